"""The page: words, table and charts put into the template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib.resources import files
from string import Template
from types import SimpleNamespace
from typing import Any

from normwise.lab.palette import STYLES, TOY_STYLES, Style
from normwise.lab.report import charts, toy_picture
from normwise.lab.summary import Row, Spread, curve, rows
from normwise.lab.toy import trajectories
from normwise.monitor import Monitor

__all__ = ["colours", "definitions", "json_in_html", "package_file", "render"]

Record = Mapping[str, Any]


@dataclass(frozen=True)
class _Chart:
    """A quantity's chart.

    Args:
        quantity: its name in the metrics.
        title: over the chart.
        axis: beside the vertical axis, with the unit.
        scale: makes the axis.
        text: a value in the tooltip.
        caption: what to look for.
    """

    quantity: str
    title: str
    axis: str
    scale: Callable[[Sequence[float]], charts.Scale]
    text: Callable[[float], str]
    caption: str


_CHARTS = (
    _Chart(
        "norm_growth",
        "Norm of the scale-invariant weights",
        "norm ÷ norm at the start",
        charts.linear,
        lambda v: f"×{v:.3f}",
        "Look for how fast the dashed lines leave 1, and how much of that the solid line of the "
        "same pair avoids. None of this growth changes what the network computes.",
    ),
    _Chart(
        "relative_effective_lr",
        "The hidden slowdown",
        "effective lr without schedule ÷ start",
        partial(charts.linear, zero=True),
        lambda v: f"×{v:.3f}",
        "What the norms alone do to the learning rate: 1/‖w‖² for SGD and SGDP, 1/‖w‖ for AdamW "
        "and AdamP, relative to the start. At 0.5 the weights turn half as fast as the chosen "
        "learning rate would have them.",
    ),
    _Chart(
        "effective_lr",
        "Effective learning rate",
        "η/‖w‖² or η/‖w‖, log scale",
        charts.logarithmic,
        lambda v: f"{v:.3g}",
        "Schedule and norms together. The drops are the schedule; distance between the two lines "
        "of a pair is the norms' doing. Compare within a pair only: the two families have "
        "different units.",
    ),
    _Chart(
        "angular_update",
        "Angle that a slice turns in a step",
        "radians, log scale",
        charts.logarithmic,
        lambda v: f"{v:.3g} rad",
        "All that training can do to a scale-invariant weight is to turn it. This is the speed "
        "that was measured, every fifth step; where it falls, the weights come to rest.",
    ),
    _Chart(
        "test_accuracy",
        "Test accuracy",
        "percent, axis stretched towards 100",
        charts.stretched_to_one,
        lambda v: f"{100 * v:.2f}%",
        "Before the first drop a large effective learning rate may look worse, because it keeps "
        "the weights moving; what counts is the end. Where the bands overlap, the seeds matter as "
        "much as the optimizer.",
    ),
    _Chart(
        "train_loss",
        "Training loss",
        "cross-entropy in nats, log scale",
        charts.logarithmic,
        lambda v: f"{v:.4g}",
        "The mean over the steps of an epoch. A lower loss is no aim in itself: compare it with "
        "the test accuracy.",
    ),
)


def render(
    run: dict[str, Any],
    records: list[dict[str, Any]],
    summary: dict[str, Any],
    layers: dict[str, Monitor],
) -> str:
    """The report as one HTML document.

    Args:
        run: the content of ``run.json``.
        records: the content of ``metrics.jsonl``.
        summary: the content of ``summary.json``.
        layers: what was seen layer by layer, by optimizer.
    """
    labels = {method["name"]: method["label"] for method in run["methods"]}
    settings = SimpleNamespace(**run["settings"], labels=labels)
    table = rows(records, run["methods"], settings.epochs)
    courses = trajectories()
    tooltips: dict[str, Any] = {}
    figures = []
    for chart in _CHARTS:
        lines = [
            charts.Line(name, settings.labels[name], data, STYLES[name].dash)
            for name in settings.optimizers
            for data in [curve(records, name, chart.quantity, settings.epochs)]
        ]
        frame = charts.Frame(lines, chart.scale)
        drawing = charts.svg(chart.title, frame, chart.axis, settings.drop_epochs)
        tooltips[chart.quantity] = charts.tooltip(frame, chart.text)
        figures.append(
            f'<figure data-chart="{chart.quantity}"><h3>{escape(chart.title)}</h3>'
            f'<div class="plot">{drawing}</div><figcaption>{escape(chart.caption)}</figcaption>'
            "</figure>"
        )
    title = summary["headline"]
    return Template(package_file("template.html")).substitute(
        title=escape(title),
        page_title=escape(f"{run['task']['title']}: {title}"),
        style=package_file("style.css"),
        colours=_colours(),
        script=package_file("script.js"),
        data=json_in_html(tooltips),
        one_image=f"one image is {100 / run['task']['test_examples']:.2f} percentage points",
        subtitle=_subtitle(run, settings),
        notice=_notice(run, table),
        findings="".join(f"<p>{escape(f['text'])}</p>" for f in summary["findings"]),
        toggles=_toggles(settings),
        table=_table(table, settings),
        figures="".join(figures),
        layers="".join(_layers(labels[name], monitor) for name, monitor in layers.items()),
        toy=toy_picture.picture(courses),
        toy_table=toy_picture.table(courses),
        settings=definitions(_settings_items(settings, run)),
        environment=definitions(_environment_items(run)),
        command=escape(run["command"]),
    )


def _layers(label: str, monitor: Monitor) -> str:
    """What a monitor has seen, folded away; nothing if that was nothing."""
    if not monitor.history:
        return ""
    alarms = "".join(f"<p>{escape(str(alarm))}</p>" for alarm in monitor.raised)
    count = len(monitor.raised)
    return (
        f"<details><summary>{escape(label)}: {len(monitor.layers)} layers, "
        f"{count or 'no'} alarm{'s' * (count != 1)}</summary>{alarms}"
        f'<div class="panels">{"".join(monitor.panels().values())}</div></details>'
    )


def package_file(name: str) -> str:
    """The text of a file that lies beside this one."""
    return files("normwise.lab.report").joinpath(name).read_text(encoding="utf-8")


def _colours() -> str:
    """Style rules that give every optimizer its colour in both modes."""
    return colours(
        {
            **{f"o-{name}": style for name, style in STYLES.items()},
            **{f"t-{name}": style for name, style in TOY_STYLES.items()},
        }
    )


def colours(names: Mapping[str, Style]) -> str:
    """Style rules that give every class in ``names`` its colour in both modes."""
    light = "".join(f".{name}{{--c:{style.light}}}" for name, style in names.items())
    dark = "".join(f"@ .{name}{{--c:{style.dark}}}" for name, style in names.items())
    chosen = dark.replace("@", ':root[data-theme="dark"]')
    preferred = dark.replace("@", ':root:not([data-theme="light"])')
    return f"{light}{chosen}@media (prefers-color-scheme:dark){{{preferred}}}"


def json_in_html(content: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _subtitle(run: Mapping[str, Any], settings: SimpleNamespace) -> str:
    labels = ", ".join(settings.labels[name] for name in settings.optimizers)
    seeds = "1 seed" if settings.seeds == 1 else f"{settings.seeds} seeds"
    task = run["task"]
    return escape(
        f"{labels} on {task['title']}: {task['train_examples']} images to learn from, "
        f"{task['test_examples']} to test on, {settings.epochs} epochs, {seeds}, "
        f"{run['started'][:10]}"
    )


def _notice(run: Mapping[str, Any], table: Sequence[Row]) -> str:
    """What keeps this from being a whole comparison, if anything does."""
    notes = []
    if run["status"] == "interrupted":
        notes.append(
            "Interrupted: this report shows what had been finished. Means are over finished seeds; "
            "where an optimizer has none, over its unfinished ones up to the last common epoch."
        )
    notes += [
        f"{row.label}, seed {seed}: failed, {error}. It counts in no mean."
        for row in table
        for seed, error in row.failed.items()
    ]
    return "".join(f'<p class="notice" role="note">{escape(note)}</p>' for note in notes)


def _toggles(settings: SimpleNamespace) -> str:
    return "".join(
        f'<button type="button" class="toggle o-{name}" data-toggle="{name}" aria-pressed="true">'
        f'<span class="key{" dashed" if STYLES[name].dash else ""}"></span>'
        f"{escape(settings.labels[name])}</button>"
        for name in settings.optimizers
    )


def _table(table: Sequence[Row], settings: SimpleNamespace) -> str:
    heads = (
        ("optimizer", ""),
        ("test accuracy", "%"),
        ("training loss", "nats"),
        ("norm growth", "end ÷ start"),
        ("effective lr", "at the end"),
        ("share of norms", "÷ start"),
        ("step", "ms"),
        ("optimizer", "ms"),
        ("seeds", "finished"),
    )
    head = "".join(f'<th scope="col">{h}<small>{unit}</small></th>' for h, unit in heads)
    body = "".join(_table_row(row, settings) for row in table)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _table_row(row: Row, settings: SimpleNamespace) -> str:
    n = row.numbers
    state = f"{len(row.finished)} of {settings.seeds}"
    if row.failed:
        state += f"<small>{len(row.failed)} failed</small>"
    if not row.finished and row.unfinished and n:
        state += f"<small>epoch {row.epoch}</small>"
    cells = (
        _number(n.get("test_accuracy"), lambda v: f"{100 * v:.2f}"),
        _number(n.get("train_loss"), lambda v: f"{v:.4f}"),
        _number(n.get("norm_growth"), lambda v: f"{v:.2f}"),
        f"{n['effective_lr'].mean:.2e}" if "effective_lr" in n else "–",
        _number(n.get("relative_effective_lr"), lambda v: f"{v:.2f}"),
        "–" if row.step_ms is None else f"{row.step_ms:.2f}",
        "–" if row.optimizer_ms is None else f"{row.optimizer_ms:.2f}",
        state,
    )
    data = "".join(f"<td>{cell}</td>" for cell in cells)
    key = f'<span class="key{" dashed" if STYLES[row.name].dash else ""}"></span>'
    return (
        f'<tr class="o-{row.name}" data-optimizer="{row.name}"><th scope="row">{key}'
        f"{escape(row.label)}</th>{data}</tr>"
    )


def _number(value: Spread | None, text: Callable[[float], str]) -> str:
    if value is None:
        return "–"
    sd = "" if value.sd is None else f"<small>± {text(value.sd)}</small>"
    return f"{text(value.mean)}{sd}"


def definitions(items: Sequence[tuple[str, str]]) -> str:
    """Names and values as the content of a ``dl``."""
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items)


def _settings_items(s: SimpleNamespace, run: Mapping[str, Any]) -> list[tuple[str, str]]:
    drops = ", ".join(str(epoch) for epoch in s.drop_epochs) or "none"
    task = run["task"]
    return [
        ("data", task["source"]),
        ("split", f"{task['train_examples']} training, {task['test_examples']} test examples"),
        ("network", "four 3×3 convolutions, each with BatchNorm and ReLU; a linear classifier"),
        ("scale-invariant", "each output channel of each convolution, as normwise.analyze finds"),
        ("epochs, batch size", f"{s.epochs}, {s.batch_size}"),
        ("steps an epoch", str(task["steps_per_epoch"])),
        ("learning rate", f"SGD and SGDP {s.lr_sgd:g}, AdamW and AdamP {s.lr_adam:g}"),
        ("schedule", f"× {s.lr_factor:g} after epochs {drops}"),
        ("momentum", f"{s.momentum:g} (SGD, SGDP), no Nesterov"),
        ("betas, eps", f"{s.betas[0]:g} and {s.betas[1]:g}, {s.eps:g} (AdamW, AdamP)"),
        (
            "weight decay",
            f"{s.weight_decay_sgd:g} (L2 in SGD, decoupled in SGDP), {s.weight_decay_adam:g} "
            "(AdamW, AdamP); none on biases and BatchNorm",
        ),
        ("gate of the projection", f"the papers' cosine test, delta {s.delta:g}"),
        ("decay where projected", f"× {s.wd_ratio:g}"),
        ("seeds", f"0 to {s.seeds - 1}; the same start and batches for every optimizer"),
    ]


def _environment_items(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    e = run["environment"]
    items = [(name, str(value)) for name, value in e["versions"].items()]
    items += [
        ("system", e["system"]),
        ("processor", f"{e['processor']}, {e['cores']} cores, {e['threads']} thread used"),
    ]
    if "seconds" in run:
        items.append(("wall time", f"{run['seconds']} s of training"))
    return items
