"""Data of the user's by name: ``csv:FILE:TARGET``, ``folder:PATH`` or ``text:FILE``.

Nothing is held in memory but where each example lies: rows are read, images decoded and texts cut
when a batch needs them, from files that are looked through once. What is learned from and what is
tested on is drawn from a fixed seed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from normwise.lab.data.files import DataError
from normwise.lab.data.folders import MEAN, STD, central, image_folder, list_images
from normwise.lab.errors import UsageError, nearest

__all__ = ["BYTES", "KINDS", "OwnData", "fingerprint", "open_data"]

KINDS = ("csv", "folder", "text")
BYTES = 256
PIXELS, TOKENS = 32, 64  # a side, a sequence
_TEST = 0.2
_TEXT_TEST = 0.1
# A column of more different texts than this says little of a row, and would make a wide network.
_MOST_CATEGORIES = 100
# Whole numbers that take more different values than this are a quantity, not classes.
_MOST_CLASSES = 20
_CHUNK = 4096
_HASHED_WHOLE = 64 << 20


@dataclass(frozen=True)
class OwnData:
    """Data of the user's, with what a network for them has to know.

    Args:
        kind: csv, folder or text.
        train: what to learn from.
        test: what to test on.
        loss: the one that fits, by its name.
        inputs: features of a row, channels of an image, or the size of the vocabulary.
        outputs: classes, numbers, or the size of the vocabulary.
        size: pixels a side of an image, tokens of a sequence; 0 for rows.
        unit: what a target of 1 is in the file's own unit (default: 1).
        facts: what a reader should know of them (default: nothing).
    """

    kind: str
    train: Dataset[Any]
    test: Dataset[Any]
    loss: str
    inputs: int
    outputs: int
    size: int = 0
    unit: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)


def open_data(name: str, size: int | None = None, tokenizer: Path | None = None) -> OwnData:
    """The data of this name.

    Args:
        name: ``csv:FILE:TARGET``, a table with a header, whose column TARGET is learned from the
            others; ``folder:PATH``, images in a folder for each class, or in such folders in
            ``train`` and ``val`` or ``test``; or ``text:FILE``.
        size: pixels a side, or tokens a sequence (default: 32, and 64).
        tokenizer: a ``tokenizer.json`` that cuts a text (default: each byte is a token).

    Raises:
        UsageError: if it is none of these, or the files are not what it says.
    """
    kind, rest = _divided(name)
    if size is not None and (kind == "csv" or size < 2):
        allowed = "goes with images and texts" if kind == "csv" else "must be 2 or more"
        raise UsageError(f"size {size} is not allowed: it {allowed}")
    if kind == "csv":
        path, colon, target = rest.rpartition(":")
        if not colon:
            raise UsageError(f"{name!r} names no target: must be csv:FILE:TARGET")
        return _table(Path(path), target)
    if kind == "folder":
        return _images(Path(rest), size or PIXELS)
    return _text(Path(rest), size or TOKENS, tokenizer)


def _divided(name: str) -> tuple[str, str]:
    kind, colon, rest = name.partition(":")
    if kind not in KINDS or not colon or not rest:
        raise UsageError(
            f"unknown data {name!r}: must be csv:FILE:TARGET, folder:PATH or text:FILE"
        )
    return kind, rest


def fingerprint(name: str) -> str:
    """A SHA-256 that changes with the data: of a folder its file names, of a file its content.

    Of a file of more than 64 MiB it is that of its length, its first and its last MiB.
    """
    kind, rest = _divided(name)
    path = Path(rest.rpartition(":")[0] if kind == "csv" else rest)
    try:
        # A folder changes when a file in it comes or goes, and not when one in a folder of it does.
        places = [path, *(p for depth in ("*/", "*/*/") for p in path.glob(depth))]
        changed = max(place.stat().st_mtime_ns for place in places)
        return _digest(str(path.absolute()), path.stat().st_size, changed)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


@lru_cache
def _digest(name: str, size: int, changed: int) -> str:
    """The fingerprint of a path; size and time of change are there to forget it by."""
    digest = hashlib.sha256()
    if os.path.isdir(name):
        for folder, folders, files in os.walk(name):
            folders.sort()
            digest.update("\0".join([os.path.relpath(folder, name), *sorted(files)]).encode())
        return digest.hexdigest()
    with open(name, "rb") as file:
        if size <= _HASHED_WHOLE:
            digest.update(file.read())
        else:
            digest.update(str(size).encode() + file.read(1 << 20))
            file.seek(-(1 << 20), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


# Tables


@dataclass(frozen=True)
class Feature:
    """How a column of a table becomes numbers.

    Args:
        name: in the header.
        place: its number.
        mean, scale: of the training rows, of a quantity.
        values: the texts that a category may be; empty for a quantity.
    """

    name: str
    place: int
    mean: float = 0.0
    scale: float = 1.0
    values: tuple[str, ...] = ()

    def number(self, text: str) -> float:
        """A quantity, standardized."""
        return (float(text) - self.mean) / self.scale

    def features(self, text: str) -> list[float]:
        """One number, or one for each value, of which the text's own is 1."""
        if not self.values:
            return [self.number(text)]
        return [float(text == value) for value in self.values]


