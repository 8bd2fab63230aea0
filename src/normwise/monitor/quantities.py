"""What is measured of the slices of weights around one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from normwise.geometry import dot, slice_norms

__all__ = [
    "STANDARD",
    "Aggregate",
    "AngularUpdate",
    "DecayPull",
    "EffectiveLR",
    "GradientCosine",
    "GradientNorm",
    "GradientPush",
    "LargestInverseNorm",
    "Norm",
    "Quantity",
    "RadialShare",
    "ScaledGradient",
    "SmallestNorm",
    "SteppedSlices",
]


@dataclass
class SteppedSlices:
    """Slices of equal length, of one or many weights, before and after one optimizer step.

    All are on the weights' device, in float32 or better; nothing here waits for the device.

    Attributes:
        before: the weights before the step, shape ``(slices, entries)``.
        after: the weights after it.
        gradient: the gradients that the optimizer was given; 0 where there was none.
        lr: the learning rate η of each slice, shape ``(slices,)``, as all that follow.
        decay: by which share the decay alone shortens the slice in this step:
            :attr:`normwise.UpdateRule.shrink`; NaN where that is not known.
        exponent: the power of the norm in the effective learning rate, 2 or 1.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor
    lr: Tensor
    decay: Tensor
    exponent: Tensor

    @cached_property
    def norm_before(self) -> Tensor:
        """‖w‖ before the step."""
        return _norms(self.before)

    @cached_property
    def direction(self) -> Tensor:
        """ŵ before the step, shape ``(slices, entries)``; 0 for a zero slice."""
        return self.before / torch.where(self.norm_before > 0, self.norm_before, 1)[:, None]

    @cached_property
    def norm(self) -> Tensor:
        """‖w‖ after the step."""
        return _norms(self.after)

    @cached_property
    def gradient_norm(self) -> Tensor:
        """‖g‖."""
        return _norms(self.gradient)

    @cached_property
    def update(self) -> Tensor:
        """Δ, what the step added, shape ``(slices, entries)``."""
        return self.after - self.before

    @cached_property
    def update_norm(self) -> Tensor:
        """‖Δ‖."""
        return torch.hypot(self.radial, self.tangential_norm)

    @cached_property
    def radial(self) -> Tensor:
        """⟨ŵ, Δ⟩, the signed length of the part of the step that is parallel to the weight."""
        return dot(self.direction, self.update).squeeze(1)

    @cached_property
    def gradient_radial(self) -> Tensor:
        """⟨ŵ, g⟩: 0 for a scale-invariant slice."""
        return dot(self.direction, self.gradient).squeeze(1)

    @cached_property
    def tangential_norm(self) -> Tensor:
        """The length of the part of the step that turns the weight."""
        rest = torch.addcmul(self.update, self.direction, self.radial[:, None], value=-1)
        return _norms(rest)

    @cached_property
    def growth(self) -> Tensor:
        """‖w'‖/‖w‖ − 1, without the cancellation of subtracting one norm from the other."""
        difference = 2 * self.radial + self.update_norm * (self.update_norm / self.norm_before)
        return difference / (self.norm + self.norm_before)


def _norms(rows: Tensor) -> Tensor:
    """The norm of each row; as :func:`slice_norms`, in one pass where float64 holds the squares."""
    if rows.dtype is torch.float32 and rows.device.type in ("cpu", "cuda"):
        norm: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return norm.float()
    return slice_norms(rows).squeeze(1)


class Aggregate(Enum):
    """How the values of a layer's slices become one."""

    MEAN = "mean"
    RMS = "root mean square"
    GEOMETRIC_MEAN = "geometric mean"
    MIN = "least"
    MAX = "largest"


class Quantity(ABC):
    """One number for each slice, computed where the weights are.

    A quantity of one's own needs a ``name``, how to sum up a layer (``aggregate``, default: the
    mean), and ``__call__``. It is called with many slices of one length together.
    """

    name: str
    aggregate: Aggregate = Aggregate.MEAN

    @abstractmethod
    def __call__(self, s: SteppedSlices) -> Tensor:
        """The value of each slice, shape ``(slices,)``."""


