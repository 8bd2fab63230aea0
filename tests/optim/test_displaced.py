"""The fused kernels of tangential() and sphere() do what the plain path does."""

import copy

import pytest
import torch
from optimizer_table import WRAPPERS

import normwise
from normwise import View
from normwise.geometry import norms, tangential
from normwise.optim import displaced, kernels

# Slices short and long, of one entry, longer than a chunk or than what one program takes, and more
# than a chunk of them. Triton's interpreter takes its time; there chunks are of 256 entries.
SHAPES = {
    "numba": [(64, 40), (8, 6, 3, 3), (2, 3, 2, 2, 2), (300, 250), (4, 20000), (1, 5), (40, 1)],
    "triton": [(12, 40), (4, 6, 3, 3), (2, 3, 2, 2, 2), (2, 300), (2, 1030), (1, 5), (8, 1)],
}
VIEWS = [View.channel(), View.channel(1), View.blocks(2), View.layer()]


def fits(view, shape):
    return view.kind == "layer" or shape[view.dim] % view.count == 0


def weights(view, dtype, memory_format=torch.contiguous_format, kernel="numba"):
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES[kernel]]
    return [
        w.to(dtype, memory_format=memory_format if w.ndim == 4 else torch.contiguous_format)
        .clone()
        .requires_grad_()
        for w in drawn
        if fits(view, w.shape)
    ]


def steps(wrapper, view, params, count=2):
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1 if "tang" in wrapper else 0.0}
    optimizer = WRAPPERS[wrapper](torch.optim.SGD(params, **options), view)
    for step in range(count):
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = torch.empty_like(p).copy_(grad)
            if step == 0:
                view.slices(p.grad)[0].zero_()  # a slice that does not move
        optimizer.step()
    return [p.detach() for p in params]


