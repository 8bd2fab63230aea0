"""How norms grow and shrink, what that does to the learning rate, and when a range ends.

Source: [AdamP] arXiv 2006.08217, Lemmas 2.1 and 2.2 and their corollary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from normwise.theory._checks import check, check_below_one, check_positive
from normwise.updates import Update

__all__ = [
    "Update",
    "effective_lr",
    "growth_ratio",
    "momentum_norms",
    "norm_range",
    "steps_to_norm",
]

Number = TypeVar("Number", float, Tensor)


def effective_lr(lr: Number, norm: Number, update: Update) -> Number:
    """How fast the direction of a scale-invariant weight moves: η/‖w‖², or η/‖w‖ (normalized).

    Of relative steps (:func:`normwise.sphere`) it is η.

    The direction of w turns by the length of the update over ‖w‖, and an update that is a gradient
    is itself shorter by ‖w‖ ([AdamP], Section 2.3). [ES] arXiv 1911.05920 takes η/‖w‖ for SGD too,
    which is wrong.

    Args:
        lr: η.
        norm: ‖w‖, above 0; a number or a tensor of any shape.
        update: what sets the length of the optimizer's updates.

    Returns:
        A number, or a tensor of the shape of ``norm``.
    """
    return lr / norm**update.exponent


def momentum_norms(
    update_squares: Iterable[float] | Tensor,
    lr: float | Sequence[float],
    start: float | Tensor,
    momentum: float = 0.0,
) -> Tensor:
    """The norms of a scale-invariant weight under SGD without decay ([AdamP], Lemmas 2.1 and 2.2).

    With p_t = βp_{t−1} + g_t and w_{t+1} = w_t − ηp_t,

        ‖w_{t+1}‖² = ‖w_t‖² + η²‖p_t‖² + 2η² Σ_{k<t} β^{t−k}‖p_k‖²,

    exactly, as ⟨w, g⟩ = 0; without momentum only the first sum is left (Lemma 2.1). Under a
    schedule 2η² becomes 2η_t·η_k.

    Args:
        update_squares: ‖p_t‖² of each step, numbers or a tensor of shape ``(steps, ...)``.
        lr: η, or that of each step.
        start: ‖w_0‖, a number or a tensor of the trailing shape.
        momentum: β, without dampening or Nesterov (default: 0).

    Returns:
        ‖w_t‖ before each step and after the last, in float64, shape ``(steps + 1, ...)``.

    Raises:
        ValueError: for a momentum not in [0, 1), or learning rates that are not one per step.
    """
    check_below_one(momentum=momentum)
    squares = torch.as_tensor(
        update_squares if isinstance(update_squares, Tensor) else list(update_squares),
        dtype=torch.float64,
    )
    lrs = [lr] * len(squares) if isinstance(lr, int | float) else list(lr)
    if len(lrs) != len(squares):
        raise ValueError(
            f"{len(lrs)} learning rates for {len(squares)} steps; must be one per step"
        )
    square = torch.as_tensor(start, dtype=torch.float64) ** 2
    past = torch.zeros_like(squares[0]) if len(squares) else square  # Σ_{k<t} η_k β^{t−k}‖p_k‖²
    trajectory = [square]
    for rate, p in zip(lrs, squares, strict=True):
        trajectory.append(trajectory[-1] + rate**2 * p + 2 * rate * past)
        past = momentum * (past + rate * p)
    trajectory[0] = trajectory[0].expand(trajectory[-1].shape)
    return torch.stack(trajectory).sqrt()


def growth_ratio(momentum: float, steps: int | None = None) -> float:
    """How much more ‖w‖² grows with momentum than without, for updates of equal length.

    1 + 2β/(1 − β), 19 at β = 0.9, in the limit of many steps ([AdamP], Corollary of Lemma 2.2). It
    compares sums over one sequence of updates, not two runs.

    Args:
        momentum: β.
        steps: how many (default: the limit).

    Returns:
        The ratio, 1 or more.

    Raises:
        ValueError: for a momentum not in [0, 1), or fewer steps than 1.
    """
    check_below_one(momentum=momentum)
    limit = 1 + 2 * momentum / (1 - momentum)
    if steps is None:
        return limit
    if steps < 1:
        raise ValueError(f"Invalid steps: {steps}; must be 1 or more")
    # Σ_t Σ_{1≤j≤t} β^j over t < T, twice, over T.
    return limit - 2 * momentum * (1 - momentum**steps) / ((1 - momentum) ** 2 * steps)


def norm_range(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and the largest norm with which ``dtype`` can compute.

    Below the smallest, 1/‖w‖, by which gradients and effective learning rates grow, is infinite in
    ``dtype``, or ‖w‖² is no normal number in the float32 or better in which norms are taken. So it
    is 1/65504 for float16 and 1.1e-19 for float32. Above the largest, an entry or ‖w‖² overflows.

    Args:
        dtype: a floating-point dtype.

    Returns:
        Both norms.
    """
    info = torch.finfo(dtype)
    sums = torch.finfo(torch.promote_types(dtype, torch.float32))
    return max(1 / info.max, math.sqrt(sums.tiny)), min(info.max, math.sqrt(sums.max))


def steps_to_norm(norm: float, target: float, growth: float) -> float:
    """The steps until a norm that is multiplied by ``growth`` in every step reaches ``target``.

    With ``growth = 1 − ηλ``, a dead slice's under decay, and ``target = norm_range(dtype)[0]`` it
    is the time until 1/‖w‖ overflows.

    Args:
        norm: at the start.
        target: the norm to reach.
        growth: the factor per step, 0 or more.

    Returns:
        The number of steps; 0 if it is there already, infinity if it is not going there.

    Raises:
        ValueError: for a norm or target that is not positive, or a negative growth.
    """
    check_positive(norm=norm, target=target)
    check(growth=growth)
    distance = math.log(target / norm)
    if distance == 0:
        return 0.0
    speed = math.log(growth) if growth else -math.inf
    return distance / speed if distance * speed > 0 else math.inf
