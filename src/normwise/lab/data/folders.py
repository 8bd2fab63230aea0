"""Images that are listed at the start and decoded when a batch is needed: ImageNet-style folders,
and the sets of other modules that are too large to be held.

Processes of torch's ``DataLoader`` decode a few batches ahead. They draw nothing: each job comes
with the random numbers that its crops need, so that their count does not change the bits.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from normwise.lab.data.ahead import Ahead
from normwise.lab.data.files import DataError
from normwise.lab.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MEAN",
    "PART",
    "STD",
    "Decoder",
    "Folder",
    "Job",
    "central",
    "crop_numbers",
    "crop_of",
    "fit",
    "image_folder",
    "list_images",
    "processes_asked_for",
    "workers",
]

# ImageNet's published constants, of the channels R, G and B, in bytes.
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

# What is around an image that does not fill its square: near 0 when standardized.
_AROUND = (124, 116, 104)

_KINDS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_WORKERS = "NORMWISE_WORKERS"
# Images that are tested at a time.
PART = 100
# A random crop is tried so often; then it is a central one.
_TRIES = 10
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Folder:
    """The files of ImageNet-style folders, none of which has been opened.

    Args:
        name: of the data set.
        train: a path for each image, sorted within each class.
        train_labels: shape ``(N,)``, int64, from 0.
        test: as ``train``.
        test_labels: as ``train_labels``.
        classes: what the labels mean, sorted.
    """

    name: str
    train: tuple[str, ...]
    train_labels: npt.NDArray[np.int64]
    test: tuple[str, ...]
    test_labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]


def image_folder(root: Path) -> Folder:
    """List ``train/CLASS/*`` and ``val/CLASS/*`` (or ``test``); no image is read.

    Raises:
        DataError: if a part is missing, its classes differ, or a class has no images.
    """
    held_out = "val" if (root / "val").is_dir() else "test"
    for part in ("train", held_out):
        if not (root / part).is_dir():
            raise DataError(f"{root} has no folder {part!r} with one folder a class")
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    if not classes:
        raise DataError(f"{root / 'train'} has no folders, and should have one for each class")
    others = {path.name for path in (root / held_out).iterdir() if path.is_dir()} ^ set(classes)
    if others:
        raise DataError(
            f"{root / held_out} and {root / 'train'} have different classes: {min(others)!r} is in "
            "one of them only"
        )

    train, test = (list_images(root / part, classes) for part in ("train", held_out))
    return Folder(root.name, *train, *test, tuple(classes))


def list_images(
    root: Path, classes: Sequence[str]
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """The image files in a folder for each class, and the number of each one's class.

    Raises:
        DataError: if a class has no images.
    """
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = root / name
        # Names, not Path objects: ImageNet has more than a million.
        files = [file for file in sorted(os.listdir(folder)) if file.lower().endswith(_KINDS)]
        if not files:
            raise DataError(f"{folder} has no images ({', '.join(_KINDS)})")
        paths += [os.path.join(folder, file) for file in files]
        labels += [label] * len(files)
    return tuple(paths), np.array(labels, np.int64)


def crop_numbers(count: int, draw: Generator) -> npt.NDArray[np.float64]:
    """What the random crops of ``count`` images need, shape ``(count, 22)``, uniform in [0, 1)."""
    drawn = torch.rand(count, 2 * _TRIES + 2, generator=draw, dtype=torch.float64)
    return np.asarray(drawn.numpy())


def crop_of(width: int, height: int, numbers: Sequence[float]) -> tuple[int, int, int, int]:
    """A random crop as networks are trained with on ImageNet (arXiv 1409.4842, section 6).

    Its area is 0.08 to 1 of the image's, evenly, and its width 3/4 to 4/3 of its height, evenly in
    the logarithm. What does not fit into the image is drawn again, ten times in all; then it is the
    central crop whose aspect is as near to the image's as is allowed.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        numbers: 22, in [0, 1): for each try area and aspect, then the place across and down.

    Returns:
        Left, top, right, bottom in pixels.
    """
    low, high = map(math.log, _ASPECT)
    across, down = numbers[2 * _TRIES :]
    for area, aspect in zip(numbers[: 2 * _TRIES : 2], numbers[1 : 2 * _TRIES : 2], strict=True):
        pixels = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area)
        ratio = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * _ASPECT[1])))
    h = max(1, min(height, round(width / _ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def fit(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height of an image whose longer side is scaled to ``size``, all in pixels."""
    longer = max(width, height)
    return max(1, round(width * size / longer)), max(1, round(height * size / longer))


def _decoded(path: str, size: int, numbers: Sequence[float] | None) -> npt.NDArray[np.uint8]:
    """An image as a square of ``size`` pixels, shape ``(3, size, size)``.

    Args:
        path: the file.
        size: pixels a side.
        numbers: those of a random crop; None for the test's: the shorter side is scaled to
            ``size`` · 256/224, and the central square cut out.

    Raises:
        DataError: if it cannot be read or decoded.
    """
    return _planes(
        path,
        lambda x: (
            _central(x, size, round(size * 256 / 224))
            if numbers is None
            else _random(x, size, numbers)
        ),
    )


def central(path: str, size: int) -> npt.NDArray[np.uint8]:
    """The central square of an image, its shorter side scaled to ``size``: ``(3, size, size)``.

    Raises:
        DataError: if it cannot be read or decoded.
    """
    return _planes(path, lambda image: _central(image, size, size))


def _fitted(path: str, size: int, stated: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """An image as a whole in a square of ``size`` pixels, at its left and top (see :func:`fit`).

    Raises:
        DataError: if it cannot be read or decoded, or has another width and height than stated.
    """

    def made(image: Image) -> Image:
        from PIL.Image import Resampling, new

        if image.size != stated:
            raise DataError(f"{path} has {image.size} pixels, and its annotation says {stated}")
        square = new("RGB", (size, size), _AROUND)
        square.paste(image.convert("RGB").resize(fit(*stated, size), Resampling.BILINEAR))
        return square

    return _planes(path, made)


def _planes(path: str, make: Callable[[Image], Image]) -> npt.NDArray[np.uint8]:
    """What is made of an image file, with channels first."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            square = make(image)
    except DataError:
        raise
    # A file's bytes can make Pillow raise any of these.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded: {error}") from None
    planes: npt.NDArray[np.uint8] = np.asarray(square).transpose(2, 0, 1)
    return planes


def _random(image: Image, size: int, numbers: Sequence[float]) -> Image:
    from PIL.Image import Resampling

    cut = image.crop(crop_of(*image.size, numbers)).convert("RGB")
    return cut.resize((size, size), Resampling.BILINEAR)


def _central(image: Image, size: int, short: int) -> Image:
    from PIL.Image import Resampling

    width, height = (short * side // min(image.size) for side in image.size)
    scaled = image.convert("RGB").resize((width, height), Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return scaled.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class Job:
    """The images of one batch.

    Args:
        paths: their files.
        numbers: from :func:`crop_numbers`, a row an image; None for the test's central squares.
        sizes: width and height of each image in pixels, of those that are fitted into the square
            whole and refused if they have others; None for those that are cut.
    """

    paths: Sequence[str]
    numbers: npt.NDArray[np.float64] | None = None
    sizes: Sequence[tuple[int, int]] | None = None


class _Decoding(Dataset[Any]):
    """What a worker does: a job in, its images out.

    An error is returned, because what is raised in a worker arrives with a traceback in its text.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, job: Job) -> Tensor | DataError:
        images = np.empty((len(job.paths), 3, self.size, self.size), np.uint8)
        rows = [None] * len(job.paths) if job.numbers is None else job.numbers.tolist()
        try:
            for i, (path, numbers) in enumerate(zip(job.paths, rows, strict=True)):
                images[i] = (
                    _decoded(path, self.size, numbers)
                    if job.sizes is None
                    else _fitted(path, self.size, job.sizes[i])
                )
        except DataError as error:
            return error
        return torch.from_numpy(images)


class Decoder(Ahead):
    """Decodes batches in processes of its own.

    Args:
        size: pixels a side of the images that it makes.
        processes: how many; 0 decodes where it is asked (default: as :func:`workers` says).
    """

    def __init__(self, size: int, processes: int | None = None) -> None:
        super().__init__(_Decoding(size), workers() if processes is None else processes)

    def crops(
        self, paths: Sequence[str], steps: Tensor, draws: Iterable[Generator]
    ) -> Iterator[tuple[Tensor, Tensor, Generator]]:
        """For each step random crops of its images, which these are, and the generator that the
        step goes on drawing from.

        Args:
            paths: the files of all images.
            steps: which of them, one row per step.
            draws: for each step its source of randomness.
        """
        ahead: deque[tuple[Tensor, Generator]] = deque()

        def jobs() -> Iterator[Job]:
            for chosen, draw in zip(steps, draws, strict=True):
                ahead.append((chosen, draw))
                own = [paths[i] for i in chosen.tolist()]
                yield Job(own, crop_numbers(len(own), draw))

        for x in self.run(jobs()):
            yield x, *ahead.popleft()

    def centres(self, paths: Sequence[str]) -> Iterator[Tensor]:
        """The central squares of all images, in order, ``PART`` at a time."""
        return self.run(Job(paths[i : i + PART]) for i in range(0, len(paths), PART))


def workers() -> int:
    """How many processes decode images for one training.

    The environment variable ``NORMWISE_WORKERS``; without it, one for each core that this process
    may use, 16 at most. It does not change results.

    Raises:
        UsageError: if the variable is not a number from 0.
    """
    asked = processes_asked_for()
    if asked is not None:
        return asked
    usable = getattr(os, "sched_getaffinity", None)
    return min(len(usable(0)) if usable else os.cpu_count() or 1, 16)


def processes_asked_for() -> int | None:
    """What the environment variable ``NORMWISE_WORKERS`` says; none without it.

    Raises:
        UsageError: if that is not a number from 0.
    """
    given = os.environ.get(_WORKERS)
    if not given:
        return None
    if not (given.isascii() and given.isdigit()):
        raise UsageError(f"{_WORKERS} is {given!r} and must be a number of processes, from 0")
    return int(given)
