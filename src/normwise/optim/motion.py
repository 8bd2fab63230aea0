"""How slices move: a·w + b·d, with a and b of a few sums, for every wrapper of an optimizer.

A slice w of radius R, which the wrapped optimizer would move by d, ends at a·w + b·d. Both numbers
follow from ‖w‖², ⟨w, d⟩ and ‖d‖² alone, whichever path is taken; so weights are read once for these
sums and once for the result, and of a slice that is split over ranks only sums are exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from normwise.checks import check_number
from normwise.geometry import View
from normwise.optim.projection import retraction
from normwise.optim.sums import divisor

__all__ = [
    "Form",
    "KernelStep",
    "LearnedNorm",
    "Motion",
    "Outcome",
    "RadialBrake",
    "coefficients",
    "projected",
    "resolution",
]

Length = Literal["relative", "raw"]
Path = Literal["retract", "geodesic"]

# Sums over a slice: ‖w‖², ⟨w, d⟩, ‖d‖², and for learned norms ⟨w, g⟩.
WW, WD, DD, WG = range(4)


@dataclass(frozen=True)
class RadialBrake:
    """Radii that change by a part of what the step would change them by.

    Source: https://nilin.github.io/radial-brake, ‖w‖ ← ‖w‖ + s·(‖w + d‖ − ‖w‖).

    Args:
        outward: s of steps that lengthen a slice (default: 0.5).
        inward: s of steps that shorten it (default: 1).
    """

    outward: float = 0.5
    inward: float = 1.0

    def __post_init__(self) -> None:
        for name in ("outward", "inward"):
            check_number(name, value := getattr(self, name))
            if value > 1:
                raise ValueError(f"Invalid {name}: {value}; must be from 0 to 1")


@dataclass(frozen=True)
class LearnedNorm:
    r"""Radii that are trained: a step of Adam along ∂L/∂R = ⟨ŵ, g⟩ for each slice.

    With rows for slices these are the row magnitudes of Muown (arXiv 2605.10797). A radius never
    falls by more than half in a step, so it stays positive.

    Args:
        lr: of the radii, in units of the weights (default: the group's).
        betas: of Adam's averages (default: (0.9, 0.95)).
        eps: of Adam's denominator (default: 1e-8).
    """

    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        for beta in self.betas:
            check_number("beta", beta, below=1)


@dataclass(frozen=True)
class Motion:
    """How slices move.

    Attributes:
        update: ``"relative"`` or ``"raw"``: how far.
        path: ``"retract"`` or ``"geodesic"``.
        norm: what becomes of radii.
        floor: the least length of a raw update, in radii.
    """

    update: Length
    path: Path
    norm: Literal["fixed"] | RadialBrake | LearnedNorm = "fixed"
    floor: float = 0.0

    @property
    def fixes_norms(self) -> bool:
        """Whether no radius ever changes."""
        return self.norm == "fixed"


class Outcome(Enum):
    """What the wrapped optimizer left where.

    Attributes:
        MOVED: w + d in the parameter, w in a copy.
        FROM_ZERO: d in the parameter, w in a copy.
        IN_PLACE: d in a buffer, w in the parameter.
    """

    MOVED = "moved"
    FROM_ZERO = "from zero"
    IN_PLACE = "in place"


@dataclass(frozen=True)
class Form:
    """What a plan of kernels is made for, of one weight.

    Attributes:
        shape, stride: of the weight.
        view: its slices.
        path: of its :class:`KernelStep`.
        outcome: what the wrapped optimizer left.
        group: which of the steps that a plan is given is its.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    view: View
    path: str
    outcome: Outcome
    group: int


@dataclass(frozen=True)
class KernelStep:
    """What the step of one group is made of, in the numbers that kernels take.

    Attributes:
        path: ``"free"`` and ``"fixed"`` as of :func:`projected`, the others as of
            :func:`coefficients` where norms are fixed. All groups of an optimizer have one, and one
            kind of update.
        keep: 1 − ηλρ, for ``"free"``; a tensor if only the device knows it.
        lr: θ, for relative updates; likewise.
        floor: the least length of a raw update, in radii.
        is_relative: whether updates are θR long.
    """

    path: Literal["free", "fixed", "retract", "geodesic"]
    keep: float | Tensor = 1.0
    lr: float | Tensor = 0.0
    floor: float = 0.0
    is_relative: bool = False


def coefficients(
    sums: Tensor,
    radii: Tensor,
    lr: float | Tensor,
    motion: Motion,
    noise: float,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The a and b of a·w + b·d on a sphere, and the radii after the step; see :func:`sphere`.

    Args:
        sums: ‖w‖², ⟨w, d⟩ and ‖d‖², shape ``(..., 3 or more)``.
        radii: R, shape ``(...)``.
        lr: θ; of raw updates nothing but ``path`` is asked.
        motion: how slices move.
        noise: the resolution of d.
        ends: the radii to end on (default: as ``motion`` says).
    """
    norm, length = sums[..., WW].sqrt(), sums[..., DD].sqrt()
    radial = sums[..., WD] / divisor(norm)
    tangential = (sums[..., DD] - radial.square()).clamp_min(0).sqrt()
    if motion.update == "relative":
        scale = lr * radii / divisor(length)
    elif motion.floor:
        scale = (motion.floor * radii / divisor(length)).clamp_min(1)
    else:
        scale = torch.ones_like(length)
    to_sphere = radii / divisor(norm)  # times w this is Rŵ, and zero of a slice that is zero
    along = torch.where(norm > 0, radii, 0) + scale * radial
    if motion.path == "retract":
        reached = torch.hypot(along, scale * tangential)
        ends = _radii_after(radii, reached, motion) if ends is None else ends
        back = retraction(ends, reached)
        a, b = to_sphere * back, scale * back
        moves = length > 0
    else:
        ends = _radii_after(radii, along, motion) if ends is None else ends
        angle = lr if motion.update == "relative" else scale * tangential / radii
        cos, sin = (
            (torch.cos(angle), torch.sin(angle))
            if isinstance(angle, Tensor)
            else (math.cos(angle), math.sin(angle))
        )
        share = sin / divisor(tangential)
        a, b = ends * (cos - share * radial) / divisor(norm), ends * share
        moves = tangential > resolution(noise, sums.dtype) * length
    changed = moves | (ends != radii)
    a = torch.where(moves, a, torch.where(changed, ends / divisor(norm), 1))
    b = torch.where(moves, b, 0)
    return a, b, torch.where(changed, ends, radii)


def resolution(noise: float, dtype: torch.dtype) -> float:
    """The share of d below which its tangential part is rounding: of d, or of a difference of sums.

    Args:
        noise: the resolution of d.
        dtype: of ‖d‖² and ⟨ŵ, d⟩², whose difference is the square of the tangential part.
    """
    return float(max(noise, 4 * math.sqrt(torch.finfo(dtype).eps)))


def _radii_after(radii: Tensor, reached: Tensor, motion: Motion) -> Tensor:
    """The radii on which slices end that would end at the norms ``reached``."""
    if not isinstance(motion.norm, RadialBrake):
        return radii
    change = reached - radii
    return radii + torch.where(change > 0, motion.norm.outward, motion.norm.inward) * change


def projected(
    sums: Tensor, keep: float | Tensor, norm: Literal["free", "fixed"]
) -> tuple[Tensor, Tensor]:
    """The a and b of a·w + b·d that take the radial part out of d; see :func:`tangential`.

    Args:
        sums: ‖w‖², ⟨w, d⟩ and ‖d‖², shape ``(..., 3)``.
        keep: 1 − ηλρ, what decay leaves of w.
        norm: ``"fixed"`` puts the slice back on the norm that it had, in place of decay.
    """
    ww, wd, dd = (sums[..., i] for i in (WW, WD, DD))
    radial = wd / divisor(ww)
    if norm == "free":
        return keep - radial, torch.ones_like(radial)
    size, length = ww.sqrt(), (dd - wd * radial).clamp_min(0).sqrt()
    back = retraction(size, torch.hypot(size, length))
    return (1 - radial) * back, back
