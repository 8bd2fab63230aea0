"""The fused step against the single-tensor step in float64, and what else it promises."""

import copy
import logging
import math
import pickle
import subprocess
import sys
from dataclasses import dataclass

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optimizer_table import MAKERS

import normwise
from normwise import View
from normwise.geometry import computing_dtype
from normwise.optim import kernels

DELTA = 0.3
# The official guards act on norms, ‖w‖ against 1e-8: here they must not hide what is tested.
EPS = 1e-8
VIEWS = ["auto", "channel", "layer", "blocks(2)", "channel(1)", None]


@dataclass
class Drawn:
    """One weight: its shape, how it lies in memory, its dtype, and its norms."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    weight_scale: float
    grad_scale: float
    seed: int
    device: str = "cpu"

    def weight(self):
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        w = self.lay_out((values * self.weight_scale).to(self.dtype))
        return w.requires_grad_()

    def lay_out(self, t):
        t = t.to(self.device)
        if self.layout == "channels_last" and t.ndim == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if self.layout == "transposed" and t.ndim > 1:
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "strided" and t.ndim > 0:
            return torch.stack([t, t], -1)[..., 0]
        return t

    def gradient(self, w, kind, step):
        """A gradient that leaves no doubt about the gate: orthogonal to all slices of the weight,
        to the weight but not its slices, or to neither."""
        generator = torch.Generator().manual_seed(self.seed + 1 + step)
        g = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if w.ndim > 1 and w.numel() > 0:
            whole = w.detach().double().cpu()
            rows, weights = g.flatten(1), unit_rows(whole.flatten(1))
            rows = unit_rows(rows - weights * (weights * rows).sum(1, keepdim=True))
            share = torch.zeros(len(rows), 1, dtype=torch.float64)
            if kind == "shut":
                share[:] = 1.0
            elif kind == "layer" and len(rows) > 1:
                norms = whole.flatten(1).norm(dim=1)
                norms = norms / norms.max().clamp_min(1e-300)
                share[0], share[1] = norms[1], -norms[0]
            g = (rows + share * weights).reshape(self.shape)
        return self.lay_out((g * self.grad_scale).to(self.dtype))


def unit_rows(rows):
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(1e-300)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)


# Slices of so many entries are more than one program or thread takes at a time.
LONG = {"numba": 33_000, "triton": 1_100, "torch": 5_000, "cuda": 17_000}
WIDEST = {"numba": (70, 400), "triton": (12, 70), "torch": (70, 400), "cuda": (70, 400)}


def shapes(compiler):
    rows, columns = WIDEST[compiler]
    fixed = [
        (),
        (0,),
        (0, 3),
        (3, 0),
        (1,),
        (1, 1),
        (7,),
        (2, LONG[compiler]),
        (2, LONG[compiler] + 1, 1),
    ]
    return st.one_of(
        st.sampled_from(fixed),
        st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
        st.tuples(st.integers(1, rows), st.integers(1, columns)),
        st.tuples(
            st.integers(1, 12), st.integers(1, columns // 5), st.sampled_from([1, 3]), st.just(3)
        ),
    )


@st.composite
def drawn(draw, compiler, dtypes):
    exponent = st.integers(-30, 30)
    return Drawn(
        shape=draw(shapes(compiler)),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "transposed", "strided"])),
        dtype=draw(st.sampled_from(dtypes)),
        weight_scale=10.0 ** draw(st.one_of(st.just(0), exponent)),
        # The square of a gradient is a state of Adam, and must be a float32.
        grad_scale=10.0 ** draw(st.integers(-12, 12)),
        seed=draw(st.integers(0, 2**20)),
        device="cuda" if compiler == "cuda" else "cpu",
    )


OPTIONS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["adamp", "sgdp"]),
        "view": st.sampled_from(VIEWS),
        "norm": st.sampled_from(["free", "fixed"]),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
        "momentum": st.booleans(),
        "tensor": st.booleans(),
    }
)


def made(params, name, view, norm, nesterov, maximize, momentum, tensor, **how):
    options = {"view": view, "nesterov": nesterov, "maximize": maximize, "eps": EPS, **how}
    if isinstance(View.parse(view) if view not in ("auto", None) else view, View):
        options["norm"] = norm
    if view == "auto":
        options["delta"] = DELTA
    if name == "sgdp" and not momentum:
        options.update(momentum=0.0, dampening=0.5, nesterov=False)
    if tensor:
        float64 = torch.float64  # float32 would round the decay, and not where a number does
        lr, weight_decay = torch.tensor(1e-2, dtype=float64), torch.tensor(0.1, dtype=float64)
        options.update(lr=lr, weight_decay=weight_decay)
    return MAKERS[name](params, **options)


def fits(d, view):
    if len(d.shape) < 2 or view in ("auto", None):
        return True
    try:
        View.parse(view).check(d.shape)
    except ValueError:
        return False
    return True


def amplitude(state, grad, w, step_size):
    """What rounding errors of a step are relative to, entry by entry: |w| + σ(ũ + |w|·‖ũ‖/‖w‖).

    ũ is the direction without cancellation, made of |m| + |g|. The last term is the error of the
    radial part, whose coefficient ⟨w, u⟩/‖w‖² is a sum, for the worst of the views tested.
    """
    g = grad.double().abs()
    if "exp_avg" in state:
        v = 0.999 * state["exp_avg_sq"].double() + 0.001 * g * g
        corrected = v / (1 - 0.999 ** (state["step"].item() + 1))
        u = (state["exp_avg"].double().abs() + g) / (corrected.sqrt() + EPS)
    else:
        u = state.get("momentum_buffer", torch.zeros_like(g)).double().abs() + g
    size = w.abs()
    radial = torch.zeros_like(size)
    for view in ("channel", "channel(1)", "layer", "blocks(2)"):
        view = View.parse(view)
        if w.ndim > 1 and w.numel() > 0 and (view.kind != "blocks" or w.shape[0] % 2 == 0):
            norms = normwise.geometry.slice_norms
            slices = view.slices(size)
            ratio = norms(view.slices(u)) / norms(slices).clamp_min(1e-300)
            worst = view.slices(radial)
            worst.copy_(torch.maximum(worst, slices * ratio))
    return size + step_size * (u + radial)


# In units of half the spacing of float32, or of 1e-12 in all for float64. The formula has a dozen
# operations; its sums have up to 64 terms a lane before float64 takes over.
BOUND = 64
SPACING = {torch.float32: 2.0**-24, torch.float64: 1e-12 / BOUND}
# Half of the spacing in which a weight is stored.
STORED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = 1e-37  # below it float32 has fewer digits


def check_steps(weights, kinds, options):
    """Each step starts both optimizers from one state, so that one step's rounding is seen."""
    params = [d.weight() for d in weights]
    fused = made(params, **options, fused=True)
    for step, kind in enumerate(kinds):
        old = [p.detach().clone().double() for p in params]
        exact = [w.clone().requires_grad_() for w in old]
        reference = made(exact, **options, foreach=False)
        states = []
        for d, p, r in zip(weights, params, exact, strict=True):
            p.grad = d.gradient(p, kind, step)
            r.grad = p.grad.double()
            state = fused.state[p] or fused._init_state(p.detach(), fused.param_groups[0])
            states.append({k: v.clone() for k, v in state.items()})
            reference.state[r] = {
                k: v.clone() if k == "step" else v.clone().double() for k, v in state.items()
            }
        fused.step()
        reference.step()
        for d, p, r, w, state in zip(weights, params, exact, old, states, strict=True):
            spacing = BOUND * SPACING[computing_dtype(d.dtype)]
            t = state["step"].item() + 1 if "step" in state else math.inf
            allowed = spacing * amplitude(state, p.grad, w, 1e-2 / (1 - 0.9**t)) + SMALLEST
            if d.dtype in STORED:
                allowed += STORED[d.dtype] * r.detach().abs() + 2.0**-25
            difference = (p.detach().double() - r.detach()).abs()
            assert (difference <= allowed).all(), (d, step, (difference / allowed).max())
            for key, value in reference.state[r].items():
                ours = fused.state[p][key].double()
                g = p.grad.double().abs()
                scale = state[key].double().abs() + (g * g if key == "exp_avg_sq" else g)
                allowed = spacing * scale + SMALLEST if key != "step" else 0
                assert ((ours - value).abs() <= allowed).all(), (d, step, key)


