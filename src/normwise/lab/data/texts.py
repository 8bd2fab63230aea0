"""Text as numbers: words or characters, with the vocabulary of the training part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normwise.lab.data.files import DataError, locate

__all__ = [
    "READERS",
    "EncodedText",
    "brown",
    "encode",
    "tinyshakespeare",
    "unigram_perplexity",
    "wikitext",
]

UNKNOWN = "<unk>"
END = "<eos>"


@dataclass(frozen=True)
class EncodedText:
    """A corpus: what is learned from, and what is tested on.

    Args:
        name: of the data set.
        train: token numbers, shape ``(N,)``, int64.
        test: the same.
        vocabulary: what each number stands for.
    """

    name: str
    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    vocabulary: tuple[str, ...]


def encode(name: str, parts: Sequence[Sequence[str]], size: int | None = None) -> EncodedText:
    """Number the tokens of a training and a test part.

    The vocabulary is that of the training part, most frequent first; what is not in it becomes
    ``<unk>``, in both parts.

    Args:
        name: of the data set.
        parts: the tokens of the two.
        size: the most words in the vocabulary (default: all).
    """
    counts = Counter(parts[0])
    counts.pop(UNKNOWN, None)
    # Ties in the order of the letters, so that the numbers do not depend on the order of reading.
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = (UNKNOWN, *ranked[: None if size is None else size - 1])
    number = {word: index for index, word in enumerate(vocabulary)}
    coded = (np.array([number.get(word, 0) for word in part], np.int64) for part in parts)
    train, test = coded
    return EncodedText(name, train, test, vocabulary)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None


def brown(root: Path, vocabulary: int | None = 10_000) -> EncodedText:
    """The Brown corpus, by words: of every ten documents the first eight, and the last to test on.

    It has no official split; the ninth documents are kept for validation. Documents begin with a
    line ``= ca01 =``; each other line is a sentence of tokens between blanks, after which comes
    ``<eos>``.
    """
    path = locate(root, "brown", ("brown", "."), "brown.txt") / "brown.txt"
    lines = _read(path).splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("= ") and line.endswith(" =")]
    if len(heads) < 10:
        raise DataError(f"{path} has {len(heads)} documents and should have 500")
    train: list[str] = []
    test: list[str] = []
    for document, (start, end) in enumerate(pairwise([*heads, len(lines)])):
        if document % 10 == 8:
            continue
        part = test if document % 10 == 9 else train
        for line in lines[start + 1 : end]:
            part += [*line.split(), END]
    return encode("brown", (train, test), vocabulary)


def tinyshakespeare(root: Path, test: Literal["validation", "test"] = "test") -> EncodedText:
    """Tiny Shakespeare, by characters: the first 90%, and the last 5% to test on.

    Args:
        root: where the data sets are.
        test: ``"validation"`` tests on the 5% before the last instead (default: test).
    """
    path = locate(root, "tinyshakespeare", ("tinyshakespeare", "."), "input.txt") / "input.txt"
    text = _read(path)
    if len(text) < 100:
        raise DataError(f"{path} has {len(text)} characters: it is truncated")
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    tested = text[second:] if test == "test" else text[first:second]
    return encode("tinyshakespeare", (text[:first], tested))


def wikitext(root: Path, version: str = "2") -> EncodedText:
    """WikiText-2 or -103 by words, from ``wiki.train.tokens`` and ``wiki.test.tokens``.

    Args:
        root: where the data sets are.
        version: ``"2"`` or ``"103"``.
    """
    name = f"wikitext-{version}"
    folder = locate(root, name, (name, "."), "wiki.train.tokens")
    parts = [
        [
            word
            for line in _read(folder / f"wiki.{part}.tokens").splitlines()
            for word in (*line.split(), END)
        ]
        for part in ("train", "test")
    ]
    return encode(name, parts)


# By name, what reads a corpus: from the folder of the data sets and the most words, if by words.
READERS: dict[str, Callable[[Path, int], EncodedText]] = {
    "brown": brown,
    "tinyshakespeare": lambda root, _: tinyshakespeare(root),
    "wikitext-2": lambda root, _: wikitext(root, "2"),
    "wikitext-103": lambda root, _: wikitext(root, "103"),
}


def unigram_perplexity(train: Tensor, test: Tensor, vocabulary: int) -> float:
    """The perplexity of guessing each token by how often it is in ``train``, plus one."""
    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    return float((-(counts / counts.sum()).log()[test].mean()).exp())
