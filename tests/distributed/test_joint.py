"""Steps along symmetries of weights that lie on several ranks are those of one process."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

import normwise
from normwise.invariance.symmetry import Slices, Symmetry, Term


def sibling(name):
    """A test module beside this one, in whatever way this one was loaded."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


placements = sibling("test_placements")

STEPS = 3
# Shapes of which four ranks get uneven and empty shards.
SHAPES = {"up": (7, 5), "bias": (7,), "down": (6, 7), "out": (3, 6), "lone": (5, 4)}


def term(name, dim, exponent):
    return Term(name, SHAPES[name], Slices.each((dim,), SHAPES[name][dim]), exponent)


# Rows and a bias trade with columns; that weight's rows trade with columns again.
TRADES = [
    Symmetry((term("up", 0, 1.0), term("bias", 0, 1.0), term("down", 1, -1.0)), 7),
    Symmetry((term("down", 0, 2.0), term("out", 1, -1.0)), 6),
]
TOGETHER = [
    Symmetry((term("up", 0, 1.0), term("bias", 0, 1.0)), 7),
    Symmetry(
        (
            Term("down", (6, 7), Slices.whole((6, 7)), 1.0),
            Term("out", (3, 6), Slices.whole((3, 6)), 1.0),
        ),
        1,
    ),
]
CASES = {
    "tangential": lambda p: normwise.tangential(
        torch.optim.AdamW(p, lr=0.05, weight_decay=0.1), {"lone": "channel(1)"}, symmetries=TRADES
    ),
    "tangential, norms fixed": lambda p: normwise.tangential(
        torch.optim.SGD(p, lr=0.05, momentum=0.9), None, symmetries=TOGETHER, norm="fixed"
    ),
    "sphere": lambda p: normwise.sphere(
        torch.optim.AdamW(p, lr=0.05), {"lone": "layer"}, symmetries=TOGETHER
    ),
    "radial brake": lambda p: normwise.sphere(
        torch.optim.SGD(p, lr=0.05),
        {"lone": "layer"},
        symmetries=TOGETHER,
        update="raw",
        norm=normwise.RadialBrake(0.3, 0.6),
    ),
    "AdamP": lambda p: normwise.AdamP(p, lr=0.05, weight_decay=0.1, symmetries=TRADES),
}


def weights():
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES.values()
    ]


def trajectory(case, mesh=None, placed=None):
    """The optimizer, its parameters after all steps, and the collectives of the last."""
    params = {
        name: (w if mesh is None else placements.distributed(w, mesh, placed)).requires_grad_()
        for name, w in weights().items()
    }
    optimizer = CASES[case](list(params.items()))
    for step in range(STEPS):
        for p, g in zip(params.values(), gradients(step), strict=True):
            p.grad = g if mesh is None else placements.distributed(g, mesh, placed)
        last = mesh is not None and step == STEPS - 1
        with CommDebugMode() if last else contextlib.nullcontext() as communication:
            optimizer.step()
    count = 0 if mesh is None else sum(communication.get_comm_counts().values())
    return optimizer, list(params.values()), count


def differences(mesh_shape, placed):
    mesh = init_device_mesh("cpu", mesh_shape)
    found = {}
    for case in CASES:
        one, whole, _ = trajectory(case)
        several, shards, count = trajectory(case, mesh, placed)
        pairs = [
            (placements.cut(w.detach(), mesh, p.placements), p.to_local().detach())
            for w, p in zip(whole, shards, strict=True)
        ]
        if hasattr(one, "joint_radii"):
            pairs += zip(one.joint_radii, several.joint_radii, strict=True)
        found[case] = max(float((a - b).abs().amax()) for a, b in pairs if a.numel()), count
    return found


@pytest.mark.parametrize("name", [*placements.PLACEMENTS_1D, *placements.PLACEMENTS_2D])
def test_the_trajectory_is_that_of_one_process(name, world4):
    """With one collective a mesh dimension for all weights, views and families together."""
    if name in placements.PLACEMENTS_1D:
        shape, placed, collectives = (4,), placements.PLACEMENTS_1D[name], 1
    else:
        shape, placed, collectives = (2, 2), placements.PLACEMENTS_2D[name], 2
    for of_rank in world4(differences, shape, placed):
        for case, (difference, count) in of_rank.items():
            assert difference < 1e-10, case
            assert count <= collectives, case
