"""``normwise inspect``: which weights of a network are scale-invariant, and what follows."""

from __future__ import annotations

import argparse
import ast
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from normwise.invariance.analyze import analyze
from normwise.invariance.sources import batch_for, load

__all__ = [
    "add_inspect_parser",
    "add_source",
    "check_absent",
    "model_and_batch",
    "run_inspect",
    "settings",
    "with_exit_code",
]

_DESCRIPTION = """\
Find which weights of a network are scale-invariant, along which slices, and why; then say what
weight decay does to them. Networks are built at random weights; nothing is downloaded."""


def add_inspect_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``inspect`` to the subcommands of ``normwise``; its ``run`` is :func:`run_inspect`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect", help="which weights are scale-invariant", description=_DESCRIPTION
    )
    add_source(parser)
    parser.add_argument("--draws", type=int, default=3, help="points and gradients (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--mode", choices=("train", "eval"), default="train")
    parser.add_argument(
        "--no-joint", action="store_true", help="skip symmetries of several tensors; much faster"
    )
    parser.add_argument("--weight-decay", type=float, default=0.01, help="(default: 0.01)")
    parser.add_argument("--lr", type=float, default=1e-3, help="(default: 0.001)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--summary", action="store_true", help="print how much is of which kind")
    form.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the report in a new file")
    parser.set_defaults(run=run_inspect)
    return parser


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which network, at which batch; see :func:`model_and_batch`."""
    parser.add_argument(
        "source", help="MODULE:FACTORY, hf:MODEL_TYPE, hf:CONFIG.json, timm:NAME, torchvision:NAME"
    )
    parser.add_argument(
        "--batch", help="2x3x64x64, tokens:2x16, or MODULE:FACTORY (default: what the model says)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the factory or a field of the configuration; may be repeated",
    )


def model_and_batch(source: str, args: argparse.Namespace, seed: int = 0) -> tuple[nn.Module, Any]:
    """The network and the batch that a command is asked for."""
    model, batch = load(source, settings(args.set))
    if args.batch is not None or batch is None:
        batch = batch_for(model, args.batch, seed=seed)
    return model, batch


def check_absent(option: str, path: Path | None) -> None:
    """Raise ValueError for a file to be written that is there already."""
    if path is not None and path.exists():
        raise ValueError(f"{option} {str(path)!r} exists; name a file that does not")


def with_exit_code(command: Callable[[argparse.Namespace], None]) -> Callable[..., int]:
    """A command that returns 0, or after an error that the user can mend, in one line, 2."""

    @functools.wraps(command)
    def run(args: argparse.Namespace) -> int:
        try:
            command(args)
        except (ValueError, RuntimeError, ImportError, OSError, TypeError) as error:
            print(f"normwise: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0

    return run


@with_exit_code
def run_inspect(args: argparse.Namespace) -> None:
    """Print the report and the advice."""
    check_absent("--plot", args.plot)
    model, batch = model_and_batch(args.source, args, args.seed)
    report = analyze(
        model,
        batch,
        draws=args.draws,
        seed=args.seed,
        mode=args.mode,
        joint=not args.no_joint,
    )
    if args.json:
        print(report.to_json())
    elif args.summary:
        print(report.summary())
    else:
        print(report)
        print()
        print(report.advice(args.weight_decay, args.lr))
    if args.plot is not None:
        report.plot(args.plot)


def settings(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value that is no Python literal is a string."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"Invalid --set: {pair!r}; must be KEY=VALUE")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return settings
