"""The page of finished runs: one table, differences, curves for each row, every config."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from normwise.figures import Axis, Dots, Figure, Heat, Line, Lines, Series, Spacing, marks
from normwise.figures.tables import Cell, Column, Row, Table
from normwise.lab.errors import UsageError, nearest
from normwise.lab.report.curves import EPOCH, QUANTITIES, DrawnQuantity, over_seeds
from normwise.lab.report.pages import page
from normwise.lab.report.sweeps import sweep_charts, sweep_table
from normwise.lab.running.sweeps import point_text, sweeps

if TYPE_CHECKING:
    from normwise.lab.running.results import Done, Entry, ResultTable
    from normwise.lab.tasks.problem import Metric

__all__ = ["chart", "picture", "quantities", "render"]

_LOSS = Axis("mean over the epoch, log scale", Spacing.LOG, text=lambda v: f"{v:.4g}")
_SHOWN = (
    DrawnQuantity("train_loss", "Training loss", _LOSS),
    DrawnQuantity("norm_growth", "Norm of the weights", QUANTITIES["norm_growth"].axis),
    QUANTITIES["effective_lr"],
)
# What a picture can show beside these.
_OTHERS = (
    DrawnQuantity("norm", "Norm of the weights", Axis("log scale", Spacing.LOG)),
    DrawnQuantity("smallest_norm", "Smallest norm of a slice", Axis("log scale", Spacing.LOG)),
    DrawnQuantity("lr", "Learning rate", Axis("log scale", Spacing.LOG)),
    QUANTITIES["relative_effective_lr"],
    QUANTITIES["angular_update"],
)

Marks = Mapping[str, tuple[str, tuple[float, ...]]]
_NAN = math.nan


def render(tables: Sequence[ResultTable]) -> str:
    """The page as one HTML document that loads nothing.

    Args:
        tables: as :func:`normwise.lab.running.results.tables` makes them, one or more.
    """
    labels, drawn = _labels_and_marks(tables)
    cells = list({cell.folder: cell for table in tables for cell in table.cells}.values())
    title = _title(tables)
    return page(
        "runs.html",
        brand="normwise report",
        title=title,
        page_title=title,
        subtitle=_subtitle(tables),
        notices=_notices(cells),
        numbers=_numbers(tables, drawn),
        differences=_differences(tables, drawn),
        sweeps=_sweeps(tables),
        methods=[
            {"name": name, "label": labels[name], "colour": colour, "dashed": bool(dash)}
            for name, (colour, dash) in drawn.items()
        ],
        sections=_sections(tables, drawn),
        configs=[(_name(cell), _config(cell)) for cell in cells if "training" in cell.config],
    )


def picture(tables: Sequence[ResultTable], names: Sequence[str] = ()) -> Figure:
    """The curves as a figure, one row of charts for each row of a recipe; of a sweep, its charts.

    Args:
        tables: as for :func:`render`.
        names: of quantities in ``metrics.jsonl`` (default: what the page shows).

    Raises:
        UsageError: for a quantity that there is not, or where no table has curves.
    """
    _, drawn = _labels_and_marks(tables)
    firsts = [table for table in _firsts(tables) if table.fixed]
    if not firsts:
        return _swept_picture(tables)
    charts = []
    for table in firsts:
        judged = [quantities(t.metric)[0] for t in tables if _place(t) == _place(table)]
        known = {q.key: q for q in (*quantities(table.metric), *judged, *_OTHERS)}
        for name in names:
            if name not in known:
                raise UsageError(f"unknown curve {name!r}: {nearest(name, known)}")
        chosen = [known[name] for name in names] or quantities(table.metric)
        for quantity in chosen:
            made = chart(table, quantity, drawn)
            title = f"{table.row}: {made.title}" if len(firsts) > 1 else made.title
            charts.append(replace(made, title=title))
    if all(made.empty for made in charts):
        raise UsageError("there are no curves: the tables hold no epochs")
    seeds = {cell.config["seed"] for table in tables for cell in table.cells}
    note = "one seed" if len(seeds) == 1 else f"mean and range over {len(seeds)} seeds"
    recipe = tables[0].recipe.title
    columns = min(len(chosen), 2 if len(chosen) in (2, 4) else 3)
    return Figure(recipe, tuple(charts), columns, note)


def _swept_picture(tables: Sequence[ResultTable]) -> Figure:
    found = sweeps(tables)
    charts = tuple(sweep_charts(found))
    if not charts:
        raise UsageError("there is no picture of a sweep over more than two settings")
    note = "means over seeds, bands from the lowest to the highest; what is far off is left out"
    if isinstance(charts[0], Heat):
        note = "means over seeds; the best is framed"
    note = f"{_with_unit(found[0].metric)}; {note}"
    columns = min(len(charts), 2 if len(charts) in (2, 4) else 3)
    return Figure(found[0].recipe.title, charts, columns, note)


def _sweeps(tables: Sequence[ResultTable]) -> list[dict[str, Any]]:
    """Of each recipe and scale that sweeps its table and charts."""
    groups = itertools.groupby(sweeps(tables), lambda sweep: (sweep.recipe, sweep.scale))
    return [
        {
            "title": f"{recipe.title}, {scale} scale",
            "note": recipe.question,
            "table": sweep_table(held := list(group)),
            "charts": sweep_charts(held),
        }
        for (recipe, scale), group in groups
    ]


def _labels_and_marks(tables: Sequence[ResultTable]) -> tuple[dict[str, str], Marks]:
    """Of each method its label, and its colour and dashes; the baselines are dashed."""
    entries = [entry for table in tables for entry in table.entries]
    labels = {entry.method: entry.label for entry in entries}
    compared = {entry.compared_with for entry in entries}
    return labels, marks(labels, {name for name, label in labels.items() if label in compared})


def quantities(metric: Metric) -> list[DrawnQuantity]:
    """The metric, and what is drawn of every task."""
    spacing = Spacing.LINEAR if metric.higher_is_better else Spacing.LOG
    first = DrawnQuantity(
        metric.name,
        metric.title[0].upper() + metric.title[1:],
        Axis(_with_unit(metric), spacing, text=lambda v: f"{v:.{metric.digits}f}"),
        factor=metric.factor,
    )
    return [first, *_SHOWN]


def _with_unit(metric: Metric) -> str:
    return f"{metric.title}, {metric.unit}" if metric.unit else metric.title


def _sections(tables: Sequence[ResultTable], drawn: Marks) -> list[dict[str, Any]]:
    """The curves of each row; those beside the first metric are the same for its others."""
    sections = []
    shown = set()
    for table in tables:
        place = _place(table)
        if not table.fixed:
            continue
        drawings = quantities(table.metric)[: 1 if place in shown else None]
        charts = [chart(table, quantity, drawn) for quantity in drawings]
        shown.add(place)
        if all(drawing.empty for drawing in charts):
            continue
        notes = [table.recipe.question, table.recipe.scales[table.scale].note]
        notes += [f"Paper: {table.recipe.paper.source}.", table.recipe.paper.note]
        sections.append(
            {
                "title": f"{table.recipe.title}: {table.row}, {table.scale} scale",
                "words": _words(table),
                "note": " ".join(filter(None, notes)),
                "charts": charts,
            }
        )
    return sections


def chart(table: ResultTable, quantity: DrawnQuantity, drawn: Marks) -> Lines:
    """The curves of a quantity in one row, one line a method.

    Args:
        table: the row.
        quantity: what is drawn.
        drawn: colour and dashes of each method.
    """
    lines = []
    for entry in table.fixed:
        own = [c.records for c in table.cells if c.config["method"] == entry.method and c.records]
        colour, dash = drawn[entry.method]
        line = Line(entry.method, entry.label, colour=colour, dash=dash)
        lines.append(over_seeds(line, own, quantity))
    return Lines(quantity.title, "", EPOCH, quantity.axis, tuple(lines))


def _differences(tables: Sequence[ResultTable], drawn: Marks) -> list[Dots]:
    """The differences with their intervals: a chart for each metric and unit."""
    by_metric: dict[str, list[tuple[ResultTable, Entry]]] = {}
    for table in tables:
        for entry in table.fixed:
            if entry.difference is not None:
                by_metric.setdefault(_with_unit(table.metric), []).append((table, entry))
    charts = []
    for title, found in by_metric.items():
        many = len({(table.recipe.id, table.row) for table, _ in found}) > 1
        values = tuple(float(e.difference or 0.0) for _, e in found)
        widths = [_NAN if e.half_width is None else e.half_width for _, e in found]
        series = Series(
            "",
            values,
            tuple(v - w for v, w in zip(values, widths, strict=True)),
            tuple(v + w for v, w in zip(values, widths, strict=True)),
            tuple(drawn[e.method][0] for _, e in found),
        )
        rows = tuple(
            f"{e.label} − {e.compared_with}" + (f", {table.row}" if many else "")
            for table, e in found
        )
        better = "right" if found[0][0].metric.higher_is_better else "left"
        axis = Axis(f"difference, better to the {better}")
        first_up = title[0].upper() + title[1:]
        charts.append(Dots(first_up, "", axis, rows, (series,), reference=0.0))
    return charts


def _title(tables: Sequence[ResultTable]) -> str:
    entries = [entry for table in _firsts(tables) for entry in table.entries]
    ended = sum(len(entry.values) + len(entry.failed) for entry in entries)
    runs = ended + sum(len(entry.unfinished) for entry in entries)
    recipes = {table.recipe.id for table in tables}
    what = tables[0].recipe.title if len(recipes) == 1 else f"{len(recipes)} recipes"
    return f"{what}: {ended} of {runs} runs finished"


def _firsts(tables: Sequence[ResultTable]) -> list[ResultTable]:
    """Of each row of a recipe the table of its first metric."""
    firsts: dict[tuple[str, str, str], ResultTable] = {}
    for table in tables:
        firsts.setdefault(_place(table), table)
    return list(firsts.values())


def _place(table: ResultTable) -> tuple[str, str, str]:
    """What the tables of one row's metrics have in common."""
    return table.recipe.id, table.scale, table.row


