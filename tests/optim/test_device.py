"""What is promised on a CUDA device, on one: `make gpu` runs these where there is one."""

import copy
import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from optimizer_table import WRAPPERS
from torch import nn
from torch.nn.functional import cross_entropy

import normwise
from normwise import View
from normwise.optim import displaced

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="the CUDA kernels are compiled by Triton")

_spec = importlib.util.spec_from_file_location(
    "fused_steps", Path(__file__).with_name("test_fused.py")
)
fused_steps = importlib.util.module_from_spec(_spec)
sys.modules["fused_steps"] = fused_steps  # dataclasses look for the module of their class
_spec.loader.exec_module(fused_steps)

MAKERS = {
    "AdamP": lambda p, **o: normwise.AdamP(p, **{"lr": 1e-2, "weight_decay": 0.1, **o}),
    "SGDP": lambda p, **o: normwise.SGDP(
        p, **{"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, **o}
    ),
    "SGDW": lambda p, **o: normwise.SGDW(
        p, **{"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, **o}
    ),
}
SHAPES = [(5,), (40, 17), (64, 64, 3, 3), (3, 20_000), (1000, 256)]
CASES = [
    ("AdamP", {"view": "auto"}),
    ("AdamP", {"view": "channel"}),
    ("AdamP", {"view": "channel(1)"}),
    ("AdamP", {"view": "layer", "norm": "fixed"}),
    ("AdamP", {"view": None}),
    ("SGDP", {"view": "auto", "nesterov": True}),
    ("SGDP", {"view": "channel", "norm": "fixed"}),
    ("SGDW", {}),
]


def weights(dtype=torch.float32, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES)
    return [w.to(device, dtype).requires_grad_() for w in made]


def set_gradients(params, step):
    """Orthogonal to the channels of every other weight, so that gates open and shut."""
    generator = torch.Generator().manual_seed(step + 1)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        if i % 2 and p.ndim > 1:
            g = normwise.geometry.tangential(g, p.detach().double(), View.channel())
        p.grad = g.to(p.dtype)


@contextmanager
def no_waiting():
    """An error for whatever makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_against_waiting_can_fail():
    x = torch.ones((), device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.item()


@pytest.mark.parametrize("seed", range(1, 13))
@pytest.mark.parametrize(
    "dtypes",
    [[torch.float32], [torch.float64], [torch.float32, torch.bfloat16, torch.float16]],
    ids=["float32", "float64", "mixed"],
)
def test_a_step_is_the_reference_to_rounding(dtypes, seed):
    fused_steps.check_examples(8, "cuda", dtypes, seed)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
@pytest.mark.parametrize(
    ("dtype", "tensor_lr"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["float32", "float32, tensor lr", "bfloat16, tensor lr"],
)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_step_waits_for_the_device(name, options, dtype, tensor_lr, how):
    params = weights(dtype)
    lr = torch.tensor(1e-2, device="cuda") if tensor_lr else 1e-2
    optimizer = MAKERS[name](params, lr=lr, **options, **how)
    for step in range(3):
        set_gradients(params, step)
        torch.cuda.synchronize()
        if step == 0:  # compiles, and makes its plan
            optimizer.step()
            continue
        with no_waiting():
            optimizer.step()


def wrapped(name, view, params, **options):
    """Around torch's fused AdamW in float16, in which the other's ε of 1e-8 is 0."""
    if params[0].dtype == torch.float16:
        options = {"fused": True, **options}
    options = {"lr": 1e-2, "weight_decay": 0.1 if "tangential" in name else 0.0, **options}
    return WRAPPERS[name](torch.optim.AdamW(params, **options), view)


@contextmanager
def by_the_kernels():
    """An error for weights that the kernels around another optimizer leave to the plain way."""
    find, taken = displaced.Displacements._fused, []
    displaced.Displacements._fused = lambda self, items, known: (
        taken.append(len(members := find(self, items, known)) == len(items)) or members
    )
    try:
        yield
    finally:
        displaced.Displacements._fused = find
    assert taken
    assert all(taken)


@pytest.mark.parametrize("view", ["channel", "channel(1)", "layer"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_step_is_the_plain_way_in_float64(name, view):
    """On the device by the kernels, on the host without."""
    ours = weights(torch.float64)
    theirs = [p.detach().cpu().requires_grad_() for p in ours]
    optimizer, plain = (wrapped(name, view, params) for params in (ours, theirs))
    for step in range(3):
        set_gradients(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.cpu()
        with by_the_kernels():
            optimizer.step()
        with pytest.MonkeyPatch.context() as m:
            m.setattr(displaced.Displacements, "_fused", lambda *_: [])
            plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=0, atol=1e-11)


@pytest.mark.parametrize("view", ["channel", "channel(1)", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_step_is_so_up_to_the_rounding_of_a_dtype(name, dtype, view):
    """What the wrapped optimizer did is the same on both ways, which start from one state."""
    ours = weights(dtype)
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer, plain = (wrapped(name, view, params) for params in (ours, theirs))
    for step in range(2):
        for params in (ours, theirs):
            set_gradients(params, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        with by_the_kernels():
            optimizer.step()
        with pytest.MonkeyPatch.context() as m:
            m.setattr(displaced.Displacements, "_fused", lambda *_: [])
            plain.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)
            p.data.copy_(q)


@pytest.mark.parametrize("view", ["channel", "layer"])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["tangential", "hyperball", "great circle"])
def test_no_wrapped_step_waits_for_the_device(name, tensor_lr, view):
    params = weights()
    options = {"lr": torch.tensor(1e-2, device="cuda")} if tensor_lr else {}
    optimizer = wrapped(name, view, params, fused=True, **options)
    for step in range(3):
        set_gradients(params, step)
        torch.cuda.synchronize()
        if step == 0:  # compiles, and makes its plan
            optimizer.step()
            continue
        with no_waiting():
            optimizer.step()


def replay(captured, ours, plain, theirs, lr):
    """The same steps, of one optimizer out of a graph, under a learning rate that changes."""
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(1, 6):
        lr.fill_(1e-2 / step)
        if isinstance(own := plain.param_groups[0]["lr"], torch.Tensor):
            own.fill_(1e-2 / step)
        else:
            plain.param_groups[0]["lr"] = 1e-2 / step
        held = [p.grad for p in ours]
        set_gradients(theirs, step)
        for grad, q in zip(held, theirs, strict=True):
            grad.copy_(q.grad)
        graph.replay()
        plain.step()


@pytest.mark.parametrize("name", ["tangential", "hyperball", "great circle", "raw"])
def test_a_replayed_graph_takes_wrapped_steps(name):
    """With a learning rate on the device that changes between replays.

    Both AdamWs are capturable, which correct their bias in float32.
    """
    ours, theirs = weights(torch.float64), weights(torch.float64)
    lr = torch.tensor(1e-2, device="cuda", dtype=torch.float64)
    captured = wrapped(name, "channel", ours, lr=lr, capturable=True)
    plain = wrapped(name, "channel", theirs, lr=lr.clone(), capturable=True)
    replay(captured, ours, plain, theirs, lr)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", [View.channel(), View.layer()])
def test_no_norm_drifts_on_the_device(view, dtype, stochastic_rounding):
    """Within one spacing of numbers of the stored radius, after 500 steps."""
    w = torch.randn(64, 5000, device="cuda").to(dtype).requires_grad_()
    optimizer = normwise.sphere(
        torch.optim.AdamW([w], lr=0.02, weight_decay=0.0, fused=True),
        view,
        stochastic_rounding=stochastic_rounding,
    )
    radius = optimizer.radii[w].clone()
    for step in range(500):
        generator = torch.Generator("cuda").manual_seed(step)
        w.grad = torch.randn(w.shape, device="cuda", generator=generator).to(dtype)
        optimizer.step()
    spacing = torch.finfo(dtype).eps * radius.log2().floor().exp2()
    assert ((normwise.geometry.norms(w.detach(), view) - radius).abs() <= spacing).all()
    assert torch.equal(optimizer.radii[w], radius)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_replayed_graph_takes_the_steps_of_the_plain_optimizer(name, options):
    """With a learning rate on the device that changes between replays."""
    ours, theirs = weights(torch.float64), weights(torch.float64)
    lr = torch.tensor(1e-2, device="cuda", dtype=torch.float64)
    capturable = {} if name == "SGDW" or name == "SGDP" else {"capturable": True}
    captured = MAKERS[name](ours, lr=lr, fused=True, **capturable, **options)
    plain = MAKERS[name](theirs, lr=1e-2, foreach=False, **options)
    replay(captured, ours, plain, theirs, lr)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 10),
    ).cuda()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 3, 8, 8, generator=generator)
    return x.cuda(), torch.randint(10, (32,), generator=generator).cuda()


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_a_grad_scaler_trains_as_with_the_plain_step(name):
    """float16 autocast; the scale is so large that the first steps overflow and are skipped."""
    results = []
    for how in ({"fused": True}, {"foreach": False}):
        model = network()
        options = {"capturable": True} if name == "AdamP" else {}
        optimizer = MAKERS[name](model.parameters(), lr=1e-3, **options, **how)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
        taken = 0
        for step in range(30):
            x, y = batch(step)
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            torch.cuda.synchronize()
            if how == {"fused": True} and step > 0:
                with no_waiting():
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
            scaler.update()
            taken += scaler.get_scale() >= scale
        assert 5 < taken < 30
        results.append([p.detach() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(dtype):
    n = 1_000_000
    above = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(2.0, dtype=dtype))
    spacing = above.double().item() - 1
    p = torch.ones(n, dtype=dtype, device="cuda", requires_grad=True)
    p.grad = torch.full_like(p, -1.0)
    optimizer = normwise.SGDP([p], lr=0.3 * spacing, fused=True, stochastic_rounding=True)
    optimizer.step()
    moved = (p.detach().double() - 1) / spacing
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert abs(moved.mean().item() - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_a_checkpoint_goes_on_on_the_other_device(name):
    for first, then in (("cuda", "cpu"), ("cpu", "cuda")):
        params = weights(torch.float64, first)
        optimizer = MAKERS[name](params, fused=False)
        set_gradients(params, 0)
        optimizer.step()
        moved = [p.detach().to(then).requires_grad_() for p in params]
        other = MAKERS[name](moved)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for owner, tensors in ((optimizer, params), (other, moved)):
            set_gradients(tensors, 1)
            owner.step()
        for p, q in zip(params, moved, strict=True):
            torch.testing.assert_close(p.cpu(), q.cpu(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("view", ["auto", "channel"])
def test_a_compiled_step_is_the_plain_one(view):
    ours, theirs = weights(torch.float64), weights(torch.float64)
    compiled = MAKERS["AdamP"](ours, view=view, capturable=True)
    plain = MAKERS["AdamP"](theirs, view=view, foreach=False)
    step_ = torch.compile(compiled.step, fullgraph=True)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        step_()
        plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_analysis_finds_on_the_device_what_it_finds_on_the_host():
    model = network()
    on_host = normwise.analyze(copy.deepcopy(model).cpu(), batch(0)[0].cpu())
    on_device = normwise.analyze(model, batch(0)[0])
    verdicts = [[(r.name, r.verdict) for r in report] for report in (on_host, on_device)]
    assert verdicts[0] == verdicts[1]


def test_a_monitor_measures_on_the_device_what_it_measures_on_the_host():
    histories = []
    for device in ("cuda", "cpu"):
        model = network().double().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with normwise.Monitor(model, optimizer, {"0.weight": "channel"}, every=2) as monitor:
            for step in range(6):
                x, y = (t.to(device) for t in batch(step))
                optimizer.zero_grad()
                cross_entropy(model(x.double()), y).backward()
                optimizer.step()
        histories.append([m.values.cpu() for m in monitor.history])
    assert len(histories[0]) == len(histories[1]) > 0
    for ours, theirs in zip(*histories, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", ["weight_standardize", "weight_normalize"])
def test_normalized_weights_are_the_hosts(kind):
    outputs = []
    for device in ("cuda", "cpu"):
        model = network().double()
        getattr(normwise, kind)(model)
        model = model.to(device)
        out = model(batch(0)[0].double().to(device))
        out.square().mean().backward()
        outputs += [[out.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
@pytest.mark.parametrize("view", ["auto", "channel", "layer"])
def test_on_nccl_shards_step_as_whole_weights_do(name, view):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    results = []
    for sharded in (True, False):
        model = network().double()
        if sharded:
            fully_shard(model)
        optimizer = MAKERS[name](model.parameters(), view=view)
        for step in range(4):
            x, y = batch(step)
            optimizer.zero_grad()
            cross_entropy(model(x.double()), y).backward()
            optimizer.step()
        results.append([getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
