"""AWP and RWP: what they move, by how much, and that they take it back."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normwise as nw
from normwise import View
from normwise.geometry import cosine, norms
from normwise.perturb import buffers_kept

METHODS = [nw.AWP, nw.RWP]


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def batch():
    return torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.randint(3, (6,))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, **options)


def loss_for(method, model, x, y):
    reduction = "none" if method is nw.RWP else "mean"
    return lambda: F.cross_entropy(model(x), y, reduction=reduction)


def matrices(model):
    return [p for p in model.parameters() if p.ndim > 1]


def everything(model, optimizer):
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [None if t is None else t.detach().clone() for t in (*tensors, *state)]


def same_bits(a, b):
    """Equal, with −0 and 0 told apart."""
    return all(
        (s is None and t is None) or (torch.equal(s, t) and torch.equal(s.signbit(), t.signbit()))
        for s, t in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
def test_without_a_step_everything_is_as_before_bit_for_bit(method):
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0
    x, y = batch()
    optimizer = sgd(model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = everything(model, optimizer)
    moved = []
    with method(model, optimizer).perturbed(loss_for(method, model, x, y)):
        moved = [p.detach().clone() for p in matrices(model)]
        assert same_bits(everything(model, optimizer)[-3:], before[-3:])
    assert same_bits(everything(model, optimizer), before)
    assert not any(map(torch.equal, moved, matrices(model)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["in the ascent", "inside"])
def test_an_exception_leaves_the_weights_as_they_were(method, where):
    model = network()
    x, y = batch()
    optimizer = sgd(model)
    before = everything(model, optimizer)
    calls = []

    def losses():
        calls.append(1)
        if where == "in the ascent" and len(calls) == (2 if method is nw.RWP else 1):
            raise ZeroDivisionError
        return loss_for(method, model, x, y)()

    with (
        pytest.raises(ZeroDivisionError),
        method(model, optimizer).perturbed(losses),
    ):
        raise ZeroDivisionError
    assert same_bits(everything(model, optimizer), before)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, nw.AdamP])
def test_the_step_is_that_of_the_optimizer_at_the_perturbed_weights(optimizer_class):
    """w_new = w + step(∇L(w + γv), decay at w + γv), written out by hand."""
    model = network()
    x, y = batch()
    by_hand = copy.deepcopy(model)
    optimizer = optimizer_class(model.parameters(), lr=0.05, weight_decay=0.1)
    with nw.AWP(model, optimizer, gamma=0.3).perturbed(loss_for(nw.AWP, model, x, y)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    other = optimizer_class(by_hand.parameters(), lr=0.05, weight_decay=0.1)
    with buffers_kept(by_hand):
        gradients = torch.autograd.grad(F.cross_entropy(by_hand(x), y), matrices(by_hand))
    v = [
        0.3 * w.detach().norm() / g.norm() * g
        for w, g in zip(matrices(by_hand), gradients, strict=True)
    ]
    with torch.no_grad():
        torch._foreach_add_(matrices(by_hand), v)
    other.zero_grad()
    F.cross_entropy(by_hand(x), y).backward()
    other.step()
    with torch.no_grad():
        torch._foreach_sub_(matrices(by_hand), v)
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("form", ["context", "closure"])
@pytest.mark.parametrize("method", METHODS)
def test_gamma_0_is_plain_training(method, form):
    trained = []
    for perturb in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(network(), nn.Dropout(0.5))
        optimizer = sgd(model)
        perturbation = method(model, optimizer, gamma=0)
        for _ in range(3):
            x, y = batch()

            def closure(model=model, optimizer=optimizer, x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            losses = loss_for(method, model, x, y)
            if not perturb:
                optimizer.step(closure)
            elif form == "closure":
                perturbation.step(closure, losses)
            else:
                with perturbation.perturbed(losses):
                    closure()
                    optimizer.step()
        trained.append(everything(model, optimizer))
    assert same_bits(*trained)


def test_both_forms_take_the_same_step():
    trained = []
    for form in ("context", "closure", "ascent"):
        torch.manual_seed(1)
        model = network()
        x, y = batch()
        optimizer = sgd(model)
        awp = nw.AWP(model, optimizer, gamma=0.1)

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses = loss_for(nw.AWP, model, x, y)
        if form == "context":
            with awp.perturbed(losses):
                closure()
                optimizer.step()
        else:
            loss = awp.step(closure) if form == "closure" else awp.step(closure, losses)
            assert float(loss.detach()) > 0
        trained.append(everything(model, optimizer))
    assert same_bits(trained[0], trained[1])
    assert same_bits(trained[0], trained[2])


def test_on_a_quadratic_in_one_dimension_the_step_has_a_closed_form():
    """L = ½aw²: v = sign(w)|w| = w, so w_new = w − ηa(1 + γ)w."""
    a, lr, gamma, w = 3.0, 0.05, 0.2, -1.7
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, w)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def closure():
        optimizer.zero_grad()
        loss = a / 2 * model.weight.square().sum()
        loss.backward()
        return loss

    loss = nw.AWP(model, optimizer, gamma=gamma).step(closure)
    assert float(loss.detach()) == pytest.approx(a / 2 * ((1 + gamma) * w) ** 2, rel=1e-14)
    assert float(model.weight) == pytest.approx(w - lr * a * (1 + gamma) * w, rel=1e-14)


@pytest.mark.parametrize("view", [View.layer(), View.channel()])
def test_a_scale_invariant_slice_turns_by_arctan_gamma(view):
    """v ⟂ w: the norm grows by √(1 + γ²) and the angle is arctan γ, whatever the norm."""
    gamma = 0.05
    model = network()
    x, y = batch()
    optimizer = sgd(model)
    awp = nw.AWP(model, optimizer, gamma=gamma, views=view)
    with torch.no_grad():
        model[3].weight.mul_(30)
    for norm in (model[1], model[4]):
        norm.eps = 1e-30
    before = [model[i].weight.detach().clone() for i in (0, 3)]
    with awp.perturbed(loss_for(nw.AWP, model, x, y)):
        for i, w in zip((0, 3), before, strict=True):
            moved = model[i].weight.detach()
            angle = torch.acos(cosine(w, moved, view))
            torch.testing.assert_close(angle, torch.full_like(angle, math.atan(gamma)))
            growth = norms(moved, view) / norms(w, view)
            torch.testing.assert_close(growth, torch.full_like(growth, math.hypot(1, gamma)))


def perturbation_of(awp, weight, losses):
    before = weight.detach().clone()
    with awp.perturbed(losses):
        return weight.detach() - before


def test_per_slice_it_is_equivariant_to_the_scale_of_every_row_and_per_tensor_only_to_one():
    model = network()
    x, y = batch()
    for norm in (model[1], model[4]):
        norm.eps = 1e-30
    rows = (4 * torch.rand(4, 1, 1, 1, dtype=torch.float64)).exp()
    deviation = {}
    for view in (View.channel(), View.layer()):
        for name, factor in (("rows", rows), ("one", torch.tensor(7.0, dtype=torch.float64))):
            scaled = copy.deepcopy(model)
            with torch.no_grad():
                scaled[3].weight.mul_(factor)
            v, u = (
                perturbation_of(
                    nw.AWP(m, sgd(m), gamma=0.1, views=view),
                    m[3].weight,
                    loss_for(nw.AWP, m, x, y),
                )
                for m in (model, scaled)
            )
            deviation[view.kind, name] = float((u / factor - v).norm() / v.norm())
    assert deviation["channel", "rows"] < 1e-12
    assert deviation["channel", "one"] < 1e-12
    assert deviation["layer", "one"] < 1e-12
    assert deviation["layer", "rows"] > 0.1


def test_a_report_gives_invariant_weights_their_slices_and_others_the_whole_tensor():
    model = network()
    x, y = batch()
    report = nw.analyze(model, x)
    awp = nw.AWP(model, sgd(model), gamma=0.1, views=report)
    assert awp.names == ("0.weight", "3.weight", "6.weight")
    before = [w.detach().clone() for w in matrices(model)]
    with awp.perturbed(loss_for(nw.AWP, model, x, y)):
        moved = [w.detach() - b for w, b in zip(matrices(model), before, strict=True)]
        for v, w, view in zip(
            moved, before, [View.channel(), View.channel(), View.layer()], strict=True
        ):
            torch.testing.assert_close(norms(v, view), 0.1 * norms(w, view))


@pytest.mark.parametrize("method", METHODS)
def test_batch_statistics_move_in_the_pass_of_the_step_and_not_in_the_ascent(method):
    model = network()
    x, y = batch()
    optimizer = sgd(model)
    before = model[1].running_mean.clone()
    with method(model, optimizer).perturbed(loss_for(method, model, x, y)):
        assert torch.equal(model[1].running_mean, before)
        assert int(model[1].num_batches_tracked) == 0
        model(x)
    assert int(model[1].num_batches_tracked) == 1
    assert not torch.equal(model[1].running_mean, before)


def test_buffers_kept_undoes_writes_and_puts_replaced_buffers_back():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("written", torch.zeros(2))
            self.register_buffer("replaced", torch.zeros(2))
            self.register_buffer("expanded", torch.zeros(1).expand(2))

        def forward(self):
            self.written += 1
            self.replaced = self.replaced + 1

    model = Counter()
    written, replaced = model.written, model.replaced
    with buffers_kept(model):
        model()
        assert float(model.written.sum() + model.replaced.sum()) == 4
    assert model.written is written
    assert model.replaced is replaced
    assert float(model.written.sum() + model.replaced.sum()) == 0


def test_rwp_with_no_bound_one_step_and_norms_per_tensor_is_awp():
    model = network()
    x, y = batch()
    rwp = nw.RWP(model, sgd(model), gamma=0.1, max_loss=math.inf, steps=1, views="layer")
    awp = nw.AWP(model, sgd(model), gamma=0.1)
    for w in matrices(model):
        torch.testing.assert_close(
            perturbation_of(rwp, w, loss_for(nw.RWP, model, x, y)),
            perturbation_of(awp, w, loss_for(nw.AWP, model, x, y)),
            rtol=1e-12,
            atol=1e-15,
        )


@pytest.mark.parametrize("views", [None, "channel"])
def test_rwp_below_every_loss_perturbs_nothing(views):
    model = network()
    x, y = batch()
    before = [w.detach().clone() for w in matrices(model)]
    rwp = nw.RWP(model, sgd(model), gamma=0.1, max_loss=0, views=views)
    with rwp.perturbed(loss_for(nw.RWP, model, x, y)):
        assert all(map(torch.equal, matrices(model), before))


@pytest.mark.parametrize("max_loss", [1.2, math.inf])
def test_rwp_moves_all_weights_together_by_gamma_of_their_norm(max_loss):
    model = network()
    x, y = batch()
    before = [w.detach().clone() for w in matrices(model)]
    rwp = nw.RWP(model, sgd(model), gamma=0.07, max_loss=max_loss, steps=3)
    with rwp.perturbed(loss_for(nw.RWP, model, x, y)):
        moved = torch.cat(
            [(w.detach() - b).flatten() for w, b in zip(matrices(model), before, strict=True)]
        )
    whole = torch.cat([b.flatten() for b in before]).norm()
    assert float(moved.norm()) == pytest.approx(0.07 * float(whole), rel=1e-12)


def test_rwp_on_a_linear_loss_is_the_same_whatever_the_number_of_steps():
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    once, often = (
        perturbation_of(
            nw.RWP(model, sgd(model), max_loss=math.inf, steps=k),
            model.weight,
            lambda: model(x).sum(1),
        )
        for k in (1, 7)
    )
    torch.testing.assert_close(once, often, rtol=1e-12, atol=0)


def test_rwp_accumulates_gradients_at_the_perturbed_weights():
    """D ← D + ∇S(w + γP), P = ‖w‖/‖D‖·D, written out for one weight."""
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def losses():
        return model(x).square().sum(1)

    rwp = nw.RWP(model, sgd(model), gamma=0.5, max_loss=2.0, steps=3)
    v = perturbation_of(rwp, model.weight, losses)
    w = model.weight.detach().clone()
    d, p = torch.zeros_like(w), torch.zeros_like(w)
    for _ in range(3):
        at = (w + 0.5 * p).requires_grad_()
        each = (x @ at.T).square().sum(1)
        (g,) = torch.autograd.grad(each[each < 2.0].sum() / 5, at)
        d = d + g
        p = w.norm() / d.norm() * d
    torch.testing.assert_close(v, 0.5 * p, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_perturbs_nothing_and_stays_out_of_the_weights(method):
    model = nn.Linear(3, 2).double()
    x = torch.full((4, 3), torch.inf, dtype=torch.float64)
    before = model.weight.detach().clone()
    reduce = (lambda t: t.mean(1)) if method is nw.RWP else torch.mean
    with method(model, sgd(model)).perturbed(lambda: reduce(model(x))):
        assert torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)


def test_gains_of_weight_normalization_and_shared_weights_count_as_they_should():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    nw.weight_normalize(model, only=["0"])
    model[1].weight = model[2].weight = nn.Parameter(torch.randn(3, 3))
    awp = nw.AWP(model, sgd(model))
    assert awp.names == ("0.parametrizations.weight.original1", "1.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_scale_of_the_loss_does_not_matter(dtype, scale):
    """So a gradient scaler's factor may stay in it, and half types keep their weights too."""
    model = nn.Linear(8, 4).to(dtype)
    x = torch.randn(5, 8).to(dtype)
    before = model.weight.detach().clone()
    with nw.AWP(model, sgd(model), gamma=0.1).perturbed(lambda: scale * model(x).square().mean()):
        v = (model.weight.detach() - before).float()
        torch.testing.assert_close(v.norm(), 0.1 * before.float().norm(), rtol=0.03, atol=0)
    assert torch.equal(model.weight, before)


