"""A problem of the user's as a kind of task.

It is ``MODULE:FACTORY``, an object that is at hand, or a network by its name with data by theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from normwise.lab.checks import within
from normwise.lab.errors import UsageError
from normwise.lab.imports import attribute, reason
from normwise.lab.tasks.problem import Metric, Problem
from normwise.lab.tasks.supervised import Supervised
from normwise.lab.trust import GIVEN, check_trusted, is_library

__all__ = ["OwnOptions", "build", "give", "metrics_of"]

# Problems that have no module that another process could find them in.
_given: dict[str, Any] = {}
# What factories returned: the data are made once, whatever the number of cells.
_made: dict[tuple[str, str], Supervised] = {}


@dataclass(frozen=True)
class OwnOptions:
    """What a recipe may set.

    Args:
        held_out: the share of the training data that is kept back and tested on instead of the test
            data, to choose settings by (default: 0, nothing).
        data: ``csv:FILE:TARGET``, ``folder:PATH`` or ``text:FILE``, for what names only a network
            (default: the factory's own).
        size: pixels a side of images, or tokens of a sequence (default: 32, and 64).
        set: arguments of the network, or fields of its configuration (default: none).
    """

    held_out: float = 0.0
    data: str = ""
    size: int | None = None
    set: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        within(self, "held_out", 0, 1, below=True)


def give(name: str, problem: Any) -> str:
    """Make an object known as a task in this process.

    Args:
        name: to be shown.
        problem: a problem, or a function that makes one.

    Returns:
        The name of the task.
    """
    task = f"{GIVEN}:{name}"
    _given[task] = problem
    return task


def build(task: str, options: OwnOptions, root: Path, device: torch.device) -> Problem:
    """The problem with a network that is drawn from torch's global generator.

    Raises:
        UsageError: if there is no such factory, it fails, or what it makes is no problem.
    """
    found = None if is_library(task) else _found(task)
    key = (task, repr((id(found), options.data, options.size, options.set)))
    if key not in _made:
        state = torch.get_rng_state()
        torch.manual_seed(0)  # data that a factory draws are the same for every seed
        made = _problem(task, found, options)
        torch.set_rng_state(state)
        if not isinstance(made, Supervised):
            return _other(task, made, found, options)
        _made[key] = made
    return _made[key].fresh(device, options.held_out)


def _problem(task: str, found: Any, options: OwnOptions) -> Any:
    if options.data:
        from normwise.lab.tasks.named import named

        return named(task, options.data, options.size, options.set, found)
    if is_library(task):
        raise UsageError(
            f"{task!r} is only a network: give --data csv:FILE:TARGET, folder:PATH or text:FILE"
        )
    for name in ("size", "set"):
        if getattr(options, name):
            raise UsageError(f"{name} goes with data, and {task!r} has its own")
    return found if isinstance(found, Problem) else _call(task, found)


def metrics_of(problem: Problem) -> tuple[Metric, ...]:
    """What it is judged by, the first above all."""
    given: tuple[Metric, ...] = getattr(problem, "metrics", ())
    if not given:
        raise UsageError(
            f"{type(problem).__name__} has no metrics: must have an attribute `metrics`, a tuple "
            "of normwise.lab.tasks.problem.Metric"
        )
    return given


def _found(task: str) -> Any:
    if task.startswith(f"{GIVEN}:"):
        if task not in _given:
            raise UsageError(
                f"{task!r} is an object of the process that compared it; put it into a module and "
                "name MODULE:FACTORY"
            )
        return _given[task]
    check_trusted(task)
    return attribute(task)


def _call(task: str, factory: Callable[[], Any]) -> Any:
    if not callable(factory):
        raise UsageError(
            f"{task!r} is of type {type(factory).__name__}; must be a function that returns "
            "normwise.lab.supervised(…)"
        )
    try:
        return factory()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{task!r} raised {reason(error)}") from error


def _other(task: str, made: Any, found: Any, options: OwnOptions) -> Problem:
    """A problem of a class of the user's own, whose network its factory draws."""
    if not isinstance(made, Problem):
        raise UsageError(
            f"{task!r} returned an object of type {type(made).__name__}; must return "
            "normwise.lab.supervised(…), another Problem, or a network with --data beside it"
        )
    if options.held_out:
        raise UsageError(
            f"{task!r} is a {type(made).__name__}, of which no part can be held out: give one "
            "learning rate and one weight decay, or use normwise.lab.supervised(…)"
        )
    if isinstance(found, Problem):
        raise UsageError(
            f"{task!r} is a {type(made).__name__} with one network; give a function that makes it, "
            "so that every method and seed starts from a network of its own"
        )
    problem: Problem = _call(task, found)
    return problem
