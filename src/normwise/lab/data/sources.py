"""Where a task's images come from: held on the device, or decoded from files as they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from normwise.lab.data.folders import MEAN, PART, STD, Decoder
from normwise.lab.errors import UsageError

__all__ = ["DecodedImages", "HeldImages", "ImageSource", "shrunk"]

_HELD_PART = 500

Batch = tuple[Tensor, Tensor, Generator]


class ImageSource(ABC):
    """Images to train and to test on, with their labels.

    Attributes:
        channels: of an image.
        pixels: whether values are from 0 to 255.
        train_labels: shape ``(N,)``, on the device.
        test_labels: as ``train_labels``.
        mean: of each channel, shape ``(1, C, 1, 1)``, or of all values.
        std: as ``mean``.
    """

    channels: int
    pixels: bool
    train_labels: Tensor
    test_labels: Tensor
    mean: Tensor | float
    std: Tensor | float

    def standardized(self, x: Tensor) -> Tensor:
        """Images as a network takes them."""
        return (x.float() - self.mean) / self.std

    @abstractmethod
    def batches(self, steps: Tensor, draws: Iterable[Generator]) -> Iterator[Batch]:
        """For each step images, labels, and the generator that it goes on drawing from."""

    @abstractmethod
    def test_parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images and their labels, in order, some at a time."""


class HeldImages(ImageSource):
    """A set that is on the device whole.

    Args:
        train: images, shape ``(N, C, H, W)``, and their labels, shape ``(N,)``.
        test: as ``train``.
        mean: see :class:`ImageSource`.
        std: as ``mean``.
        pixels: whether values are from 0 to 255.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        mean: Tensor | float,
        std: Tensor | float,
        pixels: bool,
    ) -> None:
        (self.train, self.train_labels), (self.test, self.test_labels) = train, test
        self.channels, self.mean, self.std, self.pixels = self.train.shape[1], mean, std, pixels

    def batches(self, steps: Tensor, draws: Iterable[Generator]) -> Iterator[Batch]:
        for chosen, draw in zip(steps.to(self.train.device), draws, strict=True):
            yield self.train[chosen], self.train_labels[chosen], draw

    def test_parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = (torch.split(x, _HELD_PART) for x in (self.test, self.test_labels))
        return zip(*parts, strict=True)


class DecodedImages(ImageSource):
    """Files that are decoded as they are needed, standardized by ImageNet's constants.

    To train on, a random crop of each image is scaled to a square (see
    :func:`normwise.lab.data.folders.crop_of`); to test on, it is the central one.

    Args:
        train: the files, and their labels, shape ``(N,)``, on the device.
        test: as ``train``.
        size: pixels a side, after scaling.
        shrink: side of the squares of pixels that are then averaged (default: 1).
    """

    channels, pixels = 3, True

    def __init__(
        self,
        train: tuple[Sequence[str], Tensor],
        test: tuple[Sequence[str], Tensor],
        size: int,
        shrink: int = 1,
    ) -> None:
        (self.train, self.train_labels), (self.test, self.test_labels) = train, test
        _check_shrink(shrink, (size, size))
        self.shrink, self.device = shrink, self.train_labels.device
        self.decoder = Decoder(size)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (MEAN, STD)
        )

    def batches(self, steps: Tensor, draws: Iterable[Generator]) -> Iterator[Batch]:
        for x, chosen, draw in self.decoder.crops(self.train, steps, draws):
            yield self._received(x), self.train_labels[chosen.to(self.device)], draw

    def test_parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = torch.split(self.test_labels, PART)
        for x, y in zip(self.decoder.centres(self.test), parts, strict=True):
            yield self._received(x), y

    def _received(self, x: Tensor) -> Tensor:
        return shrunk(x.to(self.device), self.shrink)


def shrunk(x: Tensor, shrink: int) -> Tensor:
    """Means of squares of ``shrink`` pixels a side; as it is where that is 1.

    Raises:
        UsageError: if the images cannot be divided into such squares.
    """
    _check_shrink(shrink, x.shape[2:])
    return F.avg_pool2d(x.float(), shrink) if shrink > 1 else x


def _check_shrink(shrink: int, sides: Sequence[int]) -> None:
    if any(side % shrink for side in sides):
        raise UsageError(
            f"shrink {shrink} is not allowed: must divide {' × '.join(map(str, sides))}"
        )
