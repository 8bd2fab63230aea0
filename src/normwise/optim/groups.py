"""What a parameter group is: options, what each of them may be, and keys that are no options."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from normwise.checks import check_number
from normwise.geometry import View
from normwise.optim.projection import ViewOption

# What schedulers and users write into groups beside an optimizer's own options.
ANNOTATIONS = frozenset({"params", "param_names", "name", "initial_lr", "lr_scale"})


def check_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError for an option of a wrong type, or out of its range.

    Args:
        group: options by name; ``view`` as :func:`as_view_option` gives it.
    """
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, but has shape {list(group['lr'].shape)}")
    for option, check in _CHECKS.items():
        if option in group:
            check(group[option])
    if "norm" in group:
        check_norm_option(group["norm"], group["view"])
    if group.get("nesterov") and (group.get("momentum") == 0 or group.get("dampening", 0) != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    if group["foreach"] and group["differentiable"]:
        raise ValueError("`foreach` and `differentiable` cannot be `True` together.")
    for option in ("foreach", "differentiable"):
        if group["fused"] and group[option]:
            raise RuntimeError(f"`fused` and `{option}` cannot be `True` together.")


def check_keys(keys: Collection[str], options: Collection[str], optimizer: str) -> None:
    """Raise ValueError for a key of a group that is an option misspelt.

    Other keys are kept: wrappers, schedulers and users keep numbers of their own in groups. A key
    is taken for a misspelling if it has nearly the letters of an option, or is a word of its name.

    Args:
        keys: of the group.
        options: that the optimizer has.
        optimizer: its name, for the message.
    """
    for key in keys:
        if key in options or key in ANNOTATIONS:
            continue
        if meant := _meant(str(key), options):
            raise ValueError(
                f"Invalid option {key!r} in a parameter group of {optimizer}; "
                f"did you mean {meant!r}?"
            )


def _meant(key: str, options: Collection[str]) -> str | None:
    """The option that a key was probably to be."""
    for option in difflib.get_close_matches(key.lower(), options, n=3, cutoff=0.7):
        if abs(len(option) - len(key)) <= 2:
            return option
    return next((o for o in options if "_" in o and key.lower() in o.split("_")), None)


def as_view_option(value: object) -> ViewOption:
    """A ``view`` option as users write it: ``"auto"``, a :class:`View` or its spelling, None."""
    if value is None or isinstance(value, View):
        return value
    if isinstance(value, str):
        return "auto" if value == "auto" else View.parse(value)
    raise ValueError(f"Invalid view: {value!r}; must be 'auto', a normwise.View or None")


def check_norm_option(norm: object, view: object) -> None:
    """Raise ValueError unless ``norm`` is "free", or "fixed" in a view that says whose norm."""
    if norm not in ("free", "fixed"):
        raise ValueError(f"Invalid norm: {norm!r}; must be 'free' or 'fixed'")
    if norm == "fixed" and not isinstance(view, View):
        raise ValueError(f"norm='fixed' needs a view that says which norms, but view is {view!r}")


def check_not_flattened(p: Tensor, view: object) -> None:
    """Raise ValueError if a view is to be taken of a parameter that FSDP1 has made flat."""
    if view is not None and p.ndim < 2 and getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"view {str(view)!r} is of a weight's slices, but FullyShardedDataParallel has made "
            f"this parameter flat: its shape is {tuple(p.shape)}. Shard the model with "
            "torch.distributed.fsdp.fully_shard, or give view=None, which never projects"
        )


def _number(name: str, below: float = math.inf) -> Callable[[object], None]:
    return lambda value: check_number(name, value, below=below)


def _flag(name: str, *others: object) -> Callable[[object], None]:
    def check(value: object) -> None:
        if not (isinstance(value, bool) or any(value is other for other in others)):
            choices = " or ".join(map(str, (True, False, *others)))
            raise ValueError(f"Invalid {name}: {value!r}; must be {choices}")

    return check


def _check_betas(value: object) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"Invalid betas: {value!r}; must be two numbers, at least 0 and below 1")
    for i, beta in enumerate(value):
        if isinstance(beta, Tensor):
            raise ValueError(f"Invalid beta parameter at index {i}: a tensor; must be a number")
        check_number(f"beta parameter at index {i}", beta, below=1)


def _check_variant(value: object) -> None:
    if value not in ("paper", "official"):
        raise ValueError(f"Invalid variant: {value!r}; must be 'paper' or 'official'")


_CHECKS: dict[str, Callable[[object], None]] = {
    "lr": _number("learning rate"),
    "weight_decay": _number("weight_decay value"),
    "eps": _number("epsilon value"),
    "delta": _number("delta"),
    "wd_ratio": _number("wd_ratio"),
    "betas": _check_betas,
    "momentum": _number("momentum value", below=1),
    "dampening": _number("dampening value"),
    "variant": _check_variant,
    "nesterov": _flag("nesterov"),
    "maximize": _flag("maximize"),
    "capturable": _flag("capturable"),
    "differentiable": _flag("differentiable"),
    "stochastic_rounding": _flag("stochastic_rounding"),
    "foreach": _flag("foreach", None),
    "fused": _flag("fused", None),
}


def names_of(optimizer: Optimizer) -> dict[Tensor, str]:
    """The names of parameters, as far as an optimizer was made from named ones."""
    names: dict[Tensor, str] = {}
    for group in optimizer.param_groups:
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))
    return names
