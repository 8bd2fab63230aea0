"""Images with boxes in Pascal VOC's format: BCCD, or any set with the same folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from normwise.lab.data.files import DataError, locate

__all__ = ["Boxed", "bccd", "read_voc"]


@dataclass(frozen=True)
class Boxed:
    """One image and what is in it.

    Args:
        name: of the file, without its ending.
        image: shape ``(3, H, W)``, uint8.
        boxes: shape ``(n, 4)``, float32: left, top, right, bottom in pixels.
        labels: shape ``(n,)``, int64.
        dropped: how many boxes without an area were left out.
    """

    name: str
    image: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    dropped: int


def read_voc(annotation: Path, image: Path, classes: tuple[str, ...], scale: float = 1.0) -> Boxed:
    """One annotation and its image.

    Args:
        annotation: the XML file.
        image: the picture.
        classes: the names that may appear.
        scale: factor on the picture's sides and on the boxes (default: 1).

    Raises:
        DataError: if either cannot be read, they do not fit together, or a name is not a class.
    """
    from PIL import Image

    try:
        tree = ElementTree.fromstring(annotation.read_bytes())
        stated = (int(tree.findtext("size/width", "")), int(tree.findtext("size/height", "")))
        objects = [
            (
                item.findtext("name", ""),
                [float(item.findtext(f"bndbox/{side}", "")) for side in _SIDES],
            )
            for item in tree.findall("object")
        ]
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise DataError(f"{annotation} is not a whole VOC annotation: {error}") from None
    try:
        with Image.open(image) as picture:
            size = picture.size
            shape = (round(size[0] * scale), round(size[1] * scale))
            pixels = np.asarray(picture.convert("RGB").resize(shape)).transpose(2, 0, 1)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{image} cannot be decoded: {error}") from None
    if size != stated:
        raise DataError(f"{image} has {size} pixels, and {annotation.name} says {stated}")
    boxes, labels, dropped = [], [], 0
    for name, box in objects:
        if name not in classes:
            raise DataError(f"{annotation} has class {name!r}; must be one of {', '.join(classes)}")
        left, top, right, bottom = box
        if right <= left or bottom <= top:
            dropped += 1
            continue
        boxes.append([side * scale for side in box])
        labels.append(classes.index(name))
    return Boxed(
        annotation.stem,
        np.ascontiguousarray(pixels),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        dropped,
    )


_SIDES = ("xmin", "ymin", "xmax", "ymax")
BCCD_CLASSES = ("RBC", "WBC", "Platelets")


def bccd(root: Path, part: str, scale: float = 1.0) -> list[Boxed]:
    """Blood cells: ``part`` is ``train`` (205 images), ``val`` (87) or ``test`` (72)."""
    folder = locate(root, "bccd", ("BCCD", "BCCD_Dataset/BCCD"), f"ImageSets/Main/{part}.txt")
    names = (folder / "ImageSets" / "Main" / f"{part}.txt").read_text().split()
    if not names:
        raise DataError(f"{folder}/ImageSets/Main/{part}.txt names no image")
    return [
        read_voc(
            folder / "Annotations" / f"{name}.xml",
            folder / "JPEGImages" / f"{name}.jpg",
            BCCD_CLASSES,
            scale,
        )
        for name in names
    ]
