"""Nine classes of ImageNet, the same of ImageNet-A, and the published clusters of textures."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from normwise.lab.data.files import DataError, read_bytes
from normwise.lab.data.folders import list_images

__all__ = ["CLASSES", "SYNSETS", "NineClassImages", "nine_classes"]

# As published with ReBias (arXiv 1910.02806; github.com/clovaai/rebias, datasets/imagenet.py): the
# synsets of each class, which are those that ImageNet-A can have.
SYNSETS = {
    "dog": ("n02085620", "n02099601", "n02106550", "n02106662", "n02110958"),
    "cat": ("n02123045", "n02123159", "n02123394", "n02123597", "n02124075"),
    "frog": ("n01641577", "n01644373", "n01644900"),
    "turtle": ("n01664065", "n01665541", "n01667114", "n01667778", "n01669191"),
    "bird": ("n01819313", "n01820546", "n01833805", "n01843383", "n01847000"),
    "monkey": ("n02486410", "n02487347", "n02488291", "n02488702", "n02492035"),
    "fish": ("n02607072", "n02640242", "n02641379", "n02643566", "n02655020"),
    "crab": ("n01978287", "n01978455", "n01980166", "n01981276"),
    "insect": ("n02174001", "n02177972", "n02190166", "n02206856", "n02219486"),
}
CLASSES = tuple(SYNSETS)
_CLASS_OF = {synset: k for k, own in enumerate(SYNSETS.values()) for synset in own}
_COLUMNS = ("path", "category", "cluster1", "cluster2", "cluster3")

Part = tuple[tuple[str, ...], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class NineClassImages:
    """Files and classes; no image has been opened.

    Args:
        train: paths, and their classes, shape ``(N,)``.
        test: as ``train``, of ImageNet's validation part.
        hard: as ``train``, of ImageNet-A.
        clusters: of each test image its cluster in each of three clusterings, ``(3, N)``.
    """

    train: Part
    test: Part
    hard: Part
    clusters: npt.NDArray[np.int64]


def nine_classes(imagenet: Path, imagenet_a: Path, clusters: Path) -> NineClassImages:
    """List the images of the nine classes.

    Args:
        imagenet: a folder with ``train/SYNSET/*`` and ``val/SYNSET/*``; other synsets may be there.
        imagenet_a: a folder with ``SYNSET/*``, of which those of the nine classes are taken.
        clusters: the table ``9class_imagenet_val.csv`` that is published with ReBias, whose columns
            are path (``SYNSET/FILE``), category, cluster1, cluster2 and cluster3.

    Raises:
        DataError: if a folder or a class is missing, the table is damaged, or it lacks an image.
    """
    train, test = (_listed(imagenet / part, every=True) for part in ("train", "val"))
    hard = _listed(imagenet_a, every=False)
    named = _read_clusters(clusters)
    keys = ["/".join(Path(path).parts[-2:]) for path in test[0]]
    if absent := [key for key in keys if key not in named]:
        raise DataError(f"{clusters} lacks {len(absent)} images of {imagenet / 'val'}: {absent[0]}")
    table = np.array([named[key] for key in keys], np.int64)
    return NineClassImages(train, test, hard, table.T)


def _listed(folder: Path, every: bool) -> Part:
    """The images of the nine classes, of which each synset must be there or just any."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not there; must have one folder a synset")
    present = [synset for synset in sorted(_CLASS_OF) if (folder / synset).is_dir()]
    absent = sorted(set(_CLASS_OF) - set(present))
    if absent and (every or not present):
        raise DataError(f"{folder} lacks {len(absent)} synsets of the nine classes: {absent[0]}")
    paths, numbers = list_images(folder, present)
    return paths, np.array([_CLASS_OF[present[n]] for n in numbers], np.int64)


def _read_clusters(path: Path) -> dict[str, tuple[int, int, int]]:
    text = read_bytes(path).decode("utf-8", errors="replace")
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or tuple(rows[0]) != _COLUMNS:
        raise DataError(f"{path} does not begin with the columns {','.join(_COLUMNS)}")
    found: dict[str, tuple[int, int, int]] = {}
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(_COLUMNS) or not all(v.isascii() and v.isdigit() for v in row[2:]):
            raise DataError(f"{path}, line {line}, is {row}; must be {','.join(_COLUMNS)}")
        synset = row[0].partition("/")[0]
        if synset not in _CLASS_OF or CLASSES[_CLASS_OF[synset]] != row[1]:
            raise DataError(f"{path}, line {line}, has {row[0]!r} as {row[1]!r}")
        found[row[0]] = (int(row[2]), int(row[3]), int(row[4]))
    return found
