"""Closed forms for scale-invariant weights: decay as a learning-rate schedule, and equilibrium.

Only the direction of such a weight matters. Weight decay changes its norm alone, so a run with
decay takes the same directions as one without it whose learning rates grow. Sources: [ES] arXiv
1911.05920, Theorem 1; [EXP] Li and Arora, arXiv 1910.07454; [ROT] Kosson et al., arXiv 2305.17212.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

__all__ = [
    "AdamWWithoutDecay",
    "Equilibrium",
    "SGDWithoutDecay",
    "adamw_equilibrium",
    "adamw_without_decay",
    "epsilon_shifted_equilibrium",
    "sgd_equilibrium",
    "sgd_without_decay",
]


@dataclass(frozen=True)
class SGDWithoutDecay:
    """Learning rates that give SGD without decay the directions of SGD with it.

    Attributes:
        lrs: the learning rate of each step, η̃_t.
        scales: the norm without decay over the norm with it, before each step and after the last:
            one more than ``lrs``.
    """

    lrs: tuple[float, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class AdamWWithoutDecay:
    """Settings that give Adam without decay the directions of AdamW, both with eps = 0.

    The moments are m ← (β1·r)m + (1 − β1)g and v ← (β2·r²)v + (1 − β2)g², with r of the step:
    ``decay_factors``. The input coefficients and the bias corrections stay those of β1 and β2.

    Attributes:
        lrs: the learning rate of each step.
        scales: as of :class:`SGDWithoutDecay`.
        decay_factors: r of each step; that of the first step multiplies zero.
    """

    lrs: tuple[float, ...]
    scales: tuple[float, ...]
    decay_factors: tuple[float, ...]


def sgd_without_decay(
    lrs: Iterable[float],
    weight_decay: float,
    momentum: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> SGDWithoutDecay:
    """Replace the L2 of SGD on scale-invariant weights by a schedule ([ES] Theorem 1, [EXP]).

    With P_0 = 1 and P_{t+1} = P_t/α_t the learning rates are η̃_t = P_t·P_{t+1}·η_t. Without
    momentum α_t = 1 − η_t·λ; with momentum γ, in torch's convention in both runs (the buffer
    holds gradients, the learning rate stays outside, no dampening, no Nesterov),
    α_t = 1 − η_t·λ + (η_t/η_{t−1})·γ·(1 − 1/α_{t−1}), and no γ term in the first step.

    Args:
        lrs: the learning rate of each step of the run with decay.
        weight_decay: its λ.
        momentum: γ (default: 0).
        dtype: that of the run without decay; its norms grow without bound and must fit
            (default: float32).

    Raises:
        ValueError: for a learning rate that is negative, or 0 before the last step with momentum;
            where α is not positive, so that the direction would flip (with a constant η that
            comes beyond ηλ = (1 − √γ)²); or where a scale or rate is too large for ``dtype``.
    """
    _check(weight_decay=weight_decay, momentum=momentum)
    if momentum >= 1:
        raise ValueError(f"Invalid momentum: {momentum}; must be below 1")
    scales, rates = [1.0], []
    previous_lr, previous_alpha = 1.0, 1.0  # of an empty buffer: 1 − 1/α is 0
    for t, lr in enumerate(_checked(lrs)):
        if momentum and previous_lr == 0:
            raise ValueError(f"no schedule is equivalent: the learning rate of step {t - 1} is 0")
        alpha = 1 - lr * weight_decay
        if momentum:
            alpha += lr / previous_lr * momentum * (1 - 1 / previous_alpha)
        if alpha <= 0:
            most = (1 - math.sqrt(momentum)) ** 2
            raise ValueError(
                f"no schedule is equivalent: at step {t} the direction would flip "
                f"(α = {alpha:.3g}); with momentum {momentum} a constant lr·weight_decay must not "
                f"be above {most:.3g}, and here it is {lr * weight_decay:.3g}"
            )
        scales.append(scales[-1] / alpha)
        rates.append(scales[-2] * scales[-1] * lr)
        _check_range(t, max(scales[-1], rates[-1]), dtype)
        previous_lr, previous_alpha = lr, alpha
    return SGDWithoutDecay(tuple(rates), tuple(scales))


def adamw_without_decay(
    lrs: Iterable[float], weight_decay: float, dtype: torch.dtype = torch.float32
) -> AdamWWithoutDecay:
    """Replace the decoupled decay of AdamW (eps = 0) on scale-invariant weights by a schedule.

    With r_t = 1 − η_t·λ, P_0 = 1 and P_{t+1} = P_t/r_t, the learning rates are η̃_t = P_{t+1}·η_t,
    η/r^{t+1} for a constant η, and step t multiplies β1 and β2 by r_{t−1} and its square in the
    moments: the gradient at the larger weight is smaller by P_t.

    Args:
        lrs: the learning rate of each step of the run with decay.
        weight_decay: its λ.
        dtype: that of the run without decay (default: float32).

    Raises:
        ValueError: for a negative learning rate, ηλ of 1 or more, or where a scale or rate is too
            large for ``dtype``.
    """
    _check(weight_decay=weight_decay)
    scales, rates, factors = [1.0], [], [1.0]
    for t, lr in enumerate(_checked(lrs)):
        r = 1 - lr * weight_decay
        if r <= 0:
            raise ValueError(
                f"no schedule is equivalent: lr·weight_decay is {lr * weight_decay:.3g} at step "
                f"{t}, and must be below 1"
            )
        scales.append(scales[-1] / r)
        rates.append(scales[-1] * lr)
        factors.append(r)
        _check_range(t, max(scales[-1], rates[-1]), dtype)
    return AdamWWithoutDecay(tuple(rates), tuple(scales), tuple(factors[:-1]))


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
        ValueError: for a number that is not positive, or a momentum not in [0, 1).
    """
    _check_positive(lr=lr, weight_decay=weight_decay, gradient_square=gradient_square)
    if not 0 <= momentum < 1:
        raise ValueError(f"Invalid momentum: {momentum}; must be from 0 to below 1")
    return Equilibrium(
        math.sqrt(math.sqrt(lr * gradient_square / (2 * weight_decay * (1 - momentum)))),
        math.sqrt(2 * lr * weight_decay / (1 + momentum)),
    )


