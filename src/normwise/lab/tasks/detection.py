"""Object detection on boxes as VOC or COCO has them, by CenterNet (arXiv 1904.07850) or by a
detector of torchvision, judged by AP."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.lab.checks import later, within
from normwise.lab.data.boxes import BCCD_CLASSES, Boxed, Listed, Listing, bccd, coco, voc
from normwise.lab.data.files import locate
from normwise.lab.data.folders import MEAN, STD, Decoder, Job
from normwise.lab.errors import UsageError, nearest
from normwise.lab.networks.centernet import CentreNet
from normwise.lab.networks.detectors import DETECTORS, detector
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = [
    "Detection",
    "DetectionOptions",
    "Detector",
    "average_precision",
    "centre_targets",
    "decode",
    "focal",
]

METRICS = (
    Metric("ap", "AP", "", 100.0),
    Metric("ap50", "AP at IoU 0.5", "", 100.0),
)
STRIDE = 4
PARTS = ("val", "test")
# At most this many boxes per image; COCO's AP looks at as many of a class.
_MOST = 100
# Images that are tested at a time.
_PART = 16


@dataclass(frozen=True)
class DetectionOptions:
    """What a recipe may set.

    Args:
        scale: factor on the sides of bccd's 640×480 images; both must become multiples of 16
            (default: 0.3).
        width: channels of the network's first stage (default: 16).
        test_part: ``val`` or ``test``; of coco, ``val`` (default: test).
        data: ``bccd``; ``coco``, or ``coco:FOLDER`` with files as COCO's; or ``voc:FOLDER``, laid
            out as Pascal VOC is, to learn on its part ``train`` (default: bccd).
        image_size: pixels a side, a multiple of 16, of coco and voc, which need it: the longer side
            of each image is scaled to it, and what is left of the square is filled.
        network: ``centernet``, or one of :data:`normwise.lab.networks.detectors.DETECTORS`, whose
            width is the name's own (default: centernet).
    """

    scale: float = 0.3
    width: int = 16
    test_part: str = "test"
    data: str = "bccd"
    image_size: int | None = None
    network: str = later("centernet")

    def __post_init__(self) -> None:
        kind, _, folder = self.data.partition(":")
        if self.data not in ("bccd", "coco") and not (kind in ("voc", "coco") and folder):
            known = ("bccd", "coco", "coco:FOLDER", "voc:FOLDER")
            raise UsageError(f"unknown data {self.data!r}: {nearest(self.data, known)}")
        size = self.image_size
        if kind == "bccd" and size is not None:
            raise UsageError(f"image_size {size} is not allowed: data 'bccd' has scale instead")
        if kind != "bccd" and (size is None or size < 16 or size % 16):
            raise UsageError(
                f"image_size {size} is not allowed: data {self.data!r} needs a multiple of 16, in "
                "pixels"
            )
        if kind != "bccd" and self.scale != DetectionOptions.scale:
            raise UsageError(
                f"scale {self.scale} is not allowed: data {self.data!r} has image_size instead"
            )
        if kind == "coco" and self.test_part == "test":
            raise UsageError(
                "test_part 'test' is not allowed: COCO publishes no annotations of its test "
                "images; set it to 'val'"
            )
        if self.test_part not in PARTS:
            hint = nearest(self.test_part, PARTS)
            raise UsageError(f"unknown test_part {self.test_part!r}: {hint}")
        within(self, "scale", 0, above=True)
        within(self, "width", 1)
        known_networks = ("centernet", *DETECTORS)
        if self.network not in known_networks:
            hint = nearest(self.network, known_networks)
            raise UsageError(f"unknown network {self.network!r}: {hint}")
        if self.learns_masks and kind != "coco":
            raise UsageError(
                f"network {self.network!r} needs data coco, or coco:FOLDER: {self.data!r} has no "
                "masks"
            )

    @property
    def learns_masks(self) -> bool:
        """Whether it needs the outlines of objects."""
        return "mask" in self.network


def centre_targets(
    boxes: Tensor, labels: Tensor, classes: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What CenterNet is to say of one image.

    Args:
        boxes: left, top, right, bottom in pixels, shape ``(n, 4)``.
        labels: shape ``(n,)``.
        classes: how many.
        height, width: of the map, whose cells are ``STRIDE`` pixels wide.

    Returns:
        The heat map ``(classes, height, width)``, 1 at each centre and a Gaussian of a sixth of
        the box's sides around it; size and offset in cells ``(4, height, width)``: width, height,
        and the centre's place in its cell; and the cells that have them ``(height, width)``. Of
        boxes whose centres share a cell one is kept.
    """
    size = (boxes[:, 2:] - boxes[:, :2]) / STRIDE
    centre = (boxes[:, 2:] + boxes[:, :2]) / 2 / STRIDE
    cell = centre.long().clamp(max=torch.tensor([width - 1, height - 1]))
    column, row = cell.unbind(1)
    spread = (size / 6).clamp(min=0.5)[:, :, None]
    across = (torch.arange(width) - column[:, None]) / spread[:, 0]
    down = (torch.arange(height) - row[:, None]) / spread[:, 1]
    bumps = torch.exp(-(across.square()[:, None, :] + down.square()[:, :, None]) / 2)
    of_class = labels[:, None, None].expand_as(bumps)
    heat = torch.zeros(classes, height, width).scatter_reduce_(0, of_class, bumps, "amax")
    values = torch.zeros(4, height, width)
    values[:, row, column] = torch.cat([size, centre - cell], dim=1).T
    at = torch.zeros(height, width, dtype=torch.bool)
    at[row, column] = True
    return heat, values, at


