"""Tables as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from typing import Any

from normwise.lab.running.results import Entry, ResultTable
from normwise.lab.tasks.problem import Metric

__all__ = ["as_csv", "as_data", "as_latex", "as_markdown"]

_HEAD = ("method", "mean ± sd", "seeds", "difference (95%)", "verdict", "paper")


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
    return entry.label, shown, seeds, difference, entry.verdict(metric), paper


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


_FIELDS = (
    "recipe",
    "scale",
    "row",
    "metric",
    "method",
    "mean",
    "sd",
    "seeds",
    "failed",
    "unfinished",
    "compared_with",
    "difference",
    "half_width_95",
    "verdict",
    "baseline",
    "paper",
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
                    "mean": None if spread is None else spread.mean,
                    "sd": None if spread is None else spread.sd,
                    "seeds": len(entry.values),
                    "failed": len(entry.failed),
                    "unfinished": len(entry.unfinished),
                    "compared_with": entry.compared_with,
                    "difference": entry.difference,
                    "half_width_95": entry.half_width,
                    "verdict": entry.verdict(table.metric),
                    "baseline": entry.baseline,
                    "paper": entry.paper,
                    "values": {str(seed): value for seed, value in entry.values.items()},
                }
            )
    return rows


def as_csv(tables: Sequence[ResultTable]) -> str:
    """One line for each method in each table; numbers with all digits, nothing for unknown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_data(tables))
    return text.getvalue()
