"""What a sweep found: each method's best point, and what it costs to carry it to other rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from normwise.lab.errors import Damaged, UsageError
from normwise.lab.recipes import Recipe
from normwise.lab.recipes.grids import Point, Tuned
from normwise.lab.running.results import Entry, ResultTable
from normwise.lab.summary import Spread
from normwise.lab.tasks.problem import Metric

__all__ = ["TUNED", "Sweep", "chosen", "point_text", "read_tuned", "sweeps"]

TUNED = "tuned.json"


@dataclass(frozen=True)
class Sweep:
    """The points of a method's grid in one row, by the first metric.

    A point of which a seed diverged, or none is finished, counts as worse than all others.

    Args:
        recipe, scale, row, method: what was run.
        label: of the method, as a reader sees it.
        metric: the first by which the task is judged.
        entries: one for each point, rising.
        first: the points of the same method in the first row; its own in that row.
    """

    recipe: Recipe
    scale: str
    row: str
    method: str
    label: str
    metric: Metric
    entries: tuple[Entry, ...]
    first: tuple[Entry, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings that are swept."""
        return tuple(key for key, _ in self.entries[0].point)

    @cached_property
    def best(self) -> Entry:
        """The point with the best mean over seeds; of equal ones the least."""
        return min(self.entries, key=self._cost)

    @cached_property
    def carried(self) -> Entry | None:
        """The point that is best in the first row, as it does in this one."""
        there = min(self.first, key=self._cost).point
        return next((entry for entry in self.entries if entry.point == there), None)

    @property
    def edges(self) -> tuple[str, ...]:
        """The settings of which the best value is the least or the greatest of several."""
        found = []
        for place, (key, value) in enumerate(self.best.point):
            values = {entry.point[place][1] for entry in self.entries}
            if len(values) > 1 and value in (min(values), max(values)):
                found.append(key)
        return tuple(found)

    @property
    def regret(self) -> Spread | None:
        """What the best point of the first row costs here: its distance from the best of this row.

        The mean over common seeds, in the metric's unit, positive where it costs; infinite where it
        diverged, and None where it has not been run.
        """
        if self.carried is None or not self.best.values:
            return None
        if self.carried.failed:
            return Spread(math.inf, None, ())
        common = [seed for seed in self.carried.values if seed in self.best.values]
        costs = [self._sign * (self.carried.values[s] - self.best.values[s]) for s in common]
        return Spread.of(costs) if costs else None

    @property
    def ratios(self) -> dict[str, float | None]:
        """For each setting, its best value over that in the first row; None where that is 0."""
        if self.carried is None:
            return {}
        there = dict(self.carried.point)
        return {key: value / there[key] if there[key] else None for key, value in self.best.point}

    @property
    def _sign(self) -> int:
        return -1 if self.metric.higher_is_better else 1

    def _cost(self, entry: Entry) -> float:
        if entry.failed or not entry.values:
            return math.inf
        return self._sign * fmean(entry.values.values())


def sweeps(tables: Sequence[ResultTable]) -> list[Sweep]:
    """The sweeps in the tables of each row's first metric: recipe by recipe, method by method."""
    firsts: dict[tuple[str, str], dict[str, ResultTable]] = {}
    for table in tables:
        firsts.setdefault((table.recipe.id, table.scale), {}).setdefault(table.row, table)
    found = []
    for (_, scale), by_row in firsts.items():
        recipe = next(iter(by_row.values())).recipe
        order = list(recipe.scales[scale].rows)
        rows = sorted(by_row, key=lambda row: order.index(row) if row in order else len(order))
        for method in recipe.methods:
            points = {row: _swept(by_row[row], method) for row in rows}
            present = [row for row in rows if points[row]]
            found += [
                Sweep(
                    recipe,
                    scale,
                    row,
                    method,
                    recipe.methods[method].label,
                    by_row[row].metric,
                    points[row],
                    points[present[0]],
                )
                for row in present
            ]
    return found


def _swept(table: ResultTable, method: str) -> tuple[Entry, ...]:
    return tuple(entry for entry in table.entries if entry.method == method and entry.point)


def chosen(found: Sequence[Sweep], scale: str) -> tuple[dict[str, Any], list[str]]:
    """What the sweeps of a scale decide, as a record, and which of them are not finished.

    Args:
        found: as :func:`sweeps` makes them.
        scale: the one that others are tuned on.
    """
    rows: dict[str, dict[str, Any]] = {}
    unfinished = []
    for sweep in found:
        points = sweep.recipe.points(scale, sweep.method)
        done = {e.point for e in sweep.entries if not e.unfinished and (e.values or e.failed)}
        if missing := [point for point in points if point not in done]:
            unfinished.append(f"{sweep.row} {sweep.method}: {len(missing)} of {len(points)} points")
            continue
        if not sweep.best.values:
            unfinished.append(f"{sweep.row} {sweep.method}: all points diverged")
            continue
        spread = sweep.best.spread
        rows.setdefault(sweep.row, {})[sweep.method] = {
            "settings": dict(sweep.best.point),
            "at_edge": list(sweep.edges),
            "points": len(points),
            "seeds": len(sweep.best.values),
            sweep.metric.name: None if spread is None else spread.mean,
        }
    record = {"recipe": found[0].recipe.id, "scale": scale, "rows": rows} if found else {}
    return record, unfinished


def read_tuned(recipe: Recipe, scale: str, out: Path) -> tuple[Tuned, Path | None]:
    """What a scale is tuned to, and where that is written; nothing for one that is not tuned.

    It is what ``normwise paper tune`` has written below ``out``; else what comes with the library.

    Raises:
        UsageError: if there is neither, or it is of another recipe.
        Damaged: if it cannot be read.
    """
    on = recipe.scales[scale].tuned_on if scale in recipe.scales else None
    if on is None:
        return {}, None
    name = f"{recipe.id}-{on}"
    own, shipped = out / name / TUNED, files("normwise.lab.recipes") / "tuned" / f"{name}.json"
    path = own if own.exists() else Path(str(shipped))
    if not path.exists():
        raise UsageError(
            f"scale {scale!r} of {recipe.id!r} takes settings from its scale {on!r}, which has not "
            f"been trained: run `normwise paper tune` with the same recipe, --scale {scale} and "
            "--out first"
        )
    try:
        record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (record["recipe"], record["scale"]) != (recipe.id, on):
            raise UsageError(f"{path} is of {record['recipe']}-{record['scale']}, not of {name}")
        settings = {
            row: {method: dict(entry["settings"]) for method, entry in methods.items()}
            for row, methods in record["rows"].items()
        }
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(path, f"{type(error).__name__}: {error}") from None
    return settings, path


def point_text(point: Point) -> str:
    """A point as a reader sees it: ``lr 0.00195, weight_decay 0.1``."""
    return ", ".join(f"{key} {value:.3g}" for key, value in point)
