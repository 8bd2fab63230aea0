"""Classification of images, and of sounds as log-mel spectra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from normwise.lab.augment import GEOMETRIC, MIXING
from normwise.lab.checks import later, within
from normwise.lab.data.catalogue import CATALOGUE
from normwise.lab.data.folders import image_folder
from normwise.lab.data.images import Labelled
from normwise.lab.data.sources import DecodedImages, HeldImages, ImageSource, shrunk
from normwise.lab.errors import UsageError, nearest
from normwise.lab.networks import build
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["Classification", "ClassificationOptions", "data_sets", "load"]

_FOLDER = "folder:"
METRICS = (Metric("accuracy", "test accuracy", "%", 100.0),)


@dataclass(frozen=True)
class ClassificationOptions:
    """What a recipe may set.

    Args:
        data: a name in :func:`data_sets`, or ``folder:PATH`` for ImageNet-style folders, of whose
            images a random part is scaled to a square for each step, as is usual on ImageNet.
        network: a name that :func:`normwise.lab.networks.build` knows.
        width: channels of the network's first stage (default: 16).
        augment: any of crop, flip, cutout, mixup, cutmix, in the order in which they act; of mixup
            and cutmix one (default: none).
        label_smoothing: share of each target that is spread over all classes (default: 0).
        train_examples: how many are used, drawn once and for all (default: all).
        test_examples: the same for testing (default: all).
        label_noise: share of the training labels that are drawn anew from all classes, once and for
            all (default: 0).
        image_size: pixels a side, of folders (default: 224).
        shrink: side of the squares of pixels that are averaged, a divisor of the images' (default:
            1).
        held_out: share of the training data that is tested on instead of the test data, drawn once
            and for all, by which settings are chosen (default: 0).
    """

    data: str
    network: str
    width: int = 16
    augment: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    train_examples: int | None = None
    test_examples: int | None = None
    label_noise: float = 0.0
    image_size: int = 224
    shrink: int = 1
    held_out: float = later(0.0)

    def __post_init__(self) -> None:
        within(self, "held_out", 0, 1, below=True)
        for name in ("shrink", "width", "image_size", "train_examples", "test_examples"):
            within(self, name, 1)
        within(self, "label_smoothing", 0, 1)
        within(self, "label_noise", 0, 1)
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


def _read(reader: str, root: Path) -> Labelled:
    """What a reader of the catalogue, ``MODULE:FUNCTION``, makes of the files below ``root``."""
    module, _, function = reader.partition(":")
    data: Labelled = getattr(import_module(f"normwise.lab.data.{module}"), function)(root)
    return data


def data_sets() -> dict[str, Callable[[Path], Labelled]]:
    """The readers of the data sets to classify, by name."""
    listed = {s.name: partial(_read, s.labelled) for s in CATALOGUE.values() if s.labelled}
    return {**listed, "digits": _digits}


@cache
def load(name: str, root: Path) -> Labelled:
    """A data set by name, read once.

    Raises:
        UsageError: for an unknown name.
        DataError: if it is missing or not as published.
    """
    known = data_sets()
    if name not in known:
        raise UsageError(f"unknown data {name!r}: {nearest(name, known)}")
    return known[name](root)


def subset(count: int, of: int) -> Tensor:
    """``count`` numbers below ``of``, always the same ones, in order.

    Raises:
        UsageError: if there are fewer.
    """
    if not 1 <= count <= of:
        raise UsageError(f"{count} examples are not allowed: there are {of}")
    return torch.randperm(of, generator=torch.Generator().manual_seed(0))[:count].sort().values


def divided(count: int, held_out: float) -> tuple[Tensor, Tensor]:
    """Which of ``count`` examples are trained on, and which share is held out; always the same.

    Raises:
        UsageError: if one of the two would be empty.
    """
    held = subset(round(held_out * count), count)
    left = torch.ones(count, dtype=torch.bool)
    left[held] = False
    if not left.any():
        raise UsageError(f"held_out {held_out} is not allowed: it leaves none of {count} examples")
    return left.nonzero().flatten(), held


class Classification(Problem):
    """Cross-entropy on augmented batches of standardized inputs.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    def __init__(self, options: ClassificationOptions, root: Path, device: torch.device) -> None:
        self.options = options
        self.data, name, self.classes = _source(options, root, device, self.labelled)
        if options.label_noise:
            self.data.train_labels = _noisy(
                self.data.train_labels, options.label_noise, self.classes
            )
        labels, test_labels = self.data.train_labels, self.data.test_labels
        self.mean, self.std = self.data.mean, self.data.std
        self.examples = len(labels)
        network = build(options.network, self.data.channels, self.classes, options.width)
        self.model = network.to(device)
        self.facts = {
            "data": name,
            "train_examples": len(labels),
            "test_examples": len(test_labels),
            "classes": self.classes,
        }
        commonest = int(torch.bincount(labels).argmax())
        self.baseline = {"accuracy": float((test_labels == commonest).double().mean())}

    @staticmethod
    def labelled(options: Any, root: Path) -> Labelled:
        """The data set, by its name."""
        return load(options.data, root)

    def standardized(self, x: Tensor) -> Tensor:
        """Inputs as the network takes them."""
        return self.data.standardized(x)

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, ...]:
        """Augmented inputs and their targets as probabilities."""
        return next(self.stream(chosen[None], [draw]))

    def stream(self, steps: Tensor, draws: Iterable[Generator]) -> Iterator[tuple[Tensor, ...]]:
        """The batch of each step; images of folders are decoded some steps ahead."""
        for x, labels, draw in self.data.batches(steps, draws):
            yield self._made(x, labels, draw)

    def _made(self, x: Tensor, labels: Tensor, draw: Generator) -> tuple[Tensor, ...]:
        """A batch of images and labels: standardized, one-hot, augmented."""
        x = self.standardized(x)
        y = F.one_hot(labels, self.classes).float()
        for name in self.options.augment:
            if name in GEOMETRIC:
                x = GEOMETRIC[name](x, draw)
            else:
                x, y = MIXING[name](x, y, draw)
        return x, y

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy in nats."""
        x, y = batch
        return F.cross_entropy(self.model(x), y, label_smoothing=self.options.label_smoothing)

    def evaluate(self) -> Evaluation:
        """Accuracy on the test set."""
        self.model.eval()
        with torch.no_grad():
            parts = [
                self.model(self.standardized(x)).argmax(1) != y for x, y in self.data.test_parts()
            ]
        wrong = torch.cat(parts)
        accuracy = 1 - float(wrong.double().mean())
        return Evaluation({"accuracy": accuracy}, wrong.nonzero().flatten().tolist())


def _source(
    options: ClassificationOptions,
    root: Path,
    device: torch.device,
    labelled: Callable[[ClassificationOptions, Path], Labelled],
) -> tuple[ImageSource, str, int]:
    """The images, the name of their set, and the number of classes."""
    counts = options.train_examples, options.test_examples
    if options.data.startswith(_FOLDER):
        folder = image_folder(root / options.data.removeprefix(_FOLDER))
        train = _files(folder.train, folder.train_labels, counts[0], device)
        test = _files(folder.test, folder.test_labels, counts[1], device)
        if options.held_out:
            kept, held = divided(len(train[0]), options.held_out)
            train, test = (
                (tuple(train[0][i] for i in chosen.tolist()), train[1][chosen.to(device)])
                for chosen in (kept, held)
            )
        decoded = DecodedImages(train, test, options.image_size, options.shrink)
        return decoded, folder.name, len(folder.classes)
    data = labelled(options, root)
    x, y = part(data.train, data.train_labels, counts[0], device)
    test_x, test_y = part(data.test, data.test_labels, counts[1], device)
    if options.held_out:
        kept, held = (i.to(device) for i in divided(len(x), options.held_out))
        x, y, test_x, test_y = x[kept], y[kept], x[held], y[held]
    pixels = x.dtype == torch.uint8
    x, test_x = shrunk(x, options.shrink), shrunk(test_x, options.shrink)
    channels = x.float().transpose(0, 1).flatten(1).double()
    mean = channels.mean(1).float().view(1, -1, 1, 1)
    std = channels.std(1).clamp(min=1e-6).float().view(1, -1, 1, 1)
    return HeldImages((x, y), (test_x, test_y), mean, std, pixels), data.name, len(data.classes)


def _noisy(labels: Tensor, share: float, classes: int) -> Tensor:
    """Labels of which each is, with this probability, drawn anew; always the same ones."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(classes, labels.shape, generator=draw)
    replaced = torch.rand(labels.shape, generator=draw) < share
    return torch.where(replaced.to(labels.device), drawn.to(labels.device), labels)


def part(
    inputs: Any, labels: Any, count: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Arrays as tensors on a device; of ``count`` of them, always the same ones, or of all."""
    # torch.tensor copies: arrays that were read from bytes are not writable.
    x, y = torch.tensor(inputs), torch.tensor(labels)
    if count is not None:
        chosen = subset(count, len(x))
        x, y = x[chosen], y[chosen]
    return x.to(device), y.to(device)


def _files(
    paths: tuple[str, ...], labels: Any, count: int | None, device: torch.device
) -> tuple[tuple[str, ...], Tensor]:
    y = torch.tensor(labels)
    if count is not None:
        chosen = subset(count, len(paths))
        paths, y = tuple(paths[i] for i in chosen.tolist()), y[chosen]
    return paths, y.to(device)
