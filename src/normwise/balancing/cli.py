"""``normwise balance``: a checkpoint in, the same function at other scales out."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normwise.balancing.equalizing import equalize
from normwise.balancing.least_mass import balance, mass
from normwise.balancing.rounding import rounded
from normwise.figures.tables import Column, Table
from normwise.geometry import View, norms
from normwise.invariance import Report, analyze
from normwise.invariance.cli import add_source, check_absent, model_and_batch, with_exit_code
from normwise.invariance.replica import Replica

__all__ = ["add_balance_parser", "run_balance"]

_DESCRIPTION = """\
Rescale a checkpoint along the symmetries of its network, so that it computes the same with the
least mass, or with equal ranges for rounding; print what that does to rounding. Checkpoints are
read and written as safetensors; nothing is unpickled."""


def add_balance_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``balance`` to the subcommands of ``normwise``; its ``run`` is :func:`run_balance`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "balance", help="the same function at other scales", description=_DESCRIPTION
    )
    add_source(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE.safetensors",
        help="its weights (default: those that the source has)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.safetensors", help="a new file (default: only the table)"
    )
    parser.add_argument(
        "--to",
        choices=("least-mass", "equal-ranges"),
        default="least-mass",
        help="what to choose the scales for (default: least-mass)",
    )
    parser.add_argument("--mode", choices=("train", "eval"), default="train")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.set_defaults(run=run_balance)
    return parser


@with_exit_code
def run_balance(args: argparse.Namespace) -> None:
    """Print the table and write the checkpoint."""
    check_absent("--out", args.out)
    model, batch = model_and_batch(args.source, args, args.seed)
    state = None if args.checkpoint is None else _read(model, args.checkpoint)
    report = analyze(model, batch, seed=args.seed, mode=args.mode)
    before = _measures(model, report, batch, args.mode)
    if args.to == "least-mass":
        result = balance(model, report, batch=batch, tolerance=1e-8)
    else:
        result = equalize(model, report, batch=batch)
    after = _measures(model, report, batch, args.mode)
    rows = [(name, f"{value:.4g}", f"{after[name]:.4g}") for name, value in before.items()]
    rows.append(("largest difference of outputs", "", f"{result.difference:.1e}"))
    print(Table.of(("measure", Column("before"), Column("after")), rows))
    if args.out is not None:
        _write(model, args.out, state)
        print(args.out)


def _measures(
    model: nn.Module, report: Report, batch: Any, mode: Literal["train", "eval"]
) -> dict[str, float]:
    """Mass, the spread of norms, and the relative error of the outputs of rounded matrices."""

    def outputs(network: nn.Module) -> Tensor:
        run = Replica(network, batch, seed=0, mode=mode).run(shrink=1)
        flat = torch.cat([output.flatten() for output in run])
        return torch.where(flat.isfinite(), flat, 0)

    spreads = [1.0]
    for row in report:
        if not row.is_vector:
            length = norms(model.get_parameter(row.name).detach(), View.channel(0))
            length = length[length > 0]
            if len(length):
                spreads.append(float(length.max() / length.min()))
    found = {"mass": mass(model), "longest row over shortest of a matrix": max(spreads)}
    exact = outputs(model)
    for bits in (8, 4):
        for view, by in (("layer", "tensor"), ("channel", "row")):
            difference = outputs(rounded(model, report, bits, view)) - exact
            found[f"error of int{bits} by {by}"] = float(difference.norm() / exact.norm())
    return found


def _read(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Load a checkpoint into a model; its tensors, by name."""
    state: dict[str, Tensor] = _safetensors().load_file(path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected:
        raise ValueError(f"{str(path)!r} has {unexpected[0]!r}, which the network has not")
    # A tied weight is stored under one of its names.
    loaded = {value.data_ptr() for name, value in model.state_dict().items() if name in state}
    for name in missing:
        if model.state_dict()[name].data_ptr() not in loaded:
            raise ValueError(f"{str(path)!r} lacks {name!r}, which the network has")
    return state


def _write(model: nn.Module, path: Path, like: Mapping[str, Tensor] | None) -> None:
    """Write a model, under the names and in the dtypes of the checkpoint that it was read from."""
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, value in model.state_dict().items():
        if like is not None and name not in like:
            continue
        if like is None and value.numel() and value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        dtype = value.dtype if like is None else like[name].dtype
        tensors[name] = value.detach().to(dtype).contiguous()
    _safetensors().save_file(tensors, path, metadata={"format": "pt"})


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "safetensors cannot be imported; install it with `pip install normwise[transformers]`"
        ) from error