def check_examples(count, compiler, dtypes, seed=0):
    """:func:`check_steps` for ``count`` sets of weights and options, others with each ``seed``."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=seed == 0,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        weights=st.lists(
            drawn(compiler, dtypes), min_size=1, max_size=2 if compiler == "triton" else 4
        ),
        kinds=st.lists(st.sampled_from(["channel", "layer", "shut"]), min_size=1, max_size=4),
        options=OPTIONS,
    )
    def check(weights, kinds, options):
        weights = [d for d in weights if fits(d, options["view"])]
        for d in weights:
            if computing_dtype(d.dtype) != d.dtype:
                # Its own rounding would decide the gate at other scales.
                d.weight_scale = d.grad_scale = 1.0
        if weights:
            check_steps(weights, kinds, options)

    check()


# Interpreted kernels take a tenth of a second a step: a few sets for every day, many at leisure.
some = pytest.mark.parametrize(
    ("compiler", "count"),
    [
        ("numba", 170),
        ("torch", 30),
        ("triton", 4),
        pytest.param("torch", 400, marks=pytest.mark.slow),
        pytest.param("triton", 100, marks=pytest.mark.slow),
    ],
    indirect=["compiler"],
)


@some
def test_in_float32_a_step_is_the_reference_to_rounding(compiler, count):
    check_examples(count, compiler, [torch.float32])


@some
def test_in_float64_a_step_is_the_reference_to_1e_12(compiler, count):
    check_examples(count, compiler, [torch.float64])


@some
def test_mixed_dtypes_and_half_precision(compiler, count):
    half = [torch.bfloat16, torch.float16] if compiler == "triton" else [torch.bfloat16]
    check_examples(count, compiler, [torch.float32, torch.float64, *half])


def parameters(compiler="numba", dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(5,), (6, 4), (4, 3, 3, 3), (2, LONG[compiler])]
    if compiler != "triton":
        shapes.append((40, 300))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(params, optimizer, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def assert_close(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_run_may_change_between_fused_and_not(name, first, compiler):
    straight = parameters(compiler, torch.float64)
    expected = run(straight, MAKERS[name](straight, foreach=False), 10)
    params = parameters(compiler, torch.float64)
    one = MAKERS[name](params, fused=first)
    run(params, one, 5)
    other = MAKERS[name](params, fused=not first)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.param_groups[0]["fused"] is not first
    assert_close(run(params, other, 5, 5), expected)


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_sgdw(variant, nesterov, tensor_lr, compiler):
    ends = []
    for how in ({"fused": True}, {"foreach": False}):
        lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
        params = parameters(compiler, torch.float64)
        optimizer = MAKERS["sgdw"](params, lr=lr, variant=variant, nesterov=nesterov, **how)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(5):
            run(params, optimizer, 1, step)
            schedule.step()
        ends.append([p.detach() for p in params])
    assert_close(*ends)


@pytest.mark.parametrize("view", ["auto", "channel", "layer"])
@pytest.mark.parametrize("name", ["adamp", "sgdp"])
def test_the_number_of_threads_changes_no_bit(name, view, numba):
    before = torch.get_num_threads()
    ends = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = parameters()
            ends.append(run(params, MAKERS[name](params, view=view, fused=True), 6))
    finally:
        torch.set_num_threads(before)
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


@pytest.mark.parametrize("view", ["auto", "channel", None])
@pytest.mark.parametrize("name", ["adamp", "sgdp"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_ends_up_where_it_does_in_the_reference(name, view, value, compiler):
    ends = []
    for how in ({"fused": True}, {"foreach": False}):
        params = parameters(compiler)
        optimizer = MAKERS[name](params, view=view, **how)
        run(params, optimizer, 2)
        set_gradients(params, 2)
        for p in params:
            p.grad.view(-1)[1] = value
        optimizer.step()
        states = [t for p in params for t in optimizer.state[p].values()]
        ends.append([torch.isfinite(t.detach()) for t in [*params, *states]])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_storage_that_moves_is_followed(compiler):
    moved, still = parameters(compiler, torch.float64), parameters(compiler, torch.float64)
    ours = normwise.AdamP(moved, fused=True)
    theirs = normwise.AdamP(still, foreach=False)
    for step in range(4):
        run(moved, ours, 1, step)
        run(still, theirs, 1, step)
        for p in moved:
            p.data = p.data.clone()
            for key, value in ours.state[p].items():
                ours.state[p][key] = value.clone()
    assert_close(moved, still)


def test_a_gradient_that_lies_otherwise_only_along_a_dimension_of_one_is_taken(
    compiler, monkeypatch
):
    """As that of a 1×1 convolution often does: obeying autograd's contract of layouts."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 4, 1, 1, generator=generator, dtype=torch.float64)
    g = torch.randn(8, 4, 1, 1, generator=generator, dtype=torch.float64)
    strided = g.as_strided((8, 4, 1, 1), (4, 1, 4, 4))
    ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
    plain = normwise.AdamP([theirs], view="channel", foreach=False)
    theirs.grad = g
    plain.step()
    monkeypatch.setattr(normwise.AdamP, "_functional", None)  # no way but the kernels
    optimizer = normwise.AdamP([ours], view="channel", fused=True)
    ours.grad = strided
    optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_a_weight_that_shrinks_is_not_written_beyond_its_end(compiler):
    storage = torch.ones(8, 4)
    w = torch.nn.Parameter(storage)
    optimizer = normwise.SGDP([w], lr=0.1, fused=True)
    w.grad = torch.ones_like(w)
    optimizer.step()
    before = storage.clone()
    w.data = storage[:4]
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert not torch.equal(storage[:4], before[:4])
    assert torch.equal(storage[4:], before[4:])


