"""Perturbed steps on many ranks: the ascent is averaged over ranks, as the step is."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import normwise as nw


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def steps(model, method, x, **options):
    """Three steps of SGD with decay, at perturbed weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    options |= {"max_loss": 10.0, "steps": 2} if method == "RWP" else {}
    perturbation = getattr(nw, method)(model, optimizer, gamma=0.2, **options)

    def losses():
        each = model(x).square().sum(1)
        return each if method == "RWP" else each.mean()

    for _ in range(3):
        with perturbation.perturbed(losses):
            optimizer.zero_grad()
            losses().mean().backward()
            optimizer.step()


def difference(method):
    """The largest difference between two ranks with half of a batch each and one process."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone, shared = network(), network()
    steps(alone, method, x)
    steps(DistributedDataParallel(shared), method, x.chunk(2)[torch.distributed.get_rank()])
    pairs = zip(alone.parameters(), shared.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize("method", ["AWP", "RWP"])
def test_ranks_take_the_step_of_one_process_with_the_whole_batch(method, world2):
    assert max(world2(difference, method)) < 1e-12


def difference_of_shards(method, views):
    """The same with FSDP2, whose ranks have some rows of each weight, of 4 and of 3 rows."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone, sharded = network(), network()
    options = {} if views is None else {"views": views}
    steps(alone, method, x, **options)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(sharded, mesh=mesh)
    steps(sharded, method, x.chunk(2)[torch.distributed.get_rank()], **options)
    pairs = zip(alone.parameters(), sharded.parameters(), strict=True)
    return max(float((p - q.full_tensor()).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize(
    ("method", "views"),
    [("AWP", "channel"), ("AWP", "layer"), ("AWP", "channel(1)"), ("RWP", None), ("RWP", "layer")],
)
def test_shards_take_the_step_of_one_process(method, views, world2):
    assert max(world2(difference_of_shards, method, views)) < 1e-12
