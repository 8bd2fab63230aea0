"""Steps along symmetries of several weights: what changes nothing in the function is removed."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import normwise
from normwise.invariance.symmetry import Slices, Symmetry, Term
from normwise.optim.gram import solve


def mlp():
    """Rows and a bias trade with the next layer's columns, twice: families share a weight."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)
    ).double()


def convolutions():
    """Rows are invariant by themselves, gains trade with the next layer's columns."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4, 3),
    ).double()


class Attention(nn.Module):
    """Queries trade with keys, values with the output, in one fused weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(6, 18, bias=False)
        self.out = nn.Linear(6, 6, bias=False)
        self.double()

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


INPUTS = {
    mlp: lambda: torch.randn(9, 5).double(),
    convolutions: lambda: torch.randn(9, 3, 6, 6).double(),
    Attention: lambda: torch.randn(2, 5, 6).double(),
}
MODELS = pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__.lower())
FACTORIES = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def analyzed(make):
    model = make()
    torch.manual_seed(1)
    x = INPUTS[make]()
    return model, x, normwise.analyze(model, x)


def backward(model, x, step=0):
    model.zero_grad()
    generator = torch.Generator().manual_seed(step)
    y = model(x)
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (y * weight + 0.1 * y.square()).mean().backward()


def generators(model, symmetries):
    """(aₛwₛ)ₛ of every unit of every family, as rows: shape ``(units, entries of the model)``."""
    params = dict(model.named_parameters())
    rows = []
    for symmetry in symmetries:
        for unit in range(symmetry.units):
            row = {name: torch.zeros_like(p) for name, p in params.items()}
            for term in symmetry.terms:
                inside = term.slices.spread(
                    torch.eye(symmetry.units, dtype=torch.float64)[unit] + 1, term.shape
                )
                w = params[term.parameter].detach()
                row[term.parameter] += term.exponent * (inside == 2) * w
            rows.append(torch.cat([t.flatten() for t in row.values()]))
    return torch.stack(rows)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def projected(displacement, basis):
    """Without its part in the span of the rows of a basis, by least squares."""
    coefficients = torch.linalg.lstsq(basis.T, displacement.unsqueeze(1), driver="gelsd").solution
    return displacement - (basis.T @ coefficients).squeeze(1)


@pytest.mark.parametrize("inner", FACTORIES)
@MODELS
def test_the_part_along_all_symmetries_together_is_removed(make, inner):
    """A step is the wrapped optimizer's, projected onto the complement of all generators."""
    model, x, report = analyzed(make)
    plain = copy.deepcopy(model)
    optimizer = normwise.tangential(FACTORIES[inner](model.parameters()), None, symmetries=report)
    wrapped = FACTORIES[inner](plain.parameters())
    for step in range(3):
        plain.load_state_dict(model.state_dict())
        before, basis = flat(model), generators(model, report.symmetries)
        for network, rule in ((model, optimizer), (plain, wrapped)):
            backward(network, x, step)
            rule.step()
        raw, ours = flat(plain) - before, flat(model) - before
        sizes = (basis * raw).abs().sum(1).clamp_min(1e-30)
        if step:
            assert ((basis @ raw).abs() / sizes).max() > 1e-3  # there was something to remove
        assert (basis @ ours).abs().max() < 1e-12
        torch.testing.assert_close(ours, projected(raw, basis), rtol=0, atol=1e-12)


@MODELS
def test_of_gradient_descent_there_is_nothing_to_remove(make):
    """Σ aₛ⟨wₛ, gₛ⟩ = 0, or batch normalization's epsilon away from it."""
    model, x, report = analyzed(make)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30
    plain = copy.deepcopy(model)
    optimizer = normwise.tangential(
        torch.optim.SGD(model.parameters(), lr=0.1), None, symmetries=report
    )
    for network, rule in ((model, optimizer), (plain, torch.optim.SGD(plain.parameters(), lr=0.1))):
        backward(network, x)
        rule.step()
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=1e-12)


