"""Where decay and growth of a scale-invariant weight balance, and the way there.

Sources: [ROT] Kosson et al., Rotational Equilibrium, arXiv 2305.17212; [ES] arXiv 1911.05920. Times
and courses are ours: the same balance, solved in time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from normwise.theory._checks import check, check_below_one, check_positive, checked
from normwise.theory.decay_schedule import sgd_decay_limit

__all__ = [
    "Equilibrium",
    "adamw_angle",
    "adamw_equilibrium",
    "adamw_norms",
    "adamw_time_to_equilibrium",
    "epsilon_shifted_equilibrium",
    "lion_equilibrium_angle",
    "sgd_angle",
    "sgd_equilibrium",
    "sgd_norms",
    "sgd_time_to_equilibrium",
]


@dataclass(frozen=True)
class Equilibrium:
    """Where decay and growth of a scale-invariant weight balance.

    Attributes:
        norm: of the weight.
        angle: the root mean square of the angle that a step turns it by, in radians.
    """

    norm: float
    angle: float


def sgd_equilibrium(
    lr: float, weight_decay: float, gradient_square: float, momentum: float = 0.0
) -> Equilibrium:
    """The equilibrium of SGD with L2 ([ROT]).

    Args:
        lr: η.
        weight_decay: λ.
        gradient_square: E‖g̃‖², the mean squared norm of the gradient at weight norm 1.
        momentum: α (default: 0).

    Raises:
        ValueError: for a number that is not positive, a momentum not in [0, 1), or ηλ above
            (1 − √α)², where the weight swings through zero instead.
    """
    check_positive(lr=lr, weight_decay=weight_decay, gradient_square=gradient_square)
    _check_sgd(lr, weight_decay, momentum)
    return Equilibrium(
        math.sqrt(math.sqrt(lr * gradient_square / (2 * weight_decay * (1 - momentum)))),
        math.sqrt(2 * lr * weight_decay / (1 + momentum)),
    )


def adamw_equilibrium(
    lr: float, weight_decay: float, entries: int, beta1: float = 0.9
) -> Equilibrium:
    """The equilibrium of AdamW ([ROT]) for a weight, or a slice, of so many ``entries``.

    Raises:
        ValueError: for a number that is not positive, a ``beta1`` not in [0, 1), or ηλ of 1 or
            more, with which a step turns the weight around.
    """
    check_positive(lr=lr, weight_decay=weight_decay, entries=entries)
    check_below_one(beta1=beta1)
    _check_decoupled(lr, weight_decay)
    return Equilibrium(
        math.sqrt(lr * entries / (2 * weight_decay)),
        math.sqrt(2 * lr * weight_decay * (1 - beta1) / (1 + beta1)),
    )


def lion_equilibrium_angle(
    lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)
) -> float:
    """The RMS angle a step at the equilibrium of Lion ([ROT]), in radians.

    √(π/2)·√(2ηλ)·[(1 − β1)² + β1²(1 − β2)/(1 + β2)]^½.

    Raises:
        ValueError: for a number that is not positive, a beta not in [0, 1), or ηλ of 1 or more.
    """
    check_positive(lr=lr, weight_decay=weight_decay)
    beta1, beta2 = betas
    check_below_one(beta1=beta1, beta2=beta2)
    _check_decoupled(lr, weight_decay)
    correlation = (1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2)
    return math.sqrt(math.pi / 2 * 2 * lr * weight_decay * correlation)


def epsilon_shifted_equilibrium(
    lr: float, weight_decay: float, eps: float, gradient_square: float
) -> float:
    """The norm k at which SGD with ε-shifted L2 settles: k³(k − ε) = ηE‖g̃‖²/(2λ), so k > ε.

    Args:
        lr: η.
        weight_decay: λ.
        eps: ε, a norm.
        gradient_square: E‖g̃‖², the mean squared norm of the gradient at weight norm 1; 0 gives ε.

    Raises:
        ValueError: for a number that is not positive, or a negative ``gradient_square``.
    """
    check_positive(lr=lr, weight_decay=weight_decay, eps=eps)
    check(gradient_square=gradient_square)
    target = lr * gradient_square / (2 * weight_decay)
    low, high = eps, eps + math.sqrt(math.sqrt(target))  # k = ε + x has k³x ≥ x⁴
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if middle**3 * (middle - eps) < target else (low, middle)
    return high


def sgd_angle(lr: float, norm: float, gradient_square: float, momentum: float = 0.0) -> float:
    """The RMS angle of a step of SGD at any norm, √(η²E‖g̃‖²/(1 − α²))/‖w‖², in radians.

    At the norm of :func:`sgd_equilibrium` it is the angle of the equilibrium.
    """
    check_positive(norm=norm)
    check(lr=lr, gradient_square=gradient_square)
    check_below_one(momentum=momentum)
    return lr * math.sqrt(gradient_square / (1 - momentum**2)) / norm**2


def adamw_angle(lr: float, norm: float, entries: int, beta1: float = 0.9) -> float:
    """The RMS angle of a step of AdamW at any norm, η√(C(1 − β1)/(1 + β1))/‖w‖, in radians."""
    check_positive(norm=norm, entries=entries)
    check(lr=lr)
    check_below_one(beta1=beta1)
    return lr * math.sqrt(entries * (1 - beta1) / (1 + beta1)) / norm


def sgd_time_to_equilibrium(
    lr: float, weight_decay: float, start: float, momentum: float = 0.0, tolerance: float = 0.1
) -> float:
    """The steps until the norm under SGD with L2 is within ``tolerance`` of its equilibrium k.

    With η' = η/(1 − α), y = ‖w‖⁴ obeys y ← (1 − η'λ)⁴y + 2η'²E‖g̃‖² to first order, so its distance
    from k⁴ shrinks by (1 − η'λ)⁴ a step.

    Args:
        lr: η, constant.
        weight_decay: λ.
        start: the norm at the start, over k.
        momentum: α (default: 0).
        tolerance: the relative distance from k that counts as arrived (default: 0.1).

    Raises:
        ValueError: as :func:`sgd_equilibrium`; for a ``tolerance`` not in (0, 1).
    """
    check_positive(lr=lr, weight_decay=weight_decay, start=start)
    _check_sgd(lr, weight_decay, momentum)
    return _steps(lr * weight_decay / (1 - momentum), 4, start, tolerance)


def adamw_time_to_equilibrium(
    lr: float, weight_decay: float, start: float, tolerance: float = 0.1
) -> float:
    """As :func:`sgd_time_to_equilibrium` for AdamW: the distance of ‖w‖² shrinks by (1 − ηλ)²."""
    check_positive(lr=lr, weight_decay=weight_decay, start=start)
    _check_decoupled(lr, weight_decay)
    return _steps(lr * weight_decay, 2, start, tolerance)


def sgd_norms(
    lrs: Iterable[float],
    weight_decay: float,
    gradient_square: float,
    start: float,
    momentum: float = 0.0,
) -> list[float]:
    """The expected norm before each step of SGD with L2, and after the last, under any schedule.

    ‖w‖² ← (1 − η'λ)²‖w‖² + η'²E‖g̃‖²/‖w‖² with η' = η/(1 − α): momentum as if its steps were taken
    at once, so the first 1/(1 − α) steps, in which the buffer fills, are ahead of the truth.

    Args:
        lrs: η of each step.
        weight_decay: λ; 0 is allowed.
        gradient_square: E‖g̃‖², the mean squared norm of the gradient at weight norm 1.
        start: the norm before the first step.
        momentum: α (default: 0).

    Raises:
        ValueError: for a number out of its range, or ηλ above (1 − √α)².
    """
    check(weight_decay=weight_decay, gradient_square=gradient_square)
    check_positive(start=start)
    check_below_one(momentum=momentum)
    squares = [start**2]
    for lr in checked(lrs):
        _check_sgd(lr, weight_decay, momentum)
        rate = lr / (1 - momentum)
        square = squares[-1]
        squares.append((1 - rate * weight_decay) ** 2 * square + rate**2 * gradient_square / square)
    return [math.sqrt(square) for square in squares]


def adamw_norms(
    lrs: Iterable[float], weight_decay: float, entries: int, start: float
) -> list[float]:
    """As :func:`sgd_norms` for AdamW: ‖w‖² ← (1 − ηλ)²‖w‖² + η²C for slices of C ``entries``."""
    check(weight_decay=weight_decay)
    check_positive(start=start, entries=entries)
    squares = [start**2]
    for lr in checked(lrs):
        _check_decoupled(lr, weight_decay)
        squares.append((1 - lr * weight_decay) ** 2 * squares[-1] + lr**2 * entries)
    return [math.sqrt(square) for square in squares]


def _steps(rate: float, power: int, start: float, tolerance: float) -> float:
    """Steps until start^p·(1−rate)^pt + 1 − (1−rate)^pt is (1 ± tolerance)^p."""
    if not 0 < tolerance < 1:
        raise ValueError(f"Invalid tolerance: {tolerance}; must be between 0 and 1")
    distance = abs(start**power - 1)
    allowed = (1 + tolerance) ** power - 1 if start > 1 else 1 - (1 - tolerance) ** power
    if distance <= allowed:
        return 0.0
    return math.log(distance / allowed) / (-power * math.log1p(-rate))


def _check_sgd(lr: float, weight_decay: float, momentum: float) -> None:
    limit = sgd_decay_limit(momentum)
    if lr * weight_decay > limit or lr * weight_decay >= 1:
        raise ValueError(
            f"no equilibrium: lr·weight_decay is {lr * weight_decay:.3g}, above (1 − √momentum)² = "
            f"{limit:.3g} at momentum {momentum}; the weight would swing through zero. Lower one "
            "of the three"
        )


def _check_decoupled(lr: float, weight_decay: float) -> None:
    if lr * weight_decay >= 1:
        raise ValueError(
            f"no equilibrium: lr·weight_decay is {lr * weight_decay:.3g}, and must be below 1"
        )
