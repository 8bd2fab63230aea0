"""What takes part in a comparison on the user's own problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from normwise.lab.optimizers import OptimizerSpec
from normwise.lab.tasks.problem import Metric
from normwise.updates import UpdateRule

__all__ = ["Inspected", "Method", "Setting"]


@dataclass(frozen=True)
class Setting:
    """One learning rate and one weight decay."""

    lr: float
    weight_decay: float

    @property
    def row(self) -> str:
        """The name of its row in the sweep."""
        return f"lr={self.lr!r},wd={self.weight_decay!r}"


@dataclass(frozen=True)
class Method:
    """An optimizer that takes part.

    Args:
        name: of its folder.
        label: as a reader sees it.
        spec: what it is.
        rules: what its steps do, one for each group of parameters that it steps otherwise.
        settings: those that it may choose from.
    """

    name: str
    label: str
    spec: OptimizerSpec
    rules: tuple[UpdateRule, ...]
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Inspected:
    """What the problem turned out to be.

    Args:
        network: the name of its class.
        weights: how many numbers train.
        tensors: how many parameters hold them.
        normalizations: how many of its modules normalize, as their classes' names have it.
        invariant: the scale-invariant parameters, each with its view's spelling and its size.
        not_analyzed: why that could not be found out; none where it could.
        metrics: what it is judged by.
        facts: sizes of the data.
    """

    network: str
    weights: int
    tensors: int
    normalizations: int
    invariant: dict[str, tuple[str, int]]
    not_analyzed: str | None
    metrics: tuple[Metric, ...]
    facts: dict[str, Any]

    @property
    def share(self) -> float:
        """The share of the weights that are scale-invariant, from 0 to 1."""
        return sum(size for _, size in self.invariant.values()) / self.weights