def test_autograd_is_told_that_weights_changed(compiler):
    w = torch.ones(3, 2, requires_grad=True)
    loss = (w * w).sum()
    w.grad = torch.ones_like(w)
    normwise.AdamP([w], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_an_optimizer_works_on_its_own_weights(copied, compiler):
    params = parameters(compiler, torch.float64)
    optimizer = normwise.AdamP(params, fused=True)
    run(params, optimizer, 3)
    twin = copied(optimizer)
    twins = twin.param_groups[0]["params"]
    run(twins, twin, 3, 3)
    run(params, optimizer, 3, 3)
    assert_close(params, twins)


@pytest.mark.parametrize("name", MAKERS)
def test_a_scaler_leaves_its_work_to_the_step(name, compiler):
    ends = []
    for how in ({"fused": True}, {"foreach": False}):
        params = parameters(compiler)
        optimizer = MAKERS[name](params, **how)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for factor in (1.0, math.inf, 0.5):
            optimizer.zero_grad()
            loss = sum((p.sin() * factor).sum() for p in params)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 32.0
        gradients = [p.grad for p in params]
        ends.append([p.detach() for p in params] + gradients)
    assert_close(*ends, tolerance=1e-6)


def test_options_that_exclude_one_another(numba):
    w = [torch.ones(2, 2, requires_grad=True)]
    for option in ("foreach", "differentiable"):
        with pytest.raises(RuntimeError, match=f"`fused` and `{option}` cannot be `True`"):
            normwise.AdamP(w, fused=True, **{option: True})


def test_stochastic_rounding_is_refused_where_the_kernels_do_not_have_it(numba):
    with pytest.raises(RuntimeError, match="together for a parameter on cpu"):
        normwise.AdamP([torch.ones(2, 2).requires_grad_()], fused=True, stochastic_rounding=True)


def test_a_device_without_kernels_is_refused():
    with pytest.raises(RuntimeError, match=r"but one of shape \(2, 2\) is on meta"):
        normwise.SGDP([torch.ones(2, 2, device="meta", requires_grad=True)], fused=True)


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setattr(kernels, "_is_installed", lambda compiler: False)
    kernels._say_once.cache_clear()
    yield
    kernels._say_once.cache_clear()


def test_without_numba_asking_names_the_extra(without_numba):
    w = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ImportError, match=r'pip install "normwise\[cpu\]"'):
        normwise.AdamP([w], fused=True)