def _subtitle(tables: Sequence[ResultTable]) -> str:
    entries = [entry for table in tables for entry in table.entries]
    seeds = max(len(e.values) + len(e.failed) + len(e.unfinished) for e in entries)
    counts = ((seeds, "seed"), (len({entry.method for entry in entries}), "method"))
    return ", ".join(f"{n} {word}" + "s" * (n != 1) for n, word in counts)


def _notices(cells: Sequence[Done]) -> list[str]:
    return [
        f"{_name(c)}: failed, {c.result['error']}. It counts in no mean."
        for c in cells
        if c.result is not None and c.result["status"] == "failed"
    ]


def _name(cell: Done) -> str:
    c = cell.config
    at = f", {point_text(cell.point)}" if cell.point else ""
    return f"{c['recipe']}, {c['row']}, {c['method']}{at}, seed {c['seed']}"


def _words(table: ResultTable) -> str:
    entries = (w for e in table.entries for w in (e.method, e.label, e.verdict(table.metric)))
    return " ".join((table.recipe.id, table.recipe.title, table.scale, table.row, *entries))


def _numbers(tables: Sequence[ResultTable], drawn: Marks) -> Table:
    columns = (
        Column("method", words=True),
        Column("mean ± sd"),
        Column("verdict", words=True),
        Column("difference"),
        Column("metric", words=True),
        Column("row", words=True),
        Column("recipe", words=True),
        Column("seeds"),
        Column("claimed"),
        Column("seeds to see it"),
        Column("baseline"),
        Column("paper"),
    )
    rows = (_row(table, e, *drawn[e.method]) for table in tables for e in table.fixed)
    return Table(columns, tuple(rows))


