"""``normwise data``, ``normwise paper`` and ``normwise report``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normwise.lab.arguments import duration, seconds, seeds, whole
from normwise.lab.errors import UsageError, require_lab

if TYPE_CHECKING:
    from normwise.lab.parallel import Processes
    from normwise.lab.recipes import Recipe, RecipeCell
    from normwise.lab.running.events import Event
    from normwise.lab.running.results import ResultTable
    from normwise.monitor import Monitor

__all__ = ["ProgressLines", "add_lab_parsers"]

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again.
_LEFT = 75
_FORMATS = (".html", ".md", ".tex", ".csv", ".json", ".png", ".svg")


def add_lab_parsers(subparsers: Any) -> None:
    """Add ``data``, ``paper`` and ``report`` to the subcommands of ``normwise``."""
    _add_data(subparsers)
    _add_paper(subparsers)
    _add_report(subparsers)


def _add_data(subparsers: Any) -> None:
    data = subparsers.add_parser(
        "data",
        help="the data sets that the recipes use",
        description=(
            "Data sets lie in the folder that the environment variable NORMWISE_DATA names, or in "
            "./data, in the formats that their makers publish."
        ),
    )
    verbs = data.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("list", help="which there are, and which are at hand").set_defaults(
        run=_data_list
    )
    fetch = verbs.add_parser(
        "fetch", help="download one and check it, or say what to put where by hand"
    )
    fetch.add_argument("name", metavar="NAME")
    fetch.set_defaults(run=_data_fetch)


def _add_paper(subparsers: Any) -> None:
    paper = subparsers.add_parser(
        "paper", help="the papers' tables and figures as recipes that can be run"
    )
    verbs = paper.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("list", help="the recipes, and what they ask").set_defaults(run=_paper_list)
    run = verbs.add_parser(
        "run",
        help="train all its cells; goes on where it was interrupted",
        description=(
            "Train every row, method and seed of a recipe, each in a folder of its own, and print "
            "the results beside the paper's. Cells that are finished are not run again; one that "
            "was killed goes on to the same bits."
        ),
    )
    option = run.add_argument
    option(
        "--scale", default="small", metavar="NAME", help="small, medium or paper (default: small)"
    )
    option(
        "--monitor",
        type=Path,
        metavar="FILE",
        help="draw what a Monitor sees of the weights, layer by layer, of the only cell",
    )
    _add_training(run)
    run.set_defaults(run=_paper_run)
    tune = verbs.add_parser(
        "tune",
        help="train the sweep that a scale takes its settings from, and write down what is best",
        description=(
            "Train the sweep of the scale that another is tuned on, tested on data held out of the "
            "training data, and write each method's best settings beside it, which `paper run` on "
            "the tuned scale then takes. Goes on where it was interrupted."
        ),
    )
    tune.add_argument(
        "--scale", metavar="NAME", help="the scale that is tuned (default: the only one)"
    )
    _add_training(tune)
    tune.set_defaults(run=_paper_tune)


def _add_training(parser: argparse.ArgumentParser) -> None:
    """What ``run`` and ``tune`` have in common: which cells, and how they are trained."""
    option = parser.add_argument
    option("recipe", metavar="ID", help="a name of `paper list`, or a .yaml file of your own")
    option("--rows", default="", metavar="A,B,…", help="only these rows")
    option("--methods", default="", metavar="A,B,…", help="only these methods")
    option("--seeds", type=seeds, metavar="N", help="(default: the recipe's)")
    option("--jobs", type=whole, default=1, metavar="N", help="trainings at once (default: 1)")
    option(
        "--executor", default="local", metavar="NAME", help="local, ray, or graphs (default: local)"
    )
    option(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="train a cell on several processes: torchrun --nproc-per-node 2 -m normwise paper …",
    )
    option(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="let the recipe run code of this module of yours (may be given several times)",
    )
    option(
        "--checkpoint-every",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="the most that is lost when it is killed (default: 60)",
    )
    option(
        "--budget",
        type=duration,
        metavar="TIME",
        help=f"30m, 8h: stop cleanly after this; exit code {_LEFT} while something is left",
    )
    option("--quiet", action="store_true", help="show no progress")
    option("--device", default="cpu", metavar="NAME", help="(default: cpu)")
    option("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="(runs/paper)")
    option("--json", action="store_true", help="print the results as JSON, and nothing else")


def _add_report(subparsers: Any) -> None:
    report = subparsers.add_parser(
        "report",
        help="tables and curves of runs: HTML, Markdown, LaTeX, CSV, JSON, PNG or SVG",
        description="Tables of finished runs, a page with their curves and settings, or a picture.",
    )
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="folders with runs, or reports in .json"
    )
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"a file ending in {', '.join(_FORMATS)}; it is replaced (default: print Markdown)",
    )
    report.add_argument(
        "--curves",
        default="",
        metavar="A,B,…",
        help="what a picture shows, by the names in metrics.jsonl (default: as on the page)",
    )
    report.set_defaults(run=_report)


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _data_list(arguments: argparse.Namespace) -> int:
    from normwise.lab.data.catalogue import CATALOGUE
    from normwise.lab.data.fetch import missing
    from normwise.lab.data.files import data_root

    root = data_root()
    for source in CATALOGUE.values():
        lacking = len(missing(root, source))
        state = "in part" if 0 < lacking < len(source.files) else "absent" if lacking else "at hand"
        print(f"{source.name:<16} {state:<8} {source.title} ({source.licence})")
    return 0


def _data_fetch(arguments: argparse.Namespace) -> int:
    from normwise.lab.data.fetch import fetch
    from normwise.lab.data.files import data_root

    print(fetch(data_root(), arguments.name))
    return 0


def _paper_list(arguments: argparse.Namespace) -> int:
    require_lab()
    from normwise.lab.recipes import find, ids

    for name in ids():
        recipe = find(name)
        print(f"{name}\n    {recipe.title} [{recipe.paper.source}]\n    {recipe.question}")
    return 0


def _paper_run(arguments: argparse.Namespace) -> int:
    require_lab()
    from normwise.lab.recipes import find
    from normwise.lab.running.sweeps import read_tuned

    recipe = find(arguments.recipe)
    tuned, path = read_tuned(recipe, arguments.scale, arguments.out)
    cells = recipe.cells(
        arguments.scale, arguments.seeds, _names(arguments.methods), _names(arguments.rows), tuned
    )
    if path is not None and not arguments.quiet:
        print(f"normwise: tuned settings from {path}", file=sys.stderr, flush=True)
    if arguments.monitor is None:
        return _trained(arguments, recipe, cells)
    if len(cells) > 1 or arguments.jobs > 1 or arguments.executor != "local":
        raise UsageError(
            f"--monitor draws one cell that is trained here, and these are {len(cells)}: choose "
            "one by --rows, --methods and --seeds 1, with --jobs 1"
        )
    seen: list[Monitor] = []
    ended = _trained(arguments, recipe, cells, seen.append)
    if not seen or not seen[0].history:
        raise UsageError(
            "--monitor has nothing to draw: the cell was finished before, or no weight of it is "
            "scale-invariant"
        )
    arguments.monitor.parent.mkdir(parents=True, exist_ok=True)
    seen[0].plot(arguments.monitor)
    return ended


def _paper_tune(arguments: argparse.Namespace) -> int:
    require_lab()
    from normwise.lab.recipes import find

    recipe = find(arguments.recipe)
    tuned = {name: s.tuned_on for name, s in recipe.scales.items() if s.tuned_on is not None}
    if not tuned:
        raise UsageError(f"recipe {recipe.id!r} has no scale that is tuned on another")
    scale = arguments.scale or (next(iter(tuned)) if len(tuned) == 1 else "")
    if scale not in tuned:
        raise UsageError(f"--scale {scale!r} is not tuned: choose from {', '.join(tuned)}")
    cells = recipe.cells(
        tuned[scale], arguments.seeds, _names(arguments.methods), _names(arguments.rows)
    )
    ended = _trained(arguments, recipe, cells)
    if ended in (130, _LEFT) or int(os.environ.get("RANK", "0")) > 0:
        return ended
    return _write_tuned(arguments, recipe, tuned[scale])


def _write_tuned(arguments: argparse.Namespace, recipe: Recipe, scale: str) -> int:
    """Write down what the finished sweeps of a scale decide."""
    from normwise.lab.running.results import read_cells, tables
    from normwise.lab.running.sweeps import TUNED, chosen, sweeps
    from normwise.lab.store import write_atomically

    folder = arguments.out / f"{recipe.id}-{scale}"
    record, unfinished = chosen(sweeps(tables(read_cells([folder]))), scale)
    for what in unfinished:
        print(f"normwise: nothing is chosen for {what}", file=sys.stderr)
    if not record.get("rows"):
        return 1
    text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(folder / TUNED, text.encode())
    print(folder / TUNED, file=sys.stderr if arguments.json else sys.stdout)
    return 1 if unfinished else 0


def _trained(
    arguments: argparse.Namespace,
    recipe: Recipe,
    cells: list[RecipeCell],
    watched: Callable[[Monitor], object] = lambda monitor: None,
) -> int:
    """Train cells as the command says, and show what came of them; the exit code.

    ``watched`` is called with the monitor of each that is trained in this process.
    """
    from normwise.lab.data.files import data_root
    from normwise.lab.errors import nearest
    from normwise.lab.parallel import processes
    from normwise.lab.running.cell import check_device
    from normwise.lab.running.executors import EXECUTORS, check_parallel, run_cells
    from normwise.lab.running.graphs import check_graphs

    if arguments.executor not in EXECUTORS:
        raise UsageError(
            f"unknown executor {arguments.executor!r}: {nearest(arguments.executor, EXECUTORS)}"
        )
    check_parallel(arguments.parallel, arguments.jobs, arguments.executor)
    if arguments.parallel is not None and arguments.budget is not None:
        raise UsageError("--budget goes with one process for a training: leave out --parallel")
    with processes(
        arguments.parallel,
        f"paper run {arguments.recipe}",
        [cell.training.batch_size for cell in cells],
        device=arguments.device,
    ) as together:
        if arguments.executor != "ray":
            check_device(arguments.device)
        if arguments.executor == "graphs":
            check_graphs(cells)
        if together.rank > 0:
            run_cells(
                cells,
                arguments.out,
                data_root(),
                device=arguments.device,
                checkpoint_seconds=arguments.checkpoint_every,
                processes=together,
                trust=arguments.trust,
            )
            return 0
        return _run_and_show(arguments, recipe, cells, together, watched)


@dataclass
class ProgressLines:
    """Progress as lines on stderr, from this process and from those that train.

    Args:
        total: how many cells there are.
        quiet: whether nothing is shown.
        watched: called with the monitor of each cell that is trained here.
    """

    total: int
    quiet: bool
    watched: Callable[[Monitor], object] = lambda monitor: None
    done: int = 0
    begin: float = field(default_factory=time.monotonic)
    # Of each cell that was trained here, the share that is done, and what of it was done here.
    _shares: dict[str, float] = field(default_factory=dict)
    _fresh: dict[str, float] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        from normwise.lab.recipes.grids import point_name
        from normwise.lab.running.events import Finished, Measured, Planned, Progress, Started
        from normwise.lab.running.pace import spelled

        if isinstance(event, Planned):
            self._show(f"{event.trainings} trainings, about {spelled(event.seconds)}")
            if event.gave_up:
                print(f"normwise: to fit the budget: {event.gave_up}", file=sys.stderr, flush=True)
            self.begin = time.monotonic()
            return
        at = f" {point_name(event.cell.point)}" if event.cell.point else ""
        who = f"{event.cell.row} {event.cell.method}{at} seed {event.cell.seed}"
        if isinstance(event, Measured | Started):
            self._shares.setdefault(event.cell.folder, 0.0)
            if isinstance(event, Started) and event.monitor is not None:
                self.watched(event.monitor)
        elif isinstance(event, Finished):
            if event.result["status"] == "unfinished":
                return
            self.done += 1
            if event.result["status"] == "skipped":
                print(f"normwise: skipped: {event.result['error']}", file=sys.stderr)
                return
            if event.cell.folder in self._shares:
                before = self._shares[event.cell.folder] - self._fresh.get(event.cell.folder, 0.0)
                self._fresh[event.cell.folder] = 1.0 - before
                self._shares[event.cell.folder] = 1.0
            shown = event.result.get("metrics") or event.result.get("error")
            self._show(f"{self.done}/{self.total} {who}: {_spelled(shown)}{self._left()}")
        elif isinstance(event, Progress):
            self._shares[event.cell.folder] = event.share
            self._fresh[event.cell.folder] = event.fresh
            norm = "" if event.growth is None else f"norm ×{event.growth:.2f}, "
            self._show(
                f"{who}: {100 * event.share:.0f}%, loss {event.loss:.4g}, {norm}"
                f"{spelled(event.seconds_left)} left{self._left()}"
            )

    def _left(self) -> str:
        """How long all will take, at the pace of what has been trained since the start."""
        from normwise.lab.running.pace import spelled

        seconds = self.seconds_left
        return "" if seconds is None else f"; {spelled(seconds)} in all"

    @property
    def seconds_left(self) -> float | None:
        """How long all will take; None where all is done, or nothing is known of the pace."""
        trained, fresh = sum(self._shares.values()), sum(self._fresh.values())
        known = self.done - sum(share == 1.0 for share in self._shares.values())
        left = self.total - known - trained
        if left < 1e-9 or fresh < 1e-9:
            return None
        return (time.monotonic() - self.begin) / fresh * left

    def _show(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


def _spelled(shown: object) -> str:
    """Metrics in a line, or an error."""
    if not isinstance(shown, dict):
        return str(shown)
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


def _run_and_show(
    arguments: argparse.Namespace,
    recipe: Recipe,
    cells: list[RecipeCell],
    together: Processes,
    watched: Callable[[Monitor], object],
) -> int:
    """What the first process, or the only one, does."""
    from normwise.lab.data.files import data_root
    from normwise.lab.recipes import text
    from normwise.lab.running.cell import CONFIG
    from normwise.lab.running.executors import check_trust, run_cells
    from normwise.lab.running.export import as_data, as_markdown
    from normwise.lab.running.pace import spelled
    from normwise.lab.running.results import RECIPE, read_cells, tables
    from normwise.lab.store import write_atomically

    check_trust(cells, arguments.trust)
    folder = arguments.out / f"{recipe.id}-{cells[0].scale}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECIPE, text(arguments.recipe).encode())
    lines = ProgressLines(len(cells), arguments.quiet, watched)
    try:
        results = run_cells(
            cells,
            arguments.out,
            data_root(),
            jobs=arguments.jobs,
            executor=arguments.executor,
            device=arguments.device,
            checkpoint_seconds=arguments.checkpoint_every,
            observe=lines,
            processes=together,
            trust=arguments.trust,
            until=math.inf if arguments.budget is None else time.time() + arguments.budget,
        )
    except KeyboardInterrupt:
        print("normwise: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    whole = [
        arguments.out / cell.folder
        for cell, result in zip(cells, results, strict=True)
        if result["status"] != "skipped" and (arguments.out / cell.folder / CONFIG).exists()
    ]
    made = tables(read_cells(whole)) if whole else []
    if arguments.json:
        print(json.dumps(as_data(made), allow_nan=False))
    else:
        print(as_markdown(made))
        print(f"normwise report {folder} --out report.html")
    unfinished = sum(result["status"] == "unfinished" for result in results)
    if unfinished:
        left = "" if lines.seconds_left is None else f", about {spelled(lines.seconds_left)}"
        print(
            f"normwise: out of time: {unfinished} of {len(cells)} trainings are left{left}; run "
            "the same command again to go on",
            file=sys.stderr,
        )
        return _LEFT
    # That a point of a sweep diverges is what some are there to find.
    fine = (
        result["status"] in (("ok", "failed") if cell.point else ("ok",))
        for cell, result in zip(cells, results, strict=True)
    )
    return 0 if all(fine) else 1


def _report(arguments: argparse.Namespace) -> int:
    require_lab()
    from normwise.lab.running.export import read_json
    from normwise.lab.running.results import read_cells, tables
    from normwise.lab.store import write_atomically

    out: Path | None = arguments.out
    if out is not None and out.suffix not in _FORMATS:
        raise UsageError(f"--out {str(out)!r} is not allowed: must end in {', '.join(_FORMATS)}")
    damaged: list[str] = []
    folders = [path for path in arguments.runs if path.suffix != ".json"]
    made = tables(read_cells(folders, damaged.append))
    made += [
        table for path in arguments.runs if path.suffix == ".json" for table in read_json(path)
    ]
    for reason in damaged:
        print(f"normwise: skipped: {reason}", file=sys.stderr)
    if damaged and not made:
        return 1
    text = _written(made, ".md" if out is None else out.suffix, _names(arguments.curves))
    if out is None:
        print(text.decode())
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)
        print(out)
    return 1 if damaged else 0


def _written(made: list[ResultTable], suffix: str, curves: list[str]) -> bytes:
    """The tables, or a picture of their curves, as a file's bytes."""
    from normwise.figures import document, png
    from normwise.lab.report.runs import picture, render
    from normwise.lab.running.export import as_csv, as_json, as_latex, as_markdown

    if suffix in (".png", ".svg"):
        figure = picture(made, curves)
        return png(figure) if suffix == ".png" else document(figure).encode()
    write = {
        ".html": render,
        ".json": as_json,
        ".md": as_markdown,
        ".tex": as_latex,
        ".csv": as_csv,
    }[suffix]
    return write(made).encode()
