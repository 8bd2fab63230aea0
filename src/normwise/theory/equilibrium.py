"""Where decay and growth of a scale-invariant weight balance, and the way there.

Sources: [ROT] Kosson et al., Rotational Equilibrium, arXiv 2305.17212; [ES] arXiv 1911.05920. The
equilibria of projected and of orthogonalized updates, and all times and trajectories, are ours: the
same balance, solved in time.

Let δ be the share by which decay alone shortens a weight in one step, and let an update be
Σ c_k·g_{t−k} over past gradients that are independent. One gradient comes to Σc_k in the end, so
that ‖w‖² grows by η²(Σc_k)²‖g‖² per step and shrinks by 2δ‖w‖²; a step turns the weight by
η²Σc_k²‖g‖²/‖w‖². A projected step adds the square of its own length alone, Σc_k² in place of
(Σc_k)².
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from normwise.theory._checks import check, check_below_one, check_positive, checked
from normwise.theory.decay_schedule import sgd_decay_limit
from normwise.theory.orthogonalized import mean_square_singular_value, summed_overlaps
from normwise.updates import Coupling, Update, UpdateRule

__all__ = [
    "Equilibrium",
    "adamw_angle",
    "adamw_equilibrium",
    "adamw_norms",
    "adamw_time_to_equilibrium",
    "angle_at",
    "epsilon_shifted_equilibrium",
    "equilibrium_of",
    "lion_equilibrium_angle",
    "norm_after",
    "norm_trajectory",
    "sgd_angle",
    "sgd_equilibrium",
    "sgd_norms",
    "sgd_time_to_equilibrium",
    "time_to_equilibrium",
]


@dataclass(frozen=True)
class Equilibrium:
    """Where decay and growth of a scale-invariant weight balance.

    Attributes:
        norm: of the weight.
        angle: the root mean square of the angle per step, in radians.
    """

    norm: float
    angle: float


def equilibrium_of(
    rule: UpdateRule,
    *,
    gradient_square: float = math.nan,
    entries: int = 0,
    shape: Sequence[int] = (),
) -> Equilibrium:
    """The equilibrium of a slice of a scale-invariant weight; NaN for what has no closed form.

    Without projection θ² = 2δ·Σc_k²/(Σc_k)². A projected step grows ‖w‖² by the square of its own
    length alone, so that θ² = 2δ; and its buffer loses what the weight turns away from, so that
    ‖p⊥‖² is 1 + κ² times smaller, κ = μθ/(1 − μ).

    ============== ============================ =====================================
    update         norm                         θ², not projected
    ============== ============================ =====================================
    gradient       ‖w‖⁴ = η²S·E‖g̃‖²/(2δ)        2δ(1 − μ)/(1 + μ)
    normalized     ‖w‖² = η²S·C/(2δ)            2δ(1 − β1)/(1 + β1)
    sign           not known                    see :func:`lion_equilibrium_angle`
    orthogonalized ‖w‖² = η²s²K·C/(2δ·max(m, n)) 2δ/K
    ============== ============================ =====================================

    S is (Σc_k)², or Σc_k²/(1 + κ²) if projected; s² is the mean square of the update's singular
    values, and K sums the overlaps of the updates of an m×n matrix, see
    :mod:`normwise.theory.orthogonalized`. All is to first order in δ.

    Args:
        rule: as of :func:`normwise.describe`, without tensors (:meth:`UpdateRule.converted`). Of
            one with a gate, first say whether it holds (:meth:`UpdateRule.with_gate`).
        gradient_square: E‖g̃‖², the mean squared norm of the slice's gradient at weight norm 1; of
            ``Update.GRADIENT`` only (default: not known).
        entries: C, of the slice; of the other updates (default: not known).
        shape: of the matrix that is orthogonalized (default: not known).

    Returns:
        The norm, and the RMS angle per step. Infinite and 0 without decay. NaN where no closed form
        is known, as with a fixed norm, L2 of normalized updates, or unknown optimizers. Of relative
        steps on a fixed norm, whatever it is, the angle is η, or arctan η where the step leads off
        the sphere and back. That takes steps to be tangential; momentum leads outward, so that they
        turn by less, to second order in μη/(1 − μ).

    Raises:
        ValueError: for δ of 1 or more, or L2 with ηλ above (1 − √μ)², where the weight swings
            through zero instead; for numbers out of their range.
    """
    if rule.norm == "fixed":
        return Equilibrium(math.nan, _relative_angle(rule))
    decay, lr = _number(rule.shrink), _number(rule.lr)
    if decay == 0 and rule.coupling in (Coupling.L2, Coupling.DECOUPLED, Coupling.NONE):
        return Equilibrium(math.inf, 0.0)
    if not (decay > 0 and lr > 0) or rule.is_projected is None:
        return Equilibrium(math.nan, math.nan)
    _check_decay(rule)
    squared_angle = 2 * decay if rule.is_projected else 2 * decay / _correlation(rule, shape)
    growth = _growth(rule, gradient_square, entries, shape, squared_angle)
    norm = (growth / (2 * decay)) ** (1 / _power(rule))
    return Equilibrium(norm, math.sqrt(squared_angle))


def time_to_equilibrium(rule: UpdateRule, start: float, tolerance: float = 0.1) -> float:
    """The steps until a norm is within ``tolerance`` of its equilibrium k, at a constant η.

    To first order the distance of ‖w‖⁴ from k⁴ shrinks by (1 − δ)⁴ per step where updates are
    gradients, and that of ‖w‖² by (1 − δ)² where they have a length of their own; δ is ``wd_ratio``
    times smaller where a step is projected.

    Args:
        rule: as of :func:`equilibrium_of`.
        start: the norm at the start, over k.
        tolerance: the relative distance from k that counts as arrived (default: 0.1).

    Returns:
        The number of steps: 0 from within the tolerance, infinity without decay, NaN where no
        closed form is known.

    Raises:
        ValueError: as :func:`equilibrium_of`; for a ``tolerance`` not in (0, 1).
    """
    check_positive(start=start)
    decay = _number(rule.shrink)
    if rule.update.is_relative:
        return 0.0 if rule.norm == "fixed" else math.nan
    if not decay > 0 or rule.is_projected is None or rule.norm == "fixed":
        return math.inf if decay == 0 else math.nan
    _check_decay(rule)
    return _steps(decay, _power(rule), start, tolerance)


def norm_after(
    rule: UpdateRule,
    norm: float,
    steps: int,
    *,
    gradient_square: float = math.nan,
    entries: int = 0,
    shape: Sequence[int] = (),
) -> float:
    """The expected norm some steps on, at a constant η: :func:`norm_trajectory` in closed form.

    With p = 4 where updates are gradients and 2 where they have a length of their own, ‖w‖^p
    relaxes by (1 − δ)^p per step towards that of the equilibrium; without decay it grows evenly.
    What projected steps add changes with the norm, so that a path of theirs is halved until each
    part changes it by little.

    Args:
        rule: as of :func:`equilibrium_of`.
        norm: now.
        steps: how many.
        gradient_square: as of :func:`equilibrium_of`.
        entries: as of :func:`equilibrium_of`.
        shape: as of :func:`equilibrium_of`.

    Returns:
        The norm; NaN where no closed form is known.

    Raises:
        ValueError: as :func:`equilibrium_of`; for a norm that is not positive.
    """
    check_positive(norm=norm)
    if rule.norm == "fixed":
        return norm
    if rule.is_projected is None:
        return math.nan
    _check_decay(rule)
    power = _power(rule)
    growth = _growth(rule, gradient_square, entries, shape, 0.0)
    # Per step, of ‖w‖^p.
    added = power / 2 * _added(growth / norm**power, _turning(rule)) * norm**power
    kept = (1 - _number(rule.shrink)) ** power
    left: float = kept**steps
    total = added * (steps if kept == 1 else (1 - left) / (1 - kept))
    result: float = (norm**power * left + total) ** (1 / power)
    if rule.is_projected and steps > 1 and abs(result / norm - 1) > 0.05:
        known: dict[str, Any] = {
            "gradient_square": gradient_square,
            "entries": entries,
            "shape": shape,
        }
        half = norm_after(rule, norm, steps // 2, **known)
        return norm_after(rule, half, steps - steps // 2, **known)
    return result


def angle_at(
    rule: UpdateRule,
    norm: float,
    *,
    gradient_square: float = math.nan,
    entries: int = 0,
    shape: Sequence[int] = (),
) -> float:
    """The RMS angle per step at any norm, in radians; at that of the equilibrium it is its angle.

    Args:
        rule: as of :func:`equilibrium_of`; its decay does not matter.
        norm: ‖w‖.
        gradient_square: as of :func:`equilibrium_of`.
        entries: as of :func:`equilibrium_of`.
        shape: as of :func:`equilibrium_of`.

    Returns:
        The angle; NaN where no closed form is known.

    Raises:
        ValueError: for a norm that is not positive.
    """
    check_positive(norm=norm)
    if rule.update.is_relative:
        return _relative_angle(rule)
    if rule.is_projected is None:
        return math.nan
    growth = _growth(rule, gradient_square, entries, shape, 0.0)
    added = _added(growth / norm ** _power(rule), _turning(rule))
    return math.sqrt(added if rule.is_projected else added / _correlation(rule, shape))


def norm_trajectory(
    rule: UpdateRule,
    lrs: Iterable[float],
    start: float,
    *,
    gradient_square: float = math.nan,
    entries: int = 0,
    shape: Sequence[int] = (),
) -> list[float]:
    """The expected norm before each step, and after the last, under any schedule of η.

    ‖w‖² ← (1 − δ_t)²‖w‖² + what the step adds. Momentum is taken as if its steps came at once, so
    that the first 1/(1 − μ) steps, in which the buffer fills, are ahead of the truth.

    Args:
        rule: as of :func:`equilibrium_of`; its own η does not matter.
        lrs: η of each step.
        start: the norm before the first step.
        gradient_square: as of :func:`equilibrium_of`.
        entries: as of :func:`equilibrium_of`.
        shape: as of :func:`equilibrium_of`.

    Returns:
        One norm more than there are learning rates; NaN where no closed form is known.

    Raises:
        ValueError: as :func:`equilibrium_of`.
    """
    check_positive(start=start)
    rates = list(checked(lrs))
    if rule.update.is_relative:
        return [start if rule.norm == "fixed" else math.nan] * (len(rates) + 1)
    decay = _number(rule.shrink_per_lr)
    peak = max(rates, default=0.0)
    _check_decay(replace(rule, lr=peak, decay_per_step=peak * _number(rule.weight_decay)))
    growth = _growth(replace(rule, lr=1.0), gradient_square, entries, shape, 0.0)
    half, turning = rule.update.exponent, _turning(rule)
    squares = [start**2]
    for lr in rates:
        square = squares[-1]
        added = _added(lr**2 * growth / square**half, turning)
        squares.append(((1 - lr * decay) ** 2 + added) * square)
    return [math.sqrt(square) for square in squares]


def _relative_angle(rule: UpdateRule) -> float:
    """The angle of a step whose length is a share of the norm; NaN of any other."""
    lr = _number(rule.lr)
    if rule.update is Update.ROTATION:
        return lr
    return math.atan(lr) if rule.update is Update.RELATIVE else math.nan


def _turning(rule: UpdateRule) -> float:
    """κ/θ, of what a buffer loses as the weight turns away from it: 0 without projection."""
    mu = _number(rule.momentum)
    return mu / (1 - mu) if rule.is_projected else 0.0


def _added(ratio: float, turning: float) -> float:
    """What a step adds to ‖w‖², over ‖w‖², if it is ``ratio`` where the weight stands still.

    Projected it is θ² with θ²(1 + κ²) = ratio.
    """
    return 2 * ratio / (1 + math.sqrt(1 + 4 * turning**2 * ratio)) if turning else ratio


def _power(rule: UpdateRule) -> int:
    """That of the norm which relaxes exponentially: 4, or 2 where updates have a length."""
    return 2 * rule.update.exponent


def _correlation(rule: UpdateRule, shape: Sequence[int]) -> float:
    """(Σc_k)²/Σc_k²: how much longer updates are together than if they were independent."""
    mu = _number(rule.momentum)
    if rule.update is Update.ORTHOGONALIZED:
        if len(shape) != 2:
            return math.nan
        return summed_overlaps(_kernel(mu, rule.nesterov), (shape[0], shape[1]), rule.newton_schulz)
    if rule.update is Update.SIGN:
        beta1, beta2 = (_number(beta) for beta in rule.betas) if rule.betas else (math.nan,) * 2
        check_below_one(beta1=beta1, beta2=beta2)
        correlation = (1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2)
        return 1 / (math.pi / 2 * correlation)
    if rule.update is Update.UNKNOWN or math.isnan(rule.scale) or (rule.nesterov and mu):
        return math.nan
    return (1 + mu) / (1 - mu)


def _growth(
    rule: UpdateRule,
    gradient_square: float,
    entries: int,
    shape: Sequence[int],
    squared_angle: float,
) -> float:
    """What a step adds to ‖w‖² in the end, at weight norm 1; NaN where it is not known."""
    mu, unit = _number(rule.momentum), _number(rule.lr) * rule.scale
    if rule.update is Update.GRADIENT:
        size = gradient_square * ((1 - _number(rule.dampening)) / (1 - mu)) ** 2
    elif rule.update is Update.NORMALIZED:
        size = entries or math.nan
    elif rule.update is Update.ORTHOGONALIZED and len(shape) == 2 and not rule.is_projected:
        singular = mean_square_singular_value((shape[0], shape[1]), rule.newton_schulz)
        size = (entries or math.nan) * singular / max(shape) * _correlation(rule, shape)
    else:
        return math.nan
    if rule.is_projected:
        kappa = _turning(rule) * math.sqrt(squared_angle)
        size /= _correlation(rule, shape) * (1 + kappa**2)
    return unit**2 * size


def _kernel(momentum: float, nesterov: bool) -> list[float]:
    """c_k of an update from a buffer that averages, as far as it counts."""
    if momentum == 0:
        return [1.0]
    count = math.ceil(math.log(1e-6) / math.log(momentum))
    shift = 1 if nesterov else 0
    first = 1 + momentum if nesterov else 1.0
    return [first, *(momentum ** (k + shift) for k in range(1, count))]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _check_decay(rule: UpdateRule) -> None:
    """Raise ValueError where a step takes more of a weight than the closed forms hold for."""
    mu, term = _number(rule.momentum), _number(rule.decay_per_step)
    if rule.coupling is Coupling.L2 and rule.update is Update.GRADIENT:
        _check_sgd(term * (1 - _number(rule.dampening)), 1.0, mu)
    elif rule.coupling is Coupling.DECOUPLED:
        _check_decoupled(_number(rule.shrink), 1.0)


_SGD = UpdateRule("SGD", Update.GRADIENT, 1.0, scale=1.0, coupling=Coupling.L2)
_ADAMW = UpdateRule("AdamW", Update.NORMALIZED, 1.0, scale=1.0, coupling=Coupling.DECOUPLED)


def _decayed(rule: UpdateRule, lr: float, weight_decay: float, momentum: float) -> UpdateRule:
    decay = lr * weight_decay
    return replace(rule, lr=lr, momentum=momentum, weight_decay=weight_decay, decay_per_step=decay)


def _sgd(lr: float, weight_decay: float, momentum: float) -> UpdateRule:
    check_below_one(momentum=momentum)
    return _decayed(_SGD, lr, weight_decay, momentum)


def _adamw(lr: float, weight_decay: float, beta1: float) -> UpdateRule:
    check_below_one(beta1=beta1)
    return _decayed(_ADAMW, lr, weight_decay, beta1)


def sgd_equilibrium(
    lr: float, weight_decay: float, gradient_square: float, momentum: float = 0.0
) -> Equilibrium:
    """The equilibrium of SGD with L2 ([ROT]): norm (ηE‖g̃‖²/(2λ(1−α)))^¼, angle √(2ηλ/(1+α)).

    Args:
        lr: η.
        weight_decay: λ.
        gradient_square: E‖g̃‖², the mean squared norm of the gradient at weight norm 1.
        momentum: α (default: 0).

    Returns:
        The norm, and the RMS angle per step in radians.

    Raises:
        ValueError: for a number that is not positive, a momentum not in [0, 1), or ηλ above
            (1 − √α)², where the weight swings through zero instead.
    """
    check_positive(lr=lr, weight_decay=weight_decay, gradient_square=gradient_square)
    return equilibrium_of(_sgd(lr, weight_decay, momentum), gradient_square=gradient_square)


def adamw_equilibrium(
    lr: float, weight_decay: float, entries: int, beta1: float = 0.9
) -> Equilibrium:
    """The equilibrium of AdamW ([ROT]): norm √(ηC/2λ), angle √(2ηλ(1−β1)/(1+β1)).

    Args:
        lr: η.
        weight_decay: λ.
        entries: C, of a weight or a slice.
        beta1: β1 (default: 0.9).

    Returns:
        The norm, and the RMS angle per step in radians.

    Raises:
        ValueError: for a number that is not positive, a ``beta1`` not in [0, 1), or ηλ of 1 or
            more, with which a step turns the weight around.
    """
    check_positive(lr=lr, weight_decay=weight_decay, entries=entries)
    return equilibrium_of(_adamw(lr, weight_decay, beta1), entries=entries)


def lion_equilibrium_angle(
    lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)
) -> float:
    """The RMS angle per step at the equilibrium of Lion ([ROT]), in radians.

    √(π/2)·√(2ηλ)·[(1 − β1)² + β1²(1 − β2)/(1 + β2)]^½.

    Args:
        lr: η.
        weight_decay: λ.
        betas: β1 and β2 (default: 0.9 and 0.99).

    Returns:
        The angle in radians.

    Raises:
        ValueError: for a number that is not positive, a beta not in [0, 1), or ηλ of 1 or more.
    """
    check_positive(lr=lr, weight_decay=weight_decay)
    lion = UpdateRule("Lion", Update.SIGN, 1.0, betas=betas, coupling=Coupling.DECOUPLED)
    return equilibrium_of(_decayed(lion, lr, weight_decay, 0.0)).angle


def epsilon_shifted_equilibrium(
    lr: float, weight_decay: float, eps: float, gradient_square: float
) -> float:
    """The norm k at which SGD with ε-shifted L2 settles: k³(k − ε) = ηE‖g̃‖²/(2λ), so k > ε.

    Args:
        lr: η.
        weight_decay: λ.
        eps: ε, as a norm.
        gradient_square: E‖g̃‖², the mean squared norm of the gradient at weight norm 1.

    Returns:
        k.

    Raises:
        ValueError: for a number that is not positive.
    """
    check_positive(lr=lr, weight_decay=weight_decay, eps=eps)
    check(gradient_square=gradient_square)
    target = lr * gradient_square / (2 * weight_decay)
    low, high = eps, eps + math.sqrt(math.sqrt(target))  # k = ε + x has k³x ≥ x⁴
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if middle**3 * (middle - eps) < target else (low, middle)
    return high


def sgd_angle(lr: float, norm: float, gradient_square: float, momentum: float = 0.0) -> float:
    """The RMS angle per step of SGD at any norm, √(η²E‖g̃‖²/(1 − α²))/‖w‖², in radians.

    At the norm of :func:`sgd_equilibrium` it is the angle of the equilibrium.

    Args:
        lr: η; 0 is allowed.
        norm: ‖w‖.
        gradient_square: E‖g̃‖², the mean squared norm of the gradient at weight norm 1.
        momentum: α (default: 0).

    Returns:
        The angle in radians.

    Raises:
        ValueError: for a number out of its range.
    """
    check(lr=lr, gradient_square=gradient_square)
    return angle_at(_sgd(lr, 0.0, momentum), norm, gradient_square=gradient_square)


def adamw_angle(lr: float, norm: float, entries: int, beta1: float = 0.9) -> float:
    """The RMS angle per step of AdamW at any norm, η√(C(1 − β1)/(1 + β1))/‖w‖, in radians.

    Args:
        lr: η; 0 is allowed.
        norm: ‖w‖.
        entries: C, of a weight or a slice.
        beta1: β1 (default: 0.9).

    Returns:
        The angle in radians.

    Raises:
        ValueError: for a number out of its range.
    """
    check_positive(entries=entries)
    check(lr=lr)
    return angle_at(_adamw(lr, 0.0, beta1), norm, entries=entries)


def sgd_time_to_equilibrium(
    lr: float, weight_decay: float, start: float, momentum: float = 0.0, tolerance: float = 0.1
) -> float:
    """The steps until the norm under SGD with L2 is within ``tolerance`` of its equilibrium k.

    See :func:`time_to_equilibrium`; δ = ηλ/(1 − α).

    Args:
        lr: η, constant.
        weight_decay: λ.
        start: the norm at the start, over k.
        momentum: α (default: 0).
        tolerance: the relative distance from k that counts as arrived (default: 0.1).

    Returns:
        Steps, a real number; 0 if it starts there.

    Raises:
        ValueError: as :func:`sgd_equilibrium`; for a ``tolerance`` not in (0, 1).
    """
    check_positive(lr=lr, weight_decay=weight_decay, start=start)
    return time_to_equilibrium(_sgd(lr, weight_decay, momentum), start, tolerance)


def adamw_time_to_equilibrium(
    lr: float, weight_decay: float, start: float, tolerance: float = 0.1
) -> float:
    """The steps until the norm under AdamW is within ``tolerance`` of its equilibrium k.

    See :func:`time_to_equilibrium`; δ = ηλ.

    Args:
        lr: η, constant.
        weight_decay: λ.
        start: the norm at the start, over k.
        tolerance: the relative distance from k that counts as arrived (default: 0.1).

    Returns:
        Steps, a real number; 0 if it starts there.

    Raises:
        ValueError: as :func:`adamw_equilibrium`; for a ``tolerance`` not in (0, 1).
    """
    check_positive(lr=lr, weight_decay=weight_decay, start=start)
    return time_to_equilibrium(_adamw(lr, weight_decay, 0.9), start, tolerance)


def sgd_norms(
    lrs: Iterable[float],
    weight_decay: float,
    gradient_square: float,
    start: float,
    momentum: float = 0.0,
) -> list[float]:
    """The expected norm before each step of SGD with L2, and after the last, under any schedule.

    ‖w‖² ← (1 − η'λ)²‖w‖² + η'²E‖g̃‖²/‖w‖² with η' = η/(1 − α), see :func:`norm_trajectory`.

    Args:
        lrs: η of each step.
        weight_decay: λ; 0 is allowed.
        gradient_square: E‖g̃‖², the mean squared norm of the gradient at weight norm 1.
        start: the norm before the first step.
        momentum: α (default: 0).

    Returns:
        One more norm than steps.

    Raises:
        ValueError: for a number out of its range, or ηλ above (1 − √α)².
    """
    check(weight_decay=weight_decay, gradient_square=gradient_square)
    rule = _sgd(1.0, weight_decay, momentum)
    return norm_trajectory(rule, lrs, start, gradient_square=gradient_square)


def adamw_norms(
    lrs: Iterable[float], weight_decay: float, entries: int, start: float
) -> list[float]:
    """The expected norm before each step of AdamW, and after the last, under any schedule.

    ‖w‖² ← (1 − ηλ)²‖w‖² + η²C, see :func:`norm_trajectory`.

    Args:
        lrs: η of each step.
        weight_decay: λ; 0 is allowed.
        entries: C, of a weight or a slice.
        start: the norm before the first step.

    Returns:
        One more norm than steps.

    Raises:
        ValueError: for a number out of its range, or ηλ of 1 or more.
    """
    check(weight_decay=weight_decay)
    check_positive(entries=entries)
    return norm_trajectory(_adamw(1.0, weight_decay, 0.9), lrs, start, entries=entries)


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
