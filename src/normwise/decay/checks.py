"""Checks of arguments: one line for a wrong value and for a wrong type."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

__all__ = ["check_at_least_one", "check_number"]


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