def test_bad_input_is_told_with_the_value_and_the_remedy():
    model, other = network(), network()
    x, y = batch()
    for gamma in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"Invalid gamma: {gamma}"):
            nw.AWP(model, sgd(model), gamma=gamma)
    with pytest.raises(ValueError, match="finds no weight of two dimensions or more"):
        nw.AWP(model, sgd(other))
    with pytest.raises(ValueError, match=r"0\.weight: view blocks\(3\) does not fit"):
        nw.AWP(model, sgd(model), views="blocks(3)")
    with pytest.raises(ValueError, match="parameter 'nope' is not one of the model's"):
        nw.AWP(model, sgd(model), views={"nope": "layer"})
    with pytest.raises(ValueError, match="Invalid max_loss: -1"):
        nw.RWP(model, sgd(model), max_loss=-1)
    with pytest.raises(ValueError, match="Invalid steps: 0"):
        nw.RWP(model, sgd(model), steps=0)
    with (
        pytest.raises(ValueError, match=r"that AWP ascends is \(6,\); must be one number"),
        nw.AWP(model, sgd(model)).perturbed(loss_for(nw.RWP, model, x, y)),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"\(6, 3\); must be one number a sample.*sum over classes"),
        nw.RWP(model, sgd(model)).perturbed(lambda: model(x)),
    ):
        pass
