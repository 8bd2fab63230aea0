"""The kinds of task that recipes name, each imported when it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from normwise.lab.errors import UsageError, nearest
from normwise.lab.tasks.problem import Metric, Problem
from normwise.lab.trust import GIVEN, is_code, is_library

__all__ = ["KINDS", "Kind", "is_own", "kind"]

# Task name → module under normwise.lab.tasks, class of the problem; that of its settings has the
# same name and "Options" behind it.
KINDS = {
    "classification": ("classification", "Classification"),
    "adversarial": ("adversarial", "Adversarial"),
    "long_tail": ("long_tail", "LongTail"),
    "incremental": ("incremental", "Incremental"),
    "equilibrium": ("equilibrium", "Settling"),
    "stabilization": ("stabilization", "LossStabilization"),
    "bias": ("bias", "Bias"),
    "nine_classes": ("nine_classes", "NineClasses"),
    "detection": ("detection", "Detection"),
    "retrieval": ("retrieval", "Retrieval"),
    "language": ("language", "Language"),
    "tagging": ("tagging", "Tagging"),
    "merging": ("merging", "Merging"),
    "decay_moments": ("decay_moments", "DecayMoments"),
    "lr_transfer": ("transfer", "LRTransfer"),
}


@dataclass(frozen=True)
class Kind:
    """A kind of task.

    Args:
        name: as recipes have it.
        options: the dataclass of its settings.
        metrics: what it is judged by, the first above all; empty for a problem of the user's, whose
            results say it.
        divisible: whether processes can share a batch of it.
        build: makes the problem from options, the data's root and the device.
    """

    name: str
    options: type[Any]
    metrics: tuple[Metric, ...]
    divisible: bool
    build: Callable[[Any, Path, torch.device], Problem]


def is_own(name: str) -> bool:
    """Whether a task is a problem of the user's: ``MODULE:FACTORY``, an object at hand, or a
    network of a library."""
    return is_code(name) or is_library(name) or name.startswith(f"{GIVEN}:")


def kind(name: str) -> Kind:
    """The kind of task of this name.

    Raises:
        UsageError: if there is none.
    """
    if is_own(name):
        own = import_module("normwise.lab.tasks.own")
        return Kind(name, own.OwnOptions, (), True, partial(own.build, name))
    if name not in KINDS:
        raise UsageError(f"unknown task {name!r}: {nearest(name, KINDS)}")
    module_name, class_name = KINDS[name]
    module = import_module(f"normwise.lab.tasks.{module_name}")
    problem = getattr(module, class_name)
    options = getattr(module, f"{class_name}Options")
    return Kind(name, options, module.METRICS, problem.divisible, problem)
