"""A sphere whose slices lie on several ranks is the sphere of one process."""

import contextlib
import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import normwise
from normwise import LearnedNorm, RadialBrake


def sibling(name):
    """A test module beside this one, in whatever way this one was loaded."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


placements = sibling("test_placements")

STEPS = 4
VIEWS = ("channel", "channel(1)", "blocks(2)", "blocks(2, 1)", "layer")
CASES = {
    "hyperball": (lambda p: torch.optim.AdamW(p, lr=0.05), {}),
    "great circle": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        {"path": "geodesic", "radius": "unit"},
    ),
    "raw": (lambda p: torch.optim.SGD(p, lr=0.05), {"update": "raw", "floor": 0.01}),
    "brake": (
        lambda p: torch.optim.NAdam(p, lr=0.05),
        {"update": "raw", "norm": RadialBrake(0.3, 0.6)},
    ),
    # Some gradients are orthogonal to their weight: their ⟨ŵ, g⟩ is rounding, which Adam with a
    # small eps would turn into steps.
    "learned": (
        lambda p: torch.optim.Adam(p, lr=0.05),
        {"norm": LearnedNorm(lr=0.02, eps=1e-3)},
    ),
}
FEW = ("hyperball",)


def sphere_of(case, params, view):
    make, options = CASES[case]
    return normwise.sphere(make(params), view, **options)


def trajectory(case, view, known={}):  # noqa: B006 -- a cache
    """On one process: gradients of every step, the weights and the radii after the last."""
    if (case, view) not in known:
        weights = [w.requires_grad_() for w in placements.weights_of(view)]
        optimizer = sphere_of(case, weights, view)
        grads = []
        for step in range(STEPS):
            for index, w in enumerate(weights):
                w.grad = placements.gradient(w.detach(), step, index)
            grads.append([w.grad for w in weights])
            optimizer.step()
        known[case, view] = grads, weights, list(optimizer.radii.values())
    return known[case, view]


def difference_from_one_process(case, view, mesh, placed):
    """The largest difference of an entry or a radius, and the collectives of the last step."""
    grads, after, radii = trajectory(case, view)
    shards = [
        placements.distributed(w, mesh, placed).requires_grad_()
        for w in placements.weights_of(view)
    ]
    optimizer = sphere_of(case, shards, view)
    for step, gs in enumerate(grads):
        for p, g in zip(shards, gs, strict=True):
            p.grad = placements.distributed(g, mesh, placed)
        last = step == STEPS - 1
        with CommDebugMode() if last else contextlib.nullcontext() as communication:
            optimizer.step()
    pairs = [
        (placements.cut(w.detach(), mesh, p.placements), p.to_local().detach())
        for w, p in zip(after, shards, strict=True)
    ]
    pairs += zip(radii, optimizer.radii.values(), strict=True)
    worst = max(float((a - b).abs().amax()) for a, b in pairs if a.numel())
    return worst, sum(communication.get_comm_counts().values())


def differences(cases, mesh_shape, placed):
    mesh = init_device_mesh("cpu", mesh_shape)
    return {
        (case, view): difference_from_one_process(case, view, mesh, placed)
        for case in cases
        for view in VIEWS
    }


@pytest.mark.parametrize(
    "cases", [FEW, pytest.param([c for c in CASES if c not in FEW], marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [*placements.PLACEMENTS_1D, *placements.PLACEMENTS_2D])
def test_the_trajectory_is_that_of_one_process(name, cases, world4):
    """In every view, with one collective a mesh dimension at most; all ranks know all radii."""
    if name in placements.PLACEMENTS_1D:
        shape, placed, collectives = (4,), placements.PLACEMENTS_1D[name], 1
    else:
        shape, placed, collectives = (2, 2), placements.PLACEMENTS_2D[name], 2
    for of_rank in world4(differences, cases, shape, placed):
        for case, (difference, count) in of_rank.items():
            assert difference < 1e-10, case
            assert count <= collectives, case


def collectives_of_whole_rows():
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    w = placements.distributed(torch.randn(8, 5).double(), mesh, [placements.Shard(0)])
    w.requires_grad_()
    optimizer = normwise.sphere(torch.optim.SGD([w], lr=0.1), "channel")
    w.grad = placements.distributed(torch.randn(8, 5).double(), mesh, [placements.Shard(0)])
    with CommDebugMode() as communication:
        optimizer.step()
    return sum(communication.get_comm_counts().values())


def test_slices_that_lie_whole_on_a_rank_are_not_talked_about(world2):
    assert world2(collectives_of_whole_rows) == [0, 0]


RUNS = {
    "hyperball": lambda p: normwise.sphere(torch.optim.AdamW(p, lr=0.02), "layer"),
    "learned rows": lambda p: normwise.sphere(
        torch.optim.AdamW(p, lr=0.02), "channel", norm=LearnedNorm(lr=0.01)
    ),
}
SAVED_AFTER, LENGTH = 4, 8


def new(name, sharded):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 7, bias=False), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3)
    ).double()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model, RUNS[name](model.parameters())


def train(model, optimizer, steps):
    for step in steps:
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def whole(model, optimizer):
    """All weights and radii, as numbers that can be sent from rank to rank."""
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [t.tolist() for t in [*weights, *optimizer.radii.values()]]


def run_and_save(name, folder):
    """Train to the end, saving on the way; return where it ends."""
    model, optimizer = new(name, sharded=True)
    train(model, optimizer, range(SAVED_AFTER))
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    train(model, optimizer, range(SAVED_AFTER, LENGTH))
    return whole(model, optimizer)


def resume(name, folder, sharded=True, saved_to=None):
    """Load, perhaps save again, and train to the end."""
    model, optimizer = new(name, sharded)
    train(model, optimizer, [77])  # away from where it began
    states = get_state_dict(model, optimizer)
    loaded = {"model": states[0], "optimizer": states[1]}
    dcp.load(loaded, checkpoint_id=folder, no_dist=not sharded)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    if saved_to is not None:
        states = get_state_dict(model, optimizer)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=saved_to)
    train(model, optimizer, range(SAVED_AFTER, LENGTH))
    return whole(model, optimizer)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            *(torch.tensor(t, dtype=torch.float64) for t in (a, b)), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("name", RUNS)
def test_saved_on_two_ranks_it_continues_on_four_and_from_there_on_one(
    name, world2, world4, tmp_path
):
    two, four = str(tmp_path / "two"), str(tmp_path / "four")
    expected = world2(run_and_save, name, two)[0]
    for continued in world4(resume, name, two, saved_to=four):
        assert_same(continued, expected)
    assert_same(resume(name, four, sharded=False), expected)


def through_a_whole_state_dict(name):
    """Gather everything on rank 0, and send it from there to another model."""
    model, optimizer = new(name, sharded=True)
    train(model, optimizer, range(SAVED_AFTER))
    whole_states = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # A copy, because step counts are not copied off a CPU.
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=whole_states))
    train(model, optimizer, range(SAVED_AFTER, LENGTH))
    other, continued = new(name, sharded=True)
    train(other, continued, [77])
    sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, saved[0], options=sent)
    set_optimizer_state_dict(other, continued, saved[1], options=sent)
    train(other, continued, range(SAVED_AFTER, LENGTH))
    return whole(model, optimizer), whole(other, continued)


@pytest.mark.parametrize("name", RUNS)
def test_rank_0_can_save_and_send_all_of_it(name, world2):
    for expected, continued in world2(through_a_whole_state_dict, name):
        assert_same(continued, expected)
