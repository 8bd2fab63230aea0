"""Families derived by hand, and the definition: rescaled along them, a network is the same."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normwise import View
from normwise.balancing import balance, equalize
from normwise.invariance import Report, Slices, Symmetry, Term, analyze


def families(report):
    """The symmetries of two terms or more, as the report prints them.

    Without how many units showed no gradient, which is up to the batch and the weights.
    """
    return {str(replace(s, unseen=0)) for s in report.symmetries if not s.is_view}


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def multilayer():
    """ReLU lets scale pass: row and bias against the next column. The last bias stands alone."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    return (
        net,
        torch.randn(60, 6),
        {
            "0.weight rows, 0.bias ↔ 2.weight columns: 8 units",
            "2.weight rows, 2.bias ↔ 4.weight columns: 7 units",
        },
    )


def convolutional():
    """A channel's 16 positions after flattening are 16 columns; BN makes rows invariant."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(80, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )
    return (
        net,
        torch.randn(30, 3, 8, 8),
        {
            "0.weight rows, 0.bias ↔ 2.weight columns: 6 units",
            "3.weight, 3.bias ↔ 7.weight columns, in runs of 16: 5 units",
            "7.weight rows, 7.bias ↔ 9.weight columns: 10 units",
        },
    )


def grouped():
    """With 2 groups of 4 outputs, input channel j is one index of 4 kernels; depthwise, one row."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return (
        net,
        torch.randn(20, 3, 10, 10),
        {
            "0.weight rows, 0.bias ↔ "
            "2.weight slices along dimensions 0 and 1, 4 at a time 4 apart: 8 units",
            "2.weight rows, 2.bias ↔ 4.weight rows: 8 units",
            "4.weight rows, 4.bias ↔ 6.weight columns: 8 units",
            "6.weight rows, in runs of 2, 6.bias entries, in runs of 2: 2 units",
        },
    )


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, between two that no scale passes."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 8), linear(6, 3), linear(3, 8)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def low_rank():
    return Adapted(), torch.randn(20, 6), {"down.weight rows ↔ up.weight columns: 3 units"}


class Recurrent(nn.Module):
    """Two LSTM layers with a projection: what a cell passes is bounded, its projection is free."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.lstm = nn.LSTM(6, 8, 2, proj_size=4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, ids):
        return self.out(self.lstm(self.embed(ids))[0])


def recurrent():
    ids = torch.arange(27).view(3, 9) * 5 % 9
    return (
        Recurrent(),
        ids,
        {
            "embed.weight columns ↔ lstm.weight_ih_l0 columns: 6 units",
            "lstm.weight_hh_l0 columns, lstm.weight_ih_l1 columns ↔ "
            "lstm.weight_hr_l0 rows: 4 units",
            "lstm.weight_hh_l1 columns, out.weight columns ↔ lstm.weight_hr_l1 rows: 4 units",
        },
    )


class Gated(nn.Module):
    """relu(gate) · up is homogeneous in both: two trades tell the third."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = linear(6, 8), linear(6, 8), linear(8, 3)

    def forward(self, x):
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def gated():
    return (
        Gated(),
        torch.randn(60, 6),
        {
            "gate.weight rows ↔ up.weight rows: 8 units",
            "up.weight rows ↔ down.weight columns: 8 units",
        },
    )


class Experts(nn.Module):
    """Four experts in two stacks, weighed by a router: scale is traded expert by expert."""

    def __init__(self, count=4, width=5):
        super().__init__()
        self.norm = nn.RMSNorm(6)
        self.router = linear(6, count)
        self.up = nn.Parameter(torch.randn(count, width, 6))
        self.down = nn.Parameter(torch.randn(count, 3, width))

    def forward(self, x):
        x = self.norm(x)
        shares = self.router(x).softmax(1)
        hidden = torch.relu(torch.einsum("bi,ehi->beh", x, self.up)).square()
        y = torch.einsum("beh,eoh->beo", hidden, self.down)
        return torch.einsum("beo,be->bo", y, shares)


def experts():
    return (
        Experts(),
        torch.randn(60, 6),
        {
            "up slices along dimensions 0 and 1 ↔ "
            "down slices along dimensions 0 and 2 ^2: 20 units",
            "norm.weight ↔ router.weight columns, up slices along dimension 2: 6 units",
        },
    )


