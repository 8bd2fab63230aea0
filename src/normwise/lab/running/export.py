"""Tables as Markdown, LaTeX, CSV and JSON, and back from JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from normwise.lab.errors import Damaged
from normwise.lab.recipes import Recipe, find
from normwise.lab.recipes.grids import Point, point_name
from normwise.lab.running.results import Done, Entry, ResultTable, spread_of_differences
from normwise.lab.running.sweeps import Sweep, point_text, sweeps
from normwise.lab.summary import Spread
from normwise.lab.tasks.kinds import kind
from normwise.lab.tasks.problem import Metric

__all__ = [
    "as_csv",
    "as_data",
    "as_json",
    "as_latex",
    "as_markdown",
    "read_json",
    "sweep_cells",
    "sweep_head",
]

_HEAD = (
    "method",
    "mean ± sd",
    "seeds",
    "difference (95%)",
    "verdict",
    "claimed",
    "seeds to see it",
    "paper",
)
_SWEEP_HEAD = ("method", "row", "seeds", "best at", "mean ± sd", "over the first row's", "regret")


def _number(value: float, metric: Metric, sign: bool = False) -> str:
    rounded = round(value, metric.digits) + 0.0  # so that nothing is shown as −0
    return f"{rounded:{'+' if sign else ''}.{metric.digits}f}".replace("-", "−")


def _cells(entry: Entry, metric: Metric) -> tuple[str, ...]:
    shown = "failed" if entry.failed and not entry.values else _spread(entry.spread, metric)
    seeds = str(len(entry.values))
    if entry.failed:
        seeds += f", {len(entry.failed)} failed"
    if entry.unfinished:
        seeds += f", {len(entry.unfinished)} unfinished"
    difference = ""
    if entry.difference is not None:
        width = "" if entry.half_width is None else f" ± {_number(entry.half_width, metric)}"
        difference = (
            f"{_number(entry.difference, metric, sign=True)}{width} to {entry.compared_with}"
        )
    paper = "not known" if entry.paper is None else f"{entry.paper:g}"
    claimed = needed = ""
    if entry.difference is not None:
        claimed = (
            "not known" if entry.claimed is None else _number(entry.claimed, metric, sign=True)
        )
        if entry.sd_of_differences is not None and entry.claimed:
            needed = "over 10,000" if entry.seeds_needed is None else f"{entry.seeds_needed:,}"
    return entry.label, shown, seeds, difference, entry.verdict(metric), claimed, needed, paper


def _spread(spread: Spread | None, metric: Metric) -> str:
    if spread is None:
        return "–"
    sd = "" if spread.sd is None else f" ± {_number(spread.sd, metric)}"
    return _number(spread.mean, metric) + sd


def sweep_head(found: Sequence[Sweep]) -> tuple[str, ...]:
    """The headings of a table of sweeps; where there is one row, nothing is carried to others."""
    return _SWEEP_HEAD if len({sweep.row for sweep in found}) > 1 else _SWEEP_HEAD[:-2]


def sweep_cells(sweep: Sweep) -> tuple[str, ...]:
    """The texts under :func:`sweep_head`, of several rows."""
    best, regret = sweep.best, sweep.regret
    edge = f" (edge: {', '.join(sweep.edges)})" if sweep.edges else ""
    ratios = ", ".join("–" if r is None else f"×{r:.3g}" for r in sweep.ratios.values())
    diverged = regret is not None and regret.mean == math.inf
    return (
        sweep.label,
        sweep.row,
        str(len(best.values)),
        point_text(best.point) + edge if best.values else "none",
        _spread(best.spread, sweep.metric),
        ratios,
        "diverged" if diverged else _spread(regret, sweep.metric),
    )


def _swept_rows(found: Sequence[Sweep]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = sweep_head(found)
    return head, [sweep_cells(sweep)[: len(head)] for sweep in found]


def _swept_title(found: Sequence[Sweep]) -> str:
    first = found[0]
    title = (
        f"{first.recipe.title} ({first.scale} scale): best of each sweep by {first.metric.title}"
    )
    if len(sweep_head(found)) < len(_SWEEP_HEAD):
        return title
    return f"{title}, and the regret of carrying the first row's best to the others"


def _title(table: ResultTable) -> str:
    unit = f", {table.metric.unit}" if table.metric.unit else ""
    return f"{table.recipe.title}: {table.row} ({table.scale} scale), {table.metric.title}{unit}"


def _baseline(table: ResultTable) -> str:
    value = next((e.baseline for e in table.entries if e.baseline is not None), None)
    return "" if value is None else f"Baseline: {_number(value, table.metric)}."


def as_markdown(tables: Sequence[ResultTable]) -> str:
    """Pipe tables, each under its title; what holds for all of a recipe's follows the last."""
    parts = []
    for (recipe, scale), group in itertools.groupby(tables, lambda t: (t.recipe, t.scale)):
        held = list(group)
        for table in held:
            if fixed := table.fixed:
                rows = [_cells(e, table.metric) for e in fixed]
                parts += [f"**{_title(table)}**", _pipes(_HEAD, rows), _baseline(table)]
        if swept := sweeps(held):
            parts += [f"**{_swept_title(swept)}**", _pipes(*_swept_rows(swept))]
        paper = f"Paper: {recipe.paper.source}."
        parts.append(" ".join(filter(None, [recipe.scales[scale].note, paper, recipe.paper.note])))
    return "\n\n".join(filter(None, parts)) + "\n"


