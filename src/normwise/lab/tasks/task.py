"""What a task is: data, and the network that learns it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from normwise.lab.models import LabModel

__all__ = ["Data", "Task"]


@dataclass(frozen=True)
class Data:
    """Labelled examples, split once and for all.

    Args:
        train_inputs: shape ``(N, C, H, W)``, float32, standardized on the training set.
        train_targets: shape ``(N,)``, int64, the classes.
        test_inputs: as ``train_inputs``; never seen in training.
        test_targets: as ``train_targets``.
        classes: the number of classes.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int


@dataclass(frozen=True)
class Task:
    """Something to learn, as ``normwise compare --task NAME`` finds it.

    Args:
        name: what the user writes.
        title: what a reader of the report sees.
        source: where the data come from.
        epochs: passes over the training data by default.
        batch_size: examples a step by default.
        load: returns the data, the same at every call.
        model: returns a fresh network for the data; draws from torch's global generator.
    """

    name: str
    title: str
    source: str
    epochs: int
    batch_size: int
    load: Callable[[], Data]
    model: Callable[[Data], LabModel]
