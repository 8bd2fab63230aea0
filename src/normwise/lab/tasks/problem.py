"""What the training of a cell needs of a task: data, a network, a loss, and a test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from normwise.geometry import View
from normwise.monitor import Monitor

__all__ = ["Evaluation", "Metric", "Problem"]


@dataclass(frozen=True)
class Metric:
    """A number that a task is judged by.

    Args:
        name: in ``metrics.jsonl``.
        title: as a reader sees it.
        unit: as a reader sees it; may be empty.
        factor: from the stored number to the shown one.
        higher_is_better: which way is up.
        digits: after the point, as shown.
    """

    name: str
    title: str
    unit: str = ""
    factor: float = 1.0
    higher_is_better: bool = True
    digits: int = 2


@dataclass(frozen=True)
class Evaluation:
    """A test of the network.

    Args:
        metrics: by name, as plain numbers.
        wrong: which test examples are classified wrongly, where that has a meaning.
    """

    metrics: dict[str, float]
    wrong: list[int] | None = None


class Problem(ABC):
    """Data and network, ready to be trained.

    Nothing in it changes while training but ``model``, its buffers included, so that the state of a
    training is that of the model, of the optimizer, and the number of the step.

    Attributes:
        divisible: whether processes can share a batch: the loss is the mean over its examples,
            ``model`` is called as a whole and remembers nothing of a batch (default: yes).
        measured: at about how many steps of a training angles are measured (default: 100).
        model: all that is trained; its weights are drawn from torch's global generator.
        examples: how many there are to train on.
        facts: what a reader should know of the data: sizes, splits.
        baseline: the metrics of a stated method that learns nothing from the inputs.
    """

    divisible: bool = True
    measured: ClassVar[int] = 100
    model: nn.Module
    examples: int
    facts: dict[str, Any]
    baseline: dict[str, float]

    def batches(self, size: int, draw: Generator) -> Tensor:
        """The examples of each step of an epoch, shape ``(steps, size)``; the rest is left out."""
        steps = self.examples // size
        return torch.randperm(self.examples, generator=draw)[: steps * size].view(steps, size)

    @abstractmethod
    def batch(self, chosen: Tensor, draw: Generator) -> Any:
        """The chosen examples on the device, augmented; randomness comes from ``draw`` alone."""

    def stream(self, steps: Tensor, draws: Iterable[Generator]) -> Iterator[Any]:
        """The batch of each step, in order; a task may prepare some before they are asked for.

        Args:
            steps: rows of what :meth:`batches` returned.
            draws: for each step its source of randomness.
        """
        for chosen, draw in zip(steps, draws, strict=True):
            yield self.batch(chosen, draw)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights and buffers of a finished training, before anything is measured."""
        self.model.load_state_dict(dict(weights))

    def make_optimizer(self, training: Any) -> Optimizer | None:
        """The optimizer of a task whose methods are its own; none for the one of the settings.

        The learning rate that it gives to a group is the highest; the schedule multiplies it.

        Args:
            training: the settings, a :class:`normwise.lab.recipes.Training`.
        """
        return None

    def attend(  # noqa: B027  # most tasks are judged by their model alone
        self, optimizer: Optimizer, monitor: Monitor, views: Mapping[str, View]
    ) -> None:
        """Learn what trains the model and measures its scale-invariant weights.

        Called once, before the first step or a checkpoint is read; not where nothing is measured.
        What a task keeps of measurements belongs into buffers of its model.

        Args:
            optimizer: that trains it.
            monitor: to whose ``writers`` a task may add.
            views: of the scale-invariant weights, by the names of their parameters.
        """

    def prepared(self, batch: Any) -> Any:
        """A batch with what is found from the weights before the step and stays through it.

        An attacked image is: a step at perturbed weights computes two losses of it.
        """
        return batch

    def end_epoch(self) -> None:  # noqa: B027  # most tasks leave the model as it is
        """Change the model as the task has it between epochs, before it is tested."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """A scalar to be minimized, in nats where it is a cross-entropy."""

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Test the network as it is; two calls in a row give the same."""
