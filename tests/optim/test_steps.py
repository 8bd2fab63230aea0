"""What a step promises beside its arithmetic: no wait for the device, no recompilation …"""

import contextlib
import math

import pytest
import torch
from optimizer_table import MAKERS
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import normwise
from normwise import View
from normwise.geometry import norms
from normwise.optim.step import round_stochastically

VIEWS = ["auto", "channel", "layer", None]
PROJECTED = [(name, view) for name in ("adamp", "sgdp") for view in VIEWS]
CASES = [(name, {"view": view}) for name, view in PROJECTED] + [
    ("sgdw", {}),
    ("sgdw", {"variant": "official"}),
    ("adamp", {"view": "channel", "norm": "fixed"}),
]
# Compilation takes its time, so only what differs in the traced code.
COMPILED = [case for case in CASES if case[1].get("view", "auto") in ("auto", "channel")]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(5,), (6, 4), (6, 4), (4, 3, 3, 3)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


# Fake tensors and tensors on the meta device have a shape and a dtype, and no values: whatever
# would read one, in Python or below, raises. Meta stands in for an accelerator: the step count
# stays a real tensor on the host.
READING = (DataDependentOutputException, DynamicOutputShapeException, RuntimeError)
DEVICES = {
    "fake": lambda: (FakeTensorMode(), "cpu"),
    "meta": lambda: (contextlib.nullcontext(), "meta"),
}


