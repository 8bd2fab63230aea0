"""Checks of arguments: one line for a wrong value and for a wrong type."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor, nn

__all__ = [
    "check_at_least_one",
    "check_model",
    "check_number",
    "check_optimizer",
    "check_report",
    "check_switch",
]


def check_number(name: str, value: Any, *, positive: bool = False, below: float = math.inf) -> None:
    """Raise ValueError unless ``value`` is a number, finite, 0 or more (above 0), and below."""
    is_number = isinstance(value, Real | Tensor) and not isinstance(value, bool)
    if not (is_number and (value > 0 if positive else value >= 0) and value < below):
        least = "above 0" if positive else "0 or more"
        most = "finite and " if below == math.inf else f"below {below:g} and "
        raise ValueError(f"Invalid {name}: {value!r}; must be {most}{least}")


def check_at_least_one(name: str, value: Any) -> int:
    """``value``, if it is a whole number of 1 or more; else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Invalid {name}: {value!r}; must be a whole number, 1 or more")
    return value


def check_switch(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False: a word for no would count as yes."""
    if not isinstance(value, bool):
        raise ValueError(f"Invalid {name}: {value!r}; must be True or False")


def check_model(value: Any) -> None:
    """Raise TypeError unless ``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"Invalid model: {_shown(value)}; must be a torch.nn.Module")


def check_optimizer(value: Any) -> None:
    """Raise TypeError unless ``value`` has groups and a step, as torch's optimizers do."""
    if not (hasattr(value, "param_groups") and hasattr(value, "step")):
        raise TypeError(f"Invalid optimizer: {_shown(value)}; must be a torch.optim.Optimizer")


def check_report(value: Any, others: str = "") -> None:
    """Raise TypeError unless ``value`` is an analysis.

    Args:
        value: what was given.
        others: what else might have been given, in words that end in "or" (default: nothing).
    """
    if not hasattr(value, "parameter_views"):
        raise TypeError(
            f"Invalid report: {_shown(value)}; must be {others}{' ' * bool(others)}what "
            "normwise.analyze returns"
        )


def _shown(value: Any) -> str:
    """A value if it is short, else what it is."""
    text = repr(value)
    return text if len(text) < 60 and "\n" not in text else f"of type {type(value).__name__}"
