"""Verdicts and words on small networks whose answers follow from the architecture by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from normwise.invariance import analyze
from normwise.invariance.euler import chance_of_error


def found(report):
    return {row.name: row.verdict for row in report}


def test_each_normalization_makes_the_slices_that_it_averages_over():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),  # 0: its bias is removed with the channel's mean
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, bias=False),  # 3
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 4, 2, bias=False),  # 6: output channels along dimension 1
        nn.InstanceNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(100, 7, bias=False),  # 10
        nn.RMSNorm(7, elementwise_affine=False),
        nn.Tanh(),
        nn.Linear(7, 5),  # 13: together with its bias
        nn.LayerNorm(5),
        nn.Tanh(),
        nn.Linear(5, 3),  # 16
    )
    report = analyze(net, torch.randn(4, 3, 8, 8))
    assert found(report) == {
        "0.weight": "channel",
        "0.bias": "no effect",
        "1.weight": "none",
        "1.bias": "none",
        "3.weight": "blocks(2)",
        "4.weight": "none",
        "4.bias": "none",
        "6.weight": "channel(1)",
        "10.weight": "layer",
        "13.weight": "joint",
        "13.bias": "joint",
        "14.weight": "none",
        "14.bias": "none",
        "16.weight": "none",
        "16.bias": "none",
    }
    assert report["0.weight"].why == "feeds `1` (BatchNorm2d)"
    assert report["0.bias"].why == "zero gradient; its change is removed by `1` (BatchNorm2d)"
    assert report["3.weight"].why == "each block of 4 rows feeds `4` (GroupNorm)"
    assert report["10.weight"].why == "feeds `11` (RMSNorm)"
    assert report["16.weight"].why == ""
    (joint,) = (symmetry for symmetry in report.symmetries if not symmetry.is_view)
    assert str(joint) == "13.weight, 13.bias"
    assert joint.why == "absorbed by `14`"
    assert all(report[name].residual < 1e-13 for name in report.views())
    assert all(row.residual > 1e-8 for row in report if row.kind in ("none", "joint"))


def test_outputs_do_not_change_when_every_invariant_slice_is_scaled():
    """The definition: f(c·w) = f(w), here in float32 and with the model's own epsilon."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.GroupNorm(4, 8)
    )
    x = torch.randn(4, 3, 8, 8)
    report = analyze(net, x)
    assert set(report.views()) == {"0.weight"}  # the bias of the other takes part
    before, weight = net(x), net[0].weight.clone()
    report.rescale_()
    assert not torch.allclose(net[0].weight, weight, rtol=1e-2)
    torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-3)


def test_zero_biases_and_gains_hide_nothing():
    """A zero bias would make its weight look invariant alone; a zero gain would hide one."""
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    behind = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)
    )
    nn.init.zeros_(net[0].bias)
    nn.init.zeros_(behind[1].weight)
    assert analyze(net, torch.randn(5, 6))["0.weight"].verdict == "joint"
    assert analyze(behind, torch.randn(5, 6))["0.weight"].verdict == "channel"


def test_rows_without_a_gradient_are_no_evidence_against_the_others():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.unused = nn.Embedding(9, 4), nn.Linear(2, 2)
            self.head = nn.Linear(4, 2)

        def forward(self, ids):
            return self.head(torch.tanh(F.layer_norm(self.embed(ids), (4,))))

    report = analyze(Net(), torch.tensor([[0, 3, 3], [8, 1, 0]]))
    assert report["embed.weight"].verdict == "channel"
    assert "5 of 9 rows have zero gradient" in report["embed.weight"].why
    assert report["unused.weight"].verdict == report["unused.bias"].verdict == "unused"


def test_a_fused_projection_is_invariant_only_in_the_rows_that_are_normalized():
    class Attention(nn.Module):
        """Two heads of 4, queries and keys normalized by head, values not."""

        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 3)
            self.norm = nn.RMSNorm(4, elementwise_affine=False)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
            return self.out(torch.tanh(y.transpose(1, 2).flatten(2)))

    report = analyze(Attention(), torch.randn(2, 5, 8))
    assert report["qkv.weight"].verdict == "balanced"
    assert "qkv.weight rows 0–15, in runs of 4: 4 units" in map(str, report.symmetries)
    assert "qkv.weight rows 16–23 ↔ out.weight columns: 8 units" not in map(str, report.symmetries)
    assert report["qkv.weight"].why == "only rows 0–15 are invariant, in blocks of 4"


