"""What the terminal shows: progress on stderr, tables on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from normwise.figures.tables import Column, Row, Table, show, stdout
from normwise.lab.plots import PLOTS
from normwise.lab.report.curves import Comparison
from normwise.lab.report.page import comparison_table
from normwise.lab.toy import PRINTED, Path2D

__all__ = ["print_outcome", "print_toy", "progress"]

Record = Mapping[str, Any]


@contextmanager
def progress(
    labels: Mapping[str, str], seeds: int, epochs: int, quiet: bool
) -> Iterator[Callable[[Record], None]]:
    """Yield what is to be called with every record of metrics.

    A bar for each method on a terminal; elsewhere a line for each finished run.

    Args:
        labels: of the methods, by name.
        seeds: how many runs each has.
        epochs: how long each is.
        quiet: show nothing.
    """
    console = Console(stderr=True)
    if quiet:
        yield lambda record: None
    elif not console.is_terminal:
        yield lambda record: _print_run(console, record, labels, epochs)
    else:
        bars = Progress(
            TextColumn("[bold]{task.description:<6}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("epochs  {task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        tasks = {
            name: bars.add_task(label, total=seeds * epochs, start=False, state="waiting")
            for name, label in labels.items()
        }

        def advance(record: Record) -> None:
            task = tasks[record["optimizer"]]
            if record["status"] == "failed":
                left = epochs - record["epoch"] + 1
                bars.update(task, advance=left, state=f"[red]seed {record['seed']} diverged")
            elif record["epoch"] == 0:
                bars.start_task(task)
            else:
                bars.update(task, advance=1, state=_state(record))

        with bars:
            yield advance


def _state(record: Record) -> str:
    return (
        f"seed {record['seed']}  accuracy {100 * record['test_accuracy']:5.1f}%  "
        f"norm ×{record['norm_growth']:.2f}"
    )


def _print_run(console: Console, record: Record, labels: Mapping[str, str], epochs: int) -> None:
    label = labels[record["optimizer"]]
    if record["status"] == "failed":
        console.print(f"{label:<6} seed {record['seed']}  failed: {record['error']}", style="red")
    elif record["epoch"] == epochs:
        console.print(f"{label:<6} {_state(record)}", highlight=False)


def print_outcome(
    folder: Path, run: Mapping[str, Any], records: Sequence[Record], summary: Mapping[str, Any]
) -> None:
    """The table of a comparison, its findings, and where the files are.

    Args:
        folder: where the files are.
        run: the content of ``run.json``.
        records: the content of ``metrics.jsonl``.
        summary: the content of ``summary.json``.
    """
    comparison = Comparison(run, records)
    table = comparison_table(comparison, summary)
    state = "" if run["status"] == "complete" else f" ({run['status']})"
    seeds, epochs = run["settings"]["seeds"], run["settings"]["epochs"]
    title = f"{run['task']['title']}, {epochs} epochs, {seeds} seed{'s' * (seeds != 1)}{state}"
    show(Table(table.columns, table.rows, title))
    console = stdout()
    console.print(
        "Mean ± sd over seeds. Difference: to the same optimizer without the projection, with its "
        "95% interval. Norm growth: geometric mean over slices. Effective lr: η times "
        f"{comparison.formulas}; the norms’ share is the same without the schedule. Times: medians "
        "of a whole step and of the optimizer's part.",
        style="dim",
    )
    console.print()
    for found in summary["findings"]:
        console.print(found["text"])
        console.print()
    for name in ("report.html", "summary.json", "metrics.jsonl", "run.json", *PLOTS):
        console.print(str(folder / name), soft_wrap=True)


def print_toy(trajectories: Mapping[str, Path2D]) -> None:
    """Our numbers beside the ones that the paper's pictures print."""
    columns = (
        Column("method", words=True),
        Column("quantity", words=True),
        Column("before step"),
        Column("printed"),
        Column("ours"),
        Column("ours, all digits"),
    )
    rows = []
    for printed in PRINTED:
        t = trajectories[printed.method]
        numbers = (printed.text, printed.rounded(t), f"{printed.ours(t):.10f}")
        rows.append(Row((t.label, printed.quantity, str(printed.step), *numbers)))
    title = "The 2-D toy of AdamP: 500 steps towards one direction"
    show(Table(columns, tuple(rows), title))
