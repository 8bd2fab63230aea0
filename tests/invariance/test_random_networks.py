"""No false positive and no false negative on networks whose invariances follow by construction."""

import random

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from normwise.invariance import analyze

NETWORKS = 200


class RootMeanSquare(nn.Module):
    """An RMSNorm as language models write it by hand, over all but the first dimension."""

    def forward(self, x):
        mean = x.float().pow(2).mean(tuple(range(1, x.ndim)), keepdim=True)
        return x * torch.rsqrt(mean + 1e-6)


class Standardized(nn.Module):
    """Weight standardization with the epsilon outside the square root."""

    def forward(self, w):
        rows = w.flatten(1)
        mean, std = rows.mean(1), rows.std(1, correction=0)
        shape = (-1, *(1 for _ in w.shape[1:]))
        return (w - mean.view(shape)) / (std.view(shape) + 1e-5)


class Sum(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.a(x) + self.b(x)


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Builder:
    """Draws a network, and for each of its parameters derives the verdict."""

    # No homogeneous function: what stands before one cannot trade its scale with what follows.
    CURVED = (nn.GELU, nn.Tanh, nn.Softplus, nn.SiLU)

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.expected = {}
        self.homogeneous = False
        self.conv = self.random.random() < 0.6
        self.shape = (6, 7, 7) if self.conv else (8,)
        self.x = torch.randn(5, *self.shape, generator=torch.Generator().manual_seed(seed))

    def network(self):
        blocks = nn.Sequential()
        for i in range(self.random.randint(1, 4)):
            blocks.append(self.block(f"{i}."))
        depth = len(blocks)
        blocks.append(nn.Flatten())
        blocks.append(nn.Linear(torch.Size(self.shape).numel(), 3))
        self.expected |= {f"{depth + 1}.weight": "none", f"{depth + 1}.bias": "none"}
        return blocks

    def block(self, name):
        choose = self.random.choice
        residual = self.random.random() < 0.3
        prefix = name + ("body." if residual else "")
        before = self.shape
        channels = before[0] if residual else choose([6, 8, 12])
        bias, summed = choose([True, False]), not residual and self.random.random() < 0.2
        norm = choose(["batch", "instance", "group", "layer", "rms", "hand", "none"])
        if norm == "instance" and not self.conv:
            norm = "batch"
        weight = "plain" if summed else choose(["plain", "plain", "wn", "ws"])
        kind = choose(["conv", "grouped", "depthwise", "transposed", "grouped transposed"])
        kind = kind if self.conv else "linear"
        if weight != "plain" and "transposed" in kind:
            kind = "conv"
        if self.conv and ((residual and "transposed" in kind) or (summed and kind != "transposed")):
            kind = "conv"
        if self.homogeneous and ("grouped" in kind or kind == "depthwise"):
            # Behind a ReLU these would let the scale of each group of what comes before pass to
            # their own normalization, and make its invariance finer than its own norm's.
            kind = "conv"
        op, dim, groups = self.operation(kind, channels, bias, same_size=residual)
        channels = op(self.x[:1].new_zeros(1, *before)).shape[1]
        other = None
        if summed:
            other, _, _ = self.operation(kind, channels, bias, same_size=False)
            op = Sum(op, other)
        self.shape = tuple(op(self.x.new_zeros(1, *before)).shape[1:])
        # Two numbers less their mean, over their deviation, are ±1: nothing passes back.
        fewest = 2 if self.conv else 3
        count = choose([k for k in (2, 3, 4) if channels % k == 0 and channels // k >= fewest])
        affine = norm in ("batch", "instance", "group", "layer") and choose([True, False])
        layers = [op, *self.normalization(norm, count, affine)]
        self.homogeneous = not affine and norm != "none" and self.random.random() < 0.5
        layers.append(nn.ReLU() if self.homogeneous else choose(self.CURVED)())
        body = nn.Sequential(*layers)

        first = prefix + "0."
        sources = [first + "a.", first + "b."] if summed else [first]
        for source in sources:
            self.expected |= self.verdicts(
                source, weight, norm, bias, summed, count, dim, groups, channels
            )
        if weight == "wn":
            parametrizations.weight_norm(op)
        elif weight == "ws":
            parametrize.register_parametrization(op, "weight", Standardized())
        if affine:
            self.expected |= {prefix + "1.weight": "none", prefix + "1.bias": "none"}
        return Residual(body) if residual else body

    def operation(self, kind, channels, bias, same_size):
        """A linear operation, the dimension of its output channels, and its groups."""
        inputs = self.shape[0]
        if kind == "linear":
            return nn.Linear(inputs, channels, bias=bias), 0, 1
        padding = 1 if same_size else 0
        if self.shape[1] < 5:
            padding = 1
        if kind == "depthwise":
            multiplier = 1 if same_size else self.random.choice([1, 2])
            op = nn.Conv2d(
                inputs, inputs * multiplier, 3, padding=padding, groups=inputs, bias=bias
            )
            return op, 0, 1
        if kind == "grouped":
            channels = channels + channels % 2
            op = nn.Conv2d(inputs, channels, 3, padding=padding, groups=2, bias=bias)
            return op, 0, 1
        if kind == "transposed":
            return nn.ConvTranspose2d(inputs, channels, 2, bias=bias), 1, 1
        if kind == "grouped transposed":
            channels = channels + channels % 2
            return nn.ConvTranspose2d(inputs, channels, 2, groups=2, bias=bias), 1, 2
        return nn.Conv2d(inputs, channels, 3, padding=padding, bias=bias), 0, 1

    def normalization(self, norm, count, affine):
        channels = self.shape[0]
        if norm == "none":
            return []
        if norm == "batch":
            kind = nn.BatchNorm2d if self.conv else nn.BatchNorm1d
            return [kind(channels, affine=affine)]
        if norm == "instance":
            return [nn.InstanceNorm2d(channels, affine=affine)]
        if norm == "group":
            return [nn.GroupNorm(count, channels, affine=affine)]
        if norm == "layer":
            return [nn.LayerNorm(self.shape, elementwise_affine=affine)]
        if norm == "rms":
            return [nn.RMSNorm(self.shape, elementwise_affine=False)]
        return [RootMeanSquare()]

    @staticmethod
    def verdicts(source, weight, norm, bias, summed, count, dim, groups, channels):
        by_channel = norm in ("batch", "instance")
        # The mean that is removed takes a bias with it where it is the channel's own mean.
        bias_is_removed = by_channel
        if by_channel:
            view = "channel" if dim == 0 else "channel(1)"
            if groups > 1:
                # (in, out/groups): the groups along dimension 0, and along dimension 1 the
                # channels of all groups together; the finer one is named.
                view = "channel(1)" if channels // groups > groups else f"blocks({groups})"
        elif norm == "group" and count > 1:
            view = f"blocks({count})" if dim == 0 else f"blocks({count}, 1)"
            if groups > 1:
                # Output channels run over groups first; the norm's groups are whole ones of
                # these, or halve them.
                view = None
        elif norm == "none":
            view = "none"
        else:
            view = "layer"
        alone = view == "none" or not bias or bias_is_removed
        tensor = view if alone and not summed else "joint"
        tensor = "none" if norm == "none" else tensor
        expected = {}
        if weight == "ws":
            expected[source + "parametrizations.weight.original"] = "channel"
            tensor = "none"  # what is left beside the bias has no scale of its own
        elif weight == "wn":
            expected[source + "parametrizations.weight.original1"] = "channel"
            # One entry a channel: where each channel is normalized, its gradient is zero.
            gain = "no effect" if by_channel else tensor
            expected[source + "parametrizations.weight.original0"] = gain
        else:
            expected[source + "weight"] = tensor
        if bias:
            removed = "no effect" if bias_is_removed else None
            expected[source + "bias"] = removed or ("joint" if tensor == "joint" else "none")
        return expected


def grows_with_others(report, row):
    """Whether a weight that is traded can grow as well: what it is traded for is itself invariant.

    Of such relations the report names a basis; which one is not determined.
    """
    free = {other.name for other in report if other.kind in ("joint", "invariant")}
    for family in report.symmetries:
        sign = {term.exponent > 0 for term in family.terms if term.parameter == row.name}
        against = {t.parameter for t in family.terms if {t.exponent > 0} != sign}
        if row.kind == "balanced" and sign and against <= free:
            return True
    return False


def checked(seed):
    """Differences between what a random network is and what the analysis says of it."""
    builder = Builder(seed)
    torch.manual_seed(seed)
    network = builder.network()
    expected = builder.expected
    report = analyze(network, builder.x, seed=seed)
    found = {row.name: "joint" if grows_with_others(report, row) else row.verdict for row in report}
    assert found.keys() == expected.keys()
    return [
        f"network {seed}: {name} {tuple(network.get_parameter(name).shape)} is {expected[name]}, "
        f"found {found[name]} ({report[name].residual:.1e})\n{network}"
        for name in expected
        if expected[name] is not None and found[name] != expected[name]
    ]


@pytest.mark.parametrize("seed", [48, 53])
def test_an_invariance_that_others_make_is_not_told_twice(seed):
    """A weight before a norm is traded with another before a norm, channel by channel."""
    builder = Builder(seed)
    torch.manual_seed(seed)
    report = analyze(builder.network(), builder.x, seed=seed)
    (trade,) = (s for s in report.symmetries if not s.is_view)
    first, second = trade.parameters
    assert str(report[first].view) == "layer"
    told = {s.terms[0].parameter for s in report.symmetries if s.is_view}
    assert second in told
    assert first not in told


class Chain:
    """A random chain of linear layers, norms and activations, and the families that it has.

    A positively homogeneous activation, or none, lets the scale of a channel pass to the next
    layer's column: from a norm's gain and bias if there is one, else from the layer's row and bias.
    A curved activation stops it. What a bias adds is a constant where no activation follows, and
    the batch norm behind the next layer removes it. Before a norm over all channels the layer's
    weight and bias scale together as a whole.
    """

    def __init__(self, seed):
        choose = random.Random(seed).choice
        self.x = torch.randn(160, 6, generator=torch.Generator().manual_seed(seed))
        self.layers, self.expected, size, source = [], set(), 6, None
        straight = False
        for _ in range(choose([1, 2, 3, 4])):
            out, bias = choose([5, 7, 8, 12]), choose([True, False])
            row = self.add(nn.Linear(size, out, bias=bias))
            norm, activation = choose(["none", "none", "batch", "layer", "rms"]), choose("rrig")
            if norm == "batch" and source is not None and straight:
                source = source.partition(",")[0]
            self.trade(source, row, size)
            source = f"{row}.weight rows" + (f", {row}.bias" if bias else "")
            if norm == "batch":
                name = self.add(nn.BatchNorm1d(out))
                source = f"{name}.weight, {name}.bias"
            elif norm == "layer":
                if bias:
                    self.expected.add(f"{row}.weight, {row}.bias")
                name = self.add(nn.LayerNorm(out))
                source = f"{name}.weight, {name}.bias"
            elif norm == "rms":
                if bias:
                    self.expected.add(f"{row}.weight, {row}.bias")
                self.add(nn.RMSNorm(out, elementwise_affine=False))
                # Else a norm behind the next layer could take up the scale of each sample.
                activation = "g"
            if activation == "g":
                self.add(nn.GELU())
                source = None
            elif activation == "r":
                self.add(nn.LeakyReLU(0.3))
            if straight and activation == "i":
                self.add(nn.LeakyReLU(0.3))
                activation = "r"
            size, straight = out, activation == "i"
        row = self.add(nn.Linear(size, 3))
        self.trade(source, row, size)

    def add(self, layer):
        self.layers.append(layer)
        return len(self.layers) - 1

    def trade(self, source, row, size):
        if source is not None:
            self.expected.add(f"{source} ↔ {row}.weight columns: {size} units")


def checked_chain(seed):
    torch.manual_seed(seed)
    chain = Chain(seed)
    model = nn.Sequential(*chain.layers)
    report = analyze(model, chain.x, seed=seed)
    found = {str(symmetry) for symmetry in report.symmetries if not symmetry.is_view}
    if found == chain.expected:
        return []
    missed, false = chain.expected - found, found - chain.expected
    return [f"chain {seed}: missed {missed}, false {false}\n{model}"]


@pytest.mark.parametrize(
    ("check", "seeds"),
    [
        (checked, range(12)),
        (checked_chain, range(12)),
        pytest.param(checked, range(12, NETWORKS), marks=pytest.mark.slow),
        pytest.param(checked_chain, range(12, NETWORKS), marks=pytest.mark.slow),
    ],
)
def test_no_false_positive_and_no_false_negative(check, seeds):
    torch.set_num_threads(1)
    wrong = [text for seed in seeds for text in check(seed)]
    assert not wrong, "\n".join(wrong)
