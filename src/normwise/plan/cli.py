"""``normwise plan``: what the norms of a run will do, before it is run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normwise.figures.tables import paragraph
from normwise.invariance import Report, analyze
from normwise.invariance.cli import check_absent, model_and_batch, with_exit_code
from normwise.optim.by_role import destination_of
from normwise.plan.planning import Plan, finite, plan
from normwise.plan.roles import optimizer_for, roles
from normwise.plan.rules import Change, carried, rules
from normwise.plan.settings import OF_MATRICES, OPTIMIZERS, Settings, Weights, weights_of
from normwise.plan.transfer import TRANSFERS

__all__ = ["add_plan_parser", "run_plan"]

_DESCRIPTION = """\
Say where the norms of scale-invariant weights will settle, how far each step will turn them, and
how long it takes to get there, from the optimizer's settings alone. With --model, for every
scale-invariant weight of a network at random weights, and for each role of its weights how long
they remember; nothing is downloaded. With --batch-from, --horizon-from or --width-from, what named
rules make of --lr and --weight-decay, which are then those of another run."""

_MOMENTUM = {"muon": 0.95}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_NO_EQUILIBRIUM = (
    "No equilibrium is known of weights that are not scale-invariant by themselves: the loss holds "
    "their norms as much as decay does. `normwise inspect` says why each is not, and whose scale "
    "can be traded; `normwise.sphere` fixes norms instead, and "
    "`normwise.weight_normalize` makes weights scale-invariant."
)


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
    option("--no-joint", action="store_true", help="see `normwise inspect`; heads stay unseen")
    option("--others", choices=OPTIMIZERS, help="of all but hidden matrices (default: --optimizer)")
    option("--others-lr", type=float, metavar="LR")
    option("--others-weight-decay", type=float, default=0.0, metavar="DECAY", help="(default: 0)")
    option("--tokens-per-step", type=float, metavar="N", help="or examples, of this run")
    option("--batch-from", type=float, metavar="N", help="tokens per step of the run tuned")
    option(
        "--horizon-from",
        type=float,
        metavar="STEPS",
        help="of the run tuned (default: as many tokens as here)",
    )
    option("--width", type=int, metavar="N", help="of this network, for --width-from")
    option("--width-from", type=int, metavar="N", help="of the network tuned")
    option("--parameters-from", type=float, metavar="N", help="of the network tuned, with --model")
    option(
        "--rule",
        action="append",
        default=[],
        metavar="NAME",
        help="plan with what it says: "
        + ", ".join(map(repr, TRANSFERS))
        + "; may be repeated (default: keep)",
    )
    option("--json", action="store_true", help="print JSON, and nothing else")
    option("--plot", type=Path, metavar="FILE", help="draw the run in a new file")
    parser.set_defaults(run=run_plan)
    return parser


@with_exit_code
def run_plan(args: argparse.Namespace) -> None:
    """Print the plan."""
    check_absent("--plot", args.plot)
    _check_together(args)
    settings, others = _settings(args)
    model, report = _network(args)
    change = _change(args, model)
    if args.rule and not change.names:
        raise ValueError("--rule carries over from another run: give --batch-from or its like")
    parts: list[object] = []
    content: dict[str, Any] = {}
    if change.names:
        found = rules(settings, change)
        content["rules"] = [asdict(row) for row in found]
        names = args.rule or ["keep"]
        settings, others = carried(settings, others, names, change)
        planned = f"Planned with {', then '.join(names)}; --rule NAME takes another."
        parts += [found, paragraph(planned)]
    if report is None:
        plans = [plan(settings, [Weights("any slice", 1, args.entries, args.norm)])]
    else:
        optimizer = optimizer_for(report, settings, others)
        table = roles(
            report,
            optimizer,
            steps=args.steps,
            batch=args.tokens_per_step,
            gradient=args.gradient,
        )
        content["roles"] = [asdict(row) for row in table]
        parts.append(table)
        plans = _plans(model, report, settings, others)
        if not all(row.invariant for row in table):
            parts.append(paragraph(_NO_EQUILIBRIUM))
    if args.plot is not None and not plans:
        raise ValueError("there is no picture: no weight is scale-invariant by itself")
    if args.json:
        content |= plans[0].as_json() if plans else {"rows": [], "notes": [_NO_EQUILIBRIUM]}
        if len(plans) > 1:
            content["others"] = plans[1].as_json()
        print(json.dumps(finite(content), allow_nan=False))
    else:
        heads = [f"Scale-invariant weights that {p.settings.optimizer} steps\n\n" for p in plans]
        if len(plans) == 1:
            heads = [""]
        parts += [f"{head}{p}" for head, p in zip(heads, plans, strict=True)]
        print(*parts, sep="\n\n")
    if args.plot is not None:
        plans[0].plot(args.plot)


def _check_together(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that another must stand beside."""
    without_model = [
        name for name in ("batch", "set", "others", "parameters_from") if getattr(args, name)
    ]
    if args.model is None and without_model:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in without_model)
        raise ValueError(f"{names} are of a --model, and none is given")
    for name, needed in (
        ("batch_from", "tokens_per_step"),
        ("width_from", "width"),
        ("width", "width_from"),
        ("others", "others_lr"),
        ("others_lr", "others"),
    ):
        if getattr(args, name) is not None and getattr(args, needed) is None:
            one, other = (f"--{option.replace('_', '-')}" for option in (name, needed))
            raise ValueError(f"{one} needs {other} beside it")


