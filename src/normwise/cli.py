"""The command ``normwise``."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from normwise import __version__
from normwise.balancing.cli import add_balance_parser
from normwise.checkpoint import CheckpointReport
from normwise.checkpoint.cli import add_checkpoint_parser
from normwise.invariance.cli import add_inspect_parser, settings
from normwise.lab.arguments import count, duration, numbers, positives, seeds, whole
from normwise.lab.cli import add_lab_parsers
from normwise.lab.errors import Unavailable, UsageError, nearest, require_lab
from normwise.plan.cli import add_plan_parser

__all__ = ["main"]

_EXIT_CODES = "exit codes: 0 done, 1 a training failed, 2 wrong usage, 130 interrupted by Ctrl-C"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which suggests the nearest name of a command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        # argparse takes -1e-3 and -inf for options, and then complains of something else.
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        one_line = " ".join(message.split())
        self.exit(2, f"normwise: error: {one_line}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.dest != "command":
            super()._check_value(action, value)
        elif action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                None, f"unknown command {value!r}: {nearest(str(value), action.choices)}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments (default: those of the process).

    Returns:
        0 if done, 1 if a training failed, 2 for wrong usage, 130 after Ctrl-C.
    """
    try:
        with _terminated_as_interrupted():
            return _run(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; without this Python would complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM ends as Ctrl-C does; processes of torchrun end at once."""
    if threading.current_thread() is not threading.main_thread() or "RANK" in os.environ:
        yield
        return

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        code: int = arguments.run(arguments)
        return code
    except UsageError as error:
        if getattr(arguments, "debug", False):
            traceback.print_exc()
        return _complain(str(error), 2)
    except Unavailable as error:
        return _complain(str(error), 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        return _complain(str(error), 1)


def _complain(message: str, code: int) -> int:
    print(f"normwise: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="normwise",
        description="See and control the norms of neural-network weights.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"normwise {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    compare = commands.add_parser(
        "compare",
        help="train one network under several optimizers; table, curves, HTML report",
        description=(
            "Train the same network on the same data under several optimizers, from the same "
            "initial weights and in the same order of examples, and show what happens to the norms."
        ),
        epilog=_EXIT_CODES,
    )
    compare.set_defaults(run=_compare)
    option = compare.add_argument
    option(
        "problem",
        nargs="?",
        metavar="PROBLEM",
        help=(
            "your own: MODULE:FACTORY, what normwise.lab.supervised(…) made, or a function that "
            "returns it; or, with --data, a network: hf:MODEL, timm:NAME, mlp:64x64, or a "
            "MODULE:FACTORY that makes one (default: the digits; of a table mlp:64x64)"
        ),
    )
    option(
        "--data",
        metavar="DATA",
        help="what the network learns: csv:FILE:TARGET, folder:PATH of images, or text:FILE",
    )
    option("--size", type=whole, metavar="N", help="pixels a side (32), or tokens a sequence (64)")
    option(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="an argument of the network with --data, or a field of its configuration; repeat it",
    )
    option("--task", default="digits", metavar="NAME", help="what to learn (default: digits)")
    option(
        "--optimizers",
        metavar="A,B,…",
        help=(
            "any of sgd, sgdp, adamw, adamp, in any order (default: all); on a problem of your own "
            "also adam, torch:CLASS, FILE.py:FACTORY, tangential(…), sphere(…), each also with "
            "its decay changed: sgd+early(0.33), adamw+cautious"
        ),
    )
    option("--seeds", type=seeds, default=3, metavar="N", help="runs per optimizer (default: 3)")
    option("--epochs", type=whole, metavar="N", help="passes over the data (default: the task's)")
    option("--batch-size", type=whole, metavar="N", help="examples per step (default: the task's)")
    option(
        "--lr",
        type=positives,
        metavar="A,B,…",
        help="on a problem of your own: learning rates, of which each method takes its best",
    )
    option(
        "--lr-sgd",
        type=positives,
        metavar="LR",
        help="of SGD and SGDP, at first (default: 0.1); a list on a problem of your own",
    )
    option(
        "--lr-adam",
        type=positives,
        metavar="LR",
        help="of AdamW and AdamP, at first (default: 0.001); a list on a problem of your own",
    )
    option(
        "--weight-decay",
        type=numbers,
        metavar="A,B,…",
        help="on a problem of your own: weight decays, of which each method takes its best",
    )
    option(
        "--budget",
        type=duration,
        metavar="TIME",
        help="on a problem of your own: 30m, 2h; epochs and seeds are lowered to fit",
    )
    option("--jobs", type=whole, metavar="N", help="on a problem of your own: trainings at once")
    option("--executor", metavar="NAME", help="on a problem of your own: local or ray")
    option("--workers", type=count, metavar="N", help="processes that make batches (default: 0)")
    option("--device", metavar="NAME", help="on a problem of your own (default: cpu)")
    option("--debug", action="store_true", help="show the traceback of an error")
    option(
        "--out",
        type=Path,
        metavar="DIR",
        help="output folder, absent or empty (default: runs/compare-TIME)",
    )
    option(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="train on several processes: torchrun --nproc-per-node 2 -m normwise compare …",
    )
    option("--json", action="store_true", help="print the summary as JSON, and nothing else")
    option("--quiet", action="store_true", help="show no progress")

    add_inspect_parser(commands)
    add_balance_parser(commands)
    add_plan_parser(commands)
    add_checkpoint_parser(commands, _checkpoint_page)
    add_lab_parsers(commands)

    toy = commands.add_parser(
        "toy",
        help="the two-dimensional toy of the AdamP paper, digit by digit",
        description=(
            "Descend L(w) = (1 − cos(w, w*))² in two dimensions with and without momentum and "
            "projection, beside the numbers that the AdamP paper prints."
        ),
        epilog=_EXIT_CODES,
    )
    toy.set_defaults(run=_toy)
    toy.add_argument(
        "--out", type=Path, metavar="FILE", help="also draw a picture: a new .png, .svg or .pdf"
    )
    toy.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    return parser


# What only a problem of the user's takes.
_OWN = (
    *("lr", "weight_decay", "budget", "jobs", "executor", "workers", "device", "data", "size"),
    "set",
)
_DEFAULT_NETWORK = "mlp:64x64"


def _compare(arguments: argparse.Namespace) -> int:
    require_lab()
    if arguments.problem is not None or arguments.data is not None:
        return _compare_own(arguments)
    for name in _OWN:
        if getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} goes with a problem of your own: name MODULE:FACTORY, or give --data"
            )
    for name in ("lr_sgd", "lr_adam"):
        values = getattr(arguments, name)
        if values is not None and len(values) > 1:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} takes a list only with a problem of your own")
        setattr(arguments, name, None if values is None else values[0])
    from normwise.lab.console import print_outcome, progress
    from normwise.lab.digits import Choice, assist, compare
    from normwise.lab.parallel import processes

    choice = Choice(
        task=arguments.task,
        optimizers=None if arguments.optimizers is None else _names(arguments.optimizers),
        **{name: getattr(arguments, name) for name in _CHOSEN},
    )
    size = choice.cells[0].training.batch_size
    with processes(choice.parallel, "compare", [size], "--batch-size") as together:
        if together.rank > 0:
            assist(choice, together)
            return 0
        labels = {name: choice.recipe.methods[name].label for name in choice.names}
        epochs = choice.cells[0].training.epochs
        with progress(labels, choice.seeds, epochs, arguments.quiet) as observe:
            outcome = compare(choice, arguments.out, observe, together)
    if arguments.json:
        print(json.dumps({"folder": str(outcome.folder), **outcome.summary}, allow_nan=False))
    else:
        print_outcome(outcome.folder, outcome.run, outcome.records, outcome.summary)
    if outcome.interrupted:
        _complain(f"interrupted; what was finished is in {str(outcome.folder)!r}", 130)
        return 130
    for failure in outcome.failures:
        _complain(f"{failure['optimizer']}, seed {failure['seed']}: {failure['error']}", 1)
    return 1 if outcome.failures else 0


def _compare_own(arguments: argparse.Namespace) -> int:
    from normwise.figures.tables import show, stdout
    from normwise.lab.cli import ProgressLines
    from normwise.lab.contest import OPTIMIZERS, Contest
    from normwise.lab.imports import place
    from normwise.lab.optimizers import split
    from normwise.lab.parallel import processes
    from normwise.lab.running.executors import EXECUTORS, check_parallel
    from normwise.lab.trust import is_library

    problem = arguments.problem or _DEFAULT_NETWORK
    if arguments.task != "digits":
        raise UsageError(f"--task {arguments.task} and {problem!r}: give one of them")
    executor = arguments.executor or "local"
    if executor not in EXECUTORS:
        raise UsageError(f"unknown executor {executor!r}: {nearest(executor, EXECUTORS)}")
    check_parallel(arguments.parallel, arguments.jobs or 1, executor)
    if arguments.workers is not None:
        os.environ["NORMWISE_WORKERS"] = str(arguments.workers)
    given = arguments.optimizers
    contest = Contest(
        task=problem if is_library(problem) else place(problem),
        optimizers=OPTIMIZERS if given is None else tuple(filter(None, split(given, ","))),
        lrs=arguments.lr or (),
        weight_decays=arguments.weight_decay or (),
        lrs_gradient=arguments.lr_sgd or (),
        lrs_other=arguments.lr_adam or (),
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        device=arguments.device or "cpu",
        data=arguments.data or "",
        size=arguments.size,
        network=_settings(arguments.set or []),
        budget=arguments.budget,
    )
    sizes = [contest.defaults["batch_size"]]
    command = f"compare {problem}"
    with processes(arguments.parallel, command, sizes, "--batch-size", contest.device) as together:
        try:
            result = contest.run(
                arguments.out,
                jobs=arguments.jobs or 1,
                executor=executor,
                observe=ProgressLines(contest.trainings, arguments.quiet),
                processes=together,
            )
        except KeyboardInterrupt:
            return _complain("interrupted; give the same command again to go on", 130)
        if together.rank > 0:
            return 0
    if arguments.json:
        print(json.dumps({"folder": str(result.folder), **result.summary}, allow_nan=False))
    else:
        console = stdout()
        console.print(f"{result.headline}.", style="bold", highlight=False)
        console.print()
        show(result.table)
        for text in result.summary["paragraphs"]:
            console.print(text, highlight=False)
            console.print()
        print(result.summary["code"])
        for name in ("report.html", "summary.json", "recipe.yaml"):
            print(result.folder / name)
    for text in result.failures:
        _complain(text, 1)
    return 1 if result.failures else 0


def _settings(pairs: list[str]) -> dict[str, Any]:
    try:
        return settings(pairs)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _checkpoint_page(report: CheckpointReport) -> str:
    require_lab()
    from normwise.lab.report.checkpoint import checkpoint_page

    return checkpoint_page(report)


_CHOSEN = ("seeds", "epochs", "batch_size", "lr_sgd", "lr_adam", "parallel")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip().lower()))


def _toy(arguments: argparse.Namespace) -> int:
    require_lab()
    from dataclasses import asdict

    from normwise.lab.console import print_toy
    from normwise.lab.store import write_new
    from normwise.lab.toy import PRINTED, trajectories

    picture: Path | None = arguments.out
    formats = (".png", ".svg", ".pdf")
    if picture is not None and picture.suffix.lower() not in formats:
        raise UsageError(f"--out {str(picture)!r} is not allowed: must end in {', '.join(formats)}")
    paths = trajectories()
    if picture is not None:
        from normwise.lab.plots import draw_toy

        write_new(picture, draw_toy(paths, picture.suffix.lower()[1:]))
    if arguments.json:
        numbers = [
            {
                **asdict(p),
                "ours": p.ours(paths[p.method]),
                "rounded": p.rounded(paths[p.method]),
            }
            for p in PRINTED
        ]
        print(json.dumps({"numbers": numbers, "picture": str(picture) if picture else None}))
        return 0
    print_toy(paths)
    if picture is not None:
        print(picture)
    return 0
