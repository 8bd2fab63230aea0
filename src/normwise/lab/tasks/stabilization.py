"""Classification with the loss-stabilization probe: how far a copy's loss falls from here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.lab.checks import within
from normwise.lab.tasks.classification import Classification, ClassificationOptions
from normwise.lab.tasks.problem import Evaluation, Metric
from normwise.perturb import loss_stabilization

__all__ = ["LossStabilization", "LossStabilizationOptions"]

METRICS = (
    Metric("settled_loss", "training loss of the copy", "nats", higher_is_better=False, digits=3),
    Metric("running_loss", "training loss of the run", "nats", higher_is_better=False, digits=3),
    Metric("settled_accuracy", "test accuracy of the copy", "%", 100.0),
    Metric("accuracy", "test accuracy of the run", "%", 100.0),
)


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


@dataclass(frozen=True)
class LossStabilizationOptions(ClassificationOptions):
    """What a recipe may set, beside the settings of classification.

    Args:
        probe_epochs: that the copy is trained on (default: 100, as in the paper).
        probe_lr: its learning rate (default: 1e-3, as in the paper).
        probe_batch: examples per step of it (default: 128).
    """

    probe_epochs: int = 100
    probe_lr: float = 1e-3
    probe_batch: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("probe_epochs", "probe_batch"):
            within(self, name, 1)
        within(self, "probe_lr", 0, above=True)


class LossStabilization(Classification):
    """Cross-entropy; tested as it is, and after a copy was trained on at a small rate, undecayed.

    Both losses are those of the whole training set without augmentation, in evaluation mode. The
    copy's batches are the same at every test.
    """

    divisible = False
    options: LossStabilizationOptions

    def __init__(self, options: LossStabilizationOptions, root: Path, device: torch.device) -> None:
        super().__init__(options, root, device)
        labels = self.data.train_labels
        shares = torch.bincount(labels, minlength=self.classes).double() / len(labels)
        shares = shares[shares > 0]
        entropy = -float((shares * shares.log()).sum())
        accuracy = self.baseline["accuracy"]
        self.baseline = {
            "settled_loss": entropy,
            "running_loss": entropy,
            "settled_accuracy": accuracy,
            "accuracy": accuracy,
        }

    def evaluate(self) -> Evaluation:
        """Losses and accuracies of the run and of a copy that was trained on."""
        found = loss_stabilization(
            self.model,
            _cross_entropy,
            self._probed(),
            self._train_loss,
            lr=self.options.probe_lr,
        )
        return Evaluation(
            {
                "settled_loss": found.settled,
                "running_loss": found.running,
                "settled_accuracy": self._accuracy(found.model),
                "accuracy": self._accuracy(self.model),
            }
        )

    def _probed(self) -> Iterator[Any]:
        draw = torch.Generator().manual_seed(0)
        for _ in range(self.options.probe_epochs):
            for chosen in self.batches(min(self.options.probe_batch, self.examples), draw):
                yield self.batch(chosen, draw)

    @torch.no_grad()
    def _train_loss(self, model: nn.Module) -> float:
        """The mean over all training images as they are, in evaluation mode."""
        model.eval()
        total = torch.zeros((), dtype=torch.float64)
        draw = torch.Generator().manual_seed(0)
        for chosen in torch.split(torch.arange(self.examples), 500):
            for x, y, _ in self.data.batches(chosen[None], [draw]):
                logits = model(self.standardized(x))
                total += F.cross_entropy(logits, y, reduction="sum").double().cpu()
        return float(total) / self.examples

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> float:
        model.eval()
        parts = [self._right(model, x, y) for x, y in self.data.test_parts()]
        return float(torch.cat(parts).double().mean())

    def _right(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        right: Tensor = model(self.standardized(x)).argmax(1) == y
        return right
