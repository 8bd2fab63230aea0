"""Wherever the entries of a weight lie, its trajectory is the one it has on a single process."""

import contextlib

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import normwise
from normwise import View
from normwise.geometry import tangential

# Weights of which some are shorter than there are ranks, so that shards are uneven or empty; and a
# bias. Each comes once with a gradient that is orthogonal to every channel, once to the weight as
# a whole, once to nothing: the gate's three states.
SHAPES = [(6, 4, 2, 2), (3, 10), (1, 8), (5,), (10, 12)]
STATES = [View.channel(), View.layer(), None]
FEW_STEPS, MANY_STEPS = 5, 20

OPTIMIZERS = {
    "AdamP": lambda p, **o: normwise.AdamP(p, lr=0.01, weight_decay=0.1, **o),
    "AdamP nesterov": lambda p, **o: normwise.AdamP(
        p, lr=0.01, weight_decay=0.1, nesterov=True, foreach=True, **o
    ),
    "SGDP": lambda p, **o: normwise.SGDP(p, lr=0.01, momentum=0.9, weight_decay=0.1, **o),
    "SGDP nesterov": lambda p, **o: normwise.SGDP(
        p, lr=0.01, momentum=0.9, nesterov=True, maximize=True, foreach=True, **o
    ),
    "AdamP fused": lambda p, **o: normwise.AdamP(p, lr=0.01, weight_decay=0.1, fused=True, **o),
    "SGDP fused": lambda p, **o: normwise.SGDP(
        p, lr=0.01, momentum=0.9, weight_decay=0.1, fused=True, **o
    ),
    "SGDP plain": lambda p, **o: normwise.SGDP(p, lr=0.01, **o),
}
TANGENTIAL = {
    "NAdam": lambda p, **o: normwise.tangential(
        torch.optim.NAdam(p, lr=0.01, weight_decay=0.1), wd_ratio=0.5, **o
    ),
    "SGD": lambda p, **o: normwise.tangential(
        torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1), **o
    ),
}
MAKES = [*OPTIMIZERS, *TANGENTIAL]
OPTIONS = [{"view": "auto"}, {"view": "auto", "eps": 0.01}, {"view": None}] + [
    {"view": view, "norm": norm}
    for view in ("channel", "channel(1)", "blocks(2)", "blocks(2, 1)", "layer")
    for norm in ("free", "fixed")
]
PLACEMENTS_1D = {
    "FSDP2": [Shard(0)],
    "row-wise": [Shard(1)],
    "replicated": [Replicate()],
}
PLACEMENTS_2D = {
    "HSDP": [Replicate(), Shard(0)],
    "FSDP2+TP column-wise": [_StridedShard(0, split_factor=2), Shard(0)],
    "FSDP2+TP row-wise": [Shard(0), Shard(1)],
    "two shards of one dimension": [Shard(0), Shard(0)],
    "TP of TP": [Shard(1), Shard(1)],
    "row-wise, replicated": [Replicate(), Shard(1)],
}


