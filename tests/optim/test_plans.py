"""What a fused plan is remembered by, and what it does not hold on to."""

import errno
import gc
import logging
import weakref

import pytest
import torch
from optimizer_table import MAKERS

import normwise
from normwise.optim.kernels import KEPT_PLANS

EACH = pytest.mark.parametrize("name", MAKERS)


def square(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 6, generator=generator, dtype=torch.float64)


def pair(name, **options):
    """A fused and a plain optimizer of equal weights, after two equal steps."""
    pairs = []
    for how in ({"fused": True}, {"foreach": False}):
        params = [square(i).requires_grad_() for i in range(2)]
        pairs.append((params, MAKERS[name](params, **how, **options)))
    for seed in (10, 20):
        step(pairs, seed)
    return pairs


def step(pairs, seed=30, gradient=lambda g: g):
    for params, optimizer in pairs:
        for i, p in enumerate(params):
            p.grad = gradient(square(seed + i))
        optimizer.step()


def assert_equal(pairs):
    (ours, fused), (theirs, plain) = pairs
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        for key, value in plain.state[q].items():
            torch.testing.assert_close(fused.state[p][key], value, rtol=1e-12, atol=1e-12)


@EACH
def test_a_square_weight_that_is_transposed_in_place(name, compiler):
    pairs = pair(name)
    for params, _ in pairs:
        params[0].data = params[0].data.t()
    step(pairs)
    assert_equal(pairs)


@EACH
def test_a_moment_that_is_transposed_in_place(name, compiler):
    pairs = pair(name)
    for params, optimizer in pairs:
        state = optimizer.state[params[0]]
        key = "exp_avg" if name == "adamp" else "momentum_buffer"
        state[key] = state[key].t()
    step(pairs)
    assert_equal(pairs)


@EACH
@pytest.mark.parametrize("what", ["gradient", "weight", "moment"])
def test_the_negative_bit_is_a_sign(name, what, compiler):
    """A negative view has the address, shape and strides of what it negates."""
    pairs = pair(name)
    for params, optimizer in pairs:
        if what == "weight":
            params[0].data = torch._neg_view(params[0].data)
        elif what == "moment":
            key = "exp_avg" if name == "adamp" else "momentum_buffer"
            state = optimizer.state[params[0]]
            state[key] = torch._neg_view(state[key])
    step(pairs, gradient=torch._neg_view if what == "gradient" else lambda g: g)
    assert_equal(pairs)


@EACH
def test_a_weight_reshaped_to_the_same_strides(name, compiler):
    """(6, 1, 6) and (1, 6, 6) have equal strides and equal addresses, and other slices."""
    pairs = []
    for how in ({"fused": True}, {"foreach": False}):
        params = [square().view(6, 1, 6).requires_grad_()]
        options = {} if name == "sgdw" else {"view": "channel"}
        pairs.append((params, MAKERS[name](params, **how, **options)))
    for shape in ((6, 1, 6), (1, 6, 6)):
        for params, optimizer in pairs:
            params[0].data = params[0].data.view(shape)
            params[0].grad = square(7).view(shape)
            for key, value in optimizer.state[params[0]].items():
                if key != "step":
                    optimizer.state[params[0]][key] = value.view(shape)
            optimizer.step()
    assert_equal(pairs)


@EACH
@pytest.mark.parametrize(
    "what", ["weight", "gradient", "moment", "ZeroTensor", "piece of a buffer"]
)
def test_memory_that_is_gone_is_an_error_and_no_crash(name, what, numba):
    buffer = torch.randn(100)
    w = buffer[10:46].view(6, 6).requires_grad_()
    optimizer = MAKERS[name]([w], fused=True)
    for _ in range(2):
        w.grad = torch.ones_like(w)
        optimizer.step()
    moment = next(t for t in optimizer.state[w].values() if t.ndim == 2)
    if what == "ZeroTensor":
        w.grad = torch._efficientzerotensor(6, 6)
    elif what == "gradient":
        flat = torch.ones(100)
        w.grad = flat[40:76].view(6, 6)
        flat.untyped_storage().resize_(0)
    else:
        gone = {"weight": w, "moment": moment, "piece of a buffer": buffer}[what]
        gone.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"shape \(6, 6\) .* has no memory"):
        optimizer.step()