def test_tied_weights_are_judged_by_all_their_uses():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6, bias=False)
            self.second = nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight
            self.norm = nn.LayerNorm(6, elementwise_affine=False)

        def forward(self, x, normalize_last):
            y = self.second(torch.tanh(self.norm(self.first(x))))
            return self.norm(y) if normalize_last else y

    net, x = Net(), torch.randn(5, 6)
    assert analyze(net, (x, False))["first.weight"].verdict == "none"
    report = analyze(net, (x, True))
    assert report["second.weight"].verdict == "layer"
    assert "tied to second.weight" in str(report)


def test_weight_normalization_and_its_words():
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 2, bias=False)
    )
    report = analyze(net, torch.randn(5, 6))
    row = report["0.parametrizations.weight.original1"]
    assert row.verdict == "channel"
    assert row.why == "normalized by its parametrization _WeightNorm"
    assert report["0.parametrizations.weight.original0"].verdict == "none"


def test_a_normalization_within_a_forward_is_named_after_its_module():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 8, bias=False)

        def forward(self, x):
            return F.layer_norm(self.linear(x), (8,))

    net = nn.Sequential(Block(), nn.Tanh(), nn.Linear(8, 2))
    why = analyze(net, torch.randn(5, 6))["0.linear.weight"].why
    assert why == "normalized within the forward of `0` (Block)"


def test_a_homogeneous_network_trades_scale_between_its_layers():
    """relu(W₁x)² W₂: W₁ enters squared, so W₂ must shrink twice as fast."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)).square())

    report = analyze(Net(), torch.randn(50, 6))
    (trade,) = report.symmetries
    assert str(trade) == "a.weight rows ↔ b.weight columns ^2: 8 units"
    assert not trade.is_scale
    assert found(report) == {"a.weight": "balanced", "b.weight": "balanced"}


def test_a_single_output_is_enough():
    """One number a forward gives one independent draw a point; more points make up for it."""
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    report = analyze(net, lambda model: model(torch.ones(4, 6).cumsum(1)).sum())
    assert [str(symmetry) for symmetry in report.symmetries] == ["0.weight, 0.bias"]


def test_without_joint_symmetries_a_weight_beside_a_bias_is_said_to_be_unexamined():
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    report = analyze(net, torch.randn(5, 6), joint=False)
    assert report.symmetries == ()
    assert {row.verdict for row in report} == {"not looked for"}
    assert "were not looked for" in report.advice(0.1, 0.1)


def test_evaluation_mode_normalizes_nothing_by_running_statistics():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    nn.init.normal_(net[1].running_mean)
    assert analyze(net.eval(), torch.randn(5, 6))["0.weight"].verdict == "channel"
    assert analyze(net, torch.randn(5, 6), mode="eval")["0.weight"].verdict != "channel"


def test_what_holds_only_for_small_changes_of_scale_is_refused():
    """x·sign-like steps: constant nearby, so that every Euler product there is zero."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8, bias=False)

        def forward(self, x):
            y = self.a(x)
            size = torch.linalg.vector_norm(y.detach())
            # The direction, times a size that jumps where the weight is scaled by much.
            return y / torch.linalg.vector_norm(y) * (1.0 + torch.floor(8 * size))

    report = analyze(Net(), torch.randn(5, 6))
    assert report["a.weight"].verdict == "none"
    assert "a.weight passed for small changes of scale, but not for large" in report.notes[0]


@pytest.mark.parametrize(("entries", "draws", "bound"), [(1, 1, 1.5e-8), (10**8, 3, 3.4e-12)])
def test_the_chance_of_error_is_tau_root_n_to_the_draws(entries, draws, bound):
    """τ = 2⁻²⁶ = 1.49e-8: (1.49e-8·√n)^draws."""
    assert chance_of_error(entries, draws) == pytest.approx(bound, rel=0.05)
