"""Weight decay as a learning-rate schedule, and back.

Only the direction of a scale-invariant weight matters. Weight decay changes its norm alone, so a
run with decay takes the same directions as one without it whose learning rates grow. Sources: [ES]
arXiv 1911.05920, Theorem 1; [EXP] Li and Arora, arXiv 1910.07454. The form for AdamW is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from normwise.theory._checks import check, check_below_one, checked

__all__ = [
    "AdamWSchedule",
    "PlannedGroups",
    "SGDSchedule",
    "adamw_schedule_limit",
    "adamw_with_decay",
    "adamw_without_decay",
    "sgd_decay_limit",
    "sgd_schedule_limit",
    "sgd_with_decay",
    "sgd_without_decay",
]

GroupValues = list[dict[str, Any]]


@dataclass(frozen=True)
class SGDSchedule:
    """Learning rates that give SGD with one weight decay the directions of SGD with another.

    One of the two is 0.

    Attributes:
        lrs: the learning rate of each step: η̃_t without decay, η_t with it.
        scales: the norm without decay over the norm with it, before each step and after the last:
            one more than ``lrs``.
        weight_decay: λ (default: 0).
    """

    lrs: tuple[float, ...]
    scales: tuple[float, ...]
    weight_decay: float = 0.0

    def groups(self) -> GroupValues:
        """What to write into the parameter group before each step, for :class:`PlannedGroups`."""
        return [{"lr": lr, "weight_decay": self.weight_decay} for lr in self.lrs]


@dataclass(frozen=True)
class AdamWSchedule:
    """Settings that give AdamW with one weight decay the directions of AdamW with another.

    One of the two is 0, and eps is. The moments are m ← (β1·r)m + (1 − β1)g and
    v ← (β2·r²)v + (1 − β2)g², with r of the step: ``decay_factors``. The input coefficients and the
    bias corrections stay those of β1 and β2. :meth:`groups` says the same to an optimizer that
    cannot keep them.

    Attributes:
        lrs: the learning rate of each step.
        scales: as of :class:`SGDSchedule`: the norm without decay over the norm with it.
        decay_factors: r of each step, above 1 in a run with decay; that of the first step
            multiplies zero.
        weight_decay: λ (default: 0).
    """

    lrs: tuple[float, ...]
    scales: tuple[float, ...]
    decay_factors: tuple[float, ...]
    weight_decay: float = 0.0

    def groups(self, betas: tuple[float, float] = (0.9, 0.999)) -> GroupValues:
        """What to write into a group of ``torch.optim.AdamW``, without decay ``Adam``, each step.

        torch's moments tie the input coefficient to the decay coefficient. The betas here make
        them multiples of the moments wanted, and the learning rate takes the multiples out again,
        and torch's bias corrections with them.

        Args:
            betas: those of the other run (default: torch's).
        """
        return _adam_groups(self.lrs, self.decay_factors, betas, self.weight_decay)


def sgd_without_decay(
    lrs: Iterable[float],
    weight_decay: float,
    momentum: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> SGDSchedule:
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

    Returns:
        The run, step by step; its ``groups`` drive a torch optimizer.

    Raises:
        ValueError: for a learning rate that is negative, or 0 before the last step with momentum;
            where α is not positive, so that the direction would flip (with a constant η that
            comes beyond ηλ = (1 − √γ)²); or where a scale or rate is too large for ``dtype``.
    """
    check(weight_decay=weight_decay, momentum=momentum)
    _check_momentum(momentum)
    scales, rates = [1.0], []
    previous_lr, previous_alpha = 1.0, 1.0  # of an empty buffer: 1 − 1/α is 0
    for t, lr in enumerate(checked(lrs)):
        if momentum and previous_lr == 0:
            raise ValueError(f"no schedule is equivalent: the learning rate of step {t - 1} is 0")
        alpha = 1 - lr * weight_decay
        if momentum:
            alpha += lr / previous_lr * momentum * (1 - 1 / previous_alpha)
        if alpha <= 0:
            raise ValueError(
                f"no schedule is equivalent: at step {t} the direction would flip "
                f"(α = {alpha:.3g}); with momentum {momentum} a constant lr·weight_decay must not "
                f"be above {sgd_decay_limit(momentum):.3g}, and here it is {lr * weight_decay:.3g}"
            )
        scales.append(scales[-1] / alpha)
        rates.append(scales[-2] * scales[-1] * lr)
        _check_range(t, max(scales[-1], rates[-1]), dtype)
        previous_lr, previous_alpha = lr, alpha
    return SGDSchedule(tuple(rates), tuple(scales))


def sgd_with_decay(lrs: Iterable[float], weight_decay: float, momentum: float = 0.0) -> SGDSchedule:
    """Find the run of SGD with decay that takes the directions of one without: the way back.

    :func:`sgd_without_decay` solved for the learning rate, step by step: η_t = η̃_t/(P_t² +
    η̃_t(λ − c_t)) with c_t = γ(1 − 1/α_{t−1})/η_{t−1} and α_t = η_t·P_t²/η̃_t. As c_t is not above
    0, there is a solution for every λ: the rates fall as the norm without decay grows.

    Args:
        lrs: the learning rate of each step of the run without decay, η̃_t.
        weight_decay: the λ that the run shall have.
        momentum: γ, of both runs (default: 0).

    Returns:
        The run, step by step; its ``groups`` drive a torch optimizer.

    Raises:
        ValueError: for a learning rate that is negative, or 0 before the last step with momentum.
    """
    check(weight_decay=weight_decay, momentum=momentum)
    _check_momentum(momentum)
    scales = [1.0]
    rates: list[float] = []
    buffered = 0.0  # c_t
    for t, lr in enumerate(checked(lrs)):
        if momentum and rates and rates[-1] == 0:
            raise ValueError(f"no schedule is equivalent: the learning rate of step {t - 1} is 0")
        square = scales[-1] ** 2
        rates.append(lr / (square + lr * (weight_decay - buffered)))
        alpha = 1 + rates[-1] * (buffered - weight_decay)
        scales.append(scales[-1] / alpha)
        if momentum and rates[-1]:
            buffered = momentum * (1 - 1 / alpha) / rates[-1]
    return SGDSchedule(tuple(rates), tuple(scales), weight_decay)


def adamw_without_decay(
    lrs: Iterable[float], weight_decay: float, dtype: torch.dtype = torch.float32
) -> AdamWSchedule:
    """Replace the decoupled decay of AdamW (eps = 0) on scale-invariant weights by a schedule.

    With r_t = 1 − η_t·λ, P_0 = 1 and P_{t+1} = P_t/r_t, the learning rates are η̃_t = P_{t+1}·η_t,
    η/r^{t+1} for a constant η, and step t multiplies β1 and β2 by r_{t−1} and its square in the
    moments: the gradient at the larger weight is smaller by P_t.

    Args:
        lrs: the learning rate of each step of the run with decay.
        weight_decay: its λ.
        dtype: that of the run without decay (default: float32).

    Returns:
        The run, step by step; its ``groups`` drive a torch optimizer.

    Raises:
        ValueError: for a negative learning rate, ηλ of 1 or more, or where a scale or rate is too
            large for ``dtype``.
    """
    check(weight_decay=weight_decay)
    scales, rates, factors = [1.0], [], [1.0]
    for t, lr in enumerate(checked(lrs)):
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
    return AdamWSchedule(tuple(rates), tuple(scales), tuple(factors[:-1]))


def adamw_with_decay(lrs: Iterable[float], weight_decay: float) -> AdamWSchedule:
    """Find the AdamW (eps = 0) that takes the directions of Adam without decay: the way back.

    η_t = η̃_t/(P_t + λη̃_t), r_t = 1 − η_t·λ, and step t multiplies β1 by 1/r_{t−1} and β2 by its
    square in the moments. There is a solution for every λ.

    Args:
        lrs: the learning rate of each step of the run without decay, η̃_t.
        weight_decay: the λ that the run shall have.

    Returns:
        The run, step by step; its ``groups`` drive a torch optimizer.

    Raises:
        ValueError: for a negative learning rate.
    """
    check(weight_decay=weight_decay)
    scales, rates, factors = [1.0], [], [1.0]
    for lr in checked(lrs):
        rates.append(lr / (scales[-1] + weight_decay * lr))
        r = 1 - rates[-1] * weight_decay
        scales.append(scales[-1] / r)
        factors.append(1 / r)
    return AdamWSchedule(tuple(rates), tuple(scales), tuple(factors[:-1]), weight_decay)


def sgd_decay_limit(momentum: float) -> float:
    """The largest constant ηλ with which SGD with momentum γ keeps its directions: (1 − √γ)².

    α, the factor by which the decay multiplies the weight in a step, is the larger root of
    α² − (1 + γ − λη)α + γ = 0 ([EXP]); beyond the limit there is no real root, the weight swings
    through zero, and neither an equivalent schedule nor an equilibrium exists.

    Args:
        momentum: γ.

    Returns:
        The largest ηλ.

    Raises:
        ValueError: for a momentum not in [0, 1).
    """
    check_below_one(momentum=momentum)
    return (1 - math.sqrt(momentum)) ** 2


def sgd_schedule_limit(
    lr: float, weight_decay: float, momentum: float = 0.0, dtype: torch.dtype = torch.float32
) -> int:
    """The number of steps for which :func:`sgd_without_decay` has an answer at a constant η.

    The rates grow as η·α^{−(2t+1)} ([ES], [EXP]), with α settled; the first steps of momentum,
    in which α has not, are left out of account.

    Args:
        lr: η.
        weight_decay: λ, above 0.
        momentum: γ (default: 0).
        dtype: of the run without decay (default: float32).

    Returns:
        The number of steps.

    Raises:
        ValueError: for a product ηλ of 0, or above the limit of :func:`sgd_decay_limit`.
    """
    shrink = -math.log(_settled_alpha(lr, weight_decay, momentum))
    # (2t + 1)·shrink + ln η = ln max for the rate, (t + 1)·shrink = ln max for the scale.
    largest = math.log(torch.finfo(dtype).max)
    return max(0, math.floor(min((largest - math.log(lr)) / shrink + 1, 2 * largest / shrink) / 2))


def adamw_schedule_limit(lr: float, weight_decay: float, dtype: torch.dtype = torch.float32) -> int:
    """The number of steps for which :func:`adamw_without_decay` has an answer at a constant η.

    Args:
        lr: η.
        weight_decay: λ, above 0.
        dtype: of the run without decay (default: float32).

    Returns:
        The number of steps.

    Raises:
        ValueError: for a product ηλ of 0, or of 1 or more.
    """
    shrink = -math.log(_settled_alpha(lr, weight_decay, 0.0))
    largest = math.log(torch.finfo(dtype).max)
    return max(0, math.floor(min(largest - math.log(lr), largest) / shrink))


class PlannedGroups(LRScheduler):
    """A scheduler that writes planned values into parameter groups, one set for each step.

    It takes the place of a learning-rate schedule: make it before the first step, and call
    ``step()`` after every step of the optimizer.

    Args:
        optimizer: whose groups to write into.
        plan: for the index of each group, the values of each step, ``"lr"`` among them, as the
            ``groups()`` of the translations of this module give them. A group that is not named
            keeps its learning rate.
        last_epoch: as of torch's schedulers (default: -1, at the start).

    Raises:
        ValueError: for a group that the optimizer does not have, a value that the group does not
            have, or a step without ``"lr"``; in ``step()``, beyond the end of the plan. After the
            last planned step the last values stay.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        plan: Mapping[int, Sequence[Mapping[str, Any]]],
        last_epoch: int = -1,
    ) -> None:
        for index, steps in plan.items():
            if not 0 <= index < len(optimizer.param_groups):
                raise ValueError(
                    f"Invalid group in a plan: {index}; the optimizer has "
                    f"{len(optimizer.param_groups)} groups"
                )
            known = optimizer.param_groups[index].keys()
            for t, values in enumerate(steps):
                if "lr" not in values or not values.keys() <= known:
                    raise ValueError(
                        f"Invalid values in a plan for group {index}, step {t}: {dict(values)}; "
                        f"must have 'lr' and only keys of the group: {sorted(known)}"
                    )
        self._plan = plan
        super().__init__(optimizer, last_epoch)

    def _now(self, index: int) -> Mapping[str, Any]:
        steps = self._plan[index]
        if self.last_epoch > len(steps):
            raise ValueError(f"the plan of group {index} has only {len(steps)} steps")
        return steps[min(self.last_epoch, len(steps) - 1)]

    def get_lr(self) -> list[Any]:
        """The learning rate of each group for the step to come."""
        return [
            self._now(index)["lr"] if index in self._plan else group["lr"]
            for index, group in enumerate(self.optimizer.param_groups)
        ]

    def step(self, epoch: int | None = None) -> None:
        """Go on to the values of the next step.

        Args:
            epoch: the step to go to (default: the next).
        """
        super().step(epoch)
        for index in self._plan:
            values = {key: value for key, value in self._now(index).items() if key != "lr"}
            self.optimizer.param_groups[index].update(values)

    def state_dict(self) -> dict[str, Any]:
        """Where in the plan the schedule is; the plan itself is given anew when resuming."""
        return {key: value for key, value in super().state_dict().items() if key != "_plan"}


def _adam_groups(
    lrs: Sequence[float],
    factors: Sequence[float],
    betas: tuple[float, float],
    weight_decay: float,
) -> GroupValues:
    """Betas whose moments, tied as torch ties them, are k1·m and k2·v of the untied moments.

    The moment wanted is m ← βf·m + (1 − β)g. With b = βf/(k(1 − β) + βf), torch's k'm' =
    b·km + (1 − b)g has k' = (1 − b)/(1 − β).
    """
    check_below_one(beta1=betas[0], beta2=betas[1])
    values: GroupValues = []
    multiples = [1.0, 1.0]
    for n, (lr, factor) in enumerate(zip(lrs, factors, strict=True), start=1):
        tied = []
        rate = lr
        for i, (beta, power) in enumerate(zip(betas, (1, 2), strict=True)):
            kept = beta * factor**power
            b = kept / (multiples[i] * (1 - beta) + kept)
            multiples[i] = (1 - b) / (1 - beta)
            # By what torch's corrected moment is larger than the one wanted.
            excess = multiples[i] * (1 - beta**n) / (1 - b**n)
            rate = rate / excess if power == 1 else rate * math.sqrt(excess)
            tied.append(b)
        # torch multiplies the decay by the rate, which is no longer η.
        decay = weight_decay * lr / rate if rate else weight_decay
        values.append({"lr": rate, "betas": tuple(tied), "eps": 0.0, "weight_decay": decay})
    return values


def _settled_alpha(lr: float, weight_decay: float, momentum: float) -> float:
    check(lr=lr, weight_decay=weight_decay)
    product, limit = lr * weight_decay, sgd_decay_limit(momentum)
    if not 0 < product <= limit or product == 1:
        raise ValueError(
            f"no schedule is equivalent: lr·weight_decay is {product:.3g}, and with momentum "
            f"{momentum} must be above 0 and not above (1 − √γ)² = {limit:.3g}"
        )
    middle = (1 + momentum - product) / 2
    return middle + math.sqrt(max(0.0, middle**2 - momentum))


def _check_momentum(momentum: float) -> None:
    if momentum >= 1:
        raise ValueError(f"Invalid momentum: {momentum}; must be below 1")


def _check_range(t: int, largest: float, dtype: torch.dtype) -> None:
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"the run without decay outgrows {dtype} at step {t}: its norms and learning rates "
            "grow without bound; end it earlier, or rescale the weights there and begin again"
        )