def both(monkeypatch, wrapper, view, dtype, **options):
    """The weights after steps that the kernel takes, and after plain ones."""
    taken = []
    fused = displaced.Displacements._fused
    with monkeypatch.context() as m:
        m.setattr(
            displaced.Displacements, "_fused", lambda *a: taken.append(fused(*a)) or taken[-1]
        )
        ours = steps(wrapper, view, weights(view, dtype, **options))
        assert all(len(members) == len(ours) for members in taken)
        m.setattr(displaced.Displacements, "_fused", lambda *_: [])
        return ours, steps(wrapper, view, weights(view, dtype, **options))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_in_float64_the_kernel_is_the_plain_path(monkeypatch, wrapper, view, kernel):
    if kernel == "triton" and view not in (View.channel(), View.layer()) and wrapper != "hyperball":
        pytest.skip("how slices lie and where they go have nothing to do with one another there")
    results = both(monkeypatch, wrapper, view, torch.float64, kernel=kernel)
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_in_other_dtypes_it_is_so_up_to_their_rounding(monkeypatch, wrapper, dtype, kernel):
    atol = 32 * torch.finfo(dtype).eps
    for view in (View.channel(), View.layer()) if kernel == "numba" else (View.blocks(2),):
        results = both(monkeypatch, wrapper, view, dtype, kernel=kernel)
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=atol)


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_in_channels_last_it_is_so_too(monkeypatch, view, kernel):
    options = {"memory_format": torch.channels_last, "kernel": kernel}
    results = both(monkeypatch, "hyperball", view, torch.float64, **options)
    for ours, plain in zip(*results, strict=True):
        assert ours.stride() == plain.stride()
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_threads_change_no_bit(monkeypatch, numba):
    from normwise.optim.kernels import _cpu_numba

    monkeypatch.setattr(_cpu_numba, "PARALLEL_ENTRIES", 0)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(steps("hyperball", View.layer(), weights(View.layer(), torch.float32)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_may_be_extreme(scale, kernel):
    w = (torch.randn(64, 64) * scale).requires_grad_()
    first = norms(w.detach(), View.channel())
    optimizer = normwise.sphere(torch.optim.SGD([w], lr=0.1), "channel")
    w.grad = torch.randn(64, 64) * scale
    before = w.detach().clone()
    optimizer.step()
    assert not torch.equal(w, before)
    torch.testing.assert_close(norms(w.detach(), View.channel()), first, rtol=1e-6, atol=0)


def test_a_small_step_is_not_lost_in_float32(kernel):
    """What is removed is a multiple of w near 0, not the difference of two near w."""
    w = torch.randn(64, 64).requires_grad_()
    before = w.detach().clone()
    sgd = torch.optim.SGD([w], lr=1e-3)
    optimizer = normwise.tangential(sgd, "channel")
    w.grad = torch.randn(64, 64)
    optimizer.step()
    expected = before.double() + tangential(
        (before - 1e-3 * w.grad).double() - before.double(), before.double(), View.channel()
    )
    spacing = torch.finfo(torch.float32).eps * before.abs()
    assert ((w.detach().double() - expected).abs() <= spacing).all()


def test_numbers_that_are_not_spread_no_further_than_their_slice(kernel):
    w = torch.randn(64, 64).requires_grad_()
    optimizer = normwise.sphere(torch.optim.SGD([w], lr=0.1), "channel")
    w.grad = torch.randn(64, 64)
    w.grad[3, 5] = float("nan")
    optimizer.step()
    assert w[3].isnan().all()
    assert not w[[0, 1, 2, *range(4, 64)]].isnan().any()


def test_what_the_kernel_cannot_take_goes_the_plain_way(monkeypatch, numba):
    """Rounding at random, norms that change, and weights that are not dense."""
    fused = []
    monkeypatch.setattr(displaced.Displacements, "_end_fused_", lambda *_: fused.append(1))
    dense = torch.randn(64, 64)
    for w, options in (
        (dense.bfloat16(), {"stochastic_rounding": True}),
        (dense.clone(), {"norm": normwise.LearnedNorm(0.1)}),
        (dense.clone(), {"norm": normwise.RadialBrake(), "update": "raw"}),
        (torch.randn(64, 128)[:, ::2], {}),
    ):
        w.requires_grad_()
        w.grad = torch.randn(64, 64).to(w.dtype)
        before = w.detach().clone()
        normwise.sphere(torch.optim.SGD([w], lr=0.1), "channel", **options).step()
        assert not torch.equal(w, before)
    assert fused == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_rounds_at_random_without_bias(dtype, interpreted):
    """A step of 0.3 of the spacing of numbers, along a direction that is tangential."""
    n = 1024
    w = torch.ones(2, n, dtype=dtype)
    spacing = torch.finfo(dtype).eps
    w[:, 0] = -(n - 1.0)  # so that all but the first may move alike
    p = w.clone().requires_grad_()
    p.grad = torch.full_like(p, -0.3 * spacing)
    sgd = torch.optim.SGD([p], lr=1.0)
    normwise.sphere(sgd, "channel", update="raw", stochastic_rounding=True).step()
    moved = (p.detach()[:, 1:].double() - 1) / spacing
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert abs(moved.mean().item() - 0.3) < 5 * (0.3 * 0.7 / moved.numel()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triton_reads_a_learning_rate_where_it_is(monkeypatch, dtype, interpreted):
    """Of each group its own, as a tensor or as a number."""
    results = []
    for as_tensor in (True, False):
        torch.manual_seed(0)
        params = [torch.randn(4, 40, dtype=dtype).requires_grad_() for _ in range(2)]
        rates = [0.1, 0.02]
        groups = [
            {"params": [p], "lr": torch.tensor(lr) if as_tensor else lr}
            for p, lr in zip(params, rates, strict=True)
        ]
        optimizer = normwise.sphere(torch.optim.SGD(groups, foreach=False), "channel")
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(4, 40, dtype=dtype)
            optimizer.step()
        results.append([p.detach() for p in params])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_without_a_compiler_the_plain_way_is_taken(monkeypatch):
    installed = kernels._is_installed
    monkeypatch.setattr(kernels, "_is_installed", lambda name: name != "numba" and installed(name))
    monkeypatch.setattr(displaced.Displacements, "_end_fused_", lambda *_: pytest.fail("a kernel"))
    for wrapper in ("tangential", "hyperball"):
        steps(wrapper, View.channel(), weights(View.channel(), torch.float32))


WRAP = {
    "sphere": lambda p: normwise.sphere(torch.optim.AdamW(p, lr=0.01, fused=True), "channel"),
    "tangential": lambda p: normwise.tangential(torch.optim.AdamW(p, lr=0.01), "channel"),
}


@pytest.mark.parametrize("wrap", WRAP)
def test_a_weight_keeps_its_memory_and_what_looks_into_it_sees_the_step(wrap):
    """Though the wrapped optimizer steps a buffer in its place."""
    w = torch.randn(64, 64).requires_grad_()
    alias, before = w.detach().view(-1), w.detach().clone()
    optimizer = WRAP[wrap]([w])
    where = w.data_ptr()
    for _ in range(3):
        w.grad = torch.randn(64, 64)
        optimizer.step()
        assert w.data_ptr() == where
    assert not torch.equal(w, before)
    assert torch.equal(alias.view(64, 64), w)


@pytest.mark.parametrize("wrap", WRAP)
def test_what_is_done_to_a_weight_between_steps_counts(wrap):
    """No copy from an earlier step takes its place, even if autograd was not told."""
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        w = torch.randn(64, 64).requires_grad_()
        optimizer = WRAP[wrap]([w])
        for step in range(2):
            if again and step:  # another wrapper, which knows nothing of the first step
                optimizer = copy.deepcopy(optimizer)
                (w,) = optimizer.param_groups[0]["params"]
            w.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            w.data.clamp_(-0.5, 0.5)
        results.append(w.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("wrap", WRAP)
def test_autograd_is_told_that_a_weight_has_changed(wrap):
    w = torch.randn(64, 64).requires_grad_()
    optimizer = WRAP[wrap]([w])
    loss = w.square().sum()
    w.grad = torch.randn(64, 64)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_of_the_wrapped_optimizer_see_the_weights():
    w = torch.randn(64, 64).requires_grad_()
    before, seen = w.detach().clone(), []
    adamw = torch.optim.AdamW([w], lr=0.01)
    adamw.register_step_pre_hook(lambda *_: seen.append(w.detach().clone()))
    optimizer = normwise.tangential(adamw, "channel")
    w.grad = torch.randn(64, 64)
    optimizer.step()
    assert torch.equal(seen[0], before)


def test_an_optimizer_whose_step_depends_on_the_weights_sees_them():
    """Adafactor's is as long as the weight's root mean square says."""
    w = torch.randn(64, 64).double().requires_grad_()
    plain = w.detach().clone().requires_grad_()
    before = w.detach().clone()
    w.grad = torch.randn(64, 64).double()
    plain.grad = w.grad.clone()
    normwise.tangential(torch.optim.Adafactor([w], lr=0.1), "channel").step()
    torch.optim.Adafactor([plain], lr=0.1).step()
    expected = before + tangential(plain.detach() - before, before, View.channel())
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrap", WRAP)
def test_when_the_wrapped_step_fails_the_weights_are_what_they_were(monkeypatch, wrap):
    w = torch.randn(64, 64).requires_grad_()
    before, where = w.detach().clone(), w.data_ptr()
    optimizer = WRAP[wrap]([w])
    w.grad = torch.randn(64, 64)

    def failing():
        w.data.fill_(7.0)
        raise OSError("no")

    with monkeypatch.context() as m:
        m.setattr(optimizer.optimizer, "step", lambda *_: failing())
        with pytest.raises(OSError, match="no"):
            optimizer.step()
    assert torch.equal(w, before)
    assert w.data_ptr() == where
    fresh = before.clone().requires_grad_()
    fresh.grad = w.grad.clone()
    optimizer.step()  # nothing of the step that failed is left
    WRAP[wrap]([fresh]).step()
    assert torch.equal(w, fresh)


@pytest.mark.parametrize("view", [View.channel(), View.layer()])
def test_no_norm_drifts_in_bfloat16(view, kernel):
    """Within one spacing of bfloat16 numbers of the radius that is stored."""
    shape, count = ((64, 64), 300) if kernel == "numba" else ((4, 60), 30)
    w = torch.randn(shape).bfloat16().requires_grad_()
    optimizer = normwise.sphere(torch.optim.AdamW([w], lr=0.02), view)
    radius = optimizer.radii[w].clone()
    for step in range(count):
        w.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.step()
    spacing = torch.finfo(torch.bfloat16).eps * radius.log2().floor().exp2()
    assert ((norms(w.detach(), view) - radius).abs() <= spacing).all()
    assert torch.equal(optimizer.radii[w], radius)
