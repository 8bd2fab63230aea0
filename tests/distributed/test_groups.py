"""Groups by role step sharded weights as their optimizers do by themselves."""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import normwise as nw

ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, foreach=False)
if not hasattr(torch.optim, "Muon"):
    pytest.skip("Muon came with torch 2.9", allow_module_level=True)
MUON = functools.partial(torch.optim.Muon, lr=0.02)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 7))


def trained(place, matrices):
    model, tokens = network(), torch.randint(9, (3, 4))
    report = nw.analyze(model, tokens)
    for module in model:
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(place(p.detach())))
    optimizer = nw.groups(report, matrices=matrices, others=ADAMW, model=model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in model.parameters():
            p.grad = place(torch.randn(p.shape, generator=generator))
        optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().numpy() for p in model.parameters()]


def sharded(matrices):
    mesh = init_device_mesh("cpu", (2,))
    return trained(lambda t: distribute_tensor(t, mesh, [Shard(0)]), matrices)


def test_shards_are_stepped_as_whole_weights_are(world2):
    for found in world2(sharded, ADAMW):
        for a, b in zip(found, trained(lambda t: t, ADAMW), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_torchs_muon_takes_whole_matrices_that_are_sharded(world2):
    for found in world2(sharded, MUON):
        for a, b in zip(found, trained(lambda t: t, MUON), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)  # it rounds to bfloat16 on the way


def refused():
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    report = nw.analyze(model, torch.randn(2, 3, 3, 3))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    try:
        nw.groups(report, matrices=MUON, others=ADAMW, model=model)
    except ValueError as error:
        return str(error)


def test_blocks_of_shards_are_refused_by_name(world2):
    assert all("0.weight would be stepped in blocks" in message for message in world2(refused))