@pytest.mark.parametrize(("shape", "level"), [((600, 600), "INFO"), ((1100, 1100), "WARNING")])
def test_without_numba_the_default_says_once_what_it_does(shape, level, without_numba, caplog):
    params = [torch.ones(shape, requires_grad=True)]
    optimizer = normwise.AdamP(params)
    with caplog.at_level(logging.INFO, logger="normwise"):
        run(params, optimizer, 3)
    assert [r.levelname for r in caplog.records] == [level]
    assert "normwise[cpu]" in caplog.text


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("view", ["auto", "channel", None])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_numba_a_default_step_is_the_reference(name, view, nesterov, dtype, monkeypatch):
    installed = kernels._is_installed
    monkeypatch.setattr(kernels, "_is_installed", lambda c: c != "numba" and installed(c))
    options = {"nesterov": nesterov, "weight_decay": 0.1}
    if name != "sgdw":
        options["view"] = view
    ends = []
    for how in ({}, {"foreach": False}):
        params = parameters("torch", dtype)
        run(params, MAKERS[name](params, **options, **how), 4)
        ends.append([p.detach().double() for p in params])
    assert_close(*ends, tolerance=1e-12 if dtype == torch.float64 else 2e-2)


def test_an_unused_row_of_a_gradient_and_a_weight_of_zeros_are_steps_like_any(compiler):
    ends = []
    for how in ({"fused": True}, {"foreach": False}):
        params = [*parameters(compiler), torch.zeros(3, 5, requires_grad=True)]
        optimizer = normwise.AdamP(params, **how)
        for step in range(3):
            set_gradients(params, step)
            params[1].grad[2] = 0.0
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert_close(*ends, tolerance=2e-6)


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((600, 600), {}, True),
        ((6, 6), {}, False),
        ((600, 600), {"foreach": False}, False),
        ((600, 600), {"fused": False}, False),
        ((600, 600), {"differentiable": True}, False),
        ((600, 600), {"stochastic_rounding": True}, False),
        ((6, 6), {"fused": True}, True),
    ],
)
def test_the_default_is_fused_where_it_fits_and_pays(shape, options, expected, numba):
    w = torch.ones(shape, requires_grad=True)
    optimizer = normwise.AdamP([w], **options)
    assert kernels.use_fused(optimizer.param_groups[0], [w]) is expected