class Grid(nn.Module):
    """Stacks of two leading dimensions."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 3, 5, 6))
        self.down = nn.Parameter(torch.randn(2, 3, 4, 5))

    def forward(self, x):
        hidden = torch.relu(torch.einsum("bi,lehi->bleh", x, self.up))
        return torch.tanh(torch.einsum("bleh,leoh->bleo", hidden, self.down))


def grid():
    return (
        Grid(),
        torch.randn(60, 6),
        {
            "up slices along dimensions 0, 1 and 2 ↔ down slices along dimensions 0, 1 and 3: "
            "30 units"
        },
    )


class Tied(nn.Module):
    """One table looked up and read out: a norm between makes its gain give back what it takes."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(9, 6), linear(6, 6), nn.RMSNorm(6)

    def forward(self, ids):
        x = self.embed(ids)
        return self.norm(x + self.mix(x)) @ self.embed.weight.T


def tied():
    ids = torch.arange(27).view(3, 9) * 5 % 9
    return Tied(), ids, {"embed.weight ↔ norm.weight"}


class Shuffled(nn.Module):
    """Channels shuffled between two layers: the units of one are the other's in another order."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), linear(12, 3)

    def forward(self, x):
        y = torch.relu(self.a(x)).unflatten(1, (3, 4)).transpose(1, 2).flatten(1)
        return torch.tanh(self.b(y))


def shuffled():
    return (
        Shuffled(),
        torch.randn(60, 5),
        {
            "a.weight rows in another order, a.bias entries in another order ↔ b.weight columns: "
            "12 units"
        },
    )


NETWORKS = [
    multilayer,
    convolutional,
    grouped,
    low_rank,
    recurrent,
    gated,
    experts,
    grid,
    tied,
    shuffled,
]


def without_epsilons(model):
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-30
    return model.double()


def difference(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("build", NETWORKS)
def test_families_follow_from_the_structure_and_keep_the_function(build):
    """Found: those derived by hand. Drawn at random from them: the same outputs, to 1e-9.

    A rescaling that is not in their span, here of every parameter by a factor of its own, is not.
    """
    torch.manual_seed(0)
    model, x, expected = build()
    model = without_epsilons(model)
    for p in model.parameters():  # biases and gains that start at 0 or 1 hide what they do
        p.data.add_(0.1 * torch.randn_like(p))
    report = analyze(model, x)
    assert families(report) == expected
    x = x.double() if x.is_floating_point() else x
    before = model(x).detach()
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = report.rescale_(seed=3)
    assert difference(model(x), before) < 1e-9
    for name, factor in factors.items():
        assert difference(model.get_parameter(name), old[name] * factor) < 1e-12
        assert difference(model.get_parameter(name), old[name]) > 0.01
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.mul_(1.1 + 0.1 * k)
    assert difference(model(x), before) > 1e-4


@pytest.mark.parametrize("choose", [balance, equalize])
@pytest.mark.parametrize("build", NETWORKS)
def test_least_mass_and_equal_ranges_keep_the_function(build, choose):
    torch.manual_seed(0)
    model, x, _ = build()
    model = without_epsilons(model)
    x = x.double() if x.is_floating_point() else x
    report = analyze(model, x)
    before = model(x).detach()
    report.rescale_(model, seed=4)
    done = choose(model, report)
    assert done.factors
    assert difference(model(x), before) < 1e-9


def test_units_without_a_gradient_are_counted_and_taken_for_the_others():
    """A ReLU unit that no sample opens shows nothing; that it is one of the family is said."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    net[0].bias.data[2] = -100.0
    (family,) = analyze(net, torch.randn(60, 6)).symmetries
    assert (family.units, family.unseen) == (8, 1)
    assert "8 units, 1 of them without a gradient at this batch" in str(family)


