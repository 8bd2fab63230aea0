"""What a Monitor measures of sharded weights is what it measures of whole ones."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from normwise.monitor import Monitor, every

# On four ranks some shards are shorter than others, and some are empty.
VIEWS = {"a": "channel", "b": "layer", "c": "blocks(2)", "d": "channel(1)", "e": "channel"}
SHAPES = {"a": (7, 5), "b": (4, 3), "c": (8, 4), "d": (5, 6), "e": (2, 9)}
STEPS = 6


class Weights(nn.Module):
    def __init__(self, place=lambda t: t):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            w = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(place(w)))


def measured(model, optimizers, place=lambda t: t, monitored=True, bad=False):
    """Train on given gradients; the measurements and the weights."""
    found = []
    if monitored:
        monitor = Monitor(
            model,
            optimizers,
            VIEWS,
            every=2,
            writers=[found.append],
            rules=(),
            check_finite=every(1),
            fetch_every=3,
        )
    generator = torch.Generator().manual_seed(1)
    for t in range(STEPS):
        for p in model.parameters():
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if bad and t == 3:
                g[-1] = torch.nan
            p.grad = place(g)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
    if monitored:
        monitor.close()
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    rows = [(m.step, *(t.numpy() for t in (m.values, m.slices, m.first_bad))) for m in found]
    return rows, [w.numpy() for w in weights]


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, foreach=False)


def on_mesh(placements, monitored=True, bad=False, several=False):
    names = ("replicate", "shard")[-len(placements) :]
    shape = {1: (4,), 2: (2, 2)}[len(placements)]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)

    def place(t):
        if not hasattr(placements[0], "split_factor"):
            return distribute_tensor(t, mesh, placements)
        part = t  # FSDP2 cuts what tensor parallelism has cut before
        for dim in (1, 0):
            size = -(-len(part) // mesh.size(dim))
            start = min(mesh.get_local_rank(dim) * size, len(part))
            part = part[start : start + size]
        return DTensor.from_local(
            part.clone(), mesh, placements, run_check=False, shape=t.shape, stride=t.stride()
        )

    model = Weights(place)
    return measured(model, makes(model, several), place, monitored, bad)


def makes(model, several):
    params = list(model.parameters())
    return [adamw(params[:2]), adamw(params[2:])] if several else adamw(params)


def assert_alike(found, expected):
    assert [m[0] for m in found] == [m[0] for m in expected] == [1, 2, 4, 6]
    for (_, values, slices, first), (_, values0, slices0, first0) in zip(
        found, expected, strict=True
    ):
        # Sharded weights come one by one in the same order as whole ones do on a CPU.
        np.testing.assert_allclose(values, values0, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(slices, slices0, rtol=1e-12, atol=1e-14)
        assert (first == first0).all()


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_uneven_shards_are_measured_as_whole_weights_are(dim, bad, world4):
    model = Weights()
    expected, _ = measured(model, makes(model, False), bad=bad)
    for found, _ in world4(on_mesh, [Shard(dim)], bad=bad):
        assert_alike(found, expected)


def test_replicas_of_shards_and_two_optimizers_are_too(world4):
    model = Weights()
    expected, _ = measured(model, makes(model, True))
    for found, _ in world4(on_mesh, [Replicate(), Shard(0)], several=True):
        assert_alike(found, expected)


@pytest.mark.parametrize(
    "placements",
    [[_StridedShard(0, split_factor=2), Shard(0)], [Shard(0), Shard(1)], [Replicate(), Shard(1)]],
    ids=["FSDP2+TP column-wise", "FSDP2+TP row-wise", "TP with replicas"],
)
def test_tensor_parallel_weights_are_too(placements, world4):
    model = Weights()
    expected, _ = measured(model, makes(model, False))
    for found, _ in world4(on_mesh, placements):
        assert_alike(found, expected)


@pytest.mark.parametrize(
    "placements",
    [[Shard(0)], [Replicate(), Shard(0)], [Shard(0), Shard(1)]],
    ids=["FSDP2", "HSDP", "FSDP2+TP"],
)
def test_watching_changes_no_bit_of_the_training(placements, world4):
    watched, alone = (world4(on_mesh, placements, monitored=m) for m in (True, False))
    for (_, a), (_, b) in zip(watched, alone, strict=True):
        assert all((x == y).all() for x, y in zip(a, b, strict=True))


def trained_in_parallel(kind, monitored):
    """Weights of a network under FSDP2, HSDP or DDP after a training on each rank's own data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(6, 7, bias=False), nn.LayerNorm(7), nn.ReLU()),
        *(nn.Linear(7, 9, bias=False), nn.LayerNorm(9), nn.ReLU()),
        nn.Linear(9, 3),
    )
    views = {"0.weight": "layer", "3.weight": "layer"}
    if kind == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
        views = {f"module.{name}": view for name, view in views.items()}
    else:
        shape, names = ((4,), ("shard",)) if kind == "FSDP2" else ((2, 2), ("replicate", "shard"))
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found = []
    if monitored:
        monitor = Monitor(model, optimizer, views, every=2, rules=(), writers=[found.append])
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=generator)
        nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
        optimizer.step()
    if monitored:
        monitor.close()
    whole = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    return [w.numpy() for w in whole], [m.step for m in found]


@pytest.mark.parametrize("kind", ["FSDP2", "HSDP", "DDP"])
def test_a_network_trains_to_the_same_bits_whether_it_is_watched_or_not(kind, world4):
    watched, alone = (world4(trained_in_parallel, kind, monitored=m) for m in (True, False))
    for (a, steps), (b, _) in zip(watched, alone, strict=True):
        assert steps == [1, 2, 4, 6]
        assert all((x == y).all() for x, y in zip(a, b, strict=True))


def collectives():
    """How often ranks talk in one measured step."""
    mesh = init_device_mesh("cpu", (4,))
    model = Weights(lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    optimizer = makes(model, False)
    for p in model.parameters():
        p.grad = p.detach().clone()
    counts = []
    with Monitor(model, optimizer, VIEWS, every=2, rules=()):
        for _ in range(3):
            with CommDebugMode() as mode:
                optimizer.step()
            counts.append(mode.get_total_counts())
    return counts


def test_a_measurement_is_one_collective_and_a_step_between_is_none(world4):
    for counts in world4(collectives):
        assert counts == [1, 1, 0]