def test_importing_normwise_imports_no_compiler():
    code = "import sys, normwise; assert 'numba' not in sys.modules and 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_without_a_directory_to_write_to_the_kernels_are_compiled_anew(numba):
    code = """
import logging, sys
from numba.core import caching
caching.CacheImpl._locator_classes = []
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
import torch, normwise
w = torch.ones(3, 2, requires_grad=True)
w.grad = torch.ones(3, 2)
normwise.SGDP([w], lr=0.1, view="channel", fused=True).step()
assert torch.allclose(w, torch.ones(3, 2)), w
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "set NUMBA_CACHE_DIR" in done.stdout


class LibraryWithoutOpenMP:
    def __init__(self, path):
        pass

    def __getattr__(self, name):
        raise AttributeError(f"undefined symbol: {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_where_torch_has_no_openmp_to_start_numbas_threads_do_the_work(dtype, numba, monkeypatch):
    from normwise import cpu_kernels as cpu

    def step():
        params = [p.to(dtype).detach().requires_grad_() for p in parameters()]
        optimizer = normwise.AdamP(params, fused=True)
        run(params, optimizer, 3)
        plan = optimizer._plans[0]._planned[0].plan
        return params, int(plan.counter[0])

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected, _ = step()
        monkeypatch.setattr(cpu.ctypes, "CDLL", LibraryWithoutOpenMP)
        cpu.openmp.cache_clear()
        assert cpu.openmp() is None
        params, threads = step()
    finally:
        cpu.openmp.cache_clear()
        torch.set_num_threads(before)
    assert threads == 2  # so many have asked for chunks
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
