"""Classification of images, and of sounds as log-mel spectra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from normwise.lab.checks import within
from normwise.lab.data.catalogue import CATALOGUE
from normwise.lab.data.folders import MEAN, PART, STD, Decoder, Folder, image_folder
from normwise.lab.data.images import Labelled
from normwise.lab.errors import UsageError, nearest
from normwise.lab.networks import build
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["Classification", "Options", "load"]

_FOLDER = "folder:"
METRICS = (Metric("accuracy", "test accuracy", "%", 100.0),)


@dataclass(frozen=True)
class Options:
    """What a recipe may set.

    Args:
        data: a name in ``DATA``, or ``folder:PATH`` for ImageNet-style folders, of whose images a
            random part is scaled to a square for each step, as is usual on ImageNet.
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

    def __post_init__(self) -> None:
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


DATA: dict[str, Callable[[Path], Labelled]] = {
    **{s.name: partial(_read, s.labelled) for s in CATALOGUE.values() if s.labelled},
    "digits": _digits,
}


@cache
def load(name: str, root: Path) -> Labelled:
    """A data set by name, read once.

    Raises:
        UsageError: for an unknown name.
        DataError: if it is missing or not as published.
    """
    if name not in DATA:
        raise UsageError(f"unknown data {name!r}: {nearest(name, DATA)}")
    return DATA[name](root)


def subset(count: int, of: int) -> Tensor:
    """``count`` numbers below ``of``, always the same ones, in order.

    Raises:
        UsageError: if there are fewer.
    """
    if not 1 <= count <= of:
        raise UsageError(f"{count} examples are not allowed: there are {of}")
    return torch.randperm(of, generator=torch.Generator().manual_seed(0))[:count].sort().values


class _Source(ABC):
    """Where the images of a problem come from.

    Attributes:
        name: of the data set.
        classes: how many.
        channels: of an image.
        train_labels: shape ``(N,)``, on the device.
        test_labels: as ``train_labels``.
        mean: of each channel, shape ``(1, C, 1, 1)``.
        std: as ``mean``.
        pixels: whether values are from 0 to 255.
    """

    name: str
    classes: int
    channels: int
    train_labels: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    pixels: bool

    @abstractmethod
    def batches(
        self, steps: Tensor, draws: Iterable[Generator]
    ) -> Iterator[tuple[Tensor, Tensor, Generator]]:
        """For each step images, labels, and the generator that it goes on drawing from."""

    @abstractmethod
    def test_parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images and their labels, in order, some at a time."""


class _InMemory(_Source):
    """A data set on the device whole, standardized by the training set's channels."""

    def __init__(self, data: Labelled, options: Options, device: torch.device) -> None:
        self.name, self.classes = data.name, len(data.classes)
        train, self.train_labels = _part(
            data.train, data.train_labels, options.train_examples, device
        )
        test, self.test_labels = _part(data.test, data.test_labels, options.test_examples, device)
        self.pixels = train.dtype == torch.uint8
        self.train, self.test = (_shrunk(x, options.shrink) for x in (train, test))
        self.channels = train.shape[1]
        channels = self.train.float().transpose(0, 1).flatten(1).double()
        self.mean = channels.mean(1).float().view(1, -1, 1, 1)
        self.std = channels.std(1).clamp(min=1e-6).float().view(1, -1, 1, 1)

    def batches(
        self, steps: Tensor, draws: Iterable[Generator]
    ) -> Iterator[tuple[Tensor, Tensor, Generator]]:
        for chosen, draw in zip(steps.to(self.train.device), draws, strict=True):
            yield self.train[chosen], self.train_labels[chosen], draw

    def test_parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(torch.split(self.test, 500), torch.split(self.test_labels, 500), strict=True)


class _Streamed(_Source):
    """Folders whose images are decoded as they are needed, standardized by ImageNet's constants.

    To train on, a random crop of each image is scaled to a square (see
    :func:`normwise.lab.data.folders.crop_of`); to test on, it is the central one.
    """

    def __init__(self, data: Folder, options: Options, device: torch.device) -> None:
        self.name, self.classes, self.channels = data.name, len(data.classes), 3
        self.pixels = True
        self.options, self.device = options, device
        self.train, self.train_labels = _files(
            data.train, data.train_labels, options.train_examples, device
        )
        self.test, self.test_labels = _files(
            data.test, data.test_labels, options.test_examples, device
        )
        size = options.image_size
        if size < 1:
            raise UsageError(f"image_size {size} is not allowed: must be 1 or more")
        _check_shrink(options.shrink, (size, size))
        self.decoder = Decoder(size)
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD)
        )

    def batches(
        self, steps: Tensor, draws: Iterable[Generator]
    ) -> Iterator[tuple[Tensor, Tensor, Generator]]:
        for x, chosen, draw in self.decoder.crops(self.train, steps, draws):
            yield self._received(x), self.train_labels[chosen.to(self.device)], draw

    def test_parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = torch.split(self.test_labels, PART)
        for x, y in zip(self.decoder.centres(self.test), parts, strict=True):
            yield self._received(x), y

    def _received(self, x: Tensor) -> Tensor:
        return _shrunk(x.to(self.device), self.options.shrink)


def _check_shrink(shrink: int, sides: Sequence[int]) -> None:
    if any(side % shrink for side in sides):
        raise UsageError(
            f"shrink {shrink} is not allowed: must divide {' × '.join(map(str, sides))}"
        )


def _shrunk(x: Tensor, shrink: int) -> Tensor:
    """Means of squares of ``shrink`` pixels a side; as it is where that is 1."""
    _check_shrink(shrink, x.shape[2:])
    return F.avg_pool2d(x.float(), shrink) if shrink > 1 else x


class Classification(Problem):
    """Cross-entropy on augmented batches of standardized inputs.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    def __init__(self, options: Options, root: Path, device: torch.device) -> None:
        self.options = options
        self.data: _Source
        if options.data.startswith(_FOLDER):
            folder = image_folder(root / options.data.removeprefix(_FOLDER))
            self.data = _Streamed(folder, options, device)
        else:
            self.data = _InMemory(self.labelled(options, root), options, device)
        if options.label_noise:
            self.data.train_labels = _noisy(
                self.data.train_labels, options.label_noise, self.data.classes
            )
        labels, test_labels = self.data.train_labels, self.data.test_labels
        self.classes = self.data.classes
        self.mean, self.std = self.data.mean, self.data.std
        self.examples = len(labels)
        network = build(options.network, self.data.channels, self.classes, options.width)
        self.model = network.to(device)
        self.facts = {
            "data": self.data.name,
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
        return (x.float() - self.mean) / self.std

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


def _noisy(labels: Tensor, share: float, classes: int) -> Tensor:
    """Labels of which each is, with this probability, drawn anew; always the same ones."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(classes, labels.shape, generator=draw)
    replaced = torch.rand(labels.shape, generator=draw) < share
    return torch.where(replaced.to(labels.device), drawn.to(labels.device), labels)


def _part(
    inputs: Any, labels: Any, count: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
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