def adamw_equilibrium(
    lr: float, weight_decay: float, entries: int, beta1: float = 0.9
) -> Equilibrium:
    """The equilibrium of AdamW ([ROT]) for a weight, or a slice, of so many ``entries``.

    Raises:
        ValueError: for a number that is not positive, or a ``beta1`` not in [0, 1).
    """
    _check_positive(lr=lr, weight_decay=weight_decay, entries=entries)
    if not 0 <= beta1 < 1:
        raise ValueError(f"Invalid beta1: {beta1}; must be from 0 to below 1")
    return Equilibrium(
        math.sqrt(lr * entries / (2 * weight_decay)),
        math.sqrt(2 * lr * weight_decay * (1 - beta1) / (1 + beta1)),
    )


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
    _check_positive(lr=lr, weight_decay=weight_decay, eps=eps)
    _check(gradient_square=gradient_square)
    target = lr * gradient_square / (2 * weight_decay)
    low, high = eps, eps + math.sqrt(math.sqrt(target))  # k = ε + x has k³x ≥ x⁴
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if middle**3 * (middle - eps) < target else (low, middle)
    return high


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"Invalid {name}: {value}; must be finite and 0 or more")


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"Invalid {name}: {value}; must be finite and above 0")


def _checked(lrs: Iterable[float]) -> Iterator[float]:
    for t, lr in enumerate(lrs):
        _check(**{f"learning rate at step {t}": lr})
        yield lr


def _check_range(t: int, largest: float, dtype: torch.dtype) -> None:
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"the run without decay outgrows {dtype} at step {t}: its norms and learning rates "
            "grow without bound; end it earlier, or rescale the weights there and begin again"
        )
