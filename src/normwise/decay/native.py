"""How optimizers decay weights by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer

__all__ = ["Coupling", "Native", "native_decay"]

Coupling = Literal["L2", "decoupled"]

_L2 = frozenset({"SGD", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD"})
_DECOUPLED = frozenset({"AdamW", "Adafactor", "Muon"})
_OURS = frozenset({"AdamP", "SGDP", "SGDW"})


@dataclass(frozen=True)
class Native:
    """What an optimizer does with the ``weight_decay`` of a group.

    Args:
        coupling: ``"L2"``, added to the gradient, or ``"decoupled"``.
        rate: a decoupled weight is multiplied by 1 − rate·η·weight_decay (default: 1).
        is_switch: whether the group's ``decoupled_weight_decay`` chooses the coupling.
        takes_tensor: whether ``weight_decay`` may be a tensor, and is not waited for.
    """

    coupling: Coupling
    rate: float = 1.0
    is_switch: bool = False
    takes_tensor: bool = False


def native_decay(optimizer: Optimizer, group: dict[str, Any]) -> Native | None:
    """Of a group of an optimizer of torch or normwise; None for any other, which is not known."""
    if "weight_decay" not in group:
        return None
    for kind in type(optimizer).__mro__:
        room = kind.__module__.partition(".optim")[0]
        if room == "torch":
            if "decoupled_weight_decay" in group:
                is_decoupled = group["decoupled_weight_decay"]
                return Native("decoupled" if is_decoupled else "L2", is_switch=True)
            if kind.__name__ in _DECOUPLED:
                return Native("decoupled")
            if kind.__name__ in _L2 or kind is torch.optim.Adam:
                return Native("L2")
        if room == "normwise" and kind.__name__ in _OURS:
            rate = 1 / (1 - group["momentum"]) if kind.__name__ == "SGDP" else 1.0
            return Native("decoupled", rate, takes_tensor=True)
    return None