def cut(whole, mesh, placements):
    """This rank's part of a tensor that all ranks have; FSDP2 cuts what TP has cut before."""
    part = whole
    order = sorted(
        range(mesh.ndim), key=lambda i: -i if hasattr(placements[i], "split_factor") else -9
    )
    for i in order:
        if isinstance(placements[i], Replicate):
            continue
        dim, size, here = placements[i].dim, mesh.size(i), mesh.get_local_rank(i)
        width = -(-part.shape[dim] // size)
        start = min(here * width, part.shape[dim])
        part = part.narrow(dim, start, min(width, part.shape[dim] - start))
    return part.contiguous().clone()


def distributed(whole, mesh, placements):
    """A DTensor; a bias is sharded along its only dimension, if at all."""
    if whole.ndim == 1:
        placements = [
            Shard(0)
            if getattr(p, "dim", None) == 0 and not hasattr(p, "split_factor")
            else Replicate()
            for p in placements
        ]
    return DTensor.from_local(
        cut(whole, mesh, placements),
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def weights_of(view):
    generator = torch.Generator().manual_seed(1)
    shapes = [s for s in SHAPES for _ in STATES]
    if view not in ("auto", None):
        view = View.parse(view)
        shapes = [
            s
            for s in shapes
            if len(s) == 1 or (s[view.dim] % view.count == 0 and len(s) > view.dim)
        ]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def gradient(w, step, index):
    generator = torch.Generator().manual_seed(1000 * step + index)
    g = torch.randn(w.shape, generator=generator, dtype=w.dtype)
    orthogonal = STATES[index % len(STATES)]
    return g if orthogonal is None or w.ndim < 2 else tangential(g, w, orthogonal)


def trajectory(make, options, steps, known={}):  # noqa: B006 -- a cache
    """On one process: gradients of every step, and the weights after the last."""
    key = (make, str(options), steps)
    if key not in known:
        weights = [w.requires_grad_() for w in weights_of(options["view"])]
        optimizer = optimizer_of(make.removesuffix(" fused"), weights, options)
        grads = []
        for step in range(steps):
            for index, w in enumerate(weights):
                w.grad = gradient(w.detach(), step, index)
            grads.append([w.grad for w in weights])
            optimizer.step()
        known[key] = grads, [w.detach() for w in weights]
    return known[key]


def optimizer_of(make, params, options):
    if make in TANGENTIAL:
        return TANGENTIAL[make](params, views=options["view"], norm=options["norm"])
    return OPTIMIZERS[make](params, **options)


def difference_from_one_process(make, options, mesh, placements, steps):
    """The largest difference of any entry after all steps, and the collectives of the last step."""
    grads, after = trajectory(make, options, steps)
    shards = [
        distributed(w, mesh, placements).requires_grad_() for w in weights_of(options["view"])
    ]
    optimizer = optimizer_of(make, shards, options)
    for step, gs in enumerate(grads):
        for p, g in zip(shards, gs, strict=True):
            p.grad = distributed(g, mesh, placements)
        last = step == steps - 1
        with CommDebugMode() if last else contextlib.nullcontext() as communication:
            optimizer.step()
    worst = max(
        float((cut(w, mesh, p.placements) - p.to_local().detach()).abs().amax())
        for w, p in zip(after, shards, strict=True)
        if p.to_local().numel()
    )
    return worst, sum(communication.get_comm_counts().values())


def differences(makes, mesh_shape, placements, steps):
    mesh = init_device_mesh("cpu", mesh_shape)
    return {
        (make, *options.values()): difference_from_one_process(
            make, options, mesh, placements, steps
        )
        for make in makes
        for options in OPTIONS
        if make not in TANGENTIAL or "norm" in options
    }


def assert_as_one_process(results, collectives):
    for of_rank in results:
        for case, (difference, count) in of_rank.items():
            assert difference < 1e-10, case
            assert count <= collectives, case


FEW = ["AdamP", "SGD"]


@pytest.mark.parametrize(
    ("makes", "steps"), [(FEW, FEW_STEPS), pytest.param(MAKES, MANY_STEPS, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [*PLACEMENTS_1D, *PLACEMENTS_2D])
def test_the_trajectory_is_that_of_one_process(name, makes, steps, world4):
    """For every optimizer, view and state of the gate, with one collective a mesh dimension."""
    if name in PLACEMENTS_1D:
        assert_as_one_process(world4(differences, makes, (4,), PLACEMENTS_1D[name], steps), 1)
    else:
        assert_as_one_process(world4(differences, makes, (2, 2), PLACEMENTS_2D[name], steps), 2)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("FSDP2", "AdamP fused"),
        ("FSDP2+TP column-wise", "AdamP fused"),
        ("FSDP2+TP row-wise", "SGDP fused"),
        ("row-wise", "AdamP fused"),
    ],
)
def test_fused_steps_of_shards(name, make, world4):
    """Some ranks have empty shards, which no kernel takes, and all wait for the same sums."""
    pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    test_the_trajectory_is_that_of_one_process(name, [make], FEW_STEPS, world4)