def test_what_holds_in_one_linear_piece_alone_is_refused():
    """Within (−1, 1) hardtanh is linear: a small change of scale passes there, a large does not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Hardtanh(), nn.Linear(8, 3, bias=False))
    x = torch.randn(60, 6)
    x *= 0.5 / net[0](x).abs().max()
    report = analyze(net, x)
    assert not report.symmetries
    assert "but not for large" in report.notes[0]


def test_heads_are_blocks_of_units_that_mix():
    """Values and output of one head can be mixed by any matrix: 3 heads of 4 are told apart."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in "qkvo")

        def forward(self, x):
            q, k, v = (m(x).unflatten(-1, (3, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v)
            return torch.tanh(self.o(y.transpose(1, 2).flatten(2)))

    report = analyze(Attention(), torch.randn(2, 7, 12))
    assert families(report) == {
        "q.weight rows, q.bias ↔ k.weight rows: 12 units",
        "v.weight rows, v.bias ↔ o.weight columns: 12 units",
    }
    assert {name: report[f"{name}.weight"].role.heads for name in "qkvo"} == dict.fromkeys(
        "qkvo", 3
    )
    # Without attention between, all units mix, and with an activation none do: no heads.
    plain = analyze(nn.Sequential(linear(5, 6), linear(6, 4), nn.Tanh()), torch.randn(9, 5))
    assert plain["0.weight"].role.heads is None
    curved = analyze(
        nn.Sequential(linear(5, 6), nn.ReLU(), linear(6, 4), nn.Tanh()), torch.randn(60, 5)
    )
    assert curved["0.weight"].role.heads is None


def test_roles_are_told_from_what_the_network_does():
    torch.manual_seed(0)
    report = analyze(Experts(), torch.randn(60, 6))
    assert {row.name: row.role.kind for row in report} == {
        "norm.weight": "gain",
        "router.weight": "router",
        "up": "hidden",
        "down": "readout",
    }
    assert "stack of 4 matrices" in report["router.weight"].role.evidence
    model, ids, _ = recurrent()
    assert analyze(model, ids)["embed.weight"].role.kind == "embedding"


class Block(nn.Module):
    """Attention with normalized queries and keys, and a squared ReLU, as nanochat has them."""

    def __init__(self, width, heads, gated):
        super().__init__()
        self.heads, self.gated = heads, gated
        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
        self.up, self.down = linear(width, 2 * width), linear(2 * width, width)
        if gated:
            self.gate = linear(width, 2 * width)
            self.n1, self.n2 = nn.RMSNorm(width), nn.RMSNorm(width)
        else:
            self.n1 = self.n2 = lambda x: F.rms_norm(x, (width,))

    def forward(self, x):
        y, size = self.n1(x), (x.shape[-1] // self.heads,)
        q, k, v = (
            m(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(F.rms_norm(q, size), F.rms_norm(k, size), v)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.n2(x)
        hidden = self.up(y) * F.silu(self.gate(y)) if self.gated else self.up(y).relu().square()
        return x + self.down(hidden)


class Language(nn.Module):
    def __init__(self, width=16, heads=4, gated=False):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width, heads, gated) for _ in range(2))
        self.norm = nn.RMSNorm(width, elementwise_affine=gated)
        self.head = linear(width, 20)
        self.first_norm = not gated

    def forward(self, ids):
        x = self.embed(ids)
        if self.first_norm:
            x = F.rms_norm(x, x.shape[-1:])
        for block in self.blocks:
            x = block(x)
        y = self.head(self.norm(x))
        return y if not self.first_norm else 15 * torch.tanh(y / 15)


IDS = torch.arange(32).view(2, 16) * 7 % 20


def test_the_ledger_of_a_network_without_gains_loses_five_norms():
    """14 matrices. Free: embedding, q and k by head; v against o and up² against down, once each.

    Lost: the product of each of these pairs in both blocks, and the head's norm.
    """
    freedom = analyze(Language(), IDS).freedom()
    assert len(freedom.fixed) == 14
    assert freedom.lost == 5
    products = [loss.powers for loss in freedom.losses]
    for block in ("blocks.0", "blocks.1"):
        assert {f"{block}.v.weight": 1, f"{block}.o.weight": 1} in products
        assert {f"{block}.up.weight": 2, f"{block}.down.weight": 1} in products
    assert {"head.weight": 1} in products
    assert freedom.verdicts["head.weight"] == "fix with a gain"
    assert freedom.verdicts["blocks.0.q.weight"] == "fix"
    assert "5 scale degrees of freedom lost" in str(freedom)


def test_the_ledger_of_a_network_with_gains_loses_one_norm_a_block():
    """16 matrices: the gains before each block and the head give back all but the gate's scale."""
    report = analyze(Language(gated=True), IDS)
    freedom = report.freedom()
    assert len(freedom.fixed) == 16
    assert freedom.lost == 2
    for loss, block in zip(freedom.losses, ("blocks.0", "blocks.1"), strict=True):
        assert f"{block}.gate.weight" in loss.powers
    without = [name for name in freedom.fixed if not name.endswith("gate.weight")]
    assert report.freedom(without).lost == 0
    assert report.freedom(without).verdicts["blocks.0.gate.weight"] == "leave"


def test_fixing_the_rows_of_invariant_weights_costs_nothing():
    model, x, _ = convolutional()
    report = analyze(model, x)
    assert report.freedom({"2.weight": View.channel()}).lost == 0
    assert report.freedom({"2.weight": "layer"}).lost == 0
    assert report.freedom({"0.weight": "channel"}).lost == 0  # each against a column of the next
    assert report.freedom({"0.weight": "channel", "2.weight": "channel"}).lost == 0
    assert report.freedom({"9.weight": "layer"}).lost == 0
    both = report.freedom({"7.weight": "layer", "9.weight": "layer"})
    assert both.lost == 0  # the gains before 7 take up what it gives
    with pytest.raises(KeyError, match="no parameter 'x'"):
        report.freedom(["x"])
    with pytest.raises(ValueError, match="does not fit"):
        report.freedom({"9.weight": "blocks(7)"})


def test_a_family_of_a_small_network_serves_the_large_one():
    """From heads of 4 to heads of 8, the units of grouped queries and the runs grow with them."""

    class Grouped(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.size = size
            self.q, self.o = linear(6, 4 * size), linear(4 * size, 6)
            self.k, self.v = linear(6, 2 * size), linear(6, 2 * size)

        def forward(self, x):
            q, k, v = (
                m(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
                for m in (self.q, self.k, self.v)
            )
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return torch.tanh(self.o(y.transpose(1, 2).flatten(2)))

    torch.manual_seed(0)
    x, large = torch.randn(2, 5, 6), Grouped(8)
    report = analyze(large, x, factory=lambda: Grouped(4))
    assert families(report) == {
        "q.weight rows, 2 at a time 8 apart ↔ k.weight rows: 16 units",
        "v.weight rows ↔ o.weight columns, 2 at a time 8 apart: 16 units",
    }
    large, x = large.double(), x.double()
    before = large(x)
    report.rescale_()
    assert difference(large(x), before) < 1e-9


def test_a_stack_too_large_to_search_index_by_index_is_searched_in_two_matrices():
    """8 experts of 2,100 units; what two of them show is confirmed by rescaling all."""
    torch.manual_seed(0)
    report = analyze(Experts(8, 2100), torch.randn(60, 6))
    assert {replace(s, unseen=0).units for s in report.symmetries} == {16_800, 6}
    assert "up slices along dimensions 0 and 1 ↔ down slices along dimensions 0 and 2 ^2" in str(
        report.symmetries[0]
    )


def test_symmetries_are_read_back_from_json():
    model, x, _ = grouped()
    report = analyze(model, x)
    again = Report.from_json(report.to_json())
    assert again.symmetries == report.symmetries
    assert again.rows == report.rows or str(again) == str(report)
    assert str(again.freedom()) == str(report.freedom())


@pytest.mark.parametrize(
    ("slices", "shape", "units", "words"),
    [
        (Slices.whole((3, 4)), (3, 4), [list(range(3))], ""),
        (Slices.each((0,), 3), (3, 4), [[0], [1], [2]], "rows"),
        (Slices.runs((1,), 2, 2), (3, 4), [[0, 1], [2, 3]], "columns, in runs of 2"),
        (Slices.each((0,), 2, 1), (3, 4), [[1], [2]], "rows 1–2"),
        (
            Slices((0,), 1, ((2, 3), (2, 1))),
            (6, 2),
            [[1], [2], [4], [5]],
            "rows 1–2 of every 3",
        ),
        (
            Slices((0,), 0, ((2, 4), (2, 1)), ((2, 2),)),
            (8, 2),
            [[0, 2], [1, 3], [4, 6], [5, 7]],
            "rows, 2 at a time 2 apart",
        ),
    ],
)
def test_slices(slices, shape, units, words):
    """Indices, sums and factors of units agree with one another, and fit finds them again."""
    assert slices.indices().tolist() == units
    assert slices.words(shape) == words
    assert (slices.count, slices.per_unit) == (len(units), len(units[0]))
    w = torch.arange(float(torch.Size(shape).numel())).view(shape) + 1
    values = torch.rand(len(units)) + 1
    scaled = w * slices.spread(values, shape)
    torch.testing.assert_close(slices.sum(scaled), slices.sum(w) * values)
    assert (scaled != w).sum() == sum(map(len, units)) * w.numel() // shape[slices.dims[0]]
    assert Slices.fitted(slices.dims, slices.indices()) == slices


def test_slices_that_are_a_view_say_so():
    shape = (8, 6)
    for view in (View.channel(), View.channel(1), View.blocks(2), View.blocks(3, 1), View.layer()):
        slices = Slices.of_view(view, shape)
        assert slices.view(shape) == view
        w = torch.randn(shape)
        sums = view.slices(w).flatten(1).sum(1)
        torch.testing.assert_close(slices.sum(w), sums)
    assert Slices.each((0,), 4).view(shape) is None
    assert Slices.fitted((0,), torch.tensor([[0], [1], [3]])) is None


def test_two_terms_of_one_parameter_multiply_its_factors():
    first = Term("w", (4,), Slices.each((0,), 2), 1.0)
    second = Term("w", (4,), Slices.each((0,), 2, 2), -1.0)
    symmetry = Symmetry((first, second), 2)
    factors = symmetry.factors(torch.tensor([2.0, 4.0]))
    assert factors["w"].tolist() == [2.0, 4.0, 0.5, 0.25]
    assert symmetry.parameters == ("w",)
    assert str(symmetry) == "w entries 0–1 ↔ w entries 2–3: 2 units"
