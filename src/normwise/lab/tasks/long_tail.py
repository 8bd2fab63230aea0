"""Classification where a few classes have most of the examples, as CIFAR-100-LT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.balancing import MaxNorm, align_rows, class_balanced_weights, tau_normalize
from normwise.lab.checks import within
from normwise.lab.data.images import Labelled
from normwise.lab.errors import UsageError, nearest
from normwise.lab.tasks.classification import Classification, ClassificationOptions, load
from normwise.lab.tasks.problem import Evaluation, Metric

__all__ = ["LongTail", "LongTailOptions", "long_tailed"]

METRICS = (
    Metric("accuracy", "test accuracy", "%", 100.0),
    Metric("many", "test accuracy, classes of more than 100 examples", "%", 100.0),
    Metric("medium", "test accuracy, classes of 20 to 100 examples", "%", 100.0),
    Metric("few", "test accuracy, classes of fewer than 20 examples", "%", 100.0),
)
RESCALINGS = ("none", "tau", "align")


@dataclass(frozen=True)
class LongTailOptions(ClassificationOptions):
    """What a recipe may set, beside the settings of classification.

    Args:
        imbalance: examples of the largest class for each of the smallest (default: 100).
        classifier_only: whether all but the last linear layer stays as it is, batch statistics
            included (default: no).
        class_balanced: whether the loss weighs classes by their effective numbers of examples
            (default: no).
        max_norm: share between the least and the largest norm of the classifier's rows, at the
            start, that becomes the radius of a projection after every epoch (default: none).
        rescale: what is done to the classifier's rows at the start: none, ``tau`` for
            τ-normalization, or ``align``, which gives rare classes the mean norm of the others
            (default: none).
        rare: how many examples such a class has at most (default: 100).
        tau: τ (default: 1).
    """

    imbalance: float = 100.0
    classifier_only: bool = False
    class_balanced: bool = False
    max_norm: float | None = None
    rescale: str = "none"
    rare: int = 100
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "imbalance", 1)
        within(self, "max_norm", 0, 1)
        within(self, "tau", 0)
        if self.rescale not in RESCALINGS:
            raise UsageError(
                f"unknown rescale {self.rescale!r}: {nearest(self.rescale, RESCALINGS)}"
            )
        if self.data.startswith("folder:"):
            raise UsageError(f"data {self.data!r} is not allowed: its examples cannot be counted")


def long_tailed(data: Labelled, imbalance: float) -> Labelled:
    """A data set of which class i of K keeps n·f^(−i/(K−1)) training examples, rounded down.

    n is what the smallest class has, f the imbalance factor; which are kept is drawn once and for
    all. The test set stays as it is, with as many of each class as of any other.

    Source: 1901.05555, section 5.1.
    """
    classes = len(data.classes)
    draw = np.random.default_rng(0)
    least = int(np.bincount(data.train_labels, minlength=classes).min())
    kept = []
    for i in range(classes):
        # Powers of floats fall just below whole numbers, which rounding down would take one off.
        count = int(least * imbalance ** (-i / max(classes - 1, 1)) + 1e-9)
        members = np.flatnonzero(data.train_labels == i)
        kept.append(draw.permutation(members)[:count])
    chosen = np.sort(np.concatenate(kept))
    return replace(data, train=data.train[chosen], train_labels=data.train_labels[chosen])


class LongTail(Classification):
    """Cross-entropy on a long-tailed training set; accuracy of many-, medium- and few-shot classes.

    The methods that act on a trained classifier start from a finished training: some rescale its
    rows and train nothing, some train it alone.
    """

    divisible = False
    options: LongTailOptions

    def __init__(self, options: LongTailOptions, root: Path, device: torch.device) -> None:
        super().__init__(options, root, device)
        self.counts = torch.bincount(self.data.train_labels, minlength=self.classes)
        self.radii: MaxNorm | None = None
        self.class_weights = (
            class_balanced_weights(self.counts).float().to(device)
            if options.class_balanced
            else None
        )
        if options.classifier_only:
            self.model.requires_grad_(False)
            self.classifier.requires_grad_(True)
        self.facts |= {"imbalance": options.imbalance, "fewest": int(self.counts.min())}
        of = self.data.test_labels == int(self.counts.argmax())
        self.baseline = self._shares(of)

    @staticmethod
    def labelled(options: Any, root: Path) -> Labelled:
        """The data set, made long-tailed."""
        return long_tailed(load(options.data, root), options.imbalance)

    @property
    def classifier(self) -> nn.Linear:
        """The last linear layer, whose rows belong to the classes."""
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        if not layers or len(layers[-1].weight) != self.classes:
            raise UsageError(
                f"network {self.options.network!r} is not allowed: its last linear layer must have "
                "a row for each class"
            )
        return layers[-1]

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights, and do to the classifier's rows what is asked for."""
        super().start_from(weights)
        rows = self.classifier.weight
        if self.options.rescale == "tau":
            tau_normalize(rows, self.options.tau)
        elif self.options.rescale == "align":
            try:
                align_rows(rows, (self.counts <= self.options.rare).nonzero().flatten().tolist())
            except ValueError as error:
                raise UsageError(f"rare {self.options.rare} is not allowed: {error}") from None
        if self.options.max_norm is not None:
            self.radii = MaxNorm.from_norms([rows], self.options.max_norm)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy in nats, classes weighed if that is asked for."""
        x, y = batch
        if self.options.classifier_only:
            self.model.eval()
        return F.cross_entropy(
            self.model(x), y, self.class_weights, label_smoothing=self.options.label_smoothing
        )

    def end_epoch(self) -> None:
        """Bring the classifier's rows back into their radius."""
        if self.radii is not None:
            self.radii.project_()

    def evaluate(self) -> Evaluation:
        """Accuracy over all classes, and over those of many, some and few examples."""
        evaluation = super().evaluate()
        right = torch.ones_like(self.data.test_labels, dtype=torch.bool)
        right[evaluation.wrong] = False
        return Evaluation(self._shares(right), evaluation.wrong)

    def _shares(self, right: Tensor) -> dict[str, float]:
        examples = self.counts[self.data.test_labels]
        groups = {
            "accuracy": examples > 0,
            "many": examples > 100,
            "medium": (examples >= 20) & (examples <= 100),
            "few": examples < 20,
        }
        return {
            name: float(right[members].double().mean()) if members.any() else 0.0
            for name, members in groups.items()
        }