def focal(logits: Tensor, heat: Tensor) -> Tensor:
    """The penalty-reduced focal loss (arXiv 1904.07850, Eq. 1; α = 2, β = 4), over the centres.

    Args:
        logits: shape ``(N, classes, H, W)``.
        heat: targets of the same shape, 1 at centres.
    """
    centre = heat == 1
    p = logits.sigmoid()
    hit = (1 - p).square() * F.logsigmoid(logits)
    miss = (1 - heat) ** 4 * p.square() * F.logsigmoid(-logits)
    return -torch.where(centre, hit, miss).sum() / centre.sum().clamp(min=1)


def decode(output: Tensor, classes: int, count: int = _MOST) -> list[dict[str, Tensor]]:
    """The likeliest boxes: peaks of the heat maps in their 3×3 neighbourhoods.

    Args:
        output: shape ``(N, classes + 4, H, W)``.
        classes: how many.
        count: boxes an image (default: 100).

    Returns:
        For each image ``boxes`` ``(n, 4)`` in pixels, ``scores`` and ``labels``.
    """
    heat = output[:, :classes].sigmoid()
    heat = torch.where(F.max_pool2d(heat, 3, 1, 1) == heat, heat, 0.0)
    n, _, height, width = heat.shape
    scores, place = heat.flatten(1).topk(min(count, heat[0].numel()))
    labels, cell = place // (height * width), place % (height * width)
    values = output[:, classes:].flatten(2)
    wide, high, dx, dy = (values[:, k].gather(1, cell) for k in range(4))
    x, y = cell % width + dx, cell // width + dy
    boxes = STRIDE * torch.stack([x - wide / 2, y - high / 2, x + wide / 2, y + high / 2], dim=2)
    return [{"boxes": boxes[i], "scores": scores[i], "labels": labels[i]} for i in range(n)]


