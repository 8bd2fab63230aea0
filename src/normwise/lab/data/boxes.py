"""Images with boxes in the formats of Pascal VOC (BCCD is one such set) and COCO."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from normwise.lab.data.files import DataError, locate, read_bytes
from normwise.lab.data.folders import fit

__all__ = ["Boxed", "Listed", "Listing", "bccd", "coco", "read_coco", "read_voc", "voc"]


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

    @property
    def ignored(self) -> npt.NDArray[np.bool_]:
        """As :attr:`Listed.ignored`: none."""
        return np.zeros(len(self.labels), np.bool_)


@dataclass(frozen=True)
class Listed:
    """One image that has not been opened, and what its annotation says is in it.

    Args:
        path: of the image.
        size: width and height in pixels.
        boxes: as :class:`Boxed` has them.
        labels: as :class:`Boxed` has them.
        ignored: shape ``(n,)``: COCO's crowds and VOC's difficult objects, which are not learnt,
            and count in a test neither as found nor as missed.
        dropped: how many boxes without an area were left out.
        outlines: of each object COCO's segmentation, polygons or a run-length code, in pixels of
            the image as it is; none where they were not asked for.
    """

    path: str
    size: tuple[int, int]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    ignored: npt.NDArray[np.bool_]
    dropped: int
    outlines: tuple[Any, ...] | None = None

    def fitted(self, size: int) -> Listed:
        """With boxes as they are when the longer side is scaled to ``size`` pixels."""
        factors = np.divide(fit(*self.size, size), self.size, dtype=np.float32)
        return replace(self, boxes=self.boxes * np.tile(factors, 2))

    def masks(self, size: int) -> npt.NDArray[np.uint8]:
        """Which pixels are of each object that is not ignored, shape ``(n, size, size)``, 0 or 1,
        of the image as :meth:`fitted` into a square.

        Raises:
            DataError: if there are no outlines, or one is damaged.
        """
        from PIL import Image
        from pycocotools import mask as codes

        width, height = self.size
        if self.outlines is None:
            raise DataError(f"{self.path} has no outlines of its objects")
        own = [o for o, ignored in zip(self.outlines, self.ignored, strict=True) if not ignored]
        made = np.zeros((len(own), size, size), np.uint8)
        fitted = fit(width, height, size)
        for i, outline in enumerate(own):
            try:
                code = codes.frPyObjects(outline, height, width)
                code = codes.merge(code) if isinstance(code, list) else code
                whole = Image.fromarray(codes.decode(code))
            except Exception as error:  # the decoder is C, and raises what it finds
                raise DataError(
                    f"{self.path} has an object whose segmentation is damaged: {error}"
                ) from None
            scaled = whole.resize(fitted, Image.Resampling.NEAREST)
            made[i, : fitted[1], : fitted[0]] = np.asarray(scaled)
        return made


@dataclass(frozen=True)
class Listing:
    """The images of a set.

    Args:
        train: to learn on.
        test: to test on.
        classes: what the labels mean.
    """

    train: list[Listed]
    test: list[Listed]
    classes: tuple[str, ...]


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

    stated, objects = _parse_voc(annotation)
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
    for item in objects:
        label = _label(annotation, item, classes)
        left, top, right, bottom = item.box
        if right <= left or bottom <= top:
            dropped += 1
            continue
        boxes.append([side * scale for side in item.box])
        labels.append(label)
    return Boxed(
        annotation.stem,
        np.ascontiguousarray(pixels),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        dropped,
    )


_SIDES = ("xmin", "ymin", "xmax", "ymax")
BCCD_CLASSES = ("RBC", "WBC", "Platelets")


@dataclass(frozen=True)
class _Object:
    """What a VOC annotation says of one object."""

    name: str
    box: tuple[float, ...]
    difficult: bool


def _parse_voc(annotation: Path) -> tuple[tuple[int, int], list[_Object]]:
    """The width and height that an annotation states, and its objects."""
    try:
        tree = ElementTree.fromstring(annotation.read_bytes())
        stated = (int(tree.findtext("size/width", "")), int(tree.findtext("size/height", "")))
        objects = [
            _Object(
                item.findtext("name", ""),
                tuple(float(item.findtext(f"bndbox/{side}", "")) for side in _SIDES),
                item.findtext("difficult", "0").strip() == "1",
            )
            for item in tree.findall("object")
        ]
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise DataError(f"{annotation} is not a whole VOC annotation: {error}") from None
    return stated, objects


def _label(annotation: Path, item: _Object, classes: tuple[str, ...]) -> int:
    if item.name not in classes:
        raise DataError(
            f"{annotation} has class {item.name!r}; must be one of {', '.join(classes)}"
        )
    return classes.index(item.name)


def _part(folder: Path, part: str) -> list[str]:
    """The images that a part of a VOC folder names."""
    path = folder / "ImageSets" / "Main" / f"{part}.txt"
    names = read_bytes(path).decode(errors="replace").split()
    if not names:
        raise DataError(f"{path} names no image")
    return names


def bccd(root: Path, part: str, scale: float = 1.0) -> list[Boxed]:
    """Blood cells: ``part`` is ``train`` (205 images), ``val`` (87) or ``test`` (72)."""
    folder = locate(root, "bccd", ("BCCD", "BCCD_Dataset/BCCD"), f"ImageSets/Main/{part}.txt")
    return [
        read_voc(
            folder / "Annotations" / f"{name}.xml",
            folder / "JPEGImages" / f"{name}.jpg",
            BCCD_CLASSES,
            scale,
        )
        for name in _part(folder, part)
    ]


def voc(folder: Path, test_part: str) -> Listing:
    """A folder as Pascal VOC's: Annotations, JPEGImages, ImageSets/Main; no image is opened.

    The classes are the names in the part ``train``, sorted; of VOC itself these are its twenty.
    Objects marked as difficult are ignored.

    Args:
        folder: the one that holds these three.
        test_part: ``val``, ``test``, or another file of ImageSets/Main without its ending.

    Raises:
        DataError: if a part is missing, an annotation is damaged or has a class that ``train`` has
            not, or a box is not finite or lies outside of its image by more than a pixel.
    """

    def parsed(part: str) -> list[tuple[Path, tuple[int, int], list[_Object]]]:
        paths = (folder / "Annotations" / f"{name}.xml" for name in _part(folder, part))
        return [(path, *_parse_voc(path)) for path in paths]

    def listed(annotation: Path, size: tuple[int, int], objects: list[_Object]) -> Listed:
        described = (
            (
                f"{annotation}: object {i} ({item.name})",
                item.box,
                _label(annotation, item, classes),
                item.difficult,
            )
            for i, item in enumerate(objects)
        )
        return _listed(str(folder / "JPEGImages" / f"{annotation.stem}.jpg"), size, described)

    train, test = parsed("train"), parsed(test_part)
    classes = tuple(sorted({item.name for _, _, objects in train for item in objects}))
    if not classes:
        raise DataError(f"{folder} has no object in its part 'train'")
    return Listing([listed(*x) for x in train], [listed(*x) for x in test], classes)


def _listed(
    path: str,
    size: tuple[int, int],
    objects: Iterable[tuple[str, Iterable[float], int, bool]],
    outlines: Sequence[Any] | None = None,
) -> Listed:
    """An image from its objects: for each what it is called in an error, left, top, right and
    bottom, its label, and whether it is ignored; and the outlines of all, if they are wanted."""
    if min(size) < 1:
        raise DataError(f"{path} is said to have {size} pixels; must have 1 or more a side")
    boxes, labels, ignored, kept, dropped = [], [], [], [], 0
    for i, (where, box, label, ignore) in enumerate(objects):
        left, top, right, bottom = box
        if not all(map(math.isfinite, (left, top, right, bottom))):
            raise DataError(f"{where} has a box {[left, top, right, bottom]} that is not finite")
        if min(left, top) < -1 or right > size[0] + 1 or bottom > size[1] + 1:
            raise DataError(
                f"{where} has a box {[left, top, right, bottom]} (left, top, right, bottom) "
                f"outside of its image of {size[0]}×{size[1]} pixels: correct or remove it"
            )
        if right <= left or bottom <= top:
            dropped += 1
            continue
        boxes.append([left, top, right, bottom])
        labels.append(label)
        ignored.append(ignore)
        kept.append(None if outlines is None else outlines[i])
    return Listed(
        path,
        size,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(ignored, np.bool_),
        dropped,
        None if outlines is None else tuple(kept),
    )


def coco(folder: Path, outlines: bool = False) -> Listing:
    """A folder as COCO's of 2017: annotations, train2017 and val2017, to test on; no image is
    opened.

    Args:
        folder: the one that holds these three.
        outlines: whether the training images' segmentations are kept (default: no).

    Raises:
        DataError: as :func:`read_coco`, or if the two parts have different categories.
    """
    train, categories = read_coco(
        folder / "annotations" / "instances_train2017.json", folder / "train2017", outlines
    )
    path = folder / "annotations" / "instances_val2017.json"
    test, others = read_coco(path, folder / "val2017")
    if others != categories:
        name, number = min(set(others.items()) ^ set(categories.items()))[::-1]
        raise DataError(
            f"{path} and instances_train2017.json have different categories: {number} ({name!r}) "
            "is in one of them only"
        )
    return Listing(train, test, tuple(categories.values()))


def read_coco(
    path: Path, images: Path, outlines: bool = False
) -> tuple[list[Listed], dict[int, str]]:
    """One of COCO's files of instances, and where its images lie.

    Labels are from 0 in the order of the categories' ids. Crowds (``iscrowd``, 0 where it is not
    given) are ignored.

    Args:
        path: the file.
        images: the folder.
        outlines: whether segmentations, most of the file, are kept (default: no).

    Returns:
        The images in the file's order, and the categories' names by id, in order.

    Raises:
        DataError: if it is truncated, a key is missing or of another type, an annotation is of an
            image or a category that is not there, or a box is not finite or lies outside of its
            image by more than a pixel.
    """
    try:
        content = json.loads(
            read_bytes(path),
            object_pairs_hook=lambda pairs: {
                k: v for k, v in pairs if outlines or k != "segmentation"
            },
        )
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is truncated or not JSON: {error}") from None

    def records(key: str, **kinds: type) -> Iterable[tuple[str, dict[str, Any]]]:
        """Each record and what it is called, once its keys are known to be of these types."""
        listed = content.get(key) if isinstance(content, dict) else None
        if not isinstance(listed, list):
            raise DataError(f"{path} has no list {key!r}")
        for i, record in enumerate(listed):
            for name, wanted in kinds.items():
                if not isinstance(record, dict) or name not in record:
                    raise DataError(f"{path}: {key}[{i}] lacks {name!r}")
                value = record[name]
                if not isinstance(value, wanted) or isinstance(value, bool):
                    raise DataError(f"{path}: {key}[{i}] has {name} {value!r}, of a wrong type")
            yield f"{path}: {key}[{i}]", record

    names: dict[int, str] = {}
    for where, record in records("categories", id=int, name=str):
        if record["id"] in names:
            raise DataError(f"{where} has id {record['id']}, as another category has")
        names[record["id"]] = record["name"]
    categories = dict(sorted(names.items()))
    label_of = {number: label for label, number in enumerate(categories)}

    files: dict[int, tuple[str, tuple[int, int]]] = {}
    for where, record in records("images", id=int, file_name=str, width=int, height=int):
        if record["id"] in files:
            raise DataError(f"{where} has id {record['id']}, as another image has")
        files[record["id"]] = record["file_name"], (record["width"], record["height"])
    if not files or not categories:
        raise DataError(f"{path} names no {'category' if files else 'image'}")

    objects: dict[int, list[tuple[str, list[float], int, bool]]] = {number: [] for number in files}
    drawn: dict[int, list[Any]] = {number: [] for number in files}
    kinds = {"image_id": int, "category_id": int, "bbox": list}
    for where, record in records("annotations", **kinds):
        if record["image_id"] not in files:
            raise DataError(f"{where} is of image {record['image_id']}, which is not in the file")
        if record["category_id"] not in label_of:
            raise DataError(
                f"{where} is of category {record['category_id']}, which is not in the file"
            )
        box = record["bbox"]
        if len(box) != 4 or not all(type(side) in (int, float) for side in box):
            raise DataError(f"{where} has bbox {box}; must be left, top, width and height")
        left, top, width, height = map(float, box)
        label, crowd = label_of[record["category_id"]], bool(record.get("iscrowd", 0))
        corners = [left, top, left + width, top + height]
        if outlines and not record.get("segmentation"):
            raise DataError(f"{where} lacks 'segmentation', which a network for masks learns from")
        objects[record["image_id"]].append((where, corners, label, crowd))
        drawn[record["image_id"]].append(record.get("segmentation"))
    return [
        _listed(str(images / name), size, objects[number], drawn[number] if outlines else None)
        for number, (name, size) in files.items()
    ], categories
