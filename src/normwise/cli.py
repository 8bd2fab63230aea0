"""The command ``normwise``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from normwise import __version__
from normwise.balancing.cli import add_balance_parser
from normwise.invariance.cli import add_inspect_parser
from normwise.lab.cli import add_lab_parsers
from normwise.lab.errors import UsageError, nearest, require_lab
from normwise.monitor.cli import add_plan_parser

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
        return _run(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; without this Python would complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
        return _complain(str(error), 2)
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
    option("--task", default="digits", metavar="NAME", help="what to learn (default: digits)")
    option(
        "--optimizers",
        default="sgd,sgdp,adamw,adamp",
        metavar="A,B,…",
        help="any of sgd, sgdp, adamw, adamp, in any order (default: all)",
    )
    whole = _number(int, "a whole number, 1 or more")
    option("--seeds", type=whole, default=3, metavar="N", help="runs an optimizer (default: 3)")
    option("--epochs", type=whole, metavar="N", help="passes over the data (default: the task's)")
    option("--batch-size", type=whole, metavar="N", help="examples a step (default: the task's)")
    positive = _number(float, "a finite number greater than 0")
    option("--lr-sgd", type=positive, metavar="LR", help="of SGD and SGDP, at first (default: 0.1)")
    option(
        "--lr-adam",
        type=positive,
        metavar="LR",
        help="of AdamW and AdamP, at first (default: 0.001)",
    )
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


def _number(kind: Callable[[str], Any], allowed: str) -> Callable[[str], Any]:
    """A converter whose error says what is allowed."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed: must be {allowed}"
            ) from None

    return convert


def _compare(arguments: argparse.Namespace) -> int:
    require_lab()
    from normwise.lab.compare import assist, compare, default_folder
    from normwise.lab.console import print_outcome, progress
    from normwise.lab.parallel import processes
    from normwise.lab.settings import Settings
    from normwise.lab.tasks import TASKS

    task = TASKS.get(arguments.task)
    given = {
        name: getattr(arguments, name)
        for name in ("epochs", "batch_size", "lr_sgd", "lr_adam")
        if getattr(arguments, name) is not None
    }
    defaults = {"epochs": task.epochs, "batch_size": task.batch_size} if task else {}
    # An unknown task has no defaults; the settings refuse it whatever else they are given.
    settings = Settings(
        task=arguments.task,
        optimizers=tuple(
            name for part in arguments.optimizers.split(",") if (name := part.strip().lower())
        ),
        seeds=arguments.seeds,
        parallel=arguments.parallel,
        **{"epochs": 1, "batch_size": 1, **defaults, **given},
    )
    with processes(settings.parallel, "compare", [settings.batch_size], "--batch-size") as together:
        if together.rank > 0:
            assist(settings, together)
            return 0
        with progress(settings, arguments.quiet) as observe:
            outcome = compare(settings, arguments.out or default_folder(), observe, together)
    if arguments.json:
        print(json.dumps({"folder": str(outcome.folder), **outcome.summary}, allow_nan=False))
    else:
        print_outcome(outcome, settings)
    if outcome.interrupted:
        _complain(f"interrupted; what was finished is in {str(outcome.folder)!r}", 130)
        return 130
    for failure in outcome.failures:
        _complain(f"{failure['optimizer']}, seed {failure['seed']}: {failure['error']}", 1)
    return 1 if outcome.failures else 0


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
    courses = trajectories()
    if picture is not None:
        from normwise.lab.plots import draw_toy

        write_new(picture, draw_toy(courses, picture.suffix.lower()[1:]))
    if arguments.json:
        numbers = [
            {
                **asdict(p),
                "ours": p.ours(courses[p.method]),
                "rounded": p.rounded(courses[p.method]),
            }
            for p in PRINTED
        ]
        print(json.dumps({"numbers": numbers, "picture": str(picture) if picture else None}))
        return 0
    print_toy(courses)
    if picture is not None:
        print(picture)
    return 0
