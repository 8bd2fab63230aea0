"""``normwise plan``: what the norms of a run will do, before it is run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from normwise.invariance import analyze
from normwise.invariance.cli import check_absent, model_and_batch, with_exit_code
from normwise.plan.planning import plan
from normwise.plan.settings import OPTIMIZERS, Settings, Weights, weights_of

__all__ = ["add_plan_parser", "run_plan"]

_DESCRIPTION = """\
Say where the norms of scale-invariant weights will settle, how far each step will turn them, and
how long it takes to get there, from the optimizer's settings alone. With --model, for every
scale-invariant weight of a network at random weights; nothing is downloaded."""

_MOMENTUM = {"muon": 0.95}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def add_plan_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``plan`` to the subcommands of ``normwise``; its ``run`` is :func:`run_plan`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan", help="what the norms will do, before training", description=_DESCRIPTION
    )
    option = parser.add_argument
    option("--optimizer", choices=OPTIMIZERS, required=True)
    option("--lr", type=float, required=True, help="the highest of the schedule")
    option("--weight-decay", type=float, required=True)
    option("--momentum", type=float, help="of SGD and its kin, and Muon (default: 0.9; Muon 0.95)")
    option(
        "--betas",
        type=float,
        nargs=2,
        default=None,
        metavar=("B1", "B2"),
        help="of AdamW, AdamP and Lion (default: 0.9 and 0.999; Lion 0.9 and 0.99)",
    )
    option("--wd-ratio", type=float, default=0.1, help="of AdamP and SGDP (default: 0.1)")
    option("--steps", type=int, default=10_000, help="of the run (default: 10000)")
    option("--schedule", choices=("constant", "cosine"), default="constant")
    option("--gradient", type=float, default=1.0, help="RMS norm at weight norm 1 (default: 1)")
    option("--dtype", choices=_DTYPES, default="float32", help="whose range must hold")
    option("--entries", type=int, default=576, help="of a slice, without --model (default: 576)")
    option("--norm", type=float, default=1.0, help="of a slice at first (default: 1)")
    option("--model", metavar="SOURCE", help="a network, see `normwise inspect`")
    option("--batch", help="see `normwise inspect` (default: what the model says)")
    option("--set", action="append", default=[], metavar="KEY=VALUE", help="see `normwise inspect`")
    option("--json", action="store_true", help="print JSON, and nothing else")
    option("--plot", type=Path, metavar="FILE", help="draw the run in a new file")
    parser.set_defaults(run=run_plan)
    return parser


@with_exit_code
def run_plan(args: argparse.Namespace) -> None:
    """Print the plan."""
    check_absent("--plot", args.plot)
    betas = args.betas or (0.9, 0.99 if args.optimizer == "lion" else 0.999)
    settings = Settings(
        optimizer=args.optimizer,
        lr=args.lr,
        weight_decay=args.weight_decay,
        steps=args.steps,
        momentum=_MOMENTUM.get(args.optimizer, 0.9) if args.momentum is None else args.momentum,
        betas=tuple(betas),
        schedule=args.schedule,
        gradient=args.gradient,
        dtype=_DTYPES[args.dtype],
        wd_ratio=args.wd_ratio,
    )
    found = plan(settings, _weights(args))
    print(json.dumps(found.as_json(), allow_nan=False) if args.json else found)
    if args.plot is not None:
        found.plot(args.plot)


def _weights(args: argparse.Namespace) -> list[Weights]:
    if args.model is None:
        if args.batch is not None or args.set:
            raise ValueError("--batch and --set are of a --model, and none is given")
        return [Weights("any slice", 1, args.entries, args.norm)]
    model, batch = model_and_batch(args.model, args)
    weights = weights_of(model, analyze(model, batch, joint=False).views())
    if not weights:
        raise ValueError(
            f"{args.model} has no scale-invariant weight, and no equilibrium is known of others; "
            "`normwise inspect` says why each is not, and without --model one slice of --entries "
            "and --norm is planned"
        )
    return weights
