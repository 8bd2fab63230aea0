"""Tables as Markdown, LaTeX, CSV and JSON, and back from JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normwise.lab.errors import Damaged
from normwise.lab.recipes import Recipe, find
from normwise.lab.running.results import Done, Entry, ResultTable, spread_of_differences
from normwise.lab.tasks.kinds import kind
from normwise.lab.tasks.problem import Metric

__all__ = ["as_csv", "as_data", "as_json", "as_latex", "as_markdown", "read_json"]

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


def _number(value: float, metric: Metric, sign: bool = False) -> str:
    rounded = round(value, metric.digits) + 0.0  # so that nothing is shown as −0
    return f"{rounded:{'+' if sign else ''}.{metric.digits}f}".replace("-", "−")


def _cells(entry: Entry, metric: Metric) -> tuple[str, ...]:
    spread = entry.spread
    if spread is None:
        shown = "failed" if entry.failed else "–"
    else:
        sd = "" if spread.sd is None else f" ± {_number(spread.sd, metric)}"
        shown = _number(spread.mean, metric) + sd
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
        for table in group:
            lines = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
            lines += [f"| {' | '.join(_cells(e, table.metric))} |" for e in table.entries]
            parts += [f"**{_title(table)}**", "\n".join(lines), _baseline(table)]
        paper = f"Paper: {recipe.paper.source}."
        parts.append(" ".join(filter(None, [recipe.scales[scale].note, paper, recipe.paper.note])))
    return "\n\n".join(filter(None, parts)) + "\n"


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
    parts = []
    for table in tables:
        rows = [_HEAD, *(_cells(e, table.metric) for e in table.entries)]
        body = [" & ".join(map(_latex, row)) + r" \\" for row in rows]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{_latex(_title(table))}. {_latex(_baseline(table))}}}",
                    rf"\begin{{tabular}}{{l{'r' * (len(_HEAD) - 1)}}}",
                    body[0],
                    r"\hline",
                    *body[1:],
                    r"\end{tabular}",
                    r"\end{table}",
                    "",
                ]
            )
        )
    return "\n".join(parts)


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
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(tables: Sequence[ResultTable]) -> str:
    """:func:`as_data`, and the records of every epoch, to six digits, which curves are drawn from.

    A row of a recipe has its records once, in the table of its first metric.
    """
    rows, shown = as_data(tables), set()
    entries = ((table, entry) for table in tables for entry in table.entries)
    for row, (table, entry) in zip(rows, entries, strict=True):
        place = (table.recipe.id, table.scale, table.row, entry.method)
        if place in shown:
            continue
        shown.add(place)
        row["records"] = {
            str(cell.config["seed"]): [
                {k: _short(v) for k, v in record.items()} for record in cell.records
            ]
            for cell in table.cells
            if cell.config["method"] == entry.method
        }
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
        return [_table(path, *place, group) for place, group in tables.items()]
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise Damaged(path, f"{type(error).__name__}: {error}") from None


def _table(
    path: Path, name: str, scale: str, row: str, metric: str, rows: Sequence[dict[str, Any]]
) -> ResultTable:
    recipe = find(name)
    cells = tuple(
        Done(path / r["method"] / seed, {**r, "seed": int(seed)}, None, records)
        for r in rows
        for seed, records in r.get("records", {}).items()
    )
    found = next(m for m in kind(recipe.task).metrics if m.name == metric)
    of_method = {r["method"]: _values(r) for r in rows}
    entries = tuple(_entry(recipe, r, of_method) for r in rows)
    return ResultTable(recipe, scale, row, found, entries, cells)


def _values(row: dict[str, Any]) -> dict[int, float]:
    return {int(seed): float(value) for seed, value in row["values"].items()}


def _entry(recipe: Recipe, row: dict[str, Any], of_method: dict[str, dict[int, float]]) -> Entry:
    """What the file holds; the claim is the recipe's, which may have learnt of it since."""
    method = recipe.methods[row["method"]]
    values = of_method[row["method"]]
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
        sd_of_differences=spread_of_differences(values, of_method.get(method.baseline or "", {})),
        claimed=recipe.claimed(row["row"], row["method"]) if judges else None,
        baseline=row["baseline"],
    )