class Rows(Dataset[Any]):
    """Rows of a table, read when they are asked for.

    Args:
        path: of the file.
        delimiter: between its cells.
        starts: where each row begins, and after them where the last ends, in bytes.
        chosen: which rows these are.
        columns: what is learned from.
        target: what is learned.
    """

    def __init__(
        self,
        path: Path,
        delimiter: str,
        starts: array[int],
        chosen: array[int],
        columns: Sequence[Feature],
        target: Feature,
    ) -> None:
        self.path, self.delimiter, self.starts, self.chosen = path, delimiter, starts, chosen
        self.columns, self.target = columns, target

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        row = self.chosen[number]
        start, end = self.starts[row], self.starts[row + 1]
        with self.path.open("rb") as file:
            file.seek(start)
            text = file.read(end - start).decode()
        cells = next(_cells(io.StringIO(text, newline=""), self.delimiter))
        x = [value for column in self.columns for value in column.features(cells[column.place])]
        wanted = cells[self.target.place]
        if self.target.values:
            return torch.tensor(x), torch.tensor(self.target.values.index(wanted))
        return torch.tensor(x), torch.tensor(self.target.number(wanted))


@dataclass
class _Seen:
    """What is known of a column while its rows go by."""

    name: str
    is_number: bool = True
    is_whole: bool = True
    gap: int | None = None  # the first row without a value
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean, of training rows
    values: set[str] = field(default_factory=set)

    def add(self, texts: Sequence[str], trained: np.ndarray[Any, Any], first: int) -> None:
        """A chunk of rows, of which the first has this number."""
        if len(self.values) <= _MOST_CATEGORIES:
            self.values.update(texts)
        if not self.is_number:
            return
        try:
            numbers = np.array([text or "nan" for text in texts], np.float64)
        except ValueError:
            self.is_number = False
            return
        unusable = ~np.isfinite(numbers)
        if unusable.any():
            if self.gap is None:
                self.gap = first + int(unusable.argmax())
            return
        self.is_whole &= bool((numbers == np.round(numbers)).all())
        kept = numbers[trained]
        if kept.size:  # two means and sums of squares become one
            total = self.count + kept.size
            apart = float(kept.mean()) - self.mean
            self.squares += float(((kept - kept.mean()) ** 2).sum())
            self.squares += apart**2 * self.count * kept.size / total
            self.mean += apart * kept.size / total
            self.count = total

    @property
    def scale(self) -> float:
        """The standard deviation; 1 where nothing varies."""
        return math.sqrt(self.squares / max(self.count, 1)) or 1.0