@MODELS
def test_to_first_order_the_network_computes_what_it_would_have(make):
    """The outputs of the two steps differ by θ², where the weights differ by θ."""
    model, x, report = analyzed(make)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30

    def difference(lr):
        ours, plain = copy.deepcopy(model), copy.deepcopy(model)
        adam = torch.optim.Adam(ours.parameters(), lr=lr)
        params = dict(model.named_parameters())
        twin = copy.copy(report)
        named = dict(ours.named_parameters())
        object.__setattr__(twin, "_parameters", {name: named[name] for name in params})
        for network, rule in (
            (ours, normwise.tangential(adam, None, symmetries=twin)),
            (plain, torch.optim.Adam(plain.parameters(), lr=lr)),
        ):
            backward(network, x)
            rule.step()
        with torch.no_grad():
            outputs = (ours(x) - plain(x)).norm()
        return float(outputs), float((flat(ours) - flat(plain)).norm())

    (coarse, weights), (fine, half) = difference(1e-4), difference(5e-5)
    assert weights / half == pytest.approx(2, rel=0.05)
    assert coarse / fine == pytest.approx(4, rel=0.05)


def conserved(model, report):
    """Σ aₛ‖wₛ‖² of each unit, which gradient flow conserves."""
    params = dict(model.named_parameters())
    return torch.cat(
        [
            sum(
                term.exponent * term.slices.sum(params[term.parameter].detach().square())
                for term in symmetry.terms
            )
            for symmetry in report.symmetries
        ]
    )


def test_what_gradient_flow_conserves_is_kept_up_to_the_second_order():
    """Under Adam it drifts as fast as weights move; projected, by squares of steps alone."""

    def drift(lr, symmetric):
        model, x, report = analyzed(mlp)
        before = conserved(model, report)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        if symmetric:
            optimizer = normwise.tangential(optimizer, None, symmetries=report)
        for step in range(round(0.2 / lr)):
            backward(model, x, step % 3)
            optimizer.step()
        return float((conserved(model, report) - before).norm())

    assert drift(1e-3, symmetric=False) > 50 * drift(1e-3, symmetric=True)
    assert drift(2e-3, symmetric=True) / drift(1e-3, symmetric=True) == pytest.approx(2, rel=0.2)


def test_along_each_symmetry_the_change_is_exactly_the_step_squared():
    model, x, report = analyzed(mlp)
    optimizer = normwise.tangential(
        torch.optim.Adam(model.parameters(), lr=0.05), None, symmetries=report
    )
    before, old = conserved(model, report), copy.deepcopy(model)
    backward(model, x)
    optimizer.step()
    change = copy.deepcopy(model)
    for p, a, b in zip(change.parameters(), model.parameters(), old.parameters(), strict=True):
        p.data = a.data - b.data
    torch.testing.assert_close(
        conserved(model, report) - before, conserved(change, report), rtol=0, atol=1e-12
    )


@MODELS
def test_elsewhere_along_the_symmetries_it_holds_as_well(make):
    """After report.rescale_ the network computes the same, and steps are orthogonal again."""
    model, x, report = analyzed(make)
    report.rescale_(seed=3)
    optimizer = normwise.tangential(
        torch.optim.Adam(model.parameters(), lr=0.01), None, symmetries=report
    )
    before, basis = flat(model), generators(model, report.symmetries)
    backward(model, x)
    optimizer.step()
    assert (basis @ (flat(model) - before)).abs().max() < 1e-12


def test_decay_is_set_apart_and_shortens_all_weights_of_a_family():
    model, _, report = analyzed(mlp)
    adam = torch.optim.AdamW(model.named_parameters(), lr=0.1, weight_decay=0.5)
    chosen = [s for s in report.symmetries if "0.weight" in s.parameters]
    optimizer = normwise.tangential(adam, None, symmetries=chosen, wd_ratio=0.2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        ratio = 0.2 if any(name in s.parameters for s in chosen) else 1.0
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 * ratio))
    rule = optimizer.update_rule(adam.param_groups[0], model[0].weight)
    assert (rule.view, rule.shrink) == (None, pytest.approx(0.1 * 0.5 * 0.2))


