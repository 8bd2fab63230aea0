"""Settings that a recipe sweeps: each combination of their values is a training of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from normwise.lab.errors import UsageError

__all__ = ["Grid", "Point", "Tuned", "point_name", "points"]

Grid = Mapping[str, Sequence[Any]]
Point = tuple[tuple[str, float], ...]
"""Settings and the value of each; of what sweeps nothing there is one point, which is empty."""
Tuned = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Settings that a sweep has chosen: by row, method and setting."""


def points(*grids: Grid) -> list[Point]:
    """All combinations of the values of each setting, rising, the last setting fastest.

    Args:
        grids: values by setting; a later one overrules the earlier ones, setting by setting.

    Raises:
        UsageError: if a setting has no values, one twice, or one that is not a finite number.
    """
    merged = {key: values for grid in grids for key, values in grid.items()}
    columns = {key: _numbers(key, values) for key, values in merged.items()}
    return [tuple(zip(columns, row, strict=True)) for row in product(*columns.values())]


def point_name(point: Point) -> str:
    """The name of its folder, ``lr=0.1,weight_decay=0.0001``; empty where nothing is swept."""
    return ",".join(f"{key}={value!r}" for key, value in point)


def _numbers(key: str, values: Sequence[Any]) -> list[float]:
    found = [_number(key, value) for value in values]
    if not found:
        raise UsageError(f"grid: {key} has no values; must have one or more")
    for value in found:
        if found.count(value) > 1:
            raise UsageError(f"grid: {key} has {value!r} twice; list each value once")
    return sorted(found)


def _number(key: str, value: Any) -> float:
    """A whole number stays one; YAML 1.1 reads 1e-3, without a point, as a text."""
    if type(value) is int:
        return value
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"grid: {key} has {value!r}; must be finite numbers")
    return number