def test_removed_weights_are_let_go(numba):
    params = [torch.randn(8, 8, requires_grad=True) for _ in range(6)]
    optimizer = normwise.AdamP([{"params": [p]} for p in params], fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    watched = [weakref.ref(p) for p in params[1:]]
    for group in optimizer.param_groups[1:]:
        for p in group["params"]:
            del optimizer.state[p]
    del optimizer.param_groups[1:], params[1:], group, p
    gc.collect()
    assert [reference() for reference in watched] == [None] * 5
    optimizer.step()


def test_plans_of_many_sets_of_weights_are_not_all_kept(numba):
    params = [torch.randn(4, 4, requires_grad=True) for _ in range(10)]
    optimizer = normwise.AdamP(params, fused=True)
    for i in range(len(params)):
        for j, p in enumerate(params):
            p.grad = torch.ones_like(p) if j <= i else None
        optimizer.step()
    assert len(optimizer._plans[0]._known) == KEPT_PLANS


def test_groups_with_options_of_their_own_share_a_plan(compiler):
    """Views, norms, momentum, decay and learning rate each of a group's own."""
    ends = []
    for how in ({"fused": True}, {"foreach": False}):
        params = [square(i).requires_grad_() for i in range(5)] + [torch.ones(6).requires_grad_()]
        params[-1].data = params[-1].data.double()
        groups = [
            {"params": params[:1], "view": "channel", "lr": 0.3},
            {"params": params[1:2], "view": "layer", "norm": "fixed"},
            {"params": params[2:3], "view": None, "momentum": 0.0},
            {"params": params[3:4], "nesterov": True, "weight_decay": 0.7, "maximize": True},
            {"params": params[4:], "dampening": 0.5, "delta": 3.0},
        ]
        optimizer = MAKERS["sgdp"](groups, **how)
        for seed in range(4):
            for i, p in enumerate(params):
                p.grad = square(seed + 10 * i)[: p.shape[0] if p.ndim > 1 else 1].reshape(p.shape)
            optimizer.step()
        ends.append(params)
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1.0, 2e19, 1e20])
@pytest.mark.parametrize("view", ["auto", "channel", None])
@pytest.mark.parametrize("shape", [(5,), (2, 8), (6, 200)])
def test_the_second_moment_is_finite_where_torchs_is(size, view, shape, numba):
    """(1 − β2)g² is, up to g = 5.8e20; g² alone is beyond float32 from 1.8e19 on."""
    w, theirs = (torch.ones(shape, requires_grad=True) for _ in range(2))
    w.grad, theirs.grad = (torch.full(shape, size) for _ in range(2))
    ours, reference = normwise.AdamP([w], view=view, fused=True), torch.optim.AdamW([theirs])
    for _ in range(2):
        ours.step()
        reference.step()
    torch.testing.assert_close(ours.state[w]["exp_avg_sq"], reference.state[theirs]["exp_avg_sq"])
    assert torch.isfinite(w).all()


def doubled(x):
    return 2 * x


@pytest.mark.parametrize("fault", ["full disk", "truncated file", "truncated index"])
def test_a_fault_of_numbas_cache_is_a_warning(fault, numba, tmp_path, monkeypatch, caplog):
    import numba as compiler
    from numba.core import caching

    from normwise.optim.kernels import _cpu_numba

    monkeypatch.setattr(compiler.config, "CACHE_DIR", str(tmp_path))

    def compiled():
        return _cpu_numba.compile_with_cache(
            compiler.njit, compiler.float64(compiler.float64), doubled
        )

    if fault == "full disk":

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    else:
        compiled()
        for path in tmp_path.rglob("*.nbi" if "index" in fault else "*.nbc"):
            path.write_bytes(path.read_bytes()[:40])
    with caplog.at_level(logging.WARNING, logger="normwise"):
        assert compiled()(21.0) == 42.0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "set NUMBA_CACHE_DIR" in caplog.text
    if fault != "full disk":  # and the next process finds a cache in order
        caplog.clear()
        assert compiled()(21.0) == 42.0
        assert not caplog.records