def _table(path: Path, target: str) -> OwnData:
    with _opened(path) as file:
        try:
            header = file.readline().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no table of UTF-8 text: {error}") from None
        delimiter = max(",;\t", key=header.count)
        names = next(_cells([header], delimiter), [])
        names = [name.strip() for name in names]
        if target not in names:
            raise UsageError(f"{path} has no column {target!r}: {nearest(target, names)}")
        seen = [_Seen(name) for name in names]
        starts, parts = array("q", [file.tell()]), (array("q"), array("q"))
        draw = random.Random(0)
        for chunk in _chunks(file, path, delimiter, len(names), starts):
            first = len(parts[0]) + len(parts[1])
            tested = np.array([draw.random() < _TEST for _ in chunk])
            for row, is_tested in enumerate(tested.tolist(), first):
                parts[is_tested].append(row)
            for of, texts in zip(seen, zip(*chunk, strict=True), strict=True):
                of.add(texts, ~tested, first)
    for of in seen:
        if of.is_number and of.gap is not None and of.values != {""}:
            raise DataError(
                f"column {of.name!r} of {path} holds no number in row {of.gap + 1}: fill the gaps "
                "or leave the row out"
            )
    wanted = _target(path, seen[names.index(target)], names.index(target))
    columns, left_out = [], []
    for place, of in enumerate(seen):
        if of.name == target:
            continue
        if not of.is_number and len(of.values) > _MOST_CATEGORIES:
            left_out.append(of.name)
        elif of.is_number:
            columns.append(Feature(of.name, place, of.mean, of.scale))
        else:
            columns.append(Feature(of.name, place, values=tuple(sorted(of.values))))
    if not columns:
        raise DataError(f"{path} has no column to learn {target!r} from")
    train, test = (Rows(path, delimiter, starts, part, columns, wanted) for part in parts)
    facts = {"left_out": ", ".join(left_out)} if left_out else {}
    return OwnData(
        "csv",
        train,
        test,
        "cross-entropy" if wanted.values else "mse",
        inputs=sum(len(column.values) or 1 for column in columns),
        outputs=len(wanted.values) or 1,
        unit=wanted.scale,
        facts=facts,
    )


def _target(path: Path, of: _Seen, place: int) -> Feature:
    """Classes, if it is texts or a few whole numbers, else a quantity."""
    if of.is_number and not (of.is_whole and len(of.values) <= _MOST_CLASSES):
        return Feature(of.name, place, of.mean, of.scale)
    if len(of.values) > _MOST_CATEGORIES:
        raise DataError(
            f"column {of.name!r} of {path} has more than {_MOST_CATEGORIES} different texts: too "
            "many to be classes"
        )
    if len(of.values) == 1:
        raise DataError(f"column {of.name!r} of {path} is {min(of.values)!r} in every row")
    key = float if of.is_number else str
    return Feature(of.name, place, values=tuple(sorted(of.values, key=key)))


def _chunks(
    file: BinaryIO, path: Path, delimiter: str, columns: int, starts: array[int]
) -> Iterator[list[list[str]]]:
    """The rows, a few thousand at a time; where each ends is added to ``starts``."""

    def lines() -> Iterator[str]:
        while line := file.readline():  # no iteration over the file: that would hide its place
            yield line.decode()

    def rows() -> Iterator[list[str]]:
        for cells in _cells(lines(), delimiter):
            if not cells:  # a blank line belongs to the row before it
                starts[-1] = file.tell()
                continue
            if len(cells) != columns:
                raise DataError(
                    f"row {len(starts)} of {path} has {len(cells)} cells, and the header {columns}"
                )
            starts.append(file.tell())
            yield cells

    source = rows()
    try:
        while chunk := list(islice(source, _CHUNK)):
            yield chunk
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"row {len(starts)} of {path} cannot be read: {error}") from None


def _cells(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=True)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


# Images


class Images(Dataset[Any]):
    """Image files, decoded when they are asked for: RGB, standardized by ImageNet's constants.

    Args:
        paths: of the files.
        labels: of each a number from 0.
        size: pixels a side, to which the shorter side is scaled and the longer cut.
    """

    def __init__(self, paths: Sequence[str], labels: Sequence[int], size: int) -> None:
        self.paths, self.labels, self.size = paths, labels, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        planes = torch.from_numpy(central(self.paths[number], self.size).copy()).float()
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        return (planes - mean[:, None, None]) / std[:, None, None], int(self.labels[number])


