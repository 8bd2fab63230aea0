"""Labelled images as the published files hold them: CIFAR, IDX (MNIST, Fashion-MNIST)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from normwise.lab.data.files import DataError, locate, read_bytes
from normwise.lab.data.pickles import read_pickle

__all__ = [
    "Labelled",
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "mnist",
    "read_cifar_binary",
    "read_cifar_pickle",
    "read_idx",
]

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Labelled:
    """A data set of labelled images, or of what can be treated as images.

    Args:
        name: of the data set.
        train: inputs of shape ``(N, C, H, W)``, uint8 or float32.
        train_labels: shape ``(N,)``, int64, from 0.
        test: as ``train``.
        test_labels: as ``train_labels``.
        classes: what the labels mean.
    """

    name: str
    train: npt.NDArray[Any]
    train_labels: Labels
    test: npt.NDArray[Any]
    test_labels: Labels
    classes: tuple[str, ...]


def read_cifar_binary(
    path: Path, label_bytes: int, classes: int, records: int
) -> tuple[Bytes, Labels]:
    """One file of CIFAR's binary version: label bytes, then 3072 bytes of R, G, B planes, a record.

    Args:
        path: the file.
        label_bytes: 1 for CIFAR-10; 2 for CIFAR-100, of which the last, the fine one, is returned.
        classes: labels must be below.
        records: how many the published file has.

    Returns:
        Images of shape ``(records, 3, 32, 32)`` and their labels.

    Raises:
        DataError: if the size or a label is not as published.
    """
    content = np.frombuffer(read_bytes(path), np.uint8)
    size = label_bytes + 3072
    if content.size != records * size:
        raise DataError(
            f"{path} has {content.size} bytes and should have {records * size} ({records} records "
            f"of {size}): it is truncated or another file"
        )
    table = content.reshape(records, size)
    labels = table[:, label_bytes - 1].astype(np.int64)
    if int(labels.max()) >= classes:
        bad = int((labels >= classes).argmax())
        raise DataError(
            f"{path} is corrupt: record {bad} has label {labels[bad]}, and there are {classes} "
            "classes"
        )
    return table[:, label_bytes:].reshape(-1, 3, 32, 32), labels


def read_cifar_pickle(path: Path, key: str, classes: int) -> tuple[Bytes, Labels]:
    """One file of CIFAR's python version; ``key`` names its labels: ``labels`` or ``fine_labels``.

    Raises:
        DataError: if it is refused, corrupt, or does not hold images and their labels.
    """
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__} and should hold a dict")
    images, labels = content.get(b"data"), content.get(key.encode())
    if not (
        isinstance(images, np.ndarray)
        and images.dtype == np.uint8
        and images.ndim == 2
        and images.shape[1] == 3072
    ):
        raise DataError(f"{path} has no b'data' of shape (N, 3072) and type uint8")
    if not (
        isinstance(labels, list)
        and len(labels) == len(images)
        and all(type(label) is int and 0 <= label < classes for label in labels)
    ):
        raise DataError(f"{path} has no {key.encode()!r} with {len(images)} labels below {classes}")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def cifar10(root: Path) -> Labelled:
    """CIFAR-10, binary or python version; any of the five training batches that are there."""
    folders = ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar10", ".")
    folder = locate(root, "cifar10", folders, "test_batch*")
    batches = [f"data_batch_{k}" for k in range(1, 6)]
    if (folder / "test_batch.bin").exists():
        parts = [
            read_cifar_binary(folder / f"{name}.bin", 1, 10, 10_000)
            for name in (*batches, "test_batch")
            if (folder / f"{name}.bin").exists()
        ]
        names = _names(folder / "batches.meta.txt", 10)
    else:
        parts = [
            read_cifar_pickle(folder / name, "labels", 10)
            for name in (*batches, "test_batch")
            if (folder / name).exists()
        ]
        names = _pickled_names(folder / "batches.meta", "label_names", 10)
    if len(parts) < 2:
        raise DataError(f"{folder} has no data_batch_1 … data_batch_5")
    train, (test, test_labels) = parts[:-1], parts[-1]
    return Labelled(
        "cifar10",
        np.concatenate([images for images, _ in train]),
        np.concatenate([labels for _, labels in train]),
        test,
        test_labels,
        names,
    )


def cifar100(root: Path) -> Labelled:
    """CIFAR-100 with its 100 fine classes, binary or python version."""
    folders = ("cifar-100-binary", "cifar-100-python", "cifar100")
    folder = locate(root, "cifar100", folders, "test*")
    if (folder / "test.bin").exists():
        train = read_cifar_binary(folder / "train.bin", 2, 100, 50_000)
        test = read_cifar_binary(folder / "test.bin", 2, 100, 10_000)
        names = _names(folder / "fine_label_names.txt", 100)
    else:
        train = read_cifar_pickle(folder / "train", "fine_labels", 100)
        test = read_cifar_pickle(folder / "test", "fine_labels", 100)
        names = _pickled_names(folder / "meta", "fine_label_names", 100)
    return Labelled("cifar100", *train, *test, names)


def _names(path: Path, count: int) -> tuple[str, ...]:
    """The class names of a text file; numbers where the file is absent."""
    if not path.exists():
        return tuple(map(str, range(count)))
    names = tuple(path.read_text(encoding="utf-8").split())
    if len(names) != count:
        raise DataError(f"{path} has {len(names)} names and should have {count}")
    return names


def _pickled_names(path: Path, key: str, count: int) -> tuple[str, ...]:
    if not path.exists():
        return tuple(map(str, range(count)))
    content = read_pickle(path)
    names = content.get(key.encode()) if isinstance(content, dict) else None
    if not (isinstance(names, list) and len(names) == count):
        raise DataError(f"{path} has no list of {count} {key!r}")
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def read_idx(path: Path) -> Bytes:
    """An IDX file of unsigned bytes (MNIST's format), gzipped or not.

    Raises:
        DataError: if its first bytes or its size are not those of such a file.
    """
    content = read_bytes(path)
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise DataError(
            f"{path} is not an IDX file of bytes: it begins with {content[:4].hex(' ')}, and "
            "should with 00 00 08 and the number of dimensions"
        )
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise DataError(
            f"{path} has {len(content)} bytes and should have {start + math.prod(shape)} for shape "
            f"{tuple(shape)}: it is truncated or corrupt"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def mnist(root: Path) -> Labelled:
    """MNIST's four IDX files."""
    classes = tuple(map(str, range(10)))
    return _idx_set(root, "mnist", ("mnist", "MNIST/raw"), classes)


def fashion_mnist(root: Path) -> Labelled:
    """Fashion-MNIST's four IDX files, which have the names of MNIST's."""
    classes = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot"),
    )
    folders = ("fashion-mnist", "FashionMNIST/raw", "/usr/share/datasets/fashion-mnist")
    return _idx_set(root, "fashion-mnist", folders, classes)


def _idx_set(root: Path, name: str, folders: Sequence[str], classes: tuple[str, ...]) -> Labelled:
    folder = locate(root, name, folders, "train-images-idx3-ubyte*")

    def read(part: str, dimensions: int) -> Bytes:
        plain, packed = folder / part, folder / f"{part}.gz"
        array = read_idx(packed if packed.exists() and not plain.exists() else plain)
        if array.ndim != dimensions:
            raise DataError(f"{folder / part} has {array.ndim} dimensions, not {dimensions}")
        return array

    arrays: list[npt.NDArray[Any]] = []
    for part in ("train", "t10k"):
        images, labels = read(f"{part}-images-idx3-ubyte", 3), read(f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(labels) or len(images) == 0 or int(labels.max()) >= len(classes):
            raise DataError(
                f"{folder} is corrupt: {part} has {len(images)} images and {len(labels)} labels, "
                f"the largest {int(labels.max(initial=0))}"
            )
        arrays += [images[:, None], labels.astype(np.int64)]
    train, train_labels, test, test_labels = arrays
    return Labelled(name, train, train_labels, test, test_labels, classes)
