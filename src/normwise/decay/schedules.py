"""When weights decay: factors on λ by step, which multiply and follow one another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from normwise.checks import check_at_least_one, check_number

__all__ = ["Cosine", "Linear", "Piecewise", "Restarts", "Schedule", "Window", "early", "late"]


class Schedule:
    """A factor on λ for each step, counted from 0.

    Call it with a step. ``a * b`` multiplies two, or one with a function or a number;
    ``a.then(steps, b)`` is ``a`` for so many steps, and then ``b``, which counts from 0 again.
    Where a :class:`DecayScheduler` is stepped once an epoch, read "epoch" for "step".
    """

    def __call__(self, step: int) -> float:
        raise NotImplementedError

    def __mul__(self, other: Callable[[int], float] | float) -> Schedule:
        return _Product(self, other if callable(other) else _Constant(other))

    __rmul__ = __mul__

    def then(self, steps: int, other: Callable[[int], float]) -> Schedule:
        """This for ``steps`` steps, and then ``other``, from its beginning.

        Args:
            steps: how long this lasts, 1 or more.
            other: what follows, counted from 0 again.
        """
        return _Then(self, check_at_least_one("number of steps", steps), other)


@dataclass(frozen=True)
class Window(Schedule):
    """1 from ``start`` on and before ``stop``, else 0.

    Args:
        start: the first step of decay, counted from 0.
        stop: the first step without it again (default: none).
    """

    start: int
    stop: float = math.inf

    def __post_init__(self) -> None:
        are_numbers = all(isinstance(step, int | float) for step in (self.start, self.stop))
        if not (are_numbers and 0 <= self.start < self.stop):
            raise ValueError(
                f"Invalid window: from {self.start!r} to {self.stop!r}; must be two steps, the "
                "second after the first"
            )

    def __call__(self, step: int) -> float:
        return float(self.start <= step < self.stop)


def early(steps: int) -> Window:
    """Decay for the first ``steps`` steps and never after (arXiv 2012.13841).

    Args:
        steps: a whole number, 1 or more.

    Returns:
        A factor of 1 before ``steps`` and 0 from there on.

    Raises:
        ValueError: for another.
    """
    return Window(0, check_at_least_one("number of steps", steps))


def late(start: int) -> Window:
    """No decay before step ``start``, and full decay from there on.

    Args:
        start: a step, counted from 0.

    Returns:
        A factor of 0 before ``start`` and 1 from there on.

    Raises:
        ValueError: for a negative one, or what is no number.
    """
    return Window(start)


@dataclass(frozen=True)
class Linear(Schedule):
    """From ``first`` to ``last`` in equal increments over ``steps`` steps, then ``last``.

    Args:
        steps: how many it takes, 1 or more.
        first: the factor at step 0 (default: 1).
        last: the factor from ``steps`` on (default: 0).
    """

    steps: int
    first: float = 1.0
    last: float = 0.0

    def __post_init__(self) -> None:
        check_at_least_one("number of steps", self.steps)
        check_number("first", self.first)
        check_number("last", self.last)

    def __call__(self, step: int) -> float:
        return self._after(min(step / self.steps, 1))

    def _after(self, share: float) -> float:
        return self.first + (self.last - self.first) * share


class Cosine(Linear):
    """From ``first`` to ``last`` on half a cosine over ``steps`` steps, then ``last``."""

    def _after(self, share: float) -> float:
        return super()._after((1 - math.cos(math.pi * share)) / 2)


@dataclass(frozen=True)
class Piecewise(Schedule):
    """``values[i]`` from ``milestones[i − 1]`` on and before ``milestones[i]``.

    Args:
        milestones: steps, in ascending order.
        values: factors, one more than milestones.
    """

    milestones: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("milestones", "values"):
            given = getattr(self, name)
            if not isinstance(given, tuple | list):
                raise TypeError(f"Invalid {name}: {given!r}; must be a tuple of numbers")
            for value in given:
                check_number(name, value)
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(
                f"{len(self.milestones)} milestones need {len(self.milestones) + 1} values, but "
                f"there are {len(self.values)}"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"Invalid milestones: {self.milestones}; must ascend")

    def __call__(self, step: int) -> float:
        return self.values[sum(step >= milestone for milestone in self.milestones)]


@dataclass(frozen=True)
class Restarts(Schedule):
    """√(1/T_i) relative to the first restart, T_i the length of the restart that a step is in.

    What normalized decay (:func:`normalized`) changes by at warm restarts, since it holds the
    epochs of the current restart (arXiv 1711.05101, appendix B.1). The lengths are those of
    ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts``: the first of ``steps``, and each of
    the next ``factor`` times as long as the one before.

    Args:
        steps: of the first restart.
        factor: how many times as long as the one before a restart is (default: 1).
    """

    steps: int
    factor: int = 1

    def __post_init__(self) -> None:
        check_at_least_one("number of steps", self.steps)
        check_at_least_one("factor", self.factor)

    def __call__(self, step: int) -> float:
        length, end = self.steps, self.steps
        while step >= end and self.factor > 1:
            length *= self.factor
            end += length
        return math.sqrt(self.steps / length)


@dataclass(frozen=True)
class _Constant(Schedule):
    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class _Product(Schedule):
    left: Callable[[int], float]
    right: Callable[[int], float]

    def __call__(self, step: int) -> float:
        return self.left(step) * self.right(step)


@dataclass(frozen=True)
class _Then(Schedule):
    first: Callable[[int], float]
    steps: int
    second: Callable[[int], float]

    def __call__(self, step: int) -> float:
        return self.first(step) if step < self.steps else self.second(step - self.steps)
