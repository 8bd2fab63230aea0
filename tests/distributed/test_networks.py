"""Steps of real networks are those of a single process, however they are parallelized."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import normwise

FEW_STEPS, MANY_STEPS = 6, 20
BATCH = 8


class ConvNet(nn.Module):
    """With BN, GN and LN. BN needs the whole batch, so every rank is given all of it."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.gn = nn.GroupNorm(2, 2 * width)
        self.conv3 = nn.Conv2d(2 * width, width, 3, bias=False)
        self.ln = nn.LayerNorm([width, 2, 2])
        self.head = nn.Linear(4 * width, 4)

    def forward(self, x):
        x = self.bn(self.conv1(x)).relu()
        x = self.gn(self.conv2(x)).relu()
        return self.head(self.ln(self.conv3(x)).relu().flatten(1))


class Transformer(nn.Module):
    """One block; heads of 2 features, of which tensor parallelism gives each rank some."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens):
        x = self.embedding(tokens)
        h = self.norm1(x)
        q, k, v = (t(h).unflatten(2, (-1, 2)).transpose(1, 2) for t in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        x = x + self.down(self.up(self.norm2(x)).relu())
        return self.head(x.mean(1))


MODELS = {"conv": ConvNet, "transformer": Transformer}
TP_PLANS = {
    "conv": {"head": ColwiseParallel(output_layouts=Replicate())},
    "transformer": {
        **{name: ColwiseParallel() for name in ("q", "k", "v", "up")},
        **{name: RowwiseParallel() for name in ("o", "down")},
    },
}
# One view for each of the weights that meet a norm, so that an optimizer sees all of them.
VIEWS = {
    "conv1.weight": "channel",
    "conv2.weight": "blocks(2)",
    "conv3.weight": "layer",
    "head.weight": None,
    "q.weight": "channel",
    "o.weight": "channel(1)",
    "up.weight": "blocks(4)",
    "down.weight": "layer",
}
OPTIMIZERS = {
    "AdamP": lambda m: normwise.AdamP(m.parameters(), lr=0.01, weight_decay=0.01),
    "AdamP views": lambda m: normwise.AdamP(groups(m), lr=0.01, weight_decay=0.01),
    "SGDP": lambda m: normwise.SGDP(
        m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3, foreach=True
    ),
    "SGDP fixed": lambda m: normwise.SGDP(groups(m, norm="fixed"), lr=0.1, momentum=0.9),
    "SGDW": lambda m: normwise.SGDW(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "tangential": lambda m: normwise.tangential(
        torch.optim.NAdam(m.named_parameters(), lr=0.01, weight_decay=0.01),
        {name: VIEWS[name] for name, _ in m.named_parameters() if VIEWS.get(name)},
    ),
}


def groups(model, **options):
    """Each parameter in a group with its view; those that have none are in ``auto``."""
    by_view = {}
    for name, p in model.named_parameters():
        by_view.setdefault(VIEWS.get(name, "auto"), []).append(p)
    return [
        {"params": params, "view": view, **(options if view not in (None, "auto") else {})}
        for view, params in by_view.items()
    ]


def new_model(kind, width):
    torch.manual_seed(0)
    return MODELS[kind](width).double()


def batch(kind, step):
    generator = torch.Generator().manual_seed(step)
    if kind == "conv":
        inputs = torch.randn(BATCH, 3, 6, 6, generator=generator, dtype=torch.float64)
    else:
        inputs = torch.randint(11, (BATCH, 5), generator=generator)
    return inputs, torch.randint(4, (BATCH,), generator=generator)


def backward(model, kind, step, part=0, parts=1):
    """Mean gradients of the batch: ranks of the transformer each take a part of it."""
    inputs, targets = batch(kind, step)
    if kind == "transformer":
        inputs, targets = inputs.chunk(parts)[part], targets.chunk(parts)[part]
    nn.functional.cross_entropy(model(inputs), targets).backward()


def on_one_process(kind, width, optimizer, steps, known={}):  # noqa: B006 -- a cache
    key = (kind, width, optimizer, steps)
    if key not in known:
        model = new_model(kind, width)
        optimizer = OPTIMIZERS[optimizer](model)
        for step in range(steps):
            optimizer.zero_grad()
            backward(model, kind, step)
            optimizer.step()
        known[key] = dict(model.state_dict())
    return known[key]


def parallelize(model, kind, how):
    """The parallel model, and which part of the batch this rank takes of how many."""
    size = torch.distributed.get_world_size()
    if how == "DDP":
        return DistributedDataParallel(model), torch.distributed.get_rank(), size
    if how == "FSDP2":
        mesh = init_device_mesh("cpu", (size,))
        part, parts = mesh.get_rank(), size
    elif how == "HSDP":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        part, parts = mesh.get_rank(), size
    elif how == "TP":
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        return parallelize_module(model, mesh, TP_PLANS[kind]), 0, 1
    else:
        both = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, both["tp"], TP_PLANS[kind])
        mesh = both["dp"]
        part, parts = mesh.get_local_rank(), 2
    for child in model.children():
        if kind == "conv" or not isinstance(child, nn.Embedding):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh), part, parts


def difference(kind, width, how, optimizer, steps):
    """From one process, after all steps; and the most collectives in a step of the optimizer."""
    expected = on_one_process(kind, width, optimizer, steps)
    model, part, parts = parallelize(new_model(kind, width), kind, how)
    plain = model.module if how == "DDP" else model
    optimizer = OPTIMIZERS[optimizer](plain)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, kind, step, part, parts)
        if step < steps - 1:
            optimizer.step()
    with CommDebugMode() as communication:
        optimizer.step()
    worst = 0.0
    for name, value in plain.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        worst = max(worst, float((whole - expected[name]).abs().max()))
    return worst, sum(communication.get_comm_counts().values())


def differences(kind, width, how, optimizers, steps):
    return {o: difference(kind, width, how, o, steps) for o in optimizers}


FEW = ["AdamP", "SGDP fixed"]
COLLECTIVES = {"DDP": 0, "FSDP2": 1, "HSDP": 1, "TP": 1, "FSDP2+TP": 2}


@pytest.mark.parametrize(
    ("optimizers", "steps"),
    [(FEW, FEW_STEPS), pytest.param([*OPTIMIZERS], MANY_STEPS, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", COLLECTIVES)
def test_steps_on_four_ranks(how, kind, optimizers, steps, world4):
    for of_rank in world4(differences, kind, 8, how, optimizers, steps):
        for case, (distance, collectives) in of_rank.items():
            assert distance < 1e-10, case
            assert collectives <= COLLECTIVES[how], case


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["FSDP2", "HSDP"])
def test_uneven_and_empty_shards(how, kind, world4):
    """Widths of 6 and 12, and a head of 4, on 4 ranks."""
    width = 6 if kind == "conv" else 12
    for of_rank in world4(differences, kind, width, how, ["AdamP", "AdamP views"], FEW_STEPS):
        for case, (distance, collectives) in of_rank.items():
            assert distance < 1e-10, case
            assert collectives <= 1, case


def zero_redundancy(kind, optimizer, **options):
    expected = new_model(kind, 8)
    one = optimizer(expected.parameters(), **options)
    model = DistributedDataParallel(new_model(kind, 8))
    many = ZeroRedundancyOptimizer(model.parameters(), optimizer, **options)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(FEW_STEPS):
        one.zero_grad()
        many.zero_grad()
        backward(expected, kind, step)
        backward(model, kind, step, rank, size)
        one.step()
        many.step()
    pairs = zip(expected.parameters(), model.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("kind", MODELS)
def test_zero_redundancy_optimizer(kind, world2):
    options = {"lr": 0.01, "weight_decay": 0.01}
    assert max(world2(zero_redundancy, kind, normwise.AdamP, **options)) < 1e-10
    options = {"lr": 0.1, "momentum": 0.9, "view": "layer"}
    assert max(world2(zero_redundancy, kind, normwise.SGDP, **options)) < 1e-10


def count_collectives(tensors):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(tensors)))
    fully_shard(model, mesh=mesh)
    optimizer = normwise.AdamP(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "view": "layer"},
            {"params": [p for p in model.parameters() if p.ndim < 2]},
        ]
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with CommDebugMode() as communication:
        optimizer.step()
    return sum(communication.get_comm_counts().values())


def test_collectives_do_not_grow_with_the_number_of_tensors(world2):
    assert world2(count_collectives, 2) == world2(count_collectives, 40) == [1, 1]
