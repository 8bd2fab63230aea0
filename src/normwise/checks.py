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
    """Refuse what is no number, not finite, negative or too large.

    Intentionally no look at the value of a tensor: that would wait for its device.

    Args:
        name: of the argument, for the error.
        value: a number, or a tensor of one.
        positive: whether 0 is refused too (default: no).
        below: what the value must be below (default: no more than that it is finite).

    Raises:
        ValueError: for such a value.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"Invalid {name}: a tensor of shape {tuple(value.shape)}; must have one element"
            )
        return
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and (value > 0 if positive else value >= 0) and value < below):
        least = "above 0" if positive else "0 or more"
        limit = f"{least} and below {below:g}" if below < math.inf else f"finite and {least}"
        raise ValueError(f"Invalid {name}: {value!r}; must be a number, {limit}")


def check_at_least_one(name: str, value: Any) -> int:
    """A whole number of 1 or more.

    Args:
        name: of the argument, for the error.
        value: the number.

    Returns:
        ``value``.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Invalid {name}: {value!r}; must be a whole number, 1 or more")
    return value


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither True nor False: a word for no would count as yes.

    Args:
        name: of the argument, for the error.
        value: the switch.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"Invalid {name}: {value!r}; must be True or False")


def check_model(value: Any) -> None:
    """Refuse what is no module.

    Args:
        value: what was given for a model.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"Invalid model: {_shown(value)}; must be a torch.nn.Module")


def check_optimizer(value: Any) -> None:
    """Refuse what has no groups and no step, as torch's optimizers have.

    Args:
        value: what was given for an optimizer.

    Raises:
        TypeError: for anything else.
    """
    if not (hasattr(value, "param_groups") and hasattr(value, "step")):
        raise TypeError(f"Invalid optimizer: {_shown(value)}; must be a torch.optim.Optimizer")


def check_report(value: Any, others: str = "") -> None:
    """Refuse what is no analysis.

    Args:
        value: what was given.
        others: what else might have been given, in words that end in "or" (default: nothing).

    Raises:
        TypeError: for anything else.
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
