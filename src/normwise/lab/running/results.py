"""From cells to a table: means, paired differences with intervals, the paper's numbers beside."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normwise.lab.errors import Damaged, UsageError
from normwise.lab.recipes import Recipe, find
from normwise.lab.recipes.grids import Point
from normwise.lab.running.cell import CONFIG, RESULT
from normwise.lab.store import METRICS, read_metrics, read_sealed_json
from normwise.lab.summary import (
    Spread,
    Verdict,
    example_half_width,
    seed_half_width,
    seeds_needed,
)
from normwise.lab.tasks.kinds import kind
from normwise.lab.tasks.problem import Metric

__all__ = [
    "RECIPE",
    "Done",
    "Entry",
    "ResultTable",
    "finished",
    "paired",
    "read_cells",
    "spread_of_differences",
    "tables",
]

# The recipe as it was run, beside its rows; without it the library's own of that name is taken.
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Done:
    """A cell as its folder holds it.

    Args:
        folder: where.
        config: the content of ``config.json``.
        result: the content of ``result.json``; none while it is not finished.
        records: the content of ``metrics.jsonl``.
    """

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any] | None
    records: list[dict[str, Any]]

    @property
    def point(self) -> Point:
        """Of the grid; empty where nothing is swept."""
        return tuple(self.config.get("point", {}).items())


@dataclass(frozen=True)
class Entry:
    """One method in one row, judged by one metric.

    Args:
        method: its name.
        label: as a reader sees it.
        values: for each finished seed the metric, as shown.
        failed: seeds whose training diverged.
        unfinished: seeds that have not come to an end.
        paper: the paper's number; none where it is not known.
        compared_with: the label of the method that it is compared with; none for a baseline.
        difference: mean over common seeds of this method minus that one, as shown.
        half_width: of the 95% interval of the difference; none for fewer than two common seeds.
        sd_of_differences: of the differences of common seeds, as shown; none for fewer than two.
        claimed: the difference that the paper claims, as shown; none where it is not known.
        baseline: what a stated method that learns nothing from the inputs reaches, as shown.
        point: of the grid; empty where nothing is swept.
    """

    method: str
    label: str
    values: dict[int, float]
    failed: tuple[int, ...]
    unfinished: tuple[int, ...]
    paper: float | None
    compared_with: str | None
    difference: float | None
    half_width: float | None
    sd_of_differences: float | None
    claimed: float | None
    baseline: float | None
    point: Point = ()

    @property
    def seeds_needed(self) -> int | None:
        """How many see the claimed difference with a chance of 80%, by the spread seen."""
        if self.claimed is None or self.sd_of_differences is None:
            return None
        return seeds_needed(self.claimed, self.sd_of_differences)

    @property
    def spread(self) -> Spread | None:
        """Mean and standard deviation; none where no seed has finished."""
        return Spread.of(list(self.values.values())) if self.values else None

    def verdict(self, metric: Metric) -> str:
        """What the interval allows to say."""
        if self.difference is None:
            return ""
        higher = metric.higher_is_better
        return Verdict.of(self.difference, self.half_width, higher, self.claimed).value


@dataclass(frozen=True)
class ResultTable:
    """A row of a recipe: all its methods, at each point of their grids, judged by one metric.

    Args:
        recipe: what was run.
        scale: at which scale.
        row: which row.
        metric: what is shown.
        entries: the methods, in the recipe's order.
        cells: what it was made from.
    """

    recipe: Recipe
    scale: str
    row: str
    metric: Metric
    entries: tuple[Entry, ...]
    cells: tuple[Done, ...]

    @property
    def fixed(self) -> tuple[Entry, ...]:
        """The methods that sweep nothing."""
        return tuple(entry for entry in self.entries if not entry.point)


def read_cells(
    folders: Iterable[Path], skipped: Callable[[str], object] | None = None
) -> list[Done]:
    """All cells at or below ``folders``, finished or not.

    Args:
        folders: where to look.
        skipped: called with the reason for each cell that cannot be read, and it is left out
            (default: the first is raised).

    Raises:
        UsageError: if a folder has none, or a file in one is not what was written.
    """
    found = []
    for folder in folders:
        configs = sorted(folder.rglob(CONFIG))
        if not configs:
            raise UsageError(f"no runs in {str(folder)!r}: it holds no {CONFIG}")
        for path in configs:
            try:
                found.append(_read(path))
            except Damaged as error:  # noqa: PERF203  # each cell may fail by itself
                if skipped is None:
                    raise
                skipped(str(error))
    return found


def _read(path: Path) -> Done:
    """The cell whose config this is."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        for key, wanted in (("recipe", str), ("scale", str), ("row", str), ("method", str)):
            if not isinstance(config[key], wanted):
                raise TypeError(f"{key} is {config[key]!r}")
        int(config["seed"]), dict(config["training"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Damaged(path, f"{type(error).__name__}: {error}") from None
    result_path, metrics = path.with_name(RESULT), path.with_name(METRICS)
    result = read_sealed_json(result_path) if result_path.exists() else None
    try:
        if result is not None:
            content = metrics.read_bytes()
            if hashlib.sha256(content).hexdigest() != result["metrics_sha256"]:
                raise ValueError("its checksum differs")
        records = read_metrics(metrics) if metrics.exists() else []
    except (OSError, ValueError) as error:
        raise Damaged(metrics, str(error)) from None
    return Done(path.parent, config, result, records)


def tables(cells: Sequence[Done]) -> list[ResultTable]:
    """One table for each recipe, scale, row and metric, in the order in which they appear."""
    groups: dict[tuple[str, str, str], list[Done]] = {}
    for cell in cells:
        c = cell.config
        groups.setdefault((c["recipe"], c["scale"], c["row"]), []).append(cell)
    made = []
    for (name, scale, row), group in groups.items():
        own = group[0].folder.parents[3 if group[0].point else 2] / RECIPE
        recipe = find(str(own) if own.exists() else name)
        metrics = _metrics(recipe, group)
        for metric in metrics:
            entries = [
                _entry(recipe, row, method, metric, metric == metrics[0], at_point, point)
                for method in recipe.methods
                for point, at_point in _by_point(group, method).items()
            ]
            made.append(ResultTable(recipe, scale, row, metric, tuple(entries), tuple(group)))
    return made


def _by_point(group: Sequence[Done], method: str) -> dict[Point, list[Done]]:
    """For each point of a method's grid the cells of all methods there, and those without one."""
    points = sorted({cell.point for cell in group if cell.config["method"] == method})
    return {point: [cell for cell in group if cell.point in (point, ())] for point in points}


def _metrics(recipe: Recipe, group: Sequence[Done]) -> tuple[Metric, ...]:
    """What a row is judged by: the task says it, or, of the user's own, the first result."""
    results = [cell.result for cell in group if cell.result is not None]
    said = next((r["judged_by"] for r in results if "judged_by" in r), ())
    metrics = kind(recipe.task).metrics or tuple(Metric(**fields) for fields in said)
    # A run of an older version lacks what the task has been judged by since.
    done = [r["metrics"] for r in results if r["status"] == "ok"]
    return tuple(m for m in metrics if all(m.name in held for held in done))


def finished(group: Sequence[Done], method: str) -> dict[int, dict[str, Any]]:
    """The results of a method by seed, of the seeds that trained to the end."""
    return {
        cell.config["seed"]: cell.result
        for cell in sorted(group, key=lambda cell: int(cell.config["seed"]))
        if cell.config["method"] == method and cell.result and cell.result["status"] == "ok"
    }


def paired(
    mine: Mapping[int, Any], theirs: Mapping[int, Any], metric: Metric, judges: bool
) -> tuple[float, float | None] | None:
    """The mean difference over common seeds, as shown, and half of its 95% interval.

    Args:
        mine: results by seed.
        theirs: of the method that is subtracted.
        metric: what is compared.
        judges: whether test examples that are classified wrongly are those of this metric.

    Returns:
        None without a common seed; no interval for one.
    """
    common = [seed for seed in mine if seed in theirs]
    if not common:
        return None
    differences = _differences(_shown(mine, metric), _shown(theirs, metric))
    half_width = seed_half_width(differences)
    if half_width is not None and judges and "wrong" in mine[common[0]]:
        by_example = metric.factor * example_half_width(
            [mine[s]["wrong"] for s in common],
            [theirs[s]["wrong"] for s in common],
            mine[common[0]]["facts"]["test_examples"],
        )
        half_width = math.hypot(half_width, by_example)
    return sum(differences) / len(differences), half_width


def _shown(results: Mapping[int, Any], metric: Metric) -> dict[int, float]:
    """The metric as shown, by seed."""
    return {seed: metric.factor * r["metrics"][metric.name] for seed, r in results.items()}


def _differences(mine: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Of common seeds, in the order of the first."""
    return [value - theirs[seed] for seed, value in mine.items() if seed in theirs]


def spread_of_differences(mine: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """The standard deviation of the differences of common seeds; none for fewer than two."""
    differences = _differences(mine, theirs)
    return Spread.of(differences).sd if differences else None


def _entry(
    recipe: Recipe,
    row: str,
    name: str,
    metric: Metric,
    judges: bool,
    group: Sequence[Done],
    point: Point,
) -> Entry:
    method = recipe.methods[name]
    own = [cell for cell in group if cell.config["method"] == name]
    mine = finished(group, name)
    values = _shown(mine, metric)
    difference = half_width = sd = None
    if method.baseline is not None:
        theirs = finished(group, method.baseline)
        difference, half_width = paired(mine, theirs, metric, judges) or (None, None)
        sd = spread_of_differences(values, _shown(theirs, metric))
    results = [cell.result for cell in own if cell.result is not None]
    baseline = next((r["baseline"].get(metric.name) for r in results), None)
    return Entry(
        method=name,
        label=method.label,
        values=values,
        failed=tuple(c.config["seed"] for c in own if c.result and c.result["status"] == "failed"),
        unfinished=tuple(c.config["seed"] for c in own if c.result is None),
        paper=recipe.paper.rows.get(row, {}).get(name) if judges else None,
        compared_with=None if method.baseline is None else recipe.methods[method.baseline].label,
        difference=difference,
        half_width=half_width,
        sd_of_differences=sd,
        claimed=recipe.claimed(row, name) if judges else None,
        baseline=None if baseline is None else metric.factor * baseline,
        point=point,
    )
