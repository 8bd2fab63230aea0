"""Weights of few values, with gradients that pass straight through to real ones.

[BC] is BinaryConnect, arXiv 1511.00363; [OFQ] is oscillation-free quantization, arXiv 2302.02210.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from normwise.geometry import View, at_least_float32
from normwise.reparam.parametrizations import (
    WeightParametrization,
    originals,
    owner,
    stacks,
)

__all__ = ["BinaryConnect", "Draw", "Oscillation", "StatsQ", "clip_after_steps"]


class Draw(str, Enum):
    """How :class:`BinaryConnect` chooses a sign."""

    DETERMINISTIC = "deterministic"
    STOCHASTIC = "stochastic"


class BinaryConnect(WeightParametrization):
    r"""Binary weights ±H forward and backward, real ones for the optimizer ([BC]).

    .. math::
        p = \mathrm{clip}\big((w/H + 1)/2,\, 0,\, 1\big)

    Deterministic: H where p ≥ ½, else −H (the official code rounds half to even, and so sends
    w = 0 to −H). Stochastic: H with probability p, drawn anew in every forward pass in training;
    E[W'] = clip(w, −H, H), and in evaluation the weight is that. The gradient at W' is that of w.
    :func:`clip_after_steps` keeps w in [−H, H].

    Every row has the norm H√n, so before a normalization H does not matter. For the analysis the
    weight has no view: its gradient is not orthogonal to it, as only the true one would be.

    Args:
        view: see :class:`WeightParametrization`; the result does not depend on it.
        groups: as ``view``.
        scale: H, or ``None`` for that of Glorot's start, √(1.5/(inputs + outputs)), with the taps
            of a kernel counted (default: 1).
        draw: ``"deterministic"`` (default) or ``"stochastic"``.

    Raises:
        ValueError: for ``scale`` that is not positive and finite, or an unknown ``draw``.

    Source: arXiv 1511.00363, Eqs. 1 to 3 and Algorithm 1.
    """

    def __init__(
        self,
        view: View | None = None,
        *,
        groups: int = 1,
        scale: float | None = 1.0,
        draw: Draw | str = Draw.DETERMINISTIC,
    ) -> None:
        super().__init__(view, groups=groups)
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"Invalid scale: {scale}; must be positive and finite, or None")
        if draw not in list(Draw):
            raise ValueError(f"Invalid draw: {draw!r}; must be 'deterministic' or 'stochastic'")
        self.scale, self.draw = scale, Draw(draw)

    def scale_of(self, w: Tensor) -> float:
        """The H of a weight of this shape: [BC]'s factor on its learning rate is 1/H of Glorot's.

        Args:
            w: the weight.
        """
        if self.scale is not None:
            return self.scale
        taps = math.prod(w.shape[2:])
        return math.sqrt(1.5 / (taps * (w.shape[0] + w.shape[1])))

    def right_inverse(self, w: Tensor) -> Tensor:
        """The weight, clipped to [−H, H]."""
        h = self.scale_of(w)
        return w.clamp(-h, h)

    def _effective(self, w: Tensor, gain: Tensor | None) -> Tensor:
        h = self.scale_of(w)
        if self.draw is Draw.DETERMINISTIC:
            value = torch.where(w >= 0, h, -h).to(w.dtype)
        elif self.training:
            p = ((at_least_float32(w.detach()) / h + 1) / 2).clamp(0, 1)
            value = (h * (2 * torch.bernoulli(p) - 1)).to(w.dtype)
        else:
            value = w.detach().clamp(-h, h)
        return straight_through(value, w)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, draw={self.draw.value!r}"


class StatsQ(WeightParametrization):
    r"""Uniform quantization to 2ᵇ levels, scaled by each row's mean size ([OFQ]'s StatsQ).

    .. math::
        s = 2\,\mathrm{mean}|w|, \quad x = \mathrm{clip}(w/s, -1, 1^-), \quad
        W' = \frac{s}{n}\big(\mathrm{round}(xn - \tfrac12) + \tfrac12\big), \quad n = 2^{b-1}

    The gradient passes straight through inside of the clip, and s has none. Scaling a row scales
    its quantized weight, W'(cw) = c·W'(w), so that before a normalization the function does not
    change: unlike with a learned step size. The straight-through gradient is not orthogonal to w
    all the same, so the analysis gives the weight no view.

    Args:
        view: the slices that have an s each (default: output channels).
        groups: see :class:`WeightParametrization`.
        bits: b, from 1 (default: 2).

    Raises:
        ValueError: for ``bits`` below 1.

    Source: arXiv 2302.02210, its StatsQ, as in the official code.
    """

    def __init__(self, view: View | None = None, *, groups: int = 1, bits: int = 2) -> None:
        super().__init__(view, groups=groups)
        if bits < 1:
            raise ValueError(f"Invalid bits: {bits}; must be 1 or more")
        self.bits = bits

    def levels(self, w: Tensor) -> Tensor:
        """The number of each entry's level, from −2ᵇ⁻¹ to 2ᵇ⁻¹ − 1, of a weight without groups.

        Args:
            w: the weight.
        """
        return self._levels(self._scaled(w)[0])

    def _scaled(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """x before the clip, and s broadcast to the weight's shape."""
        wide = at_least_float32(w)
        slices = self.view.slices(wide.detach())
        scale = 2 * slices.abs().mean(tuple(range(1, slices.ndim)), keepdim=True)
        s = torch.empty_like(wide)
        self.view.slices(s).copy_(scale.expand_as(slices))
        return wide / torch.where(s > 0, s, 1), s

    def _levels(self, x: Tensor) -> Tensor:
        n = 2 ** (self.bits - 1)
        # The clip at 1⁻ is one of the levels, which no rounding of 1 − 10⁻⁶ can miss.
        return torch.round(x.detach() * n - 0.5).clamp(-n, n - 1)

    def _effective(self, w: Tensor, gain: Tensor | None) -> Tensor:
        n = 2 ** (self.bits - 1)
        x, s = self._scaled(w)
        value = s * (self._levels(x) + 0.5) / n
        return straight_through(value.to(w.dtype), (s * x.clamp(-1, 1)).to(w.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


def straight_through(value: Tensor, w: Tensor) -> Tensor:
    """``value`` to the last bit, with the gradient of ``w``."""
    return value.detach() + (w - w.detach())


def clip_after_steps(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Clip the real weights of every :class:`BinaryConnect` to [−H, H] after each step ([BC]).

    Args:
        model: a model with binary weights.
        optimizer: what steps them.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: if the model has none.
    """
    found = [
        (originals(stack)[-1], parametrization)
        for module in model.modules()
        for stack in stacks(module).values()
        if isinstance(parametrization := owner(stack), BinaryConnect)
    ]
    if not found:
        raise ValueError(
            "clip_after_steps finds no binary weight; reparametrize(model, BinaryConnect) first"
        )

    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for w, parametrization in found:
                h = parametrization.scale_of(w)
                w.clamp_(-h, h)

    return optimizer.register_step_post_hook(clip)


class Oscillation:
    r"""How often each entry of a quantized weight turns back to the level that it came from.

    An average with weight ``momentum`` of 1[the level changed now, in the direction opposite to its
    last change]: 0 for a weight that rests or drifts, near 1 for one that alternates. It is a
    measure of any quantizer ([OFQ], and its references).

    Args:
        momentum: the weight of a new step (default: 0.01).

    Raises:
        ValueError: for ``momentum`` outside of (0, 1].

    Source: arXiv 2302.02210, as in the official code.
    """

    def __init__(self, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"Invalid momentum: {momentum}; must be above 0 and at most 1")
        self.momentum = momentum
        self._levels: Tensor | None = None
        self._last: Tensor | None = None
        self._average: Tensor | None = None

    @torch.no_grad()
    def update(self, levels: Tensor) -> Tensor:
        """Take the levels after one more step.

        Args:
            levels: numbers of levels, or quantized weights of a fixed step size.

        Returns:
            The average.
        """
        if self._levels is None or self._last is None or self._average is None:
            self._last = torch.zeros_like(levels)
            self._average = torch.zeros(levels.shape, device=levels.device)
        else:
            direction = torch.sign(levels - self._levels)
            turned = (direction * self._last < 0).to(self._average.dtype)
            self._average.lerp_(turned, self.momentum)
            self._last = torch.where(direction != 0, direction, self._last)
        self._levels = levels.clone()
        return self._average.clone()