def _settings(args: argparse.Namespace) -> tuple[Settings, Settings]:
    """Of hidden matrices, and of all else."""

    def of(optimizer: str, lr: float, weight_decay: float) -> Settings:
        momentum = _MOMENTUM.get(optimizer, 0.9) if args.momentum is None else args.momentum
        return Settings(
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            steps=args.steps,
            momentum=momentum,
            betas=tuple(args.betas or (0.9, 0.99 if optimizer == "lion" else 0.999)),
            schedule=args.schedule,
            gradient=args.gradient,
            dtype=_DTYPES[args.dtype],
            wd_ratio=args.wd_ratio,
        )

    settings = of(args.optimizer, args.lr, args.weight_decay)
    if args.others is not None:
        return settings, of(args.others, args.others_lr, args.others_weight_decay)
    if args.model is not None and args.optimizer in OF_MATRICES:
        raise ValueError(
            f"{args.optimizer} is for hidden matrices alone: say what steps all other weights of "
            "the network, such as --others adamw --others-lr 1e-3"
        )
    return settings, settings


def _network(args: argparse.Namespace) -> tuple[nn.Module | None, Report | None]:
    if args.model is None:
        return None, None
    model, batch = model_and_batch(args.model, args)
    return model, analyze(model, batch, joint=not args.no_joint)


def _change(args: argparse.Namespace, model: nn.Module | None) -> Change:
    """From the run of --batch-from and its kin to this one."""
    batch = args.tokens_per_step
    batches = None if batch is None else (args.batch_from or batch, batch)
    before, after = batches or (1.0, 1.0)
    tokens = after * args.steps
    parameters = None
    if args.parameters_from is not None and model is not None:
        parameters = args.parameters_from, float(sum(p.numel() for p in model.parameters()))
    elif args.width_from is None:
        parameters = 1.0, 1.0  # as many in both, however many
    return Change(
        (tokens if args.horizon_from is None else before * args.horizon_from, tokens),
        batches,
        None if args.width_from is None else (args.width_from, args.width),
        parameters,
    )


def _plans(
    model: nn.Module | None, report: Report, settings: Settings, others: Settings
) -> list[Plan]:
    """Of the scale-invariant weights that each of the two steps, if any."""
    assert model is not None
    weights = weights_of(model, report.views())
    if settings == others:
        parts = [(settings, weights)]
    else:
        hidden = {w for w in weights if destination_of(report[w.name], ("matrices",)) == "matrices"}
        parts = [(settings, [w for w in weights if w in hidden])]
        parts.append((others, [w for w in weights if w not in hidden]))
    return [plan(s, mine) for s, mine in parts if mine]
