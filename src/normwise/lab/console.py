"""What the terminal shows: progress on stderr, tables on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from normwise.lab.compare import Choice, Outcome
from normwise.lab.summary import Row, Spread, rows
from normwise.lab.toy import PRINTED, Trajectory

__all__ = ["print_outcome", "print_toy", "progress"]

Record = Mapping[str, Any]
# Wide enough for the table when the output goes to a file and has no width of its own.
_FILE_WIDTH = 132


@contextmanager
def progress(choice: Choice, quiet: bool) -> Iterator[Callable[[Record], None]]:
    """Yield what is to be called with every record of metrics.

    A bar for each optimizer on a terminal; elsewhere a line for each finished run.
    """
    console = Console(stderr=True)
    labels = {name: method.label for name, method in choice.recipe.methods.items()}
    epochs = choice.cells[0].training.epochs
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
            name: bars.add_task(
                labels[name],
                total=choice.seeds * epochs,
                start=False,
                state="waiting",
            )
            for name in choice.names
        }

        def show(record: Record) -> None:
            task = tasks[record["optimizer"]]
            if record["status"] == "failed":
                left = epochs - record["epoch"] + 1
                bars.update(task, advance=left, state=f"[red]seed {record['seed']} diverged")
            elif record["epoch"] == 0:
                bars.start_task(task)
            else:
                bars.update(task, advance=1, state=_state(record))

        with bars:
            yield show


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


def print_outcome(outcome: Outcome) -> None:
    """The table of the comparison, its findings, and where the files are."""
    console = _stdout()
    table = Table(
        title=_title(outcome),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2 if console.width >= 100 else 0, 0, 0),
    )
    table.add_column("optimizer")
    for heading in (
        "test\naccuracy %",
        "train\nloss",
        "norm\ngrowth",
        "lr_eff\nat end",
        "norms'\nshare",
        "step\nms",
        "optim.\nms",
        "seeds",
    ):
        table.add_column(heading, justify="right")
    settings = outcome.run["settings"]
    for row in rows(outcome.records, outcome.run["methods"], settings["epochs"]):
        table.add_row(*_cells(row, settings["seeds"]))
    console.print(table)
    console.print(
        "Mean ± sd over seeds. Norm growth: end ÷ start, geometric mean over slices. lr_eff: the "
        "effective learning rate, η/‖w‖² for SGD and SGDP, η/‖w‖ for AdamW and AdamP. Norms' "
        "share: lr_eff without the schedule, end ÷ start. Times: medians of a whole step and of "
        "the optimizer's part.",
        style="dim",
        highlight=False,
    )
    console.print()
    for found in outcome.summary["findings"]:
        console.print(found["text"], highlight=False)
        console.print()
    for name in ("report.html", "summary.json", "metrics.jsonl", "run.json"):
        console.print(str(outcome.folder / name), highlight=False, soft_wrap=True)
    for name in ("norms.png", "effective_lr.png", "accuracy.png"):
        console.print(str(outcome.folder / name), highlight=False, soft_wrap=True)


def _title(outcome: Outcome) -> str:
    settings = outcome.run["settings"]
    state = "" if outcome.run["status"] == "complete" else f" ({outcome.run['status']})"
    return (
        f"{outcome.run['task']['title']}, {settings['epochs']} epochs, "
        f"{_count(settings['seeds'], 'seed')}{state}"
    )


def _cells(row: Row, seeds: int) -> list[str]:
    n = row.numbers
    state = f"{len(row.finished)}/{seeds}"
    if row.failed:
        state += f", {len(row.failed)} failed"
    if not row.finished and row.unfinished and n:
        state += f", epoch {row.epoch}"
    return [
        row.label,
        spread(n.get("test_accuracy"), 2, 100),
        f"{n['train_loss'].mean:.4f}" if "train_loss" in n else "–",
        spread(n.get("norm_growth"), 2, prefix="×"),
        f"{n['effective_lr'].mean:.1e}" if "effective_lr" in n else "–",
        f"×{n['relative_effective_lr'].mean:.2f}" if "relative_effective_lr" in n else "–",
        "–" if row.step_ms is None else f"{row.step_ms:.2f}",
        "–" if row.optimizer_ms is None else f"{row.optimizer_ms:.2f}",
        state,
    ]


def spread(value: Spread | None, digits: int, factor: float = 1, prefix: str = "") -> str:
    """``mean ± sd``; the mean alone for one seed; a dash for nothing."""
    if value is None:
        return "–"
    sd = "" if value.sd is None else f" ± {factor * value.sd:.{digits}f}"
    return f"{prefix}{factor * value.mean:.{digits}f}{sd}"


def print_toy(courses: Mapping[str, Trajectory]) -> None:
    """Our numbers beside the ones that the paper's pictures print."""
    console = _stdout()
    table = Table(
        title="The 2-D toy of AdamP: 500 steps towards one direction",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("method", "quantity"):
        table.add_column(heading)
    for heading in ("before step", "printed", "ours", "ours, all digits"):
        table.add_column(heading, justify="right")
    for printed in PRINTED:
        course = courses[printed.method]
        table.add_row(
            course.label,
            printed.quantity,
            str(printed.step),
            printed.text,
            printed.rounded(course),
            f"{printed.ours(course):.10f}",
        )
    console.print(table)


def _stdout() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(_FILE_WIDTH, console.width))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