class Norm(Quantity):
    """‖w‖ after the step; of a layer, the geometric mean."""

    name = "norm"
    aggregate = Aggregate.GEOMETRIC_MEAN

    def __call__(self, s: SteppedSlices) -> Tensor:
        return s.norm


class SmallestNorm(Quantity):
    """‖w‖ after the step; of a layer, the least."""

    name = "smallest_norm"
    aggregate = Aggregate.MIN

    def __call__(self, s: SteppedSlices) -> Tensor:
        return s.norm


class LargestInverseNorm(Quantity):
    """1/‖w‖ after the step, by which gradients grow; of a layer, the largest: an overflow gauge."""

    name = "largest_inverse_norm"
    aggregate = Aggregate.MAX

    def __call__(self, s: SteppedSlices) -> Tensor:
        return 1 / s.norm


class EffectiveLR(Quantity):
    """How fast the direction moves: η/‖w‖², or η/‖w‖ where updates are normalized.

    As :func:`normwise.theory.effective_lr`, of the norm before the step, which the step met.
    """

    name = "effective_lr"
    aggregate = Aggregate.GEOMETRIC_MEAN

    def __call__(self, s: SteppedSlices) -> Tensor:
        return s.lr / s.norm_before**s.exponent


class AngularUpdate(Quantity):
    """The angle by which the step turned the slice, in radians; of a layer, root mean square."""

    name = "angular_update"
    aggregate = Aggregate.RMS

    def __call__(self, s: SteppedSlices) -> Tensor:
        # An arc cosine of ⟨ŵ, ŵ'⟩ would have no correct digit for angles below 1e-4 in float32.
        return torch.atan2(s.tangential_norm, s.norm_before + s.radial)


class RadialShare(Quantity):
    """⟨ŵ, Δ⟩²/‖Δ‖²: how much of the step only changes the norm, from 0 to 1."""

    name = "radial_share"

    def __call__(self, s: SteppedSlices) -> Tensor:
        return (s.radial / s.update_norm.clamp(min=torch.finfo(s.radial.dtype).tiny)).square()


class GradientCosine(Quantity):
    """|cos(g, w)|: 0 for a scale-invariant weight; of a layer, the largest, as AdamP's gate."""

    name = "gradient_cosine"
    aggregate = Aggregate.MAX

    def __call__(self, s: SteppedSlices) -> Tensor:
        product = s.gradient_radial
        return (product / s.gradient_norm.clamp(min=torch.finfo(product.dtype).tiny)).abs()


class DecayPull(Quantity):
    """By which share the decay alone shortens the slice in this step."""

    name = "decay_pull"

    def __call__(self, s: SteppedSlices) -> Tensor:
        return s.decay


class GradientPush(Quantity):
    """By which share all but the decay lengthens the slice: at equilibrium, as much as it pulls."""

    name = "gradient_push"

    def __call__(self, s: SteppedSlices) -> Tensor:
        return s.growth + s.decay


class ScaledGradient(Quantity):
    """‖w‖·‖g‖, the norm that a scale-invariant slice's gradient has at weight norm 1."""

    name = "scaled_gradient"
    aggregate = Aggregate.RMS

    def __call__(self, s: SteppedSlices) -> Tensor:
        return s.norm_before * s.gradient_norm


class GradientNorm(Quantity):
    """‖g‖; of a layer, root mean square."""

    name = "gradient_norm"
    aggregate = Aggregate.RMS

    def __call__(self, s: SteppedSlices) -> Tensor:
        return s.gradient_norm


STANDARD: tuple[Quantity, ...] = (
    Norm(),
    EffectiveLR(),
    AngularUpdate(),
    RadialShare(),
    GradientCosine(),
    DecayPull(),
    GradientPush(),
    SmallestNorm(),
    LargestInverseNorm(),
    ScaledGradient(),
    GradientNorm(),
)
"""What a monitor measures unless told otherwise."""
