"""Schedules of λ in the manner of ``torch.optim.lr_scheduler``."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from normwise.checks import check_number
from normwise.decay.attached import scheduled
from normwise.decay.epsilon_shifted import EpsilonShiftedL2
from normwise.decay.policies import AttachedPolicy, Decoupled, On
from normwise.decay.schedules import Restarts

__all__ = ["DecayScheduler", "WarmRestarts", "normalized", "warm_restarts"]

Factor = Callable[[int], float]


class DecayScheduler:
    """Drive the ``weight_decay`` of parameter groups: λ_t = λ·schedule(t).

    λ is what a group has when the scheduler is made. What it means is up to the policy attached to
    the group, or to the optimizer. Call :meth:`step` after the optimizer's, once per step or per
    epoch, as with a learning-rate scheduler::

        scheduler = DecayScheduler(optimizer, early(1000) * Cosine(5000))

    Args:
        target: an optimizer, or an :class:`EpsilonShiftedL2`, whose groups have a λ too.
        schedule: the factor for each count of steps from 0: one of
            :mod:`normwise.decay.schedules` or any function; or a list with one for each of the
            groups.
        groups: the numbers or names of the groups to drive (default: all).

    Raises:
        TypeError: for a target or a schedule of another type.
        ValueError: for an unknown group, a group that another scheduler drives, a number of
            functions that is not that of the groups, or, in the step where it comes, a factor that
            is negative or not finite.
    """

    def __init__(
        self,
        target: Optimizer | EpsilonShiftedL2,
        schedule: Factor | Sequence[Factor],
        groups: Iterable[int | str] | None = None,
    ) -> None:
        if not isinstance(target, Optimizer | EpsilonShiftedL2):
            raise TypeError(f"{type(target).__name__} is not an Optimizer or EpsilonShiftedL2")
        self.target = target
        self.groups = _numbers(self._all(), groups)
        self._count = len(self._all())
        if callable(schedule):
            schedule = [schedule] * len(self.groups)
        if not isinstance(schedule, Sequence) or not all(map(callable, schedule)):
            raise TypeError(
                f"Invalid schedule: {schedule!r}; must be a function of the step, such as "
                "Cosine(100), or a list with one for each group"
            )
        schedules = list(schedule)
        if len(schedules) != len(self.groups):
            raise ValueError(f"{len(schedules)} functions for {len(self.groups)} groups")
        self.schedules = schedules
        for other in scheduled.setdefault(target, weakref.WeakSet()):
            for i in sorted(set(self.groups) & set(other.groups)):
                raise ValueError(
                    f"a schedule drives the weight_decay of group {i} already; multiply the two, "
                    "or remove() the first"
                )
        self.base_weight_decays = [_copy(_get(self._all()[i])) for i in self.groups]
        self.last_step = 0
        self._apply()
        scheduled[target].add(self)

    def step(self) -> None:
        """Go on to the next step, or epoch."""
        self.last_step += 1
        self._apply()

    def get_last_weight_decay(self) -> list[float | Tensor]:
        """The λ of each group that it drives."""
        return [_copy(_get(self._all()[i])) for i in self.groups]

    def state_dict(self) -> dict[str, Any]:
        """The count of steps and the λ that are multiplied; not the functions."""
        return {"last_step": self.last_step, "base_weight_decays": list(self.base_weight_decays)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, and set the groups to it.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another number of groups.
        """
        bases = state_dict["base_weight_decays"]
        if len(bases) != len(self.groups):
            raise ValueError(f"the state is of {len(bases)} groups; this has {len(self.groups)}")
        self.base_weight_decays = list(bases)
        self.last_step = state_dict["last_step"]
        self._apply()

    def remove(self) -> None:
        """End it, and give the groups the λ that they had."""
        scheduled[self.target].discard(self)
        for i, base in zip(self.groups, self.base_weight_decays, strict=True):
            _set(self._all()[i], base)

    def _all(self) -> list[Any]:
        target = self.target
        return target.param_groups if isinstance(target, Optimizer) else target.groups

    def _apply(self) -> None:
        groups = self._all()
        if len(groups) != self._count:
            raise ValueError(
                f"there were {self._count} groups when the schedule was made, and there are "
                f"{len(groups)}; make it after the last group is added or split"
            )
        for i, schedule, base in zip(
            self.groups, self.schedules, self.base_weight_decays, strict=True
        ):
            factor = schedule(self.last_step)
            if not 0 <= factor < math.inf:
                raise ValueError(
                    f"Invalid factor on weight_decay: {factor} at step {self.last_step}; must be "
                    "finite and 0 or more"
                )
            _set(groups[i], base * factor)


