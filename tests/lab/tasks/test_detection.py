"""CenterNet's targets, loss and boxes, and AP, where their values are known in closed form."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from normwise.lab.data.boxes import Boxed
from normwise.lab.errors import UsageError
from normwise.lab.tasks.detection import (
    STRIDE,
    Detection,
    DetectionOptions,
    average_precision,
    centre_targets,
    decode,
    focal,
)

HEIGHT, WIDTH, CLASSES = 24, 32, 3


def scattered(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes in random places and of random sizes, whose centres are 6 cells apart or more."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    cells = torch.stack([columns.flatten(), rows.flatten()], dim=1) * 6.0
    centres = STRIDE * (cells + torch.rand(20, 2, generator=draw))
    sizes = 4 + 40 * torch.rand(20, 2, generator=draw)
    labels = torch.randint(CLASSES, (20,), generator=draw)
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1), labels


def as_output(heat: Tensor, values: Tensor) -> Tensor:
    """What a network that is right would say."""
    return torch.cat([torch.logit(heat.double(), eps=1e-12), values.double()])[None]


@pytest.mark.parametrize("seed", range(5))
def test_decoding_inverts_encoding(seed: int) -> None:
    boxes, labels = scattered(seed)
    heat, values, _ = centre_targets(boxes, labels, CLASSES, HEIGHT, WIDTH)
    (found,) = decode(as_output(heat, values), CLASSES, count=20)
    order, own = found["boxes"][:, 0].argsort(), boxes[:, 0].argsort()
    torch.testing.assert_close(found["boxes"][order].float(), boxes[own], rtol=0, atol=1e-4)
    assert torch.equal(found["labels"][order], labels[own])


def test_targets_are_gaussians_of_a_sixth_of_the_sides_that_peak_at_the_centres() -> None:
    boxes = torch.tensor([[8.0, 16, 56, 40], [100, 50, 112, 98], [20, 16, 68, 40]])
    labels = torch.tensor([1, 2, 1])
    heat, values, at = centre_targets(boxes, labels, CLASSES, HEIGHT, WIDTH)
    cells = [(8, 7), (26, 18), (11, 7)]  # column and row, by hand
    assert sorted(at.nonzero().tolist()) == sorted([row, column] for column, row in cells)
    assert torch.equal((heat == 1).nonzero(), torch.tensor([[1, 7, 8], [1, 7, 11], [2, 18, 26]]))
    for k in range(CLASSES):
        for y in range(HEIGHT):
            for x in range(WIDTH):
                bumps = [0.0]
                for box, label, (column, row) in zip(boxes, labels, cells, strict=True):
                    wide, high = float(box[2] - box[0]) / 4, float(box[3] - box[1]) / 4
                    square = ((x - column) / max(wide / 6, 0.5)) ** 2
                    square += ((y - row) / max(high / 6, 0.5)) ** 2
                    bumps.append(math.exp(-square / 2) if label == k else 0.0)
                assert float(heat[k, y, x]) == pytest.approx(max(bumps), abs=1e-6)
    assert values[:, 7, 8].tolist() == [12, 6, 0, 0]
    assert values[:, 18, 26].tolist() == [3, 12, 0.5, 0.5]


def test_an_image_without_boxes_has_empty_targets() -> None:
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    heat, values, at = centre_targets(*none, CLASSES, HEIGHT, WIDTH)
    assert not heat.any()
    assert not values.any()
    assert not at.any()
    loss = focal(torch.full((1, CLASSES, HEIGHT, WIDTH), -3.0), heat[None])
    assert loss.isfinite()


def test_a_centre_at_the_edge_stays_in_the_map() -> None:
    edge = float(STRIDE * WIDTH)
    boxes = torch.tensor([[edge - 8, 0.0, edge + 8, 8]])
    heat, values, at = centre_targets(boxes, torch.tensor([0]), CLASSES, HEIGHT, WIDTH)
    assert at[1, WIDTH - 1]
    (found,) = decode(as_output(heat, values), CLASSES, count=1)
    torch.testing.assert_close(found["boxes"].float(), boxes)


def test_the_focal_loss_is_equation_1_written_out() -> None:
    logits = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    heat = torch.rand(2, 2, 3, 4, dtype=torch.float64)
    heat[0, 1, 2, 3] = heat[1, 0, 0, 0] = 1
    total = 0.0
    for z, y in zip(logits.flatten().tolist(), heat.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        total += (1 - p) ** 2 * math.log(p) if y == 1 else (1 - y) ** 4 * p**2 * math.log(1 - p)
    assert float(focal(logits, heat)) == pytest.approx(-total / 2, rel=1e-12)


def test_the_focal_loss_of_large_logits_is_finite_and_falls_to_zero_where_they_are_right() -> None:
    heat = torch.zeros(1, 1, 2, 2)
    heat[0, 0, 0, 0] = 1
    right = torch.where(heat == 1, 200.0, -200.0).requires_grad_()
    wrong = (-right).detach().requires_grad_()
    for logits, expected in ((right, 0.0), (wrong, 4 * 200.0)):
        loss = focal(logits, heat)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == pytest.approx(expected)
        assert gradient.isfinite().all()


def test_the_loss_is_zero_where_the_network_is_right_and_weighs_offsets_and_sizes() -> None:
    problem = object.__new__(Detection)  # without the data
    problem.classes = CLASSES
    boxes, labels = scattered()
    heat, values, at = (
        part[None].double() for part in centre_targets(boxes, labels, CLASSES, HEIGHT, WIDTH)
    )
    at = at.bool()

    def loss(values_found: Tensor) -> float:
        found = torch.cat([torch.where(heat == 1, 40.0, -40.0), values_found], dim=1)
        problem.model = torch.nn.Identity()
        return float(problem.loss((found, heat, values, at)))

    assert loss(values) == pytest.approx(0, abs=1e-12)
    # Elsewhere than at the centres sizes and offsets may be anything.
    assert loss(torch.where(at[:, None], values, 7.0)) == pytest.approx(0, abs=1e-12)
    off = torch.tensor([1.0, -2, 0.25, -0.5], dtype=torch.float64)[:, None, None]
    # 0.1 · (1 + 2) for the sizes and 0.25 + 0.5 for the offsets.
    assert loss(values + off) == pytest.approx(1.05)


def truth(n: int = 3) -> list[Boxed]:
    made = []
    for image in range(n):
        boxes, labels = scattered(image)
        pixels = np.zeros((3, 1, 1), np.uint8)
        made.append(Boxed(str(image), pixels, boxes.numpy(), labels.numpy(), 0))
    return made


def said(items: list[Boxed], shrink: float = 1.0, label: int = 0) -> list[dict[str, Tensor]]:
    """The truth as found boxes, each about its centre ``shrink`` times as wide, ``label`` off."""
    found = []
    for item in items:
        boxes = torch.from_numpy(item.boxes).double()
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        half[:, 0] *= shrink
        found.append(
            {
                "boxes": torch.cat([centre - half, centre + half], dim=1),
                "scores": torch.linspace(0.5, 0.9, len(boxes)),
                "labels": (torch.from_numpy(item.labels) + label) % CLASSES,
            }
        )
    return found


def test_average_precision_is_1_for_perfect_boxes_and_0_for_wrong_classes_or_none() -> None:
    pytest.importorskip("pycocotools", reason="AP is judged by pycocotools")
    items = truth()
    perfect = average_precision(said(items), items, CLASSES)
    assert perfect == pytest.approx({"ap": 1.0, "ap50": 1.0})
    wrong = average_precision(said(items, label=1), items, CLASSES)
    assert wrong == {"ap": 0.0, "ap50": 0.0}
    empty = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    none = [dict(zip(("boxes", "scores", "labels"), empty, strict=True)) for _ in items]
    assert average_precision(none, items, CLASSES) == {"ap": 0.0, "ap50": 0.0}


@pytest.mark.parametrize(("overlap", "passed"), [(0.52, 1), (0.67, 4), (0.91, 9), (0.49, 0)])
def test_boxes_with_a_known_overlap_pass_as_many_of_the_ten_thresholds(
    overlap: float, passed: int
) -> None:
    pytest.importorskip("pycocotools", reason="AP is judged by pycocotools")
    # A box that is narrower by a factor about the same centre overlaps by that factor.
    items = truth()
    found = average_precision(said(items, shrink=overlap), items, CLASSES)
    assert found["ap"] == pytest.approx(passed / 10)
    assert found["ap50"] == (passed > 0)


def test_half_of_the_boxes_found_gives_the_precision_up_to_a_recall_of_a_half() -> None:
    pytest.importorskip("pycocotools", reason="AP is judged by pycocotools")
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    item = Boxed("0", np.zeros((3, 1, 1), np.uint8), boxes, np.zeros(2, np.int64), 0)
    found = {
        "boxes": torch.tensor(boxes[:1]),
        "scores": torch.ones(1),
        "labels": torch.zeros(1, dtype=torch.int64),
    }
    # COCO averages the precision at the 101 recalls 0, 0.01 … 1: it is 1 at 51 of them.
    assert average_precision([found], [item], 1)["ap"] == pytest.approx(51 / 101)


def test_mirrored_images_have_mirrored_boxes() -> None:
    problem = object.__new__(Detection)  # without the data
    problem.classes, problem.size = 1, (16, 32)
    boxes = torch.tensor([[4.0, 2, 12, 14]])
    image = torch.zeros(3, 16, 32, dtype=torch.uint8)
    image[:, 2:14, 4:12] = 255  # white where the box is
    problem.images, problem.boxes = image[None], [boxes]
    problem.labels = [torch.tensor([0])]
    problem.mean, problem.std = torch.zeros(3), torch.ones(3)
    seen = set()
    for seed in range(8):
        x, heat, values, _ = problem.batch(torch.tensor([0]), torch.Generator().manual_seed(seed))
        (found,) = decode(as_output(heat[0], values[0]), 1, count=1)
        left, top, right, bottom = found["boxes"][0].round().int().tolist()
        white = torch.zeros_like(x)
        white[..., top:bottom, left:right] = 255
        assert torch.equal(x, white)
        seen.add(left)
    assert seen == {4, 20}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UsageError, match=r'pip install "normwise\[lab\]"'):
        average_precision([], [], 1)


def test_a_mistake_in_the_options_is_shown() -> None:
    with pytest.raises(UsageError, match=r"unknown test_part 'tests': did you mean 'test'"):
        DetectionOptions(test_part="tests")
    with pytest.raises(UsageError, match=r"scale 0 is not allowed"):
        DetectionOptions(scale=0)