def _pipes(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "ε": r"$\varepsilon$",
    "λ": r"$\lambda$",
    "ρ": r"$\rho$",
    "∞": r"$\infty$",
    "×": r"$\times$",
    "₂": r"$_2$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def as_latex(tables: Sequence[ResultTable]) -> str:
    """``table`` environments that need no package."""
    parts = [
        _latex_table(
            f"{_title(table)}. {_baseline(table)}",
            _HEAD,
            [_cells(entry, table.metric) for entry in table.fixed],
        )
        for table in tables
        if table.fixed
    ]
    for _, group in itertools.groupby(sweeps(tables), lambda s: (s.recipe.id, s.scale)):
        held = list(group)
        parts.append(_latex_table(_swept_title(held), *_swept_rows(held)))
    return "\n".join(parts)


def _latex_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = [" & ".join(map(_latex, row)) + r" \\" for row in (head, *rows)]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{_latex(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            body[0],
            r"\hline",
            *body[1:],
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def as_data(tables: Sequence[ResultTable]) -> list[dict[str, Any]]:
    """One dict for each method in each table, with the values of every seed."""
    rows = []
    for table in tables:
        for entry in table.entries:
            spread = entry.spread
            rows.append(
                {
                    "recipe": table.recipe.id,
                    "scale": table.scale,
                    "row": table.row,
                    "metric": table.metric.name,
                    "method": entry.method,
                    "point": dict(entry.point),
                    "mean": None if spread is None else spread.mean,
                    "sd": None if spread is None else spread.sd,
                    "seeds": len(entry.values),
                    "failed": len(entry.failed),
                    "unfinished": len(entry.unfinished),
                    "compared_with": entry.compared_with,
                    "difference": entry.difference,
                    "half_width_95": entry.half_width,
                    "sd_of_differences": entry.sd_of_differences,
                    "claimed": entry.claimed,
                    "seeds_needed": entry.seeds_needed,
                    "verdict": entry.verdict(table.metric),
                    "baseline": entry.baseline,
                    "paper": entry.paper,
                    "values": {str(seed): value for seed, value in entry.values.items()},
                }
            )
    return rows


def as_csv(tables: Sequence[ResultTable]) -> str:
    """One line for each method in each table; numbers with all digits, nothing for unknown."""
    text, rows = io.StringIO(), as_data(tables)
    for row in rows:
        del row["values"]
        row["point"] = point_name(tuple(row["point"].items()))
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(tables: Sequence[ResultTable]) -> str:
    """:func:`as_data`, and the records of every epoch, to six digits, which curves are drawn from.

    A row of a recipe has its records once, in the table of its first metric; a sweep has none.
    """
    rows, shown = as_data(tables), set()
    entries = ((table, entry) for table in tables for entry in table.entries)
    for row, (table, entry) in zip(rows, entries, strict=True):
        place = (table.recipe.id, table.scale, table.row, entry.method)
        if place in shown or entry.point:
            continue
        shown.add(place)
        records = {
            str(cell.config["seed"]): [
                {k: _short(v) for k, v in record.items()} for record in cell.records
            ]
            for cell in table.cells
            if cell.config["method"] == entry.method
        }
        if any(records.values()):
            row["records"] = records
    lines = ",\n".join(json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows)
    return f"[\n{lines}\n]\n"


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_json(path: Path) -> list[ResultTable]:
    """The tables that :func:`as_json` wrote, of the library's own recipes.

    Raises:
        Damaged: if it holds anything else.
        UsageError: for a recipe that there is not.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        tables: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
        for row in rows:
            place = (row["recipe"], row["scale"], row["row"], row["metric"])
            tables.setdefault(place, []).append(row)
        if not tables:
            raise ValueError("it holds no tables")
        recipes = {name: find(name) for name in {place[0] for place in tables}}
        return [
            _table(path, recipes[name], scale, row, metric, group)
            for (name, scale, row, metric), group in tables.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise Damaged(path, f"{type(error).__name__}: {error}") from None


def _table(
    path: Path, recipe: Recipe, scale: str, row: str, metric: str, rows: Sequence[dict[str, Any]]
) -> ResultTable:
    cells = tuple(
        Done(path / r["method"] / seed, {**r, "seed": int(seed)}, None, records)
        for r in rows
        for seed, records in r.get("records", {}).items()
    )
    found = next(m for m in kind(recipe.task).metrics if m.name == metric)
    values = {(r["method"], _point(r)): _values(r) for r in rows}
    entries = tuple(_entry(recipe, r, values) for r in rows)
    return ResultTable(recipe, scale, row, found, entries, cells)


def _values(row: dict[str, Any]) -> dict[int, float]:
    return {int(seed): float(value) for seed, value in row["values"].items()}


def _point(row: dict[str, Any]) -> Point:
    return tuple(row.get("point", {}).items())


def _entry(
    recipe: Recipe, row: dict[str, Any], held: dict[tuple[str, Point], dict[int, float]]
) -> Entry:
    """What the file holds; the claim is the recipe's, which may have learnt of it since.

    Args:
        recipe: whose row it is.
        row: of the file.
        held: the values of all methods in the same table, by method and point.
    """
    method, point = recipe.methods[row["method"]], _point(row)
    values = held[row["method"], point]
    baseline = method.baseline or ""
    theirs = held.get((baseline, point), held.get((baseline, ()), {}))
    judges = row["metric"] == kind(recipe.task).metrics[0].name
    others = [s for s in range(len(values) + row["failed"] + row["unfinished"]) if s not in values]
    return Entry(
        method=row["method"],
        label=method.label,
        values=values,
        failed=tuple(others[: row["failed"]]),
        unfinished=tuple(others[row["failed"] :]),
        paper=row["paper"],
        compared_with=row["compared_with"],
        difference=row["difference"],
        half_width=row["half_width_95"],
        sd_of_differences=spread_of_differences(values, theirs),
        claimed=recipe.claimed(row["row"], row["method"]) if judges else None,
        baseline=row["baseline"],
        point=point,
    )