def _row(table: ResultTable, entry: Entry, colour: str, dash: tuple[float, ...]) -> Row:
    metric, spread, recipe = table.metric, entry.spread, table.recipe

    def number(value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value:{sign}.{metric.digits}f}".replace("-", "−")

    def give(value: float | None, half: float | None, text: str) -> Cell:
        note = "" if half is None else f"± {number(half)}"
        return Cell(text, note, "" if value is None else value)

    mean = None if spread is None else spread.mean
    failed = "failed" if spread is None and entry.failed else number(mean)
    notes = ((entry.failed, "failed"), (entry.unfinished, "unfinished"))
    verdict = entry.verdict(metric)
    cells = (
        entry.label,
        give(mean, None if spread is None else spread.sd, failed),
        verdict,
        give(entry.difference, entry.half_width, number(entry.difference, "+")),
        _with_unit(metric),
        table.row,
        recipe.id,
        Cell(
            str(len(entry.values)),
            ", ".join(f"{len(seeds)} {word}" for seeds, word in notes if seeds),
        ),
        give(entry.claimed, None, number(entry.claimed, "+")),
        give(
            entry.seeds_needed, None, "–" if entry.seeds_needed is None else str(entry.seeds_needed)
        ),
        give(entry.baseline, None, number(entry.baseline)),
        give(entry.paper, None, "not known" if entry.paper is None else f"{entry.paper:g}"),
    )
    words = (recipe.id, recipe.title, table.row, entry.method, entry.label, metric.title, verdict)
    return Row(cells, entry.method, colour, bool(dash), " ".join(words))


def _config(cell: Done) -> list[tuple[str, str]]:
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
            if "accelerator" in start:
                items.append(("accelerator", start["accelerator"]))
    return items
