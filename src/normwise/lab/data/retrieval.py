"""The four data sets of retrieval papers: lists of files and their classes; no image is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from normwise.lab.data.files import DataError, locate, read_bytes
from normwise.lab.data.matlab import read_records

__all__ = ["LISTS", "Items", "Split", "cars", "cub", "inshop", "sop"]

# A file, and its class as the set names it: a number or a word.
_Pair = tuple[str, Any]


@dataclass(frozen=True)
class Items:
    """Images and their classes.

    Args:
        paths: of the files, in the published order.
        labels: shape ``(N,)``, int64, in the order of the set's own names of its classes.
    """

    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]

    def first(self, classes: int | None) -> Items:
        """Those whose labels are below ``classes``; all for None."""
        return self if classes is None else self._chosen(self.labels < classes)

    def without_first(self, classes: int) -> Items:
        """The others, labelled from 0."""
        others = self._chosen(self.labels >= classes)
        return Items(others.paths, others.labels - classes)

    def _chosen(self, kept: npt.NDArray[np.bool_]) -> Items:
        paths = tuple(path for path, keep in zip(self.paths, kept, strict=True) if keep)
        return Items(paths, self.labels[kept])


@dataclass(frozen=True)
class Split:
    """Images to learn on, and images of other classes to test on.

    Args:
        train: to learn on; labels from 0, without a gap.
        test: those whose neighbours are looked for; labels from 0.
        gallery: where they are looked for, labelled as ``test`` (default: among ``test``).
    """

    train: Items
    test: Items
    gallery: Items | None = None


def cub(root: Path) -> Split:
    """CUB-200-2011, birds: to learn on the classes 1 to 100, to test on 101 to 200.

    Raises:
        DataError: if a list is missing or damaged, or the two do not name the same images.
    """
    folder = locate(root, "cub", ("CUB_200_2011", "cub/CUB_200_2011", "cub"), "images.txt")
    names = {row[0]: row[1] for _, row in _table(folder / "images.txt", 2)}
    path = folder / "image_class_labels.txt"
    classes = {row[0]: _class(where, row[1], 200) for where, row in _table(path, 2)}
    alone = names.keys() ^ classes.keys()
    if alone:
        raise DataError(f"{path} and images.txt differ: image {min(alone)} is in one of them only")
    images = os.path.join(folder, "images")
    return _halves(folder, [(os.path.join(images, names[k]), classes[k]) for k in names], 100)


def cars(root: Path) -> Split:
    """Cars-196: to learn on the classes 1 to 98, to test on 99 to 196.

    Reads ``cars_annos.mat``, which lists all images.

    Raises:
        DataError: if it is missing or damaged.
    """
    folder = locate(root, "cars", ("cars", "Cars196", "cars196"), "cars_annos.mat")
    path = folder / "cars_annos.mat"
    pairs: list[_Pair] = []
    for i, record in enumerate(read_records(path, "annotations")):
        where, name = f"{path}: annotation {i}", record.get("relative_im_path")
        if not isinstance(name, str):
            raise DataError(f"{where} has relative_im_path {name!r}; must be the name of a file")
        pairs.append((os.path.join(folder, name), _class(where, record.get("class"), 196)))
    return _halves(folder, pairs, 98)


def sop(root: Path) -> Split:
    """Stanford Online Products, as ``Ebay_train.txt`` and ``Ebay_test.txt`` split them.

    Raises:
        DataError: if one is missing or damaged, or both have a class.
    """
    names = ("Stanford_Online_Products", "sop/Stanford_Online_Products", "sop")
    folder = locate(root, "sop", names, "Ebay_train.txt")

    def part(name: str) -> list[_Pair]:
        rows = _table(folder / f"Ebay_{name}.txt", 4, "image_id class_id super_class_id path")
        return [
            (os.path.join(folder, row[3]), _class(where, row[1], 22_634)) for where, row in rows
        ]

    return _split(folder, part("train"), part("test"))


def inshop(root: Path) -> Split:
    """In-shop Clothes, as ``list_eval_partition.txt`` splits them: to learn on, queries, and the
    gallery in which each query's neighbours are looked for.

    The list is in the set's folder or its ``Eval``, and ``img`` in the folder or its ``Img``.

    Raises:
        DataError: if it is missing or damaged, or an item to learn on is also one to test on.
    """
    names = ("inshop", "In-shop Clothes Retrieval Benchmark")
    places = [f"{name}{inner}" for name in names for inner in ("/Eval", "")]
    place = locate(root, "inshop", places, "list_eval_partition.txt")
    folder = place.parent if place.name == "Eval" else place
    images = folder / "Img" if (folder / "Img" / "img").is_dir() else folder
    head = "image_name item_id evaluation_status"
    parts: dict[str, list[_Pair]] = {"train": [], "query": [], "gallery": []}
    for where, row in _table(place / "list_eval_partition.txt", 3, head):
        if row[2] not in parts:
            raise DataError(f"{where} has {row[2]!r}; must be one of {', '.join(parts)}")
        parts[row[2]].append((os.path.join(images, row[0]), row[1]))
    return _split(folder, parts["train"], parts["query"], parts["gallery"])


def _table(path: Path, columns: int, head: str = "") -> list[tuple[str, list[str]]]:
    """The lines of a list, each cut at blanks, and what each is called in an error.

    Args:
        path: the file.
        columns: how many a line has.
        head: the line before them (default: none). Before that the list may say how many they are.
    """
    try:
        lines = read_bytes(path).decode().rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    begin = 0
    if head:
        heads = [line.split() for line in lines[:2]]
        if head.split() not in heads:
            raise DataError(f"{path} has no line {head!r} at its beginning")
        begin = heads.index(head.split()) + 1
        if begin == 2 and lines[0].strip() != str(len(lines) - 2):
            raise DataError(
                f"{path} has {len(lines) - 2} images and says {lines[0].strip()}: it is truncated "
                "or another file"
            )
    rows = [(f"{path}: line {i}", line.split()) for i, line in enumerate(lines, 1)][begin:]
    for where, row in rows:
        if len(row) != columns:
            raise DataError(f"{where} is {' '.join(row)!r}; must have {columns} columns")
    return rows


def _class(where: str, given: Any, most: int) -> int:
    try:
        number = int(given)
    except (OverflowError, TypeError, ValueError):
        number = 0
    if not 1 <= number <= most:
        raise DataError(f"{where} has class {given!r}; must be a number from 1 to {most}")
    return number


def _halves(folder: Path, pairs: Sequence[_Pair], last: int) -> Split:
    """To learn on the classes up to ``last``, and to test on the others."""
    seen = [pair for pair in pairs if pair[1] <= last]
    return _split(folder, seen, [pair for pair in pairs if pair[1] > last])


def _split(
    folder: Path,
    train: Sequence[_Pair],
    test: Sequence[_Pair],
    gallery: Sequence[_Pair] | None = None,
) -> Split:
    known, unseen = {k for _, k in train}, {k for _, k in (*test, *(gallery or ()))}
    for what, part in (("to learn on", train), ("to test on", test), ("in its gallery", gallery)):
        if part is not None and not part:
            raise DataError(f"{folder} lists no image {what}")
    if known & unseen:
        both = min(known & unseen)
        raise DataError(f"{folder} lists class {both!r} both to learn and to test on")

    def items(pairs: Sequence[_Pair], classes: set[Any]) -> Items:
        label = {k: i for i, k in enumerate(sorted(classes))}
        return Items(tuple(p for p, _ in pairs), np.array([label[k] for _, k in pairs], np.int64))

    return Split(
        items(train, known),
        items(test, unseen),
        None if gallery is None else items(gallery, unseen),
    )


# By name, what reads a list of images and its split.
LISTS: dict[str, Callable[[Path], Split]] = {
    "cub": cub,
    "cars": cars,
    "sop": sop,
    "inshop": inshop,
}