def average_precision(
    found: list[dict[str, Tensor]], truth: Sequence[Boxed | Listed], classes: int
) -> dict[str, float]:
    """COCO's AP over IoU 0.5 to 0.95, and at 0.5, by pycocotools.

    Args:
        found: for each image ``boxes``, ``scores`` and ``labels``.
        truth: the images' annotations. What they have as ``ignored`` is treated as COCO treats
            crowds: any number of found boxes that lie in it count neither way.
        classes: how many.

    Raises:
        UsageError: if pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise UsageError('detection needs pycocotools: pip install "normwise[lab]"') from None

    def corner_and_size(box: list[float]) -> list[float]:
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    annotations: list[dict[str, Any]] = []
    for image, item in enumerate(truth):
        columns = item.boxes.tolist(), item.labels.tolist(), item.ignored.tolist()
        for box, label, ignored in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": corner_and_size(box),
                    "area": (box[2] - box[0]) * (box[3] - box[1]),
                    "iscrowd": int(ignored),
                }
            )
    results = [
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": corner_and_size(box),
            "score": float(score),
        }
        for image, item in enumerate(found)
        for box, score, label in zip(
            item["boxes"].tolist(), item["scores"].tolist(), item["labels"].tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(truth))],
            "annotations": annotations,
            "categories": [{"id": label} for label in range(classes)],
            "info": {},
        }
        coco.createIndex()
        if not results:
            return {"ap": 0.0, "ap50": 0.0}
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"ap": float(evaluation.stats[0]), "ap50": float(evaluation.stats[1])}


@cache
def _load(root: Path, part: str, scale: float) -> list[Boxed]:
    return bccd(root, part, scale)


@cache
def _list(root: Path, data: str, test_part: str, outlines: bool) -> Listing:
    kind, _, folder = data.partition(":")
    if kind == "voc":
        return voc(root / folder, test_part)
    probe = "annotations/instances_train2017.json"
    own = root / folder if folder else locate(root, "coco", ("coco", "COCO"), probe)
    return coco(own, outlines)


class Detection(Problem):
    """CenterNet on blood cells, or on images that are decoded as they are needed.

    With a network of torchvision it is a :class:`Detector`.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    divisible = False  # the losses are sums over the number of centres in the batch
    listing: Listing | None = None  # none where all images are on the device

    def __new__(cls, options: DetectionOptions, *_: object) -> Detection:
        """The kind of detector that the options name."""
        return super().__new__(cls if options.network == "centernet" else Detector)

    def __init__(self, options: DetectionOptions, root: Path, device: torch.device) -> None:
        train, self.truth = self._read(options, root, device)
        self.boxes = [torch.from_numpy(item.boxes[~item.ignored]) for item in train]
        self.labels = [torch.from_numpy(item.labels[~item.ignored]) for item in train]
        self.examples = len(train)
        self.model = self._network(options).to(device)
        self.facts = {
            "data": options.data,
            "train_examples": len(train),
            "test_examples": len(self.truth),
            "boxes": sum(len(labels) for labels in self.labels),
            "boxes_without_area_left_out": sum(item.dropped for item in (*train, *self.truth)),
        }
        if self.listing is not None:
            self.facts["classes"] = self.classes
            self.facts["boxes_ignored"] = sum(int(x.ignored.sum()) for x in (*train, *self.truth))
        self.baseline = average_precision(self._usual_boxes(), self.truth, self.classes)

    def _network(self, options: DetectionOptions) -> nn.Module:
        return CentreNet(self.classes, options.width)

    def _read(
        self, options: DetectionOptions, root: Path, device: torch.device
    ) -> tuple[Sequence[Boxed | Listed], Sequence[Boxed | Listed]]:
        """What is in the images to learn on and in those to test on."""
        size = options.image_size
        if size is not None:
            listing = _list(root, options.data, options.test_part, options.learns_masks)
            train, test = ([x.fitted(size) for x in part] for part in (listing.train, listing.test))
            self.listing = Listing(train, test, listing.classes)
            self.classes, self.size = len(listing.classes), (size, size)
            self.decoder = Decoder(size)
            self.mean, self.std = (torch.tensor(values, device=device) for values in (MEAN, STD))
            return train, test
        cells = _load(root, "train", options.scale), _load(root, options.test_part, options.scale)
        height, width = cells[0][0].image.shape[1:]
        if height % 16 or width % 16:
            raise UsageError(
                f"scale {options.scale} is not allowed: makes images of {width}×{height} pixels, "
                "and both must be multiples of 16"
            )
        self.images, self.test = (
            torch.stack([torch.from_numpy(item.image) for item in part]).to(device)
            for part in cells
        )
        self.classes, self.size = len(BCCD_CLASSES), (height, width)
        pixels = self.images.float()
        self.mean, self.std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        return cells

    def _decoded(self, parts: Iterable[Sequence[Listed]]) -> Iterator[Tensor]:
        """The images of each part, some parts ahead of need."""
        jobs = (Job([x.path for x in part], sizes=[x.size for x in part]) for part in parts)
        return (x.to(self.mean.device) for x in self.decoder.run(jobs))

    def _train_images(self, steps: Tensor) -> Iterator[Tensor]:
        if self.listing is None:
            return (self.images[chosen] for chosen in steps)
        train = self.listing.train
        return self._decoded([train[i] for i in chosen.tolist()] for chosen in steps)

    def _test_images(self) -> Iterator[Tensor]:
        if self.listing is None:
            return iter(torch.split(self.test, _PART))
        test = self.listing.test
        return self._decoded(test[i : i + _PART] for i in range(0, len(test), _PART))

    def _usual_boxes(self) -> list[dict[str, Tensor]]:
        """In every image the same: boxes of each class's mean size, side by side, the commonest
        class first; of a listing, which may have many classes, the first hundred."""
        height, width = self.size
        boxes, labels = torch.cat(self.boxes), torch.cat(self.labels)
        places, scores, kinds = [], [], []
        for label in range(self.classes):
            own = boxes[labels == label]
            if not len(own):
                continue
            w, h = (own[:, 2:] - own[:, :2]).mean(0).tolist()
            for i in range(max(int(height / h), 1)):
                for j in range(max(int(width / w), 1)):
                    places.append([j * w, i * h, (j + 1) * w, (i + 1) * h])
                    scores.append(float(len(own)) / len(boxes))
                    kinds.append(label)
        usual = {
            "boxes": torch.tensor(places),
            "scores": torch.tensor(scores),
            "labels": torch.tensor(kinds),
        }
        if self.listing is not None:
            first = usual["scores"].argsort(descending=True, stable=True)[:_MOST]
            usual = {key: value[first] for key, value in usual.items()}
        return [usual] * len(self.truth)

    def _input(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean[:, None, None]) / self.std[:, None, None]

    def batch(self, chosen: Tensor, draw: Generator) -> Any:
        """Images, each mirrored with probability ½, and their targets."""
        return next(self.stream(chosen[None], [draw]))

    def stream(self, steps: Tensor, draws: Iterable[Generator]) -> Iterator[Any]:
        """The batch of each step; images in files are decoded some steps ahead."""
        for x, chosen, draw in zip(self._train_images(steps), steps, draws, strict=True):
            yield self._made(x, chosen, draw)

    def _mirrored(
        self, x: Tensor, chosen: Tensor, draw: Generator
    ) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
        """Each of the ``chosen`` images ``x``, its boxes, its number, and whether it is mirrored,
        which image and boxes are already."""
        mirrored = torch.rand(len(chosen), generator=draw) < 0.5
        width = self.size[1]
        for image, index, mirror in zip(x, chosen.tolist(), mirrored.tolist(), strict=True):
            boxes = self.boxes[index]
            if mirror:
                image = image.flip(2)
                boxes = torch.stack(
                    [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
                )
            yield image, boxes, index, mirror

    def _made(self, x: Tensor, chosen: Tensor, draw: Generator) -> Any:
        """The batch of the ``chosen`` images ``x``, shape ``(N, 3, H, W)``."""
        height, width = self.size
        images, targets = [], []
        for image, boxes, index, _ in self._mirrored(x, chosen, draw):
            images.append(image)
            targets.append(
                centre_targets(
                    boxes, self.labels[index], self.classes, height // STRIDE, width // STRIDE
                )
            )
        heat, values, at = (torch.stack(part).to(x.device) for part in zip(*targets, strict=True))
        return self._input(torch.stack(images)), heat, values, at

    def loss(self, batch: Any) -> Tensor:
        """Focal loss of the heat maps + L1 of the offsets + 0.1 · L1 of the sizes, over centres."""
        x, heat, values, at = batch
        output = self.model(x)
        l1 = ((output[:, self.classes :] - values).abs() * at[:, None]).sum((0, 2, 3))
        count = at.sum().clamp(min=1)
        sizes, offsets = l1[:2].sum() / count, l1[2:].sum() / count
        loss: Tensor = focal(output[:, : self.classes], heat) + offsets + 0.1 * sizes
        return loss

    def evaluate(self) -> Evaluation:
        """AP on the test images."""
        self.model.eval()
        with torch.no_grad():
            found = [
                item
                for x in self._test_images()
                for item in decode(self.model(self._input(x)), self.classes)
            ]
        return Evaluation(average_precision(found, self.truth, self.classes))


class Detector(Detection):
    """A detector of torchvision, with its own losses, on the same images.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    def _network(self, options: DetectionOptions) -> nn.Module:
        self.learns_masks = options.learns_masks
        return detector(options.network, self.classes, self.size)

    def _input(self, images: Tensor) -> Tensor:
        """In [0, 1]: the network standardizes by itself."""
        return images.float() / 255

    def _made(self, x: Tensor, chosen: Tensor, draw: Generator) -> Any:
        """Images and targets as torchvision has them: lists, and classes from 1."""
        images, targets = [], []
        for image, boxes, index, mirror in self._mirrored(x, chosen, draw):
            images.append(self._input(image))
            target = {"boxes": boxes.to(x.device), "labels": self.labels[index].to(x.device) + 1}
            if self.learns_masks:
                assert self.listing is not None  # masks come with coco alone
                masks = torch.from_numpy(self.listing.train[index].masks(self.size[0]))
                target["masks"] = (masks.flip(2) if mirror else masks).to(x.device)
            targets.append(target)
        return images, targets

    def loss(self, batch: Any) -> Tensor:
        """The sum of the network's losses."""
        images, targets = batch
        total: Tensor = sum(self.model(images, targets).values(), torch.zeros(()))
        return total

    def evaluate(self) -> Evaluation:
        """AP of boxes on the test images."""
        self.model.eval()
        found = []
        with torch.no_grad():
            for x in self._test_images():
                for said in self.model(list(self._input(x))):
                    best = said["scores"].argsort(descending=True, stable=True)[:_MOST]
                    own = {key: said[key][best].cpu() for key in ("boxes", "scores", "labels")}
                    found.append({**own, "labels": own["labels"] - 1})
        return Evaluation(average_precision(found, self.truth, self.classes))
