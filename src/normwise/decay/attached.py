"""The parameter groups that policies and regularizers need for themselves, and their schedules."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["check_unscheduled", "label", "scheduled", "split_groups"]

# Of each optimizer, or regularizer, the schedules that drive its groups.
scheduled: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


def check_unscheduled(optimizer: Optimizer, action: str) -> None:
    """Raise ValueError if a schedule drives the decay of ``optimizer``, which knows its groups."""
    if scheduled.get(optimizer):
        raise ValueError(
            f"a schedule drives the weight_decay of this optimizer already; {action} before you "
            "make the schedule"
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