def test_families_with_a_weight_that_has_no_gradient_are_left_alone():
    model, x, report = analyzed(mlp)
    plain = copy.deepcopy(model)
    optimizer = normwise.tangential(
        torch.optim.Adam(model.parameters(), lr=0.01), None, symmetries=report
    )
    for network, rule in ((model, optimizer), (plain, torch.optim.Adam(plain.parameters(), 0.01))):
        backward(network, x)
        network[0].bias.grad = None
        rule.step()
    assert torch.equal(model[0].weight, plain[0].weight)
    assert not torch.equal(model[4].weight, plain[4].weight)


def test_views_and_symmetries_go_together():
    """A view of a weight that is in a family too is one more family; of others it is a view."""
    model, x, report = analyzed(convolutions)
    trades = [s for s in report.symmetries if not s.is_view]
    whole = copy.deepcopy(model)
    named = normwise.tangential(
        torch.optim.Adam(model.named_parameters(), lr=0.01), report, symmetries=trades
    )
    all_at_once = normwise.tangential(
        torch.optim.Adam(whole.named_parameters(), lr=0.01), None, symmetries=report.symmetries
    )
    for _ in range(3):
        for network, rule in ((model, named), (whole, all_at_once)):
            backward(network, x)
            rule.step()
    torch.testing.assert_close(flat(model), flat(whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["AdamP", "SGDP"])
def test_the_papers_optimizers_take_symmetries_too(kind):
    """They are torch's, wrapped, on the weights of families."""
    model, x, report = analyzed(mlp)
    other, _, again = analyzed(mlp)
    options = {"lr": 0.02, "weight_decay": 0.1}
    if kind == "AdamP":
        ours = normwise.AdamP(model.parameters(), wd_ratio=0.3, symmetries=report, **options)
        torchs = torch.optim.AdamW(other.parameters(), **options)
    else:
        options["momentum"] = 0.9
        ours = normwise.SGDP(model.parameters(), wd_ratio=0.3, symmetries=report, **options)
        torchs = torch.optim.SGD(other.parameters(), **options)
    theirs = normwise.tangential(torchs, None, symmetries=again, wd_ratio=0.3)
    twin = copy.deepcopy(ours)
    for step in range(4):
        backward(model, x, step)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad
        ours.step()
        theirs.step()
    # The last bias is in no family: SGDP decays it decoupled, where SGD has L2.
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if any(name in s.parameters for s in report.symmetries):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert len(twin._families) == len(ours._families)
    assert twin._families[0].members[0].p is not model[0].weight
    rule = ours.update_rule(ours.param_groups[0], model[0].weight)
    assert rule.view is None
    assert rule.shrink == pytest.approx(0.02 * 0.1 * 0.3 * (10 if kind == "SGDP" else 1))


class Normalized(nn.Module):
    """A weight and its bias before a LayerNorm: invariant together."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Linear(5, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8, elementwise_affine=False, eps=0.0)
        self.double()

    def forward(self, x):
        return self.outside(self.norm(self.inside(x)))


INPUTS_OF_NORMALIZED = torch.randn(9, 5, generator=torch.Generator().manual_seed(2)).double()


def on_a_sphere(**options):
    model = Normalized()
    report = normwise.analyze(model, INPUTS_OF_NORMALIZED)
    together = [s for s in report.symmetries if s.is_scale]
    inner = torch.optim.AdamW(model.named_parameters(), lr=0.3)
    return model, normwise.sphere(inner, None, symmetries=together, **options)


def joint_vector(model):
    return torch.cat([model.inside.weight.detach().flatten(), model.inside.bias.detach()])


def test_slices_of_several_weights_that_scale_alike_turn_by_one_angle():
    model, optimizer = on_a_sphere(path="geodesic")
    (radius,) = optimizer.joint_radii
    assert float(radius) == pytest.approx(float(joint_vector(model).norm()))
    for step in range(5):
        before = joint_vector(model)
        backward(model, INPUTS_OF_NORMALIZED, step)
        optimizer.step()
        after = joint_vector(model)
        assert float(after.norm()) == pytest.approx(float(radius), rel=1e-12)
        cosine = float(before @ after / before.norm() / after.norm())
        assert cosine == pytest.approx(math.cos(0.3), abs=1e-12)


def test_a_joint_sphere_is_that_of_one_weight_that_holds_all():
    """With a column of ones in the input, weight and bias are one weight."""
    model, optimizer = on_a_sphere()
    joined = Normalized()
    joined.inside = nn.Linear(6, 8, bias=False).double()
    with torch.no_grad():
        joined.inside.weight[:, :5].copy_(model.inside.weight)
        joined.inside.weight[:, 5].copy_(model.inside.bias)
    ones = torch.cat([INPUTS_OF_NORMALIZED, torch.ones(9, 1).double()], 1)
    inner = torch.optim.AdamW(joined.parameters(), lr=0.3)
    other = normwise.sphere(inner, {joined.inside.weight: "layer"})
    for step in range(5):
        for network, rule, x in ((model, optimizer, INPUTS_OF_NORMALIZED), (joined, other, ones)):
            backward(network, x, step)
            rule.step()
    torch.testing.assert_close(model.inside.weight, joined.inside.weight[:, :5], rtol=0, atol=1e-11)
    torch.testing.assert_close(model.inside.bias, joined.inside.weight[:, 5], rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", ["fixed", normwise.LearnedNorm(0.01), normwise.RadialBrake()])
def test_joint_radii_are_saved_and_a_resumed_run_ends_in_the_same_bits(norm):
    options = {"norm": norm}
    if isinstance(norm, normwise.RadialBrake):
        options["update"] = "raw"
    model, optimizer = on_a_sphere(**options)

    def train(network, rule, steps):
        for step in steps:
            backward(network, INPUTS_OF_NORMALIZED, step)
            rule.step()
        return flat(network)

    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), model.state_dict()), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    other, again = on_a_sphere(**options)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    twin = copy.deepcopy(optimizer)
    assert torch.equal(twin.joint_radii[0], optimizer.joint_radii[0])
    straight = train(model, optimizer, range(3, 6))
    assert torch.equal(straight, train(other, again, range(3, 6)))
    assert torch.equal(optimizer.joint_radii[0], again.joint_radii[0])


def test_tangential_with_fixed_norms_keeps_joint_ones():
    model = Normalized()
    report = normwise.analyze(model, INPUTS_OF_NORMALIZED)
    together = [s for s in report.symmetries if s.is_scale]
    adam = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    optimizer = normwise.tangential(adam, None, symmetries=together, norm="fixed")
    before = joint_vector(model)
    backward(model, INPUTS_OF_NORMALIZED)
    optimizer.step()
    after = joint_vector(model)
    assert not torch.equal(before, after)
    assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-14)


def pair(name, other, exponent=-1.0, units=4):
    return Symmetry(
        (
            Term(name, (4, 4), Slices.each((0,), 4), 1.0),
            Term(other, (4, 4), Slices.each((1,), 4), exponent),
        ),
        units,
    )


@pytest.mark.parametrize(
    ("wrap", "symmetries", "message"),
    [
        (normwise.sphere, [pair("a", "b")], "cannot fix norms along a rows ↔ b columns"),
        (normwise.sphere, [pair("a", "b", 1.0), pair("b", "a", 1.0)], "two norms of the same"),
        (normwise.sphere, [pair("a", "a", 1.0)], "two norms of the same"),
        (normwise.tangential, [pair("a", "c")], "'c' of a symmetry is not one of the optimizer's"),
        (normwise.tangential, [], "no symmetry of weights that the optimizer steps"),
        (normwise.tangential, None, "tangential needs views, or symmetries="),
    ],
)
def test_what_cannot_be_done_is_a_one_line_error(wrap, symmetries, message):
    weights = [(name, nn.Parameter(torch.randn(4, 4))) for name in "ab"]
    sgd = torch.optim.SGD(weights, lr=0.1)
    with pytest.raises(ValueError, match=message):
        wrap(sgd, None, symmetries=symmetries)


def test_units_on_one_sphere_are_in_one_group():
    a, b = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    groups = [{"params": [("a", a)]}, {"params": [("b", b)]}]
    with pytest.raises(ValueError, match="in several parameter groups, but turn by one angle"):
        normwise.sphere(torch.optim.SGD(groups, lr=0.1), None, symmetries=[pair("a", "b", 1.0)])


def test_a_weight_that_is_tied_to_itself_is_projected_by_both_of_its_slices():
    """Rows against columns of the same weight: the generators are (rᵢ + cⱼ)w."""
    w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    sgd = torch.optim.SGD([("a", w)], lr=1.0)
    optimizer = normwise.tangential(sgd, None, symmetries=[pair("a", "a")])
    before = w.detach().clone()
    w.grad = torch.randn(4, 4, dtype=torch.float64)
    optimizer.step()
    eye = torch.eye(4, dtype=torch.float64)
    basis = torch.stack([((e.unsqueeze(1) - e) * before).flatten() for e in eye])
    ours = (w.detach() - before).flatten()
    torch.testing.assert_close(ours, projected(-w.grad.flatten(), basis), rtol=0, atol=1e-12)


def test_dependent_generators_leave_one_projection():
    """The sum of all rows of a weight is the weight: its layer adds nothing to its rows."""
    rows = Symmetry((Term("a", (4, 5), Slices.each((0,), 4), 1.0),), 4)
    layer = Symmetry((Term("a", (4, 5), Slices.whole((4, 5)), 1.0),), 1)
    results = []
    for symmetries in ([rows], [rows, layer]):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
        w.grad = torch.randn(4, 5, dtype=torch.float64)
        sgd = torch.optim.SGD([("a", w)], lr=1.0)
        normwise.tangential(sgd, None, symmetries=symmetries).step()
        results.append(w.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_the_system_of_equations_is_that_of_the_whole_gram_matrix():
    generator = torch.Generator().manual_seed(0)
    sizes = [5, 1, 3, 4]
    parts = [torch.randn(30, n, generator=generator, dtype=torch.float64) for n in sizes]
    # Generators of one family share nothing; the first and the last share nothing either.
    for part in parts:
        part *= (torch.arange(30) % part.shape[1]).unsqueeze(1) == torch.arange(part.shape[1])
    parts[0][15:] = 0
    parts[3][:15] = 0
    d = torch.randn(30, generator=generator, dtype=torch.float64)
    pairs = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]
    blocks = {(i, j): parts[i].T @ parts[j] for i, j in pairs}
    squares = [part.square().sum(0) for part in parts]
    x = solve(squares, [part.T @ d for part in parts], blocks, list("abcd"))
    removed = sum(part @ multiples for part, multiples in zip(parts, x, strict=True))
    torch.testing.assert_close(d - removed, projected(d, torch.cat(parts, 1).T), rtol=0, atol=1e-12)


def test_too_many_units_that_share_entries_are_a_one_line_error(monkeypatch):
    monkeypatch.setattr("normwise.optim.gram._LARGEST", 10)
    model, x, report = analyzed(mlp)
    optimizer = normwise.tangential(
        torch.optim.SGD(model.parameters(), lr=0.1), None, symmetries=report
    )
    backward(model, x)
    with pytest.raises(ValueError, match=r"units share entries with others.*leave out families"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_what_is_left_along_a_symmetry_is_rounding(dtype):
    model, _, report = analyzed(mlp)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    optimizer = normwise.tangential(adam, None, symmetries=report)
    before, basis = flat(model).double(), generators(model, report.symmetries).double()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    moved = flat(model).double() - before
    assert moved.norm() > 0.1
    spacing = torch.finfo(dtype).eps * basis.norm(dim=1) * before.norm()
    assert ((basis @ moved).abs() < spacing).all()
