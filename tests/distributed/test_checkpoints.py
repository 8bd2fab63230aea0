"""Checkpoints: saved on some ranks, loaded on others; a rank that dies leaves the last one good."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import normwise

STEPS, SAVED_AFTER = 10, 5
OPTIMIZERS = {
    "AdamP": lambda p: normwise.AdamP(p, lr=0.01, weight_decay=0.1),
    "SGDP fixed": lambda p: normwise.SGDP(p, lr=0.1, momentum=0.9, view="layer", norm="fixed"),
    "SGDW": lambda p: normwise.SGDW(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "tangential": lambda p: normwise.tangential(torch.optim.AdamW(p, lr=0.01), "layer"),
}


def new(name, sharded):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 7, bias=False), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3)
    ).double()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model, OPTIMIZERS[name](model.parameters())


def train(model, optimizer, steps):
    for step in steps:
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def whole(model):
    """All weights, as numbers that can be sent from rank to rank."""
    return [(p.full_tensor() if isinstance(p, DTensor) else p).tolist() for p in model.parameters()]


def run_and_save(name, folder):
    """Train to the end, saving on the way; return where it ends."""
    model, optimizer = new(name, sharded=True)
    train(model, optimizer, range(SAVED_AFTER))
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    train(model, optimizer, range(SAVED_AFTER, STEPS))
    return whole(model)


def load(name, folder, sharded):
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
    return model, optimizer


def resume(name, folder, sharded=True):
    model, optimizer = load(name, folder, sharded)
    train(model, optimizer, range(SAVED_AFTER, STEPS))
    return whole(model)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            *(torch.tensor(t, dtype=torch.float64) for t in (a, b)), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_on_two_ranks_it_continues_on_four_and_on_one(name, world2, world4, tmp_path):
    expected = world2(run_and_save, name, str(tmp_path))[0]
    for continued in world4(resume, name, str(tmp_path)):
        assert_same(continued, expected)
    assert_same(resume(name, str(tmp_path), sharded=False), expected)


def continue_plain(name, file):
    """Load what a single process has saved with torch.save, continue, and save such a file."""
    model, optimizer = new(name, sharded=True)
    saved = torch.load(file, weights_only=True)
    set_state_dict(
        model,
        [],
        model_state_dict=saved["model"],
        optim_state_dict={},
        options=StateDictOptions(full_state_dict=True),
    )
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(3, 6))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = (
        get_model_state_dict(model, options=options),
        get_optimizer_state_dict(model, optimizer, options=options),
    )
    if torch.distributed.get_rank() == 0:
        torch.save(states, f"{file}.back")


@pytest.mark.parametrize("name", ["AdamP", "SGDW"])
def test_a_plain_checkpoint_loads_into_a_sharded_run_and_back(name, world2, tmp_path):
    model, optimizer = new(name, sharded=False)
    train(model, optimizer, range(3))
    file = str(tmp_path / "plain.pt")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    world2(continue_plain, name, file)
    train(model, optimizer, range(3, STEPS))

    again, its_optimizer = new(name, sharded=False)
    weights, state = torch.load(f"{file}.back", weights_only=True)
    set_state_dict(again, its_optimizer, model_state_dict=weights, optim_state_dict=state)
    train(again, its_optimizer, range(6, STEPS))
    assert_same(whole(again), whole(model))


def run_until_killed(name, folder, step):
    """Save after every second step; in the given step the last rank dies between two halves."""
    model, optimizer = new(name, sharded=True)
    for now in range(STEPS):
        if now == step and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            # Moments are updated, weights are not, and the other ranks wait for this one's sums.
            torch.distributed.all_reduce = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        train(model, optimizer, [now])
        if now % 2 == 1:
            states = get_state_dict(model, optimizer)
            dcp.save(
                {"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{folder}/{now + 1}"
            )
    return whole(model)


def resume_latest(name, folder):
    latest = max(int(p.parent.name) for p in Path(folder).glob("*/.metadata"))
    model, optimizer = load(name, f"{folder}/{latest}", sharded=True)
    train(model, optimizer, range(latest, STEPS))
    return latest, whole(model)


def test_a_rank_killed_in_a_step_leaves_the_last_checkpoint_good(worlds, tmp_path):
    expected = worlds(2)(run_until_killed, "AdamP", str(tmp_path / "undisturbed"), None)[0]
    with pytest.raises(pytest.fail.Exception, match="rank"):
        worlds(2)(run_until_killed, "AdamP", str(tmp_path / "killed"), 7)
    worlds(2).close()
    for latest, continued in worlds(2)(resume_latest, "AdamP", str(tmp_path / "killed")):
        assert latest == 6
        assert_same(continued, expected)
