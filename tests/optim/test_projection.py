"""What projection does to norms and decay, and when the gate opens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizer_table import CLASSES, PROJECTING

import normwise
from normwise import View
from normwise.geometry import norms

VIEWS = {
    "channel": ((6, 4), (4, 3, 3, 3)),
    "channel(1)": ((6, 4), (4, 3, 3, 3)),
    "blocks(2)": ((6, 4), (4, 3, 3, 3)),
    "layer": ((6, 4), (2, 3, 2, 2, 2)),
}

BOTH = [CLASSES[name] for name in PROJECTING]


def optimizers(**options):
    return {
        "adamp": lambda p: normwise.AdamP(p, lr=0.1, **options),
        "sgdp": lambda p: normwise.SGDP(p, lr=0.1, momentum=0.9, **options),
        "sgdp-nesterov": lambda p: normwise.SGDP(p, lr=0.1, momentum=0.9, nesterov=True, **options),
    }


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", optimizers())
@given(data=st.data())
def test_a_projected_step_changes_the_squared_norm_by_exactly_that_of_the_step(name, foreach, data):
    """‖w + Δ‖² = ‖w‖² + ‖Δ‖² for every slice: the corollary to Lemma 2.1 of arXiv 2006.08217."""
    spelling = data.draw(st.sampled_from(sorted(VIEWS)))
    view = View.parse(spelling)
    scale = 10.0 ** data.draw(st.integers(-30, 30))
    channels_last = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weights = []
    for shape in VIEWS[spelling]:
        w = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        if channels_last and w.ndim == 4:
            w = w.contiguous(memory_format=torch.channels_last)
        weights.append(w.requires_grad_())
    optimizer = optimizers(view=view, foreach=foreach)[name](weights)
    optimizer.param_groups[0]["lr"] *= scale
    for _ in range(3):
        before = [w.detach().clone() for w in weights]
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        for w, old in zip(weights, before, strict=True):
            new = w.detach()
            expected = norms(old, view).square() + norms(new - old, view).square()
            torch.testing.assert_close(norms(new, view).square(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("name", optimizers())
def test_projection_in_float32_holds_at_every_scale(name, scale):
    """The direction of the step is the float64 one, whatever the norm of the weight."""
    steps = []
    for dtype in (torch.float32, torch.float64):
        w = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype) * scale
        w.requires_grad_()
        optimizer = optimizers(view=View.channel())[name]([w])
        optimizer.param_groups[0]["lr"] *= scale
        before = w.detach().clone()
        w.grad = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
        optimizer.step()
        steps.append((w.detach().double() - before.double()) / scale)
    torch.testing.assert_close(*steps, rtol=0, atol=2e-6)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("make", BOTH)
def test_a_zero_gradient_is_no_evidence_so_the_decay_is_full(make, foreach):
    w = torch.ones(3, 4, requires_grad=True)
    w.grad = torch.zeros(3, 4)
    make([w], lr=0.1, weight_decay=0.5, foreach=foreach).step()
    torch.testing.assert_close(w.detach(), torch.full((3, 4), 1 - 0.1 * 0.5))


@pytest.mark.parametrize("make", BOTH)
def test_a_zero_slice_is_passed_over_by_the_gate(make):
    """The other slice is orthogonal, so the gate opens: the decay is wd_ratio times smaller."""
    w = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    w.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    make([w], lr=0.1, weight_decay=0.5, wd_ratio=0.2).step()
    torch.testing.assert_close(w.detach()[:, 0], torch.full((2,), 1 - 0.1 * 0.5 * 0.2))


@pytest.mark.parametrize("make", BOTH)
def test_a_gradient_that_is_not_finite_keeps_the_gate_shut(make):
    w = torch.ones(2, 4, requires_grad=True)
    other = torch.ones(2, 4, requires_grad=True)
    w.grad, other.grad = torch.full((2, 4), torch.nan), torch.zeros(2, 4)
    make([w, other], lr=0.1, weight_decay=0.5, foreach=True).step()
    assert w.isnan().all()
    torch.testing.assert_close(other.detach(), torch.full((2, 4), 1 - 0.1 * 0.5))


def test_the_gates_threshold_is_strict():
    """cos = delta/√n exactly stays shut: here cos = 1/2 with n = 4 and delta = 1."""
    for delta, projected in ((1.0, False), (1.0 + 1e-12, True)):
        w = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
        w.grad = torch.tensor([[2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
        normwise.SGDP([w], lr=1.0, delta=delta).step()
        radial_share = (w.detach() - 1).sum().item()
        assert (abs(radial_share) < 1e-6) == projected


@pytest.mark.parametrize("view", ["auto", View.channel(), View.layer(), None])
@pytest.mark.parametrize("make", BOTH)
def test_weights_below_two_dimensions_are_never_projected(make, view):
    """Not in any view: a bias of one entry a channel would otherwise never move."""
    results = []
    for option in (view, None):
        params = [torch.ones(5, requires_grad=True), torch.ones((), requires_grad=True)]
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        make(params, lr=0.1, weight_decay=0.1, view=option).step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("view", ["auto", View.channel(), View.layer()])
@pytest.mark.parametrize("make", BOTH)
def test_empty_parameters_and_channels_last_are_stepped(make, view, foreach):
    empty = torch.empty(0, 3, requires_grad=True)
    w = torch.randn(4, 3, 3, 3)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = w.clone(memory_format=memory_format).requires_grad_()
        p.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
        empty.grad = torch.empty(0, 3)
        make([empty, p], lr=0.1, weight_decay=0.1, view=view, foreach=foreach).step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_groups_may_have_views_of_their_own():
    a, b = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    before = [t.detach().clone() for t in (a, b)]
    for t in (a, b):
        t.grad = torch.randn(4, 6)
    groups = [{"params": [a], "view": "blocks(2)"}, {"params": [b], "view": None}]
    normwise.SGDP(groups, lr=1.0).step()
    step = a.detach() - before[0]
    blocks = View.blocks(2)
    inner = (blocks.slices(step) * blocks.slices(before[0])).sum((1, 2))
    torch.testing.assert_close(inner, torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(b.detach(), before[1] - b.grad)
