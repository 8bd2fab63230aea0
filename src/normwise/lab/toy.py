"""Two weights and one direction to find: momentum inflates the norm, the projection does not.

The toy of the AdamP paper's project page (arXiv 2006.08217): L(w) = (1 − cos(w, w*))², which does
not depend on the norm of w, from w₀ = (0.001, 1), almost opposite to w* = (0, −1). All three
methods use the learning rate 0.01; momentum is a heavy ball of 0.9 whose buffer is never projected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.geometry import View, norms
from normwise.optim import SGDP

__all__ = ["METHODS", "PRINTED", "Path2D", "Printed", "loss", "trajectories"]

LR = 0.01
MOMENTUM = 0.9
STEPS = 500
START = (0.001, 1.0)
OPTIMUM = (0.0, -1.0)

METHODS: dict[str, tuple[str, Callable[[list[Tensor]], Optimizer]]] = {
    "gd": ("gradient descent", lambda p: torch.optim.SGD(p, lr=LR)),
    "momentum": ("momentum", lambda p: torch.optim.SGD(p, lr=LR, momentum=MOMENTUM)),
    "projected": (
        "SGDP",
        lambda p: SGDP(p, lr=LR, momentum=MOMENTUM, weight_decay=0, view=View.layer()),
    ),
}


@dataclass(frozen=True)
class Path2D:
    """The path of one method.

    Args:
        method: a name in ``METHODS``.
        label: as a reader sees it.
        points: the weight before each step and after the last, ``STEPS + 1`` in all.
        losses: the loss at each point.
        norms: the norm at each point.
    """

    method: str
    label: str
    points: tuple[tuple[float, float], ...]
    losses: tuple[float, ...]
    norms: tuple[float, ...]


@dataclass(frozen=True)
class Printed:
    """A number that the paper's pictures print.

    Args:
        method: a name in ``METHODS``.
        quantity: ``"loss"`` or ``"norm"``, both before the step.
        step: which step, the first being 0.
        text: the digits as printed.
    """

    method: str
    quantity: str
    step: int
    text: str

    def ours(self, trajectory: Path2D) -> float:
        """The same number from our own run."""
        return (trajectory.losses if self.quantity == "loss" else trajectory.norms)[self.step]

    def rounded(self, trajectory: Path2D) -> str:
        """Our number, rounded to as many digits as the paper prints, in the paper's spelling."""
        digits = len(self.text.partition(".")[2])
        text = f"{self.ours(trajectory):.{digits}f}"
        return text.removeprefix("0") if self.text.startswith(".") else text


PRINTED: tuple[Printed, ...] = (
    Printed("momentum", "loss", 40, "3.7258"),
    Printed("projected", "loss", 40, "3.7186"),
    Printed("momentum", "loss", 50, "1.7578"),
    Printed("projected", "loss", 50, "1.3491"),
    Printed("momentum", "loss", 100, ".0513"),
    Printed("projected", "loss", 100, ".0010"),
    Printed("gd", "norm", 500, "1.02"),
    Printed("momentum", "norm", 500, "2.93"),
    Printed("projected", "norm", 500, "1.12"),
)


def loss(w: Tensor) -> Tensor:
    """L(w) = (1 − cos(w, w*))² of a weight of shape ``(1, 2)``: a scalar between 0 and 4."""
    cosine = torch.nn.functional.cosine_similarity(w, w.new_tensor([OPTIMUM]), dim=1, eps=0.0)
    return (1 - cosine).square().sum()


def loss_at_angle(angle: float) -> float:
    """The loss of every weight at this angle from the first axis, in radians."""
    return (1 - (OPTIMUM[0] * math.cos(angle) + OPTIMUM[1] * math.sin(angle))) ** 2


@cache
def trajectories() -> dict[str, Path2D]:
    """The three methods, run once in float64."""
    return {method: _run(method) for method in METHODS}


def _run(method: str) -> Path2D:
    label, build = METHODS[method]
    w = torch.tensor([START], dtype=torch.float64, requires_grad=True)
    optimizer = build([w])
    points, losses, lengths = [], [], []
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        value = loss(w)
        x, y = w.detach()[0].tolist()
        points.append((x, y))
        losses.append(float(value.detach()))
        lengths.append(float(norms(w.detach(), View.layer())))
        if step < STEPS:
            value.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            optimizer.step()
    return Path2D(method, label, tuple(points), tuple(losses), tuple(lengths))