def _images(root: Path, size: int) -> OwnData:
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r}")
    if (root / "train").is_dir():
        whole = image_folder(root)
        parts = [(whole.train, whole.train_labels), (whole.test, whole.test_labels)]
        classes = whole.classes
    else:
        classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
        if len(classes) < 2:
            raise DataError(
                f"{root} holds {len(classes)} folders: must hold one for each class, two or more"
            )
        paths, labels = list_images(root, classes)
        draw = random.Random(0)
        tested = np.array([draw.random() < _TEST for _ in paths], bool)
        parts = [
            (
                tuple(p for p, t in zip(paths, tested, strict=True) if t == part),
                labels[tested == part],
            )
            for part in (False, True)
        ]
    train, test = (Images(paths, labels.tolist(), size) for paths, labels in parts)
    return OwnData("folder", train, test, "cross-entropy", 3, len(classes), size)


# Texts


class Bytes(Dataset[Any]):
    """Sequences of a text's bytes, each of which ends with the byte that the next begins with.

    Args:
        path: of the file.
        start: the byte at which they begin.
        count: how many they are.
        length: how many bytes of a sequence are predicted.
    """

    def __init__(self, path: Path, start: int, count: int, length: int) -> None:
        self.path, self.start, self.count, self.length = path, start, count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        if not 0 <= number < self.count:
            raise IndexError(number)
        with self.path.open("rb") as file:
            file.seek(self.start + number * self.length)
            return torch.frombuffer(bytearray(file.read(self.length + 1)), dtype=torch.uint8).long()


class Tokens(Dataset[Any]):
    """As :class:`Bytes`, of the numbers of tokens, which are held.

    Args:
        ids: shape ``(N,)``.
        start, count, length: as of :class:`Bytes`.
    """

    def __init__(self, ids: Tensor, start: int, count: int, length: int) -> None:
        self.ids, self.start, self.count, self.length = ids, start, count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        if not 0 <= number < self.count:
            raise IndexError(number)
        first = self.start + number * self.length
        return self.ids[first : first + self.length + 1].long()


def _text(path: Path, length: int, tokenizer: Path | None) -> OwnData:
    """The first nine tenths of a text to learn from, and the last to test on."""
    vocabulary, ids = BYTES, None
    if tokenizer is None:
        with _opened(path) as file:
            total = file.seek(0, os.SEEK_END)
    else:
        ids, vocabulary = _tokenized(path, tokenizer)
        total = len(ids)
    count = max(0, (total - 1) // length)
    tested = math.ceil(count * _TEXT_TEST)
    if count < 2:
        raise DataError(
            f"{path} has {total} tokens: must have more than two sequences of {length}; give a "
            "smaller --size"
        )

    def part(first: int, many: int) -> Dataset[Any]:
        if ids is None:
            return Bytes(path, first * length, many, length)
        return Tokens(ids, first * length, many, length)

    train, test = part(0, count - tested), part(count - tested, tested)
    facts = {"tokens": "bytes" if tokenizer is None else str(tokenizer)}
    return OwnData("text", train, test, "next-token", vocabulary, vocabulary, length, facts=facts)


def _tokenized(path: Path, tokenizer: Path) -> tuple[Tensor, int]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError(
            f"{tokenizer} needs the tokenizers of transformers: pip install "
            '"normwise[transformers]"'
        ) from None
    try:
        cut = Tokenizer.from_file(str(tokenizer))
        found = array("i")
        with path.open(encoding="utf-8") as file:
            for line in file:
                found.extend(cut.encode(line, add_special_tokens=False).ids)
    except Exception as error:
        raise DataError(f"{path} cannot be cut by {tokenizer}: {error}") from None
    return torch.frombuffer(found, dtype=torch.int32), cut.get_vocab_size()