def parameters_without_values(dtype, device):
    return [
        torch.empty(p.shape, dtype=dtype, device=device, requires_grad=True) for p in parameters()
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.item,
        bool,
        float,
        torch.Tensor.tolist,
        lambda t: torch.ones(2, device=t.device).add_(1, alpha=t),
    ],
)
def test_the_guard_against_reading_can_fail(read, device):
    mode, device = DEVICES[device]()
    with mode, pytest.raises(READING):
        read(torch.ones((), device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("tensor_options", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_step_reads_a_tensor_on_the_host(name, options, tensor_options, foreach, device):
    mode, device = DEVICES[device]()
    with mode:
        if tensor_options:
            options = {**options, "lr": torch.tensor(1e-2), "weight_decay": torch.tensor(0.1)}
        for dtype in (torch.float32, torch.bfloat16):
            params = parameters_without_values(dtype, device)
            optimizer = MAKERS[name](params, foreach=foreach, **options)
            for _ in range(3):
                for p in params:
                    p.grad = torch.empty_like(p)
                optimizer.step()


@pytest.mark.parametrize("device", DEVICES)
def test_tangential_reads_no_tensor_on_the_host(device):
    mode, device = DEVICES[device]()
    with mode:
        params = parameters_without_values(torch.float32, device)
        inner = torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
        optimizer = normwise.tangential(inner, "channel")
        for _ in range(3):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()


def compiled_run(name, options, foreach, backend, tensor_lr=False, steps=6):
    """Largest difference to the plain step, and how often it was compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    lr = torch.tensor(1e-2) if tensor_lr else 1e-2
    runs = []
    for _ in range(2):
        params = parameters()
        rate = lr.clone() if tensor_lr else lr
        optimizer = MAKERS[name](params, foreach=foreach, lr=rate, **options)
        # Before there is a scheduler, which puts a wrapper of its own around step().
        stepper = optimizer.step
        if not runs:
            counter = CompileCounterWithBackend(backend)
            stepper = torch.compile(stepper, fullgraph=True, backend=counter)
        runs.append((params, stepper, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)))
    counts = []
    for step in range(steps):
        for params, stepper, schedule in runs:
            set_gradients(params, step)
            stepper()
            schedule.step()
        counts.append(counter.frame_count)
    difference = max(
        (a - b).abs().max().item() for a, b in zip(runs[0][0], runs[1][0], strict=True)
    )
    return difference, counts


# A scheduler warns if it is stepped before the step that it wraps; here another one is compiled.
SCHEDULER_MISSES_THE_STEP = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


@SCHEDULER_MISSES_THE_STEP
@pytest.mark.parametrize(("foreach", "tensor_lr"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("name", "options"), COMPILED)
def test_a_step_compiles_whole_and_once_for_a_whole_schedule(name, options, foreach, tensor_lr):
    """Once to make the state and once to use it; then the learning rate changes every step."""
    difference, counts = compiled_run(name, options, foreach, "eager", tensor_lr)
    assert difference < 1e-6
    assert counts[-1] == counts[1] <= 2


# Torch's CPU code generator fails on reductions over slices (pytorch#196570): it is not shown them.
BY_INDUCTOR = [*COMPILED, ("sgdp", {"view": "channel", "norm": "fixed"})]


@pytest.mark.slow
@SCHEDULER_MISSES_THE_STEP
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("name", "options"), BY_INDUCTOR)
def test_inductor_computes_the_same(name, options, foreach):
    difference, _ = compiled_run(name, options, foreach, "inductor")
    assert difference < 1e-6


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("view", ["channel", "blocks(2)", "layer"])
@pytest.mark.parametrize("name", ["adamp", "sgdp"])
def test_fixed_norms_stay_for_a_thousand_steps(name, view, foreach):
    params = parameters()[1:]
    before = [norms(p.detach(), View.parse(view)) for p in params]
    optimizer = MAKERS[name](params, view=view, norm="fixed", foreach=foreach)
    for step in range(1000):
        set_gradients(params, step)
        optimizer.step()
    # Each step rounds the norm by about eps, with either sign: a random walk.
    drift = 4 * math.sqrt(1000) * torch.finfo(torch.float32).eps
    for p, norm in zip(params, before, strict=True):
        torch.testing.assert_close(norms(p.detach(), View.parse(view)), norm, rtol=drift, atol=0)


def test_a_fixed_norm_is_retraction_on_the_oblique_manifold():
    """w ← ‖w‖·(w + Δ)/‖w + Δ‖ with tangential Δ, written out for one row."""
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    w.grad = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    normwise.SGDP([w], lr=1.0, view=View.channel(), norm="fixed", weight_decay=0.5).step()
    tangent = torch.tensor([1.0, 0.0]) - torch.tensor([0.6, 0.8]) * 0.6
    moved = torch.tensor([3.0, 4.0]) - tangent
    expected = 5 * moved / moved.norm()
    torch.testing.assert_close(w.detach()[0].float(), expected)


@pytest.mark.parametrize("view", ["auto", None])
def test_a_fixed_norm_needs_to_know_which_norms(view):
    with pytest.raises(ValueError, match="norm='fixed' needs a view"):
        normwise.AdamP([torch.ones(2, 2, requires_grad=True)], norm="fixed", view=view)
    with pytest.raises(ValueError, match="Invalid norm: 'kept'"):
        normwise.AdamP([torch.ones(2, 2, requires_grad=True)], norm="kept")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(dtype):
    values = torch.tensor([1.0, 1.001, -3.14159, 1e-3, -6e-5, 2e-6, 3e-8, 0.0, 65000.0])
    draws = torch.stack([round_stochastically(values, dtype).float() for _ in range(20_000)])
    for x, column in zip(values, draws.T, strict=True):
        possible = column.unique()
        assert len(possible) <= 2
        assert possible.min() <= x <= possible.max()
        gap = (possible.max() - possible.min()).item()
        # The standard error of a mean of 20,000 draws from two values is at most gap/2/√20,000.
        torch.testing.assert_close(
            column.double().mean(), x.double(), rtol=1e-12, atol=5 * gap / 2 / math.sqrt(20_000)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_what_is_not_finite_and_what_is_exact(dtype):
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.5, -0.25])
    rounded = round_stochastically(values, dtype).float()
    assert torch.equal(rounded.nan_to_num(7.0), values.nan_to_num(7.0))


def test_small_steps_on_bfloat16_weights_count_only_with_stochastic_rounding():
    """1 − 1e-4 rounds to 1 in bfloat16, whose spacing below 1 is 2⁻⁸: nothing would move."""
    ends = []
    for stochastic in (False, True):
        w = torch.ones(2000, dtype=torch.bfloat16, requires_grad=True)
        optimizer = normwise.SGDP([w], lr=1e-4, stochastic_rounding=stochastic)
        for _ in range(1000):
            w.grad = torch.ones_like(w)
            optimizer.step()
        ends.append(w.detach().float().mean().item())
    assert ends[0] == 1.0
    assert abs(ends[1] - 0.9) < 0.01


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_added_or_unfrozen_later_behave_as_in_a_fresh_optimizer(name):
    early, late, frozen = (torch.ones(2, 3, requires_grad=True) for _ in range(3))
    optimizer = MAKERS[name]([early, frozen])
    for step in range(4):
        early.grad = torch.full((2, 3), 1.0 + step)
        optimizer.step()
    optimizer.add_param_group({"params": [late]})
    alone = torch.ones(2, 3, requires_grad=True)
    other = MAKERS[name]([alone])
    for step in range(4):
        for p in (late, frozen, alone):
            p.grad = torch.arange(6.0).reshape(2, 3) - step
        optimizer.step()
        other.step()
    torch.testing.assert_close(late, alone)
    torch.testing.assert_close(frozen, alone)


@pytest.mark.parametrize("name", MAKERS)
def test_an_infinite_gradient_under_a_scaler_changes_nothing(name):
    params = parameters()
    optimizer = MAKERS[name](params)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    set_gradients(params, 0)
    loss = sum((p * p.grad).sum() for p in params)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # a finite step first, so that there is state
    scaler.update()
    before = [p.detach().clone() for p in params]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    optimizer.zero_grad()
    scaler.scale(sum(p.sum() for p in params) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    for p, old, old_state in zip(params, before, state, strict=True):
        assert torch.equal(p.detach(), old)
        for key, value in old_state.items():
            assert torch.equal(optimizer.state[p][key], value)


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images / 16.0, dtype=torch.float32).unsqueeze(1)
    return x, torch.tensor(data.target)


def loss_curve(seed, precision):
    """Mean training loss of each epoch of a small convolutional network on the digits."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 9, 10),
    )
    x, y = digits()
    options = {"lr": 1e-2, "weight_decay": 1e-2}
    if precision == "bf16 weights":
        for module in model:
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.bfloat16()
        options["stochastic_rounding"] = True
    optimizer = normwise.AdamP(model.parameters(), **options)
    curve = []
    for _ in range(4):
        total = 0.0
        for batch in torch.randperm(len(x)).split(128):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
                loss = nn.functional.cross_entropy(model(x[batch]).float(), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch) / len(x)
        curve.append(total)
    return curve


def test_loss_curves_in_lower_precision_lie_within_seed_noise():
    """The mean over 4 seeds is within 3 standard errors of the difference, epoch by epoch."""
    curves = {
        precision: torch.tensor([loss_curve(seed, precision) for seed in range(4)])
        for precision in ("fp32", "bf16 autocast", "bf16 weights")
    }
    reference = curves.pop("fp32")
    assert (reference[:, -1] < 0.2 * reference[:, 0]).all()
    for curve in curves.values():
        error = (reference.var(0) / 4 + curve.var(0) / 4).sqrt()
        assert ((curve.mean(0) - reference.mean(0)).abs() < 3 * error).all()
