"""AdamP and SGDP against the official package, torch's optimizers, and the papers' algorithms."""

import math

import adamp as official
import pytest
import torch
from optimizer_table import CLASSES, PROJECTING

import normwise
from normwise import View

SHAPES = [(7,), (6, 4), (3, 4, 5), (4, 3, 3, 3), (2, 3, 2, 2, 2), (1, 9), (5, 1)]
STEPS = 50

BOTH = [CLASSES[name] for name in PROJECTING]


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in SHAPES]


def gradients(params, step, orthogonal):
    """Random gradients: orthogonal to each channel, to the whole weight alone, or to nothing.

    ``"mixed"`` changes from step to step, so that gates open and close.
    """
    if orthogonal == "mixed":
        orthogonal = ("channel", "layer", "nothing")[step % 3]
    generator = torch.Generator().manual_seed(1000 + step)
    grads = []
    for p in params:
        w = p.detach()
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        # A gradient orthogonal to channels of one entry is zero, which is evidence of nothing.
        if w.ndim > 1 and w[0].numel() > 1 and orthogonal == "channel":
            dims = tuple(range(1, w.ndim))
            g -= w * (g * w).sum(dims, keepdim=True) / (w * w).sum(dims, keepdim=True)
        if w.ndim > 1 and orthogonal == "layer":
            g -= w * (g * w).sum() / (w * w).sum()
        grads.append(g)
    return grads


def run(optimizer, params, orthogonal, steps=STEPS):
    for step in range(steps):
        for p, g in zip(params, gradients(params, step, orthogonal), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


def two_groups(params, **options):
    return [{"params": params[::2]}, {"params": params[1::2], **options}]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("orthogonal", ["channel", "layer", "nothing", "mixed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "wd_ratio": 0.7},
        {"delta": 0.9, "weight_decay": 0.1},
        {"eps": 1e-3, "betas": (0.8, 0.9)},
    ],
)
@pytest.mark.parametrize("nesterov", [False, True])
def test_adamp_is_the_official_adamp(options, nesterov, orthogonal, foreach):
    options = {"lr": 1e-2, "nesterov": nesterov, **options}
    ours, theirs = parameters(), parameters()
    a = normwise.AdamP(two_groups(ours, lr=3e-3, delta=0.3), foreach=foreach, **options)
    b = official.AdamP(two_groups(theirs, lr=3e-3, delta=0.3), **options)
    assert_same(run(a, ours, orthogonal), run(b, theirs, orthogonal))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("orthogonal", ["channel", "layer", "nothing", "mixed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "wd_ratio": 0.7}, {"delta": 0.9}],
)
def test_nesterov_sgdp_is_the_official_sgdp(options, orthogonal, foreach):
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": True, **options}
    ours, theirs = parameters(), parameters()
    a = normwise.SGDP(two_groups(ours, lr=3e-3, wd_ratio=0.5), foreach=foreach, **options)
    b = official.SGDP(two_groups(theirs, lr=3e-3, wd_ratio=0.5), **options)
    assert_same(run(a, ours, orthogonal), run(b, theirs, orthogonal))


def paper_projection(u, w, g, delta, eps):
    """Π of arXiv 2006.08217 (Algorithms 1 and 2), with the eps of the official code."""
    for rows in (lambda t: t.reshape(len(t), -1), lambda t: t.reshape(1, -1)):
        wr, gr, ur = rows(w), rows(g), rows(u)
        cosine = (wr * gr).sum(1) / (wr.norm(dim=1) * gr.norm(dim=1))
        if cosine.abs().max() < delta / math.sqrt(wr.shape[1]):
            hat = wr / (wr.norm(dim=1, keepdim=True) + eps)
            return (ur - hat * (hat * ur).sum(1, keepdim=True)).reshape(w.shape), True
    return u, False


class PaperSGDP:
    """Algorithm 1 of arXiv 2006.08217, one weight after the other."""

    def __init__(self, params, lr, momentum, dampening, weight_decay, delta=0.1, wd_ratio=0.1):
        self.params, self.buffers = params, [torch.zeros_like(p) for p in params]
        self.lr, self.momentum, self.dampening = lr, momentum, dampening
        self.weight_decay, self.delta, self.wd_ratio = weight_decay, delta, wd_ratio

    @torch.no_grad()
    def step(self):
        for i, w in enumerate(self.params):
            self.buffers[i] = self.momentum * self.buffers[i] + (1 - self.dampening) * w.grad
            u, projected = self.buffers[i], False
            if w.ndim > 1:
                u, projected = paper_projection(u, w, w.grad, self.delta, eps=1e-8)
            ratio = self.wd_ratio if projected else 1
            w *= 1 - self.lr * self.weight_decay * ratio / (1 - self.momentum)
            w -= self.lr * u


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("orthogonal", ["channel", "layer", "nothing", "mixed"])
@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.4)])
def test_plain_sgdp_is_the_papers_algorithm(momentum, dampening, orthogonal, foreach):
    options = {"lr": 1e-2, "momentum": momentum, "dampening": dampening, "weight_decay": 0.1}
    ours, theirs = parameters(), parameters()
    a = normwise.SGDP(ours, foreach=foreach, **options)
    assert_same(run(a, ours, orthogonal), run(PaperSGDP(theirs, **options), theirs, orthogonal))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamp_without_a_view_is_torch_adamw(weight_decay, foreach):
    ours, theirs = parameters(), parameters()
    options = {"lr": 1e-2, "weight_decay": weight_decay, "betas": (0.8, 0.95)}
    a = normwise.AdamP(ours, view=None, foreach=foreach, **options)
    b = torch.optim.AdamW(theirs, foreach=False, **options)
    assert_same(run(a, ours, "mixed"), run(b, theirs, "mixed"))


@pytest.mark.parametrize("foreach", [False, True])
def test_sgdp_without_a_view_is_sgdw(foreach):
    """SGDW of arXiv 1711.05101, θ ← θ − m − sλθ with m = μm + αg, where sλ is αλ/(1 − μ)."""
    lr, momentum, weight_decay = 1e-2, 0.9, 0.1
    ours, theirs = parameters(), parameters()
    a = normwise.SGDP(
        ours, lr=lr, momentum=momentum, weight_decay=weight_decay, view=None, foreach=foreach
    )

    buffers = [torch.zeros_like(p) for p in theirs]

    class SGDW:
        @torch.no_grad()
        def step(self):
            for i, p in enumerate(theirs):
                buffers[i] = momentum * buffers[i] + lr * p.grad
                p -= buffers[i] + lr * weight_decay / (1 - momentum) * p

    assert_same(run(a, ours, "mixed"), run(SGDW(), theirs, "mixed"))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgdp_without_decay_and_view_is_torch_sgd(nesterov):
    ours, theirs = parameters(), parameters()
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": nesterov}
    a = normwise.SGDP(ours, view=None, **options)
    b = torch.optim.SGD(theirs, **options)
    assert_same(run(a, ours, "mixed"), run(b, theirs, "mixed"))


@pytest.mark.parametrize("make", BOTH)
def test_the_momentum_buffer_is_never_projected(make):
    options = {"lr": 1e-2} if make is normwise.AdamP else {"lr": 1e-2, "momentum": 0.9}
    key = "exp_avg" if make is normwise.AdamP else "momentum_buffer"
    buffers = []
    for view in (View.channel(), None):
        w = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        optimizer = make([w], view=view, **options)
        for step in range(5):
            w.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        buffers.append(optimizer.state[w][key])
    assert torch.equal(*buffers)
