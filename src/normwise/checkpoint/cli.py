"""``normwise checkpoint``: what weights on disk say about how they were trained."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from normwise.checkpoint.report import CheckpointReport, examine
from normwise.figures.tables import show
from normwise.invariance import analyze
from normwise.invariance.cli import check_absent, model_and_batch, with_exit_code

__all__ = ["add_checkpoint_parser"]

_DESCRIPTION = """\
Say from a checkpoint's weights alone which have settled, at which lr/weight_decay, which never
moved, which are constrained, dead, or near the end of their range, and what to warm up to when
training goes on. Reads safetensors and torch's distributed checkpoints; nothing is unpickled."""


def add_checkpoint_parser(
    subparsers: Any, page: Callable[[CheckpointReport], str]
) -> argparse.ArgumentParser:
    """Add ``checkpoint`` to the subcommands of ``normwise``.

    Args:
        subparsers: of the parser of ``normwise``.
        page: makes the HTML page of a report.

    Returns:
        Its parser, whose ``run`` prints the report and returns an exit code.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "checkpoint",
        help="what weights on disk say about how they were trained",
        description=_DESCRIPTION,
    )
    option = parser.add_argument
    option("path", type=Path, metavar="DIR_OR_FILE", help="safetensors, or a folder of them or DCP")
    option(
        "--config",
        metavar="SOURCE",
        help="the network, for its start and its scale-invariant weights: see `normwise inspect`",
    )
    option("--batch", help="see `normwise inspect` (default: what the network says)")
    option("--set", action="append", default=[], metavar="KEY=VALUE", help="see `normwise inspect`")
    option("--lr", type=float, help="that it was trained with, at its end")
    option("--weight-decay", type=float, help="that it was trained with")
    option("--prefix", help="only keys that begin with it (default of DCP: model., if there)")
    option("--json", action="store_true", help="print JSON, and nothing else")
    option("--html", type=Path, metavar="FILE", help="also write a page, a new file")

    @with_exit_code
    def run(args: argparse.Namespace) -> None:
        check_absent("--html", args.html)
        model, invariant = None, frozenset[str]()
        if args.config is not None:
            model, batch = model_and_batch(args.config, args)
            invariant = frozenset(analyze(model, batch, joint=False).views())
        report = examine(
            args.path,
            initial=model,
            invariant=invariant,
            lr=args.lr,
            weight_decay=args.weight_decay,
            prefix=args.prefix,
        )
        if args.html is not None:
            text = page(report)
            with args.html.open("x", encoding="utf-8") as file:
                file.write(text)
        if args.json:
            print(json.dumps(report.to_dict(), allow_nan=False))
            return
        print(*report.findings(), "", sep="\n")
        show(report.table())
        if args.html is not None:
            print(args.html)

    parser.set_defaults(run=run)
    return parser
