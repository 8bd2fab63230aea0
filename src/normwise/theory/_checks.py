"""Checks of arguments, shared by the closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator


def check(**numbers: float) -> None:
    """Raise ``ValueError`` for a number that is negative or not finite."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"Invalid {name}: {value}; must be finite and 0 or more")


def check_positive(**numbers: float) -> None:
    """Raise ``ValueError`` for a number that is not positive or not finite."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"Invalid {name}: {value}; must be finite and above 0")


def check_below_one(**numbers: float) -> None:
    """Raise ``ValueError`` for a number that is not in [0, 1)."""
    for name, value in numbers.items():
        if not 0 <= value < 1:
            raise ValueError(f"Invalid {name}: {value}; must be from 0 to below 1")


def checked(lrs: Iterable[float]) -> Iterator[float]:
    """The learning rates, each looked at as it passes."""
    for t, lr in enumerate(lrs):
        check(**{f"learning rate at step {t}": lr})
        yield lr
