"""The page of a comparison: words, tables and charts put into its template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from normwise.figures.tables import Cell, Column, Row, Table
from normwise.lab.report.curves import QUANTITIES, Comparison
from normwise.lab.report.pages import page
from normwise.lab.report.toy import toy_loss, toy_norm, toy_plane, toy_table
from normwise.lab.summary import listed
from normwise.lab.toy import trajectories
from normwise.monitor import Monitor

__all__ = ["comparison_table", "render"]

Record = Mapping[str, Any]


def render(
    run: Mapping[str, Any],
    records: Sequence[Record],
    summary: Mapping[str, Any],
    layers: Mapping[str, Monitor] = MappingProxyType({}),
) -> str:
    """The report as one HTML document.

    Args:
        run: the content of ``run.json``.
        records: the content of ``metrics.jsonl``.
        summary: the content of ``summary.json``.
        layers: what was seen layer by layer, by method (default: nothing).
    """
    comparison = Comparison(run, records)
    toy = trajectories()
    charts = [comparison.chart(key) for key in QUANTITIES]
    examples = run["task"]["test_examples"]
    return page(
        "compare.html",
        brand="normwise compare",
        title=summary["headline"],
        page_title=f"{run['task']['title']}: {summary['headline']}",
        subtitle=_subtitle(comparison),
        notices=_notices(run, summary["optimizers"]),
        findings=[found["text"] for found in summary["findings"]],
        numbers=comparison_table(comparison, summary),
        formulas=comparison.formulas,
        one_example=f"; one example is {100 / examples:.2f} points" if examples else "",
        methods=_methods(comparison),
        dashed=comparison.dashed,
        charts=[chart for chart in charts if not chart.empty],
        layers=_layers(comparison, layers),
        toy=[toy_plane(toy), toy_norm(toy), toy_loss(toy)],
        toy_numbers=toy_table(toy),
        command=run["command"],
        settings=_settings(run),
        environment=_environment(run),
    )


def _methods(comparison: Comparison) -> list[dict[str, Any]]:
    found = []
    for m in comparison.methods:
        colour, dash = comparison.marks[m["name"]]
        found.append({**m, "colour": colour, "dashed": bool(dash)})
    return found


def _subtitle(comparison: Comparison) -> str:
    run, task = comparison.run, comparison.run["task"]
    seeds, epochs = run["settings"]["seeds"], run["settings"]["epochs"]
    return (
        f"{listed([m['label'] for m in comparison.methods])} on {task['title']}: "
        f"{task['train_examples']} examples to learn from, {task['test_examples']} to test on, "
        f"{_count(epochs, 'epoch')}, {_count(seeds, 'seed')}, {run['started'][:10]}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _notices(run: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What keeps this from being a whole comparison, if anything does."""
    notes = []
    if run["status"] == "interrupted":
        notes.append(
            "Interrupted: this report shows what had been finished. Means are over finished seeds; "
            "where a method has none, over its unfinished ones up to the last common epoch."
        )
    return notes + [
        f"{row['label']}, seed {failure['seed']}: failed, {failure['error']}. It counts in no mean."
        for row in rows
        for failure in row["failed"]
    ]


def comparison_table(comparison: Comparison, summary: Mapping[str, Any]) -> Table:
    """The numbers at the end of a comparison: method, accuracy and verdict first."""
    columns = (
        Column("method", words=True),
        Column("accuracy", "test, %"),
        Column("verdict", words=True),
        Column("difference", "points"),
        Column("norm growth", "end ÷ start"),
        Column("effective lr", "at the end"),
        Column("norms’ share", "÷ start"),
        Column("loss", "training"),
        Column("step", "ms"),
        Column("optimizer", "ms"),
        Column("seeds", "finished"),
    )
    found = {f["projected"]: f for f in summary["findings"]}
    rows = []
    for row in summary["optimizers"]:
        n, finding = row["numbers"], found.get(row["label"])
        colour, dash = comparison.marks[row["name"]]
        cells = (
            row["label"],
            _spread(n.get("test_accuracy"), lambda v: f"{100 * v:.2f}"),
            "" if finding is None else finding["verdict"],
            "" if finding is None else _difference(finding),
            _spread(n.get("norm_growth"), lambda v: f"{v:.2f}"),
            _mean(n.get("effective_lr"), lambda v: f"{v:.2e}"),
            _mean(n.get("relative_effective_lr"), lambda v: f"{v:.2f}"),
            _mean(n.get("train_loss"), lambda v: f"{v:.4f}"),
            "–" if row["step_ms"] is None else f"{row['step_ms']:.2f}",
            "–" if row["optimizer_ms"] is None else f"{row['optimizer_ms']:.2f}",
            _seeds(row, comparison.run["settings"]["seeds"]),
        )
        rows.append(Row(cells, row["name"], colour, bool(dash)))
    return Table(columns, tuple(rows))


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _difference(finding: Mapping[str, Any]) -> Cell:
    half = finding["half_width"]
    note = "" if half is None else f"± {100 * half:.2f}"
    return Cell(_signed(100 * finding["difference"]), note)


def _mean(value: Mapping[str, Any] | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value["mean"])


def _spread(value: Mapping[str, Any] | None, text: Callable[[float], str]) -> Cell:
    sd = None if value is None else value["sd"]
    return Cell(_mean(value, text), "" if sd is None else f"± {text(sd)}")


def _seeds(row: Mapping[str, Any], seeds: int) -> Cell:
    notes = []
    if row["failed"]:
        notes.append(f"{len(row['failed'])} failed")
    if not row["finished"] and row["unfinished"] and row["numbers"]:
        notes.append(f"epoch {row['epoch']}")
    return Cell(f"{len(row['finished'])} of {seeds}", ", ".join(notes))


def _layers(comparison: Comparison, layers: Mapping[str, Monitor]) -> list[dict[str, Any]]:
    """What each monitor has measured; nothing where that was nothing."""
    labels = {m["name"]: m["label"] for m in comparison.methods}
    titles = {
        "norms": "Norm",
        "effective_lrs": "Effective learning rate",
        "angles": "Angle per step",
        "expected": "Measured ÷ expected",
    }
    found = []
    for name, monitor in layers.items():
        if not monitor.history:
            continue
        alarms = [str(alarm) for alarm in monitor.raised]
        said = _count(len(alarms), "alarm") if alarms else "no alarms"
        found.append(
            {
                "name": name,
                "label": labels.get(name, name),
                "about": f"{_count(len(monitor.layers), 'layer')}, {said}",
                "alarms": alarms,
                "panels": [(titles[key], drawing) for key, drawing in monitor.panels().items()],
            }
        )
    return found


def _settings(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings as they are written down, after what the task is."""
    task = run["task"]
    items = [
        ("data", task["source"]),
        ("split", f"{task['train_examples']} training, {task['test_examples']} test examples"),
    ]
    if "network" in task:
        items.append(("network", task["network"]))
    if "steps_per_epoch" in task:
        items.append(("steps per epoch", str(task["steps_per_epoch"])))
    for name, value in run["settings"].items():
        items.append((name.replace("_", " "), _shown(value)))
    return items


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _environment(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    e = run["environment"]
    items = [(name, str(value)) for name, value in e["versions"].items()]
    items += [
        ("system", e["system"]),
        ("processor", f"{e['processor']}, {e['cores']} cores, {e['threads']} thread used"),
    ]
    if "seconds" in run:
        items.append(("wall time", f"{run['seconds']} s of training"))
    return items
