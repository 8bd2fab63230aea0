"""The parameter groups that policies and regularizers need for themselves, and their schedules."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from normwise.geometry import View
from normwise.updates import UpdateRule, own_rule

__all__ = ["check_acts", "check_unscheduled", "label", "scheduled", "split_groups"]

# Of each optimizer, or regularizer, the schedules that drive its groups.
scheduled: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


def check_unscheduled(optimizer: Optimizer, action: str) -> None:
    """Raise ValueError if a schedule drives the decay of ``optimizer``, which knows its groups."""
    if scheduled.get(optimizer):
        raise ValueError(
            f"a schedule drives the weight_decay of this optimizer already; {action} before you "
            "make the schedule"
        )


def check_acts(
    optimizer: Optimizer,
    weights: Collection[Tensor],
    what: str,
    adds_to_gradient: Callable[[UpdateRule], bool],
) -> None:
    """Raise ValueError for decay of fixed norms; warn of decay that a projection takes out.

    Args:
        optimizer: whose weights are to decay.
        weights: which.
        what: the name of what is to be attached.
        adds_to_gradient: whether it adds λw to the gradient of weights of a rule.
    """
    projected = []
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p not in weights or p.ndim < 2:
                continue
            rule = own_rule(optimizer, group, p)
            if rule.norm == "fixed":
                raise ValueError(
                    f"{what} would decay a weight of shape {tuple(p.shape)} in "
                    f"{label(optimizer, i)}, whose norms {type(optimizer).__name__} fixes; attach "
                    "it to the other weights only"
                )
            if isinstance(rule.view, View) and adds_to_gradient(rule):
                projected.append(p)
    if projected:
        warnings.warn(
            f"{what} adds λw to the gradient of {len(projected)} weights whose steps "
            f"{type(optimizer).__name__} projects, which takes the radial part out again, so that "
            "their norms hardly decay; decoupled decay acts beside the projection",
            stacklevel=3,
        )


def label(optimizer: Optimizer, index: int) -> str:
    """How messages and tables call a parameter group: by its number, and its name if it has one."""
    name = optimizer.param_groups[index].get("name")
    return f"group {index}" if name is None else f"group {index} ({name})"


def split_groups(optimizer: Optimizer, chosen: Collection[Tensor]) -> list[dict[str, Any]]:
    """Split each group that mixes ``chosen`` parameters with others; return the groups of chosen.

    The new group has the options of the old one and comes last.
    """
    ours = []
    for group in list(optimizer.param_groups):
        indices = [i for i, p in enumerate(group["params"]) if p in chosen]
        if indices and len(indices) == len(group["params"]):
            ours.append(group)
        elif indices:
            split = dict(group)
            for key in ("params", "param_names"):
                if key in group:
                    split[key] = [group[key][i] for i in indices]
                    group[key] = [x for i, x in enumerate(group[key]) if i not in set(indices)]
            # torch forms param_names itself, from pairs.
            param_names = split.pop("param_names", None)
            if param_names is not None:
                split["params"] = list(zip(param_names, split["params"], strict=True))
            optimizer.add_param_group(split)
            ours.append(optimizer.param_groups[-1])
    return ours
