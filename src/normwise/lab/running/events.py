"""What happens while cells run, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from normwise.lab.recipes.schema import RecipeCell
from normwise.monitor import Monitor

__all__ = [
    "Event",
    "Finished",
    "Measured",
    "Observer",
    "Planned",
    "Progress",
    "Started",
    "ignore",
]


@dataclass(frozen=True)
class Planned:
    """A few steps have been timed, and nothing else has begun.

    Args:
        trainings: how many there are to be.
        seconds: that they are expected to take.
        gave_up: what was asked for and does not fit into the budget, in words; may be empty.
    """

    trainings: int
    seconds: float
    gave_up: str


@dataclass(frozen=True)
class Started:
    """A training begins or goes on.

    Args:
        cell: which.
        monitor: of its scale-invariant weights; none where there are none, or they are sharded.
    """

    cell: RecipeCell
    monitor: Monitor | None


@dataclass(frozen=True)
class Progress:
    """A training is under way.

    Args:
        cell: which.
        share: of its steps that have been taken, from 0 to 1.
        fresh: of its steps that have been taken since it was started, from 0 to 1.
        loss: mean over the epoch so far.
        growth: of the norm of its scale-invariant weights, end over start; None where there are
            none.
        seconds_left: estimated from the steps since it was started.
    """

    cell: RecipeCell
    share: float
    fresh: float
    loss: float
    growth: float | None
    seconds_left: float


@dataclass(frozen=True)
class Measured:
    """An epoch is finished; epoch 0 is before the first step.

    Args:
        cell: which.
        record: the line of ``metrics.jsonl``.
        times: the line of ``times.jsonl``; empty for epoch 0.
        wrong: which test examples are classified wrongly, where that has a meaning.
    """

    cell: RecipeCell
    record: dict[str, Any]
    times: dict[str, Any]
    wrong: list[int] | None


@dataclass(frozen=True)
class Finished:
    """A cell has come to an end, or had before, or was skipped.

    Args:
        cell: which.
        result: the content of its ``result.json``; or a status ``skipped`` and an error; or a
            status ``unfinished`` where time was over.
    """

    cell: RecipeCell
    result: dict[str, Any]


Event = Planned | Started | Progress | Measured | Finished
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Show nothing."""
