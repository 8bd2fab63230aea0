"""When to measure. A trigger is asked once per step, with the number of the step, from 1."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from normwise.checks import check_at_least_one

__all__ = ["Trigger", "every", "first", "log_spaced"]


class Trigger(ABC):
    """Says of each step whether to measure it. ``a | b`` measures whenever one of the two does."""

    @abstractmethod
    def __call__(self, step: int) -> bool:
        """Whether to measure this ``step``, counted from 1."""

    def __or__(self, other: Trigger) -> Trigger:
        return _Either(self, other)


@dataclass(frozen=True)
class _Either(Trigger):
    one: Trigger
    other: Trigger

    def __call__(self, step: int) -> bool:
        return self.one(step) or self.other(step)


@dataclass(frozen=True)
class _Every(Trigger):
    interval: int

    def __call__(self, step: int) -> bool:
        return step == 1 or step % self.interval == 0


@dataclass(frozen=True)
class _First(Trigger):
    steps: int

    def __call__(self, step: int) -> bool:
        return step <= self.steps


@dataclass(frozen=True)
class _LogSpaced(Trigger):
    per_decade: int

    def __call__(self, step: int) -> bool:
        # Whether a mark 10^(k/per_decade), rounded up, falls on this step.
        def mark(n: int) -> int:
            return math.floor(self.per_decade * math.log10(n) + 1e-9)

        return step == 1 or mark(step) > mark(step - 1)


def every(interval: int) -> Trigger:
    """The first step, and every multiple of ``interval``.

    Args:
        interval: in steps, 1 or more.

    Returns:
        A trigger.

    Raises:
        ValueError: for another.
    """
    return _Every(check_at_least_one("interval", interval))


def first(steps: int) -> Trigger:
    """Every one of the first steps.

    Args:
        steps: how many, 1 or more.

    Returns:
        A trigger.

    Raises:
        ValueError: for another number.
    """
    return _First(check_at_least_one("steps", steps))


def log_spaced(per_decade: int = 10) -> Trigger:
    """Steps that are evenly spaced in their logarithm: dense at first, ever rarer later.

    Args:
        per_decade: about how many between 10^k and 10^(k+1), 1 or more (default: 10).

    Returns:
        A trigger.

    Raises:
        ValueError: for another number.
    """
    return _LogSpaced(check_at_least_one("per_decade", per_decade))
