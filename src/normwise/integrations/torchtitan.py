"""For torchtitan: its optimizer container with normwise's optimizers, and groups from a report.

Importing this module needs torchtitan, 0.3 or later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from normwise.invariance import Report
from normwise.optim import SGDP, SGDW, AdamP
from normwise.optim.by_role import destination_of

try:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
except ImportError as error:
    raise ImportError(
        "this module needs torchtitan 0.3 or later; install it as its own pages say"
    ) from error

__all__ = ["Container", "param_group_configs"]

_FACTORIES: dict[str, Callable[..., Optimizer]] = {"AdamP": AdamP, "SGDP": SGDP, "SGDW": SGDW}
if hasattr(torch.optim, "Muon"):
    _FACTORIES["Muon"] = torch.optim.Muon


class Container(OptimizersContainer):  # type: ignore[misc]  # untyped where it is not installed
    """torchtitan's container, which knows normwise's optimizers and torch's Muon by name too.

    ``Container.Config(param_groups=param_group_configs(report, ...))`` takes the place of
    ``OptimizersContainer.Config`` in a trainer's configuration.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]  # untyped where not installed
        """As torchtitan's."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name in _FACTORIES:
            return _FACTORIES[name]
        made: Callable[..., Optimizer] = OptimizersContainer._resolve_optimizer_factory(name)
        return made


def param_group_configs(
    report: Report, optimizers: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> list[Any]:
    """torchtitan's group configurations, whose patterns match what an analysis found.

    Each pattern is the exact list of the parameters of one role, so none is matched by accident.
    Vectors are not decayed.

    Args:
        report: of the model before it is sharded.
        optimizers: the name of an optimizer and its options, by where parameters go:
            ``"matrices"`` and ``"others"``; ``"embeddings"``, ``"readouts"`` and ``"routers"``
            where they are given, else with the others.

    Raises:
        ValueError: for an unknown key, without ``"others"``, or naming matrices of unknown role.
    """
    known = {"matrices", "others", "embeddings", "readouts", "routers"}
    if wrong := optimizers.keys() - known:
        raise ValueError(
            f"Invalid optimizers: {sorted(wrong)}; keys are {', '.join(sorted(known))}"
        )
    if "others" not in optimizers:
        raise ValueError("Invalid optimizers: there must be one for 'others'")
    members: dict[tuple[str, bool], list[str]] = {}
    unknown = []
    for row in report:
        if row.frozen:
            continue
        if not row.is_vector and row.role.kind == "other":
            unknown.append(row.name)
        to = destination_of(row, optimizers)
        members.setdefault((to, row.is_vector), []).append(row.name)
    if unknown:
        raise ValueError(
            f"nothing shows what these parameters are for: {', '.join(unknown)}; freeze them"
        )
    configs = []
    for (destination, is_vector), names in members.items():
        name, options = optimizers[destination]
        configs.append(
            ParamGroupConfig(
                pattern=f"^(?:{'|'.join(map(re.escape, names))})$",
                optimizer_name=name,
                optimizer_kwargs={**options, **({"weight_decay": 0.0} if is_vector else {})},
            )
        )
    return configs