def _numbers(groups: list[Any], wanted: Iterable[int | str] | None) -> list[int]:
    if wanted is None:
        return list(range(len(groups)))
    names = [group.get("name") if isinstance(group, dict) else None for group in groups]
    numbers = []
    for item in [wanted] if isinstance(wanted, str) else wanted:
        number = names.index(item) if item in names else item
        if not isinstance(number, int) or not 0 <= number < len(groups):
            known = ", ".join(str(i) if n is None else repr(n) for i, n in enumerate(names))
            raise ValueError(f"unknown group {item!r}; there are {known}")
        numbers.append(number)
    return numbers


def _get(group: Any) -> float | Tensor:
    if isinstance(group, dict):
        if "weight_decay" not in group:
            raise ValueError(
                "a group has no weight_decay; attach a policy, such as Decoupled(1e-2), before "
                "you make the schedule"
            )
        group_decay: float | Tensor = group["weight_decay"]
        return group_decay
    return float(group.weight_decay)


def _set(group: Any, value: float | Tensor) -> None:
    if not isinstance(group, dict):
        group.weight_decay = value
    elif isinstance(group["weight_decay"], Tensor):
        group["weight_decay"].copy_(torch.as_tensor(value))  # in place, where a graph reads it
    else:
        group["weight_decay"] = value


def _copy(value: float | Tensor) -> float | Tensor:
    return value.clone() if isinstance(value, Tensor) else value


def normalized(norm_weight_decay: float, batch_size: int, samples: int, epochs: float) -> float:
    """λ = λ_norm·√(b/(B·T)) (arXiv 1711.05101, appendix B.1).

    Args:
        norm_weight_decay: λ_norm; the paper finds 0.025 to 0.05 best on CIFAR-10.
        batch_size: b.
        samples: B, the size of the training set.
        epochs: T, of the run, or of the current restart.

    Returns:
        λ.

    Raises:
        ValueError: for a negative λ_norm, or another number that is not positive.
    """
    check_number("norm_weight_decay", norm_weight_decay)
    for name, value in (("batch_size", batch_size), ("samples", samples), ("epochs", epochs)):
        check_number(name, value, positive=True)
    return norm_weight_decay * math.sqrt(batch_size / (samples * epochs))


@dataclass(frozen=True)
class WarmRestarts:
    """The pair of schedules that :func:`warm_restarts` makes, and the policy below them.

    Attributes:
        lr: of the learning rate.
        decay: of λ.
        policy: :class:`Decoupled` decay per schedule.
    """

    lr: CosineAnnealingWarmRestarts
    decay: DecayScheduler
    policy: AttachedPolicy

    def step(self) -> None:
        """Step both; call it after the optimizer's step."""
        self.lr.step()
        self.decay.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of both."""
        return {"lr": self.lr.state_dict(), "decay": self.decay.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Args:
            state_dict: what :meth:`state_dict` returned.
        """
        self.lr.load_state_dict(state_dict["lr"])
        self.decay.load_state_dict(state_dict["decay"])


def warm_restarts(
    optimizer: Optimizer,
    *,
    norm_weight_decay: float,
    batch_size: int,
    samples: int,
    epochs: int,
    factor: int = 1,
    eta_min: float = 0.0,
    steps_per_epoch: int | None = None,
    on: On | None = None,
) -> WarmRestarts:
    """SGDWR and AdamWR (arXiv 1711.05101, Algorithms 1 and 2 with appendix B) on any optimizer.

    w ← w − s_t·(α·u + λw): the learning rate and the decay follow one cosine s_t, which restarts,
    and λ = λ_norm·√(b/(B·T)) is computed anew at each restart, T being its epochs. It is AdamWR on
    ``AdamW`` or ``Adam``, and SGDWR on ``SGDW`` or ``SGD``.

    Args:
        optimizer: α is its learning rate; its groups have ``weight_decay=0``.
        norm_weight_decay: λ_norm.
        batch_size: b.
        samples: B, the size of the training set.
        epochs: those of the first restart.
        factor: how many times longer each restart is than the one before (default: 1).
        eta_min: the learning rate at the end of a restart (default: 0).
        steps_per_epoch: how often ``step()`` is called in an epoch (default: once per batch).
        on: the weights that decay, as of :meth:`Policy.attach` (default: all).

    Returns:
        Both schedules, to be stepped as one.

    Raises:
        ValueError: as of :func:`normalized`, :class:`Decoupled` and :class:`DecayScheduler`.
    """
    decay = normalized(norm_weight_decay, batch_size, samples, epochs)
    per_epoch = math.ceil(samples / batch_size) if steps_per_epoch is None else steps_per_epoch
    first = epochs * per_epoch
    policy = Decoupled(decay, per="schedule").attach(optimizer, on)
    lr = CosineAnnealingWarmRestarts(optimizer, first, factor, eta_min)
    driven = [i for i, _ in policy.groups()]
    return WarmRestarts(lr, DecayScheduler(optimizer, Restarts(first, factor), driven), policy)
