"""The page of finished runs: one table, curves for each row of each recipe, every config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from string import Template
from typing import Any

from normwise.lab.palette import STYLES, Style
from normwise.lab.report import charts
from normwise.lab.report.page import colours, definitions, json_in_html, package_file
from normwise.lab.running.results import Done, Entry, Table
from normwise.lab.summary import Curve
from normwise.lab.tasks.problem import Metric

__all__ = ["render"]

_DASH = (3.0, 1.6)
# For methods that are not among the four optimizers; told apart with any colour vision.
_OTHERS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff9d57"),
    ("#00795a", "#35c9a0"),
    ("#a8487f", "#e79ac6"),
    ("#8a6d00", "#e0c04a"),
    ("#5b5fc7", "#a5a8f5"),
    ("#7a4b2a", "#d0a27c"),
    ("#5d6472", "#a3abb8"),
    ("#b3123b", "#ff8fa8"),
    ("#3d7a0a", "#9bd35f"),
)


@dataclass(frozen=True)
class _Chart:
    """A quantity of the metrics and how it is drawn."""

    quantity: str
    title: str
    axis: str
    scale: Callable[[Sequence[float]], charts.Scale]
    factor: float
    text: Callable[[float], str]


def _charts(metric: Metric) -> list[_Chart]:
    unit = f", {metric.unit}" if metric.unit else ""
    scale = charts.linear if metric.higher_is_better else charts.logarithmic
    return [
        _Chart(
            metric.name,
            metric.title[0].upper() + metric.title[1:],
            f"{metric.title}{unit}",
            scale,
            metric.factor,
            lambda v: f"{v:.{metric.digits}f}",
        ),
        _Chart(
            "train_loss",
            "Training loss",
            "mean over the epoch, log scale",
            charts.logarithmic,
            1.0,
            lambda v: f"{v:.4g}",
        ),
        _Chart(
            "norm_growth",
            "Norm of the weights",
            "geometric mean over channels ÷ start",
            charts.linear,
            1.0,
            lambda v: f"×{v:.3f}",
        ),
        _Chart(
            "effective_lr",
            "Effective learning rate",
            "η/‖w‖² or η/‖w‖, log scale",
            charts.logarithmic,
            1.0,
            lambda v: f"{v:.3g}",
        ),
    ]


def render(tables: Sequence[Table]) -> str:
    """The page as one HTML document that loads nothing.

    Args:
        tables: as :func:`normwise.lab.running.results.tables` makes them, one or more.
    """
    names = list(dict.fromkeys(e.method for table in tables for e in table.entries))
    keys = {name: f"m{index}" for index, name in enumerate(names)}
    labels = {e.method: e.label for table in tables for e in table.entries}
    dashed = {e.method: e.baseline is None for table in tables for e in table.entries}
    styles = {name: _style(name, index) for index, name in enumerate(names)}
    tooltips: dict[str, Any] = {}
    sections = []
    shown: set[tuple[str, str, str]] = set()
    for number, table in enumerate(tables):
        place = (table.recipe.id, table.scale, table.row)
        # The curves beside the first metric are the same for the others.
        drawn = _charts(table.metric)[: 1 if place in shown else None]
        shown.add(place)
        figures = []
        for chart in drawn:
            lines = [
                charts.Line(
                    keys[e.method],
                    e.label,
                    _curve(table.cells, e.method, chart.quantity, chart.factor),
                    _DASH if dashed[e.method] else (),
                )
                for e in table.entries
            ]
            frame = charts.Frame(lines, chart.scale)
            key = f"{number}-{chart.quantity}"
            tooltips[key] = charts.tooltip(frame, chart.text)
            figures.append(
                f'<figure data-chart="{key}"><h3>{escape(chart.title)}</h3><div class="plot">'
                f"{charts.svg(chart.title, frame, chart.axis, [])}</div></figure>"
            )
        heading = f"{table.recipe.title}: {table.row}, {table.scale} scale"
        notes = [table.recipe.question, table.recipe.scales[table.scale].note]
        notes += [f"Paper: {table.recipe.paper.source}.", table.recipe.paper.note]
        sections.append(
            f'<div data-words="{escape(_words(table))}"><h3 class="row">{escape(heading)}</h3>'
            f'<p class="note">{escape(" ".join(filter(None, notes)))}</p>'
            f'<div class="charts">{"".join(figures)}</div></div>'
        )
    cells = list({c.folder: c for table in tables for c in table.cells}.values())
    title = _title(tables, cells)
    return Template(package_file("runs.html")).substitute(
        title=escape(title),
        style=package_file("style.css") + _MORE_STYLE,
        colours=colours({f"o-{keys[name]}": style for name, style in styles.items()}),
        script=package_file("script.js") + package_file("runs.js"),
        data=json_in_html(tooltips),
        subtitle=escape(_subtitle(cells)),
        notice=_notice(cells),
        table=_table(tables, keys, dashed),
        toggles="".join(
            f'<button type="button" class="toggle o-{keys[name]}" data-toggle="{keys[name]}" '
            f'aria-pressed="true"><span class="key{" dashed" if dashed[name] else ""}"></span>'
            f"{escape(labels[name])}</button>"
            for name in names
        ),
        sections="".join(sections),
        configs="".join(_config(cell) for cell in cells),
    )


_MORE_STYLE = """
.filter { margin: 0 0 10px; }
.filter input { font: inherit; font-size: 14px; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; padding: 5px 10px; width: min(100%, 22em); }
thead button { border: 0; padding: 0; background: none; font-weight: 600; font-size: 13.5px; }
th[aria-sort="ascending"] button::after { content: " ↑"; }
th[aria-sort="descending"] button::after { content: " ↓"; }
td.text, th.text { text-align: left; }
td:first-child { padding-left: 0; }
h3.row { margin-top: 30px; }
details dl { margin: 8px 0 6px 18px; }
[hidden] { display: none !important; }
"""


def _style(name: str, index: int) -> Style:
    if name in STYLES:
        return STYLES[name]
    light, dark = _OTHERS[index % len(_OTHERS)]
    return Style(light, dark)


def _curve(cells: Sequence[Done], method: str, quantity: str, factor: float) -> Curve:
    """A quantity over the epochs that all runs of a method have reached."""
    own = [cell for cell in cells if cell.config["method"] == method and cell.records]
    by_epoch: dict[int, list[float]] = {}
    for cell in own:
        for record in cell.records:
            value = record.get(quantity)
            if value is not None:
                by_epoch.setdefault(record["epoch"], []).append(factor * value)
    reached = sorted(epoch for epoch, values in by_epoch.items() if len(values) == len(own))
    return Curve(
        epochs=tuple(reached),
        mean=tuple(fmean(by_epoch[e]) for e in reached),
        low=tuple(min(by_epoch[e]) for e in reached),
        high=tuple(max(by_epoch[e]) for e in reached),
        seeds=len(own),
    )


def _title(tables: Sequence[Table], cells: Sequence[Done]) -> str:
    finished = sum(cell.result is not None for cell in cells)
    recipes = {table.recipe.id for table in tables}
    what = tables[0].recipe.title if len(recipes) == 1 else f"{len(recipes)} recipes"
    return f"{what}: {finished} of {len(cells)} runs finished"


def _subtitle(cells: Sequence[Done]) -> str:
    seeds = {cell.config["seed"] for cell in cells}
    methods = {cell.config["method"] for cell in cells}
    counts = ((len(seeds), "seed"), (len(methods), "method"))
    return ", ".join(f"{n} {word}" + "s" * (n != 1) for n, word in counts)


def _notice(cells: Sequence[Done]) -> str:
    failed = [c for c in cells if c.result is not None and c.result["status"] == "failed"]
    return "".join(
        f'<p class="notice" role="note">{escape(_name(c))}: failed, '
        f"{escape(c.result['error'])}. It counts in no mean.</p>"
        for c in failed
        if c.result is not None
    )


def _name(cell: Done) -> str:
    c = cell.config
    return f"{c['recipe']}, {c['row']}, {c['method']}, seed {c['seed']}"


def _words(table: Table) -> str:
    return " ".join(
        [
            table.recipe.id,
            table.recipe.title,
            table.scale,
            table.row,
            *(word for e in table.entries for word in (e.method, e.label, e.verdict(table.metric))),
        ]
    )


def _table(tables: Sequence[Table], keys: Mapping[str, str], dashed: Mapping[str, bool]) -> str:
    heads = (
        ("recipe", True),
        ("row", True),
        ("method", True),
        ("metric", True),
        ("mean ± sd", False),
        ("seeds", False),
        ("difference", False),
        ("verdict", True),
        ("trivial", False),
        ("paper", False),
    )
    head = "".join(
        f'<th scope="col" aria-sort="none"{" class=text" if text else ""}>'
        f'<button type="button">{escape(name)}</button></th>'
        for name, text in heads
    )
    rows = "".join(
        _row(table, entry, keys[entry.method], dashed[entry.method])
        for table in tables
        for entry in table.entries
    )
    return f'<table id="results"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _row(table: Table, entry: Entry, key: str, dashed: bool) -> str:
    metric, spread = table.metric, entry.spread

    def number(value: float | None, sign: bool = False) -> str:
        if value is None:
            return "–"
        return f"{value:{'+' if sign else ''}.{metric.digits}f}".replace("-", "−")

    mean = number(None if spread is None else spread.mean)
    if spread is None and entry.failed:
        mean = "failed"
    if spread is not None and spread.sd is not None:
        mean += f"<small>± {number(spread.sd)}</small>"
    seeds = str(len(entry.values))
    if entry.failed:
        seeds += f"<small>{len(entry.failed)} failed</small>"
    if entry.unfinished:
        seeds += f"<small>{len(entry.unfinished)} unfinished</small>"
    difference = number(entry.difference, sign=True)
    if entry.half_width is not None:
        difference += f"<small>± {number(entry.half_width)}</small>"
    mark = f'<span class="key{" dashed" if dashed else ""}"></span>'
    cells = (
        (table.recipe.id, escape(table.recipe.id), True),
        (table.row, escape(table.row), True),
        (entry.label, mark + escape(entry.label), True),
        (metric.title, escape(f"{metric.title}{', ' + metric.unit if metric.unit else ''}"), True),
        ("" if spread is None else spread.mean, mean, False),
        (len(entry.values), seeds, False),
        ("" if entry.difference is None else entry.difference, difference, False),
        (entry.verdict(metric), escape(entry.verdict(metric)), True),
        ("" if entry.trivial is None else entry.trivial, number(entry.trivial), False),
        (
            "" if entry.paper is None else entry.paper,
            "not known" if entry.paper is None else f"{entry.paper:g}",
            False,
        ),
    )
    words = escape(
        f"{table.recipe.id} {table.recipe.title} {table.row} {entry.method} {entry.label} "
        f"{metric.title} {entry.verdict(metric)}"
    )
    return (
        f'<tr class="o-{key}" data-optimizer="{key}" data-words="{words}">'
        + "".join(
            f'<td{" class=text" if text else ""} data-value="{escape(str(value))}">{shown}</td>'
            for value, shown, text in cells
        )
        + "</tr>"
    )


def _config(cell: Done) -> str:
    config = dict(cell.config)
    items = [(k, str(config[k])) for k in ("recipe", "scale", "row", "method", "seed", "device")]
    for part in ("training", "options", "parallel"):
        items += [(k, json.dumps(v, ensure_ascii=False)) for k, v in config.get(part, {}).items()]
    if cell.result is not None:
        items += [(k, str(v)) for k, v in cell.result["facts"].items()]
        items.append(("weights, SHA-256", cell.result["weights"]))
    starts = cell.folder / "environment.json"
    if starts.exists():
        for start in json.loads(starts.read_text(encoding="utf-8")):
            versions = ", ".join(f"{k} {v}" for k, v in start["versions"].items())
            items.append(("started", f"{start['started']}: {versions}"))
            items.append(("processor", f"{start['processor']}, {start['cores']} cores"))
    return (
        f'<details data-words="{escape(_name(cell))}"><summary>{escape(_name(cell))}</summary>'
        f"<dl>{definitions(items)}</dl></details>"
    )
