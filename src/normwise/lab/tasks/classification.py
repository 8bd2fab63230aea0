"""Classification of images, and of sounds as log-mel spectra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from normwise.lab.augment import GEOMETRIC, MIXING
from normwise.lab.data.images import (
    Labelled,
    cifar10,
    cifar100,
    fashion_mnist,
    image_folder,
    mnist,
)
from normwise.lab.data.sounds import esc10, spoken_digits
from normwise.lab.errors import UsageError, nearest
from normwise.lab.networks import build
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["Classification", "Options", "load"]

METRICS = (Metric("accuracy", "test accuracy", "%", 100.0),)


@dataclass(frozen=True)
class Options:
    """What a recipe may set.

    Args:
        data: a name in ``DATA``, or ``folder:PATH`` for ImageNet-style folders.
        network: a name that :func:`normwise.lab.networks.build` knows.
        width: channels of the network's first stage (default: 16).
        augment: any of crop, flip, cutout, mixup, cutmix, in the order in which they act; of mixup
            and cutmix one (default: none).
        label_smoothing: share of each target that is spread over all classes (default: 0).
        train_examples: only so many, drawn once and for all (default: all).
        test_examples: only so many (default: all).
        image_size: pixels a side, of folders (default: 224).
        shrink: side of the squares of pixels that are averaged, a divisor of the images' (default:
            1).
    """

    data: str
    network: str
    width: int = 16
    augment: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    train_examples: int | None = None
    test_examples: int | None = None
    image_size: int = 224
    shrink: int = 1

    def __post_init__(self) -> None:
        if self.shrink < 1:
            raise UsageError(f"shrink {self.shrink} is not allowed: must be 1 or more")
        known = [*GEOMETRIC, *MIXING]
        for name in self.augment:
            if name not in known:
                raise UsageError(f"unknown augmentation {name!r}: {nearest(name, known)}")
        if sum(name in MIXING for name in self.augment) > 1:
            raise UsageError("augment has both mixup and cutmix; must have one of them at most")


def _digits(root: Path) -> Labelled:
    """scikit-learn's 1797 digits of 8×8 pixels, which need no download; half to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, test, y, test_y = train_test_split(
        images, labels, test_size=0.5, random_state=0, stratify=labels
    )

    def shaped(pixels: Any) -> Any:
        return pixels.astype(np.float32).reshape(-1, 1, 8, 8)

    return Labelled("digits", shaped(x), y, shaped(test), test_y, tuple(map(str, range(10))))


DATA: dict[str, Callable[[Path], Labelled]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "fsdd": spoken_digits,
    "esc10": esc10,
    "digits": _digits,
}


@cache
def load(name: str, root: Path, image_size: int = 224) -> Labelled:
    """A data set by name, read once.

    Raises:
        UsageError: for an unknown name.
        DataError: if it is missing or not as published.
    """
    if name.startswith("folder:"):
        return image_folder(root / name.removeprefix("folder:"), image_size)
    if name not in DATA:
        raise UsageError(f"unknown data {name!r}: {nearest(name, DATA)}")
    return DATA[name](root)


def subset(count: int, of: int) -> Tensor:
    """``count`` numbers below ``of``, always the same ones, in order.

    Raises:
        UsageError: if there are not so many.
    """
    if not 1 <= count <= of:
        raise UsageError(f"{count} examples are not allowed: there are {of}")
    return torch.randperm(of, generator=torch.Generator().manual_seed(0))[:count].sort().values


class Classification(Problem):
    """Cross-entropy on augmented batches; inputs are standardized by the training set's channels.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    def __init__(self, options: Options, root: Path, device: torch.device) -> None:
        data = load(options.data, root, options.image_size)
        self.options = options
        self.classes = len(data.classes)
        train, labels = _part(data.train, data.train_labels, options.train_examples, device)
        test, test_labels = _part(data.test, data.test_labels, options.test_examples, device)
        if any(side % options.shrink for side in train.shape[2:]):
            sides = " × ".join(map(str, train.shape[2:]))
            raise UsageError(f"shrink {options.shrink} is not allowed: must divide {sides}")
        if options.shrink > 1:
            train, test = (F.avg_pool2d(x.float(), options.shrink) for x in (train, test))
        self.train, self.train_labels = train, labels
        self.test, self.test_labels = test, test_labels
        channels = train.float().transpose(0, 1).flatten(1).double()
        self.mean = channels.mean(1).float().view(1, -1, 1, 1)
        self.std = channels.std(1).clamp(min=1e-6).float().view(1, -1, 1, 1)
        self.examples = len(train)
        self.model = build(options.network, train.shape[1], self.classes, options.width).to(device)
        self.facts = {
            "data": data.name,
            "train_examples": len(train),
            "test_examples": len(test),
            "classes": self.classes,
        }
        commonest = int(torch.bincount(labels).argmax())
        self.trivial = {"accuracy": float((test_labels == commonest).double().mean())}

    def standardized(self, x: Tensor) -> Tensor:
        """Inputs as the network takes them."""
        return (x.float() - self.mean) / self.std

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """Augmented inputs and their targets as probabilities."""
        chosen = chosen.to(self.train.device)
        x = self.standardized(self.train[chosen])
        y = F.one_hot(self.train_labels[chosen], self.classes).float()
        for name in self.options.augment:
            if name in GEOMETRIC:
                x = GEOMETRIC[name](x, draw)
            else:
                x, y = MIXING[name](x, y, draw)
        return x, y

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy in nats."""
        x, y = batch
        return F.cross_entropy(self.model(x), y, label_smoothing=self.options.label_smoothing)

    def evaluate(self) -> Evaluation:
        """Accuracy on the test set."""
        self.model.eval()
        with torch.no_grad():
            parts = zip(
                torch.split(self.test, 500), torch.split(self.test_labels, 500), strict=True
            )
            wrong = torch.cat([self.model(self.standardized(x)).argmax(1) != y for x, y in parts])
        accuracy = 1 - float(wrong.double().mean())
        return Evaluation({"accuracy": accuracy}, wrong.nonzero().flatten().tolist())


def _part(
    inputs: Any, labels: Any, count: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    # torch.tensor copies: arrays that were read from bytes are not writable.
    x, y = torch.tensor(inputs), torch.tensor(labels)
    if count is not None:
        chosen = subset(count, len(x))
        x, y = x[chosen], y[chosen]
    return x.to(device), y.to(device)
