"""Torchvision's detectors in the task: what they are given, and what is made of what they say.

Where torchvision cannot be imported, a stand-in has the interface that it publishes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from normwise.lab.data.boxes import coco, read_coco
from normwise.lab.data.files import DataError
from normwise.lab.errors import UsageError
from normwise.lab.networks.detectors import DETECTORS, detector
from normwise.lab.recipes import find
from normwise.lab.running.cell import run_cell
from normwise.lab.running.pretrained import load_pretrained
from normwise.lab.tasks.detection import Detection, DetectionOptions, Detector

CPU = torch.device("cpu")
SIDE = 32
FASTER, MASK = "torchvision:fasterrcnn_resnet50_fpn", "torchvision:maskrcnn_resnet50_fpn"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMWISE_WORKERS", "0")


class StandIn(nn.Module):
    """Learns the mean colour of boxes; when it is tested it says what ``said`` holds."""

    def __init__(self, backbone: nn.Module, num_classes: int, **given: Any) -> None:
        super().__init__()
        self.backbone, self.num_classes, self.given = backbone, num_classes, given
        self.predict = nn.Linear(4, num_classes)
        self.said: list[dict[str, Tensor]] = []
        self.masks = False

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        assert isinstance(images, list)
        for image in images:
            assert image.ndim == 3
            assert image.dtype == torch.float32
            assert 0 <= float(image.min()) <= float(image.max()) <= 1
        if not self.training:
            assert targets is None
            begin, self.said = self.said[: len(images)], self.said[len(images) :]
            return begin
        assert isinstance(targets, list)
        assert len(targets) == len(images)
        losses = []
        for image, target in zip(images, targets, strict=True):
            boxes, labels = target["boxes"], target["labels"]
            assert boxes.shape == (len(labels), 4)
            assert boxes.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert ((labels >= 1) & (labels < self.num_classes)).all(), "0 is the background"
            if self.masks:
                assert target["masks"].shape == (len(labels), *image.shape[1:])
                assert target["masks"].dtype == torch.uint8
            x = self.backbone(image[None]).mean((2, 3)).expand(len(labels), -1)
            losses.append(nn.functional.cross_entropy(self.predict(x), labels, reduction="sum"))
        total = torch.stack(losses).mean()
        return {"loss_classifier": total, "loss_box_reg": 2 * total}


class MaskStandIn(StandIn):
    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.masks = True


def body() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3, bias=False)
    return nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A torchvision that notes what it is asked for."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def backbone(**given: Any) -> nn.Module:
        calls.append(("backbone", given))
        return body()

    def ssd(**given: Any) -> nn.Module:
        calls.append(("ssd", given))
        return StandIn(body(), given["num_classes"])

    names = ("torchvision", "torchvision.models", "torchvision.models.detection")
    modules = [ModuleType(name) for name in (*names, f"{names[-1]}.backbone_utils")]
    modules[2].FasterRCNN, modules[2].MaskRCNN = StandIn, MaskStandIn
    modules[2].ssd300_vgg16 = ssd
    modules[3].resnet_fpn_backbone = backbone
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def outline(left: float, top: float, width: float, height: float) -> list[list[float]]:
    right, bottom = left + width, top + height
    return [[left, top, right, top, right, bottom, left, bottom]]


# Of three images size, then category, box, segmentation and whether it is a crowd.
IMAGES: list[tuple[tuple[int, int], list[tuple[int, list[int], Any, int]]]] = [
    (
        (64, 48),
        [
            (7, [8, 8, 16, 24], outline(8, 8, 16, 24), 0),
            (3, [40, 4, 20, 20], outline(40, 4, 20, 20), 0),
            (3, [0, 0, 0, 20], outline(0, 0, 1, 20), 0),
            (7, [2, 2, 60, 6], {"size": [48, 64], "counts": [48 * 64]}, 1),
        ],
    ),
    ((32, 32), [(3, [4, 4, 20, 12], {"size": [32, 32], "counts": [4 * 32, 20 * 32, 8 * 32]}, 0)]),
    ((40, 64), []),
]


def write(folder: Path, segmented: bool = True) -> Path:
    (folder / "annotations").mkdir(parents=True)
    draw = np.random.default_rng(0)
    annotations = []
    for i, (_, objects) in enumerate(IMAGES):
        for category, box, segmentation, crowd in objects:
            own = {"image_id": i, "category_id": category, "bbox": box, "iscrowd": crowd}
            own |= {"segmentation": segmentation} if segmented else {}
            annotations.append(own)
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": w, "height": h}
            for i, ((w, h), _) in enumerate(IMAGES)
        ],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
    }
    for part in ("train2017", "val2017"):
        (folder / part).mkdir()
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
        for i, ((w, h), _) in enumerate(IMAGES):
            pixels = draw.integers(0, 256, (h, w, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / part / f"{i}.png")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "coco")
    return tmp_path


def problem(root: Path, network: str = FASTER) -> Detector:
    torch.manual_seed(0)
    options = DetectionOptions(data="coco", test_part="val", image_size=SIDE, network=network)
    made = Detection(options, root, CPU)
    assert isinstance(made, Detector)
    return made


def test_networks_are_asked_for_with_drawn_weights_a_background_and_the_size(
    asked: list[tuple[str, dict[str, Any]]],
) -> None:
    for name in DETECTORS:
        model: Any = detector(name, 80, (144, 192))
        kind, given = asked.pop()
        assert given["weights"] is None
        if "ssd" in name:
            assert (kind, given["weights_backbone"], given["num_classes"]) == ("ssd", None, 81)
            continue
        assert given["norm_layer"] is nn.BatchNorm2d, "torchvision's default is frozen"
        assert (given["backbone_name"] in name, given["trainable_layers"]) == (True, 5)
        assert (model.num_classes, model.given) == (81, {"min_size": 144, "max_size": 192})
        assert model.masks == ("mask" in name)


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    with pytest.raises(UsageError, match=r'pip install "normwise\[vision\]"'):
        detector(FASTER, 3, (32, 32))
    with pytest.raises(UsageError, match="unknown network 'torchvision:yolo'"):
        detector("torchvision:yolo", 3, (32, 32))


def test_targets_are_boxes_classes_from_1_and_masks(root: Path, asked: Any) -> None:
    """The first image is scaled by a half, and its crowd and its box without area are left out."""
    p = problem(root, MASK)
    seen = set()
    for seed in range(8):
        images, targets = p.batch(torch.tensor([0, 2]), torch.Generator().manual_seed(seed))
        assert [tuple(image.shape) for image in images] == [(3, SIDE, SIDE)] * 2
        first, none = targets
        assert none["boxes"].shape == (0, 4)
        assert none["masks"].shape == (0, SIDE, SIDE)
        assert first["labels"].tolist() == [2, 1]
        # Each mask fills its box, mirrored or not.
        for box, mask in zip(first["boxes"].tolist(), first["masks"], strict=True):
            left, top, right, bottom = map(int, box)
            expected = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
            expected[top:bottom, left:right] = 1
            assert torch.equal(mask, expected)
        seen.add(first["boxes"][0, 0].item())
    assert seen == {4.0, SIDE - 12.0}


def test_a_run_length_code_is_a_mask_too(root: Path) -> None:
    listing = coco(root / "coco", outlines=True)
    (mask,) = listing.train[1].masks(32)
    assert mask[:, 4:24].all()
    assert mask.sum() == 20 * 32


def test_outlines_are_kept_only_where_they_are_wanted(root: Path, tmp_path: Path) -> None:
    path, images = root / "coco" / "annotations" / "instances_train2017.json", root / "coco"
    listed, _ = read_coco(path, images)
    assert all(item.outlines is None for item in listed)
    with pytest.raises(DataError, match="no outlines"):
        listed[0].masks(32)
    listed, _ = read_coco(path, images, outlines=True)
    assert [len(item.outlines or ()) for item in listed] == [3, 1, 0]
    damaged = replace(listed[1], outlines=("no code",))
    with pytest.raises(DataError, match="segmentation is damaged"):
        damaged.masks(32)
    write(tmp_path / "bare", segmented=False)
    with pytest.raises(DataError, match=r"annotations\[0\] lacks 'segmentation'"):
        coco(tmp_path / "bare", outlines=True)


def test_the_loss_is_the_sum_of_the_networks_losses(root: Path, asked: Any) -> None:
    p = problem(root)
    p.model.train()
    images, targets = p.batch(torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    total = p.loss((images, targets))
    torch.testing.assert_close(total, 3 * p.model(images, targets)["loss_classifier"])
    total.backward()
    assert all(q.grad is not None for q in p.model.parameters())


def test_what_is_said_is_judged_by_coco(root: Path, asked: Any) -> None:
    """The truth is found, after a hundred boxes that are surer and right no more: AP is 1 or 0."""
    p = problem(root)
    right = [
        {
            "boxes": torch.from_numpy(item.boxes),
            "labels": torch.from_numpy(item.labels) + 1,
            "scores": torch.ones(len(item.labels)),
        }
        for item in p.truth
    ]
    p.model.said = [dict(item) for item in right]
    assert p.evaluate().metrics["ap"] == pytest.approx(1.0)
    p.model.said = [{**item, "labels": 3 - item["labels"]} for item in right]
    assert p.evaluate().metrics["ap"] < 0.2
    many = {
        "boxes": torch.tensor([[0.0, 0, 1, 1]]).repeat(150, 1),
        "labels": torch.ones(150, dtype=torch.int64),
        "scores": torch.full((150,), 2.0),
    }
    p.model.said = [{k: torch.cat([many[k], v]) for k, v in item.items()} for item in right]
    assert p.evaluate().metrics["ap"] == 0.0, "only the hundred likeliest boxes count"


def test_a_backbone_is_loaded_from_a_file(root: Path, asked: Any) -> None:
    (cell,) = find("adamp-detection").cells("paper", 1, ["adamp"], ["ssd-pretrained"])
    p, file = problem(root, cell.options.network), root / str(cell.training.pretrained)
    torch.save(body().state_dict(), file)
    load_pretrained(p.model, cell.training, root)
    for name, value in torch.load(file, weights_only=True).items():
        assert torch.equal(p.model.backbone.state_dict()[name], value)


def test_a_cell_is_trained_and_resumes_to_the_same_bits(
    root: Path, asked: Any, assert_resumes: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "forward", _says_nothing(StandIn.forward))
    (cell,) = find("adamp-detection").cells("paper", 1, ["adamp"], ["ssd-scratch"])
    cell = replace(
        cell,
        training=replace(cell.training, epochs=3, batch_size=2, evaluate_every=3),
        options=replace(cell.options, image_size=SIDE),
    )
    assert_resumes(cell, root, Detector, 3, lambda: torch.rand(3))


def _says_nothing(forward: Callable[..., Any]) -> Callable[..., Any]:
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }

    def call(self: StandIn, images: list[Tensor], targets: Any = None) -> Any:
        return forward(self, images, targets) if self.training else [nothing] * len(images)

    return call


@pytest.mark.parametrize("row", ["faster-r50", "faster-r101", "mask-r50", "mask-r101"])
def test_rows_of_the_paper_name_torchvisions_networks(row: str) -> None:
    recipe = find("epsilon-table-7-8-rcnn")
    for cell in recipe.cells("paper", 1, rows=[row]):
        kind, _, depth = row.partition("-r")
        assert cell.options.network == f"torchvision:{kind}rcnn_resnet{depth}_fpn"
        assert cell.training.pretrained == f"resnet{depth}.pth"


def test_masks_need_coco() -> None:
    with pytest.raises(UsageError, match="'bccd' has no masks"):
        DetectionOptions(network=MASK)
    with pytest.raises(UsageError, match=r"unknown network 'centernett': did you mean 'centernet'"):
        DetectionOptions(network="centernett")


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_torchvision_itself_trains_and_is_tested(name: str, root: Path, tmp_path: Path) -> None:
    """SSD, Faster and Mask R-CNN with torchvision's own code, where it can be imported."""
    try:
        import torchvision.models.detection  # noqa: F401  # whether it can be
    except Exception as error:  # one that does not fit torch fails in its own ways
        pytest.skip(f"torchvision cannot be imported: {error}")
    (cell,) = find("adamp-detection").cells("paper", 1, ["adamp"], ["ssd-scratch"])
    cell = replace(
        cell,
        training=replace(cell.training, epochs=1, batch_size=2),
        options=replace(cell.options, image_size=64, network=name),
    )
    result = run_cell(cell, tmp_path / "out", root)
    assert result["status"] == "ok"
    assert 0 <= result["metrics"]["ap"] <= 1
