"""COCO and VOC as published: read right or refused, and decoded as needed, to the same bits."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from normwise.lab.data import folders
from normwise.lab.data.boxes import coco, read_coco, voc
from normwise.lab.data.files import DataError
from normwise.lab.data.folders import Decoder, Job, fit
from normwise.lab.errors import UsageError
from normwise.lab.recipes import find
from normwise.lab.tasks.detection import Detection, DetectionOptions, average_precision

CPU = torch.device("cpu")
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}]
SIZES = [(64, 40), (40, 64), (48, 48), (90, 30), (33, 57), (64, 64)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def annotation(number, image, bbox, category=1, **given):
    polygon = [[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]]
    named = {"id": number, "image_id": image, "category_id": category, "bbox": bbox}
    return {**named, "iscrowd": 0, "area": 1.0, "segmentation": polygon, **given}


def content():
    """Six images of differing sizes, the last without a box, and one crowd."""
    images = [
        {"id": 100 - i, "file_name": f"{i:012}.jpg", "width": w, "height": h}
        for i, (w, h) in enumerate(SIZES)
    ]
    annotations = [
        annotation(1, 100, [4, 8, 20, 10.5]),
        annotation(2, 99, [0, 0, 40, 64], 90),
        annotation(3, 98, [10, 10, 30, 30]),
        annotation(4, 98, [2, 20, 8, 20], 90),
        annotation(5, 97, [30, 5, 45, 20]),
        annotation(6, 96, [3, 3, 20, 50], 90),
        annotation(7, 100, [30, 20, 30, 18], iscrowd=1),
        annotation(8, 100, [30, 20, 0, 18]),
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_coco(folder, made=None):
    (folder / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in ("train2017", "val2017"):
        (folder / part).mkdir()
        text = json.dumps(made or content())
        (folder / "annotations" / f"instances_{part}.json").write_text(text)
        for i, (width, height) in enumerate(SIZES):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / part / f"{i:012}.jpg")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_coco(root / "coco")
    return root


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("NORMWISE_WORKERS", "0")


def options(**given):
    return DetectionOptions(
        **{"data": "coco", "test_part": "val", "image_size": 32, "width": 4, **given}
    )


# COCO


def test_coco_is_read_as_published(root):
    listing = coco(root / "coco")
    assert listing.classes == ("person", "toothbrush")
    assert len(listing.train) == len(listing.test) == 6
    first, *_, last = listing.train
    assert first.path == str(root / "coco" / "train2017" / "000000000000.jpg")
    assert first.size == (64, 40)
    assert first.boxes.tolist() == [[4, 8, 24, 18.5], [30, 20, 60, 38]]
    assert (first.labels.tolist(), first.ignored.tolist()) == ([0, 0], [False, True])
    assert first.dropped == 1
    assert listing.train[2].labels.tolist() == [0, 1]
    assert last.boxes.shape == (0, 4)


def broken(**changes):
    """The content with keys of its first annotation changed, or taken away."""
    made = content()
    for key, value in changes.items():
        if value is None:
            del made["annotations"][0][key]
        else:
            made["annotations"][0][key] = value
    return made


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([1], "has no list 'categories'"),
        ({**content(), "annotations": 3}, "has no list 'annotations'"),
        ({**content(), "images": []}, "names no image"),
        ({**content(), "categories": []}, "names no category"),
        ({**content(), "images": [{"id": 1}]}, r"images\[0\] lacks 'file_name'"),
        ({**content(), "categories": CATEGORIES * 2}, r"categories\[2\] has id 90, as another"),
        ({**content(), "images": content()["images"] * 2}, r"images\[6\] has id 100, as another"),
        (broken(bbox=None), r"annotations\[0\] lacks 'bbox'"),
        (broken(image_id="100"), r"annotations\[0\] has image_id '100', of a wrong type"),
        (broken(category_id=True), r"annotations\[0\] has category_id True, of a wrong type"),
        (broken(image_id=7), r"annotations\[0\] is of image 7, which is not in the file"),
        (broken(category_id=2), r"annotations\[0\] is of category 2, which is not in the file"),
        (broken(bbox=[1, 2, 3]), r"annotations\[0\] has bbox \[1, 2, 3\]"),
        (broken(bbox=[1, 2, 3, "4"]), r"annotations\[0\] has bbox \[1, 2, 3, '4'\]"),
        (broken(bbox=[1, 2, math.nan, 4]), r"annotations\[0\] has a box .*nan.*not finite"),
        (broken(bbox=[1, 2, math.inf, 4]), r"annotations\[0\] has a box .*inf.*not finite"),
        (broken(bbox=[-1.5, 2, 9, 4]), r"annotations\[0\] has a box .*outside of .*64×40"),
        (broken(bbox=[1, 2, 9, 40]), r"annotations\[0\] has a box .*outside of .*64×40"),
    ],
)
def test_a_wrong_record_is_named(tmp_path, made, words):
    path = tmp_path / "instances_train2017.json"
    path.write_text(json.dumps(made))
    with pytest.raises(DataError, match=rf"instances_train2017\.json.* ?{words}"):
        read_coco(path, tmp_path)


def test_a_box_may_lie_a_pixel_outside(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(broken(bbox=[-1, 2, 66, 38.5])))
    items, _ = read_coco(path, tmp_path)
    assert items[0].boxes[0].tolist() == [-1, 2, 65, 40.5]


@pytest.mark.parametrize("keep", [0, 1, 200, -1])
def test_truncated_json_is_refused(tmp_path, keep):
    (tmp_path / "a.json").write_text(json.dumps(content())[:keep])
    with pytest.raises(DataError, match=r"a\.json is truncated or not JSON"):
        read_coco(tmp_path / "a.json", tmp_path)


def test_parts_with_different_categories_are_refused(tmp_path):
    folder = write_coco(tmp_path / "coco")
    path = folder / "annotations" / "instances_val2017.json"
    other = {**content(), "categories": [*CATEGORIES, {"id": 5, "name": "boat"}]}
    path.write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"different categories: 5 \('boat'\)"):
        coco(folder)


def test_a_missing_set_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"data set 'coco' not found; looked for .*normwise data"):
        Detection(options(), tmp_path, CPU)
    with pytest.raises(DataError, match=r"cannot read .*mine/annotations/instances_train2017"):
        Detection(options(data="coco:mine"), tmp_path, CPU)


# VOC


def write_voc(folder, parts, size=(40, 20), stated=None):
    """A folder of VOC's with, for each part, images and their objects."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for part, images in parts.items():
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(images) + "\n")
        for image, objects in images.items():
            PIL.Image.new("RGB", size, (255, 0, 0)).save(folder / "JPEGImages" / f"{image}.jpg")
            text = "".join(
                f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>"
                + "".join(
                    f"<{side}>{value}</{side}>"
                    for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
                )
                + "</bndbox><part><name>head</name></part></object>"
                for name, box, difficult in objects
            )
            width, height = stated or size
            (folder / "Annotations" / f"{image}.xml").write_text(
                f"<annotation><size><width>{width}</width><height>{height}</height></size>{text}"
                "</annotation>"
            )
    return folder


DOG, CAT = ("dog", (2, 4, 10, 12), False), ("cat", (20, 0, 40, 20), True)


def test_a_voc_folder_has_the_classes_of_its_training_part(tmp_path):
    pytest.importorskip("pycocotools", reason="AP is judged by pycocotools")
    folder = write_voc(tmp_path / "v", {"train": {"a": [DOG, CAT], "b": []}, "val": {"c": [CAT]}})
    listing = voc(folder, "val")
    assert listing.classes == ("cat", "dog")
    assert [len(item.boxes) for item in listing.train] == [2, 0]
    assert listing.train[0].boxes.tolist() == [[2, 4, 10, 12], [20, 0, 40, 20]]
    assert listing.train[0].labels.tolist() == [1, 0]
    assert listing.train[0].ignored.tolist() == [False, True]
    assert listing.test[0].path == str(folder / "JPEGImages" / "c.jpg")
    problem = Detection(options(data="voc:v"), tmp_path, CPU)
    # Difficult objects are not learnt.
    assert problem.labels[0].tolist() == [1]
    assert (problem.facts["boxes"], problem.facts["boxes_ignored"]) == (1, 2)
    assert problem.evaluate().metrics.keys() == {"ap", "ap50"}


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ([("cow", (1, 1, 2, 2), False)], "c.xml has class 'cow'; must be one of cat, dog"),
        ([("cat", (1, 1, "nan", 2), False)], r"c.xml: object 0 \(cat\) has a box .*not finite"),
        ([DOG, ("cat", (1, 1, 42, 2), False)], r"c.xml: object 1 \(cat\) .*outside of .*40×20"),
        ([("cat", (1, 1, "x", 2), False)], r"c.xml is not a whole VOC annotation.*'x'"),
    ],
)
def test_a_wrong_voc_object_is_named(tmp_path, objects, words):
    parts = {"train": {"a": [DOG, CAT]}, "val": {"c": objects}}
    with pytest.raises(DataError, match=words):
        voc(write_voc(tmp_path / "v", parts), "val")


def test_a_voc_folder_without_a_part_or_objects_is_refused(tmp_path):
    folder = write_voc(tmp_path / "v", {"train": {"a": []}, "val": {"b": [DOG]}})
    with pytest.raises(DataError, match="no object in its part 'train'"):
        voc(folder, "val")
    folder = write_voc(tmp_path / "w", {"train": {"a": [DOG]}, "val": {"b": [DOG]}}, stated=(0, 20))
    with pytest.raises(DataError, match=r"said to have \(0, 20\) pixels"):
        voc(folder, "val")
    folder = write_voc(tmp_path / "x", {"train": {"a": [DOG]}})
    with pytest.raises(DataError, match=r"cannot read .*val\.txt"):
        voc(folder, "val")


# Sizes


def test_the_longer_side_is_scaled_and_boxes_with_it(tmp_path):
    assert fit(640, 480, 512) == (512, 384)
    assert fit(3, 1000, 512) == (2, 512)
    assert fit(1, 1000, 16) == (1, 16)
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[8:16, 4:20] = 255
    PIL.Image.fromarray(pixels).save(tmp_path / "x.png")
    (image,) = next(Decoder(80, 0).run([Job([str(tmp_path / "x.png")], sizes=[(40, 20)])]))
    assert (image[:, 17:31, 9:39] == 255).all()
    assert (image[:, :15] == 0).all()
    # What is left of the square has ImageNet's mean colour.
    assert (image[:, 40:] == torch.tensor([124, 116, 104])[:, None, None]).all()
    folder = write_voc(tmp_path / "v", {"train": {"a": [("dog", (4, 8, 20, 16), False)]}})
    item = voc(folder, "train").train[0].fitted(80)
    assert item.boxes.tolist() == [[8, 16, 40, 32]]
    assert item.boxes.dtype == np.float32


def test_an_image_of_another_size_than_stated_is_refused_when_its_turn_comes(tmp_path):
    pytest.importorskip("pycocotools", reason="AP is judged by pycocotools")
    folder = write_voc(tmp_path / "v", {"train": {"a": [DOG]}, "val": {"b": [DOG]}}, (40, 20))
    PIL.Image.new("RGB", (20, 40)).save(folder / "JPEGImages" / "b.jpg")
    problem = Detection(options(data="voc:v"), tmp_path, CPU)
    problem.batch(torch.tensor([0]), generator())
    with pytest.raises(DataError, match=r"b\.jpg has \(20, 40\) pixels, and .* \(40, 20\)"):
        problem.evaluate()
    (folder / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg cannot be decoded"):
        problem.batch(torch.tensor([0]), generator())


# The task


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": "coc"}, r"unknown data 'coc': did you mean 'coco'"),
        ({"data": "voc"}, r"unknown data 'voc'"),
        ({"data": "voc:"}, r"unknown data 'voc:'"),
        ({"data": "bccd:x", "image_size": None}, r"unknown data 'bccd:x'"),
        ({"image_size": None}, r"image_size None is not allowed: data 'coco' needs a multiple of"),
        ({"image_size": 40}, r"image_size 40 is not allowed"),
        ({"image_size": 0}, r"image_size 0 is not allowed"),
        ({"data": "bccd"}, r"image_size 32 is not allowed: data 'bccd' has scale"),
        ({"scale": 0.5}, r"scale 0.5 is not allowed: data 'coco' has image_size"),
        ({"test_part": "test"}, r"test_part 'test' is not allowed: .*set it to 'val'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(given, words):
    with pytest.raises(UsageError, match=words):
        options(**given)


def test_no_image_is_opened_before_it_is_needed(root, monkeypatch):
    pytest.importorskip("pycocotools", reason="AP is judged by pycocotools")
    planes, opened = folders._planes, []
    monkeypatch.setattr(folders, "_planes", lambda *a: opened.append(a[0]) or planes(*a))
    problem = Detection(options(), root, CPU)
    assert opened == []
    assert problem.facts["train_examples"] == problem.facts["test_examples"] == 6
    assert (problem.facts["boxes"], problem.facts["boxes_ignored"]) == (6, 2)
    assert problem.facts["boxes_without_area_left_out"] == 2
    x, heat, _, at = problem.batch(torch.tensor([4, 0]), generator())
    assert [path[-7:] for path in opened] == ["004.jpg", "000.jpg"]
    assert (x.shape, heat.shape) == ((2, 3, 32, 32), (2, 2, 8, 8))
    assert at.sum((1, 2)).tolist() == [1, 1]
    # The filling is near 0 when standardized; the image is at the left or, mirrored, at the right.
    width = fit(33, 57, 32)[0]
    filled = x[0].abs().amax((0, 1)) < 0.01
    assert filled.sum() == 32 - width
    assert filled[0] != filled[-1]
    opened.clear()
    problem.evaluate()
    assert [path.split("/")[-2] for path in opened] == ["val2017"] * 6


def as_found(item, keep):
    """The truth as found boxes: those that ``keep`` marks."""
    return {
        "boxes": torch.from_numpy(item.boxes[keep]),
        "scores": torch.linspace(0.9, 0.5, int(keep.sum())),
        "labels": torch.from_numpy(item.labels[keep]),
    }


def test_the_truth_has_ap_1_and_crowds_are_neither_missed_nor_false(root):
    pytest.importorskip("pycocotools", reason="AP is judged by pycocotools")
    truth = [item.fitted(32) for item in coco(root / "coco").test]
    perfect = {"ap": 1.0, "ap50": 1.0}
    said = [as_found(item, ~item.ignored) for item in truth]
    assert average_precision(said, truth, 2) == pytest.approx(perfect)
    # Sure boxes inside of the crowd are not false ones …
    crowd = truth[0].boxes[1]
    inside = torch.tensor(crowd).repeat(3, 1) + torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [2] * 4])
    inside[2, 2:] = inside[2, :2] + 3
    said[0] = {
        "boxes": torch.cat([inside, said[0]["boxes"]]),
        "scores": torch.tensor([0.99, 0.98, 0.97, 0.5]),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    assert average_precision(said, truth, 2) == pytest.approx(perfect)
    # … where without the crowd they would be, and where a crowd that counted would be missed.
    without = replace(truth[0], boxes=truth[0].boxes[:1], labels=truth[0].labels[:1])
    without = replace(without, ignored=truth[0].ignored[:1])
    assert average_precision(said, [without, *truth[1:]], 2)["ap"] < 0.9
    counted = replace(truth[0], ignored=np.zeros(2, np.bool_))
    said[0] = as_found(truth[0], ~truth[0].ignored)
    assert average_precision(said, [counted, *truth[1:]], 2)["ap"] < 0.9


def test_the_baseline_says_at_most_a_hundred_boxes(root):
    pytest.importorskip("pycocotools", reason="AP is judged by pycocotools")
    problem = Detection(options(image_size=320), root, CPU)
    problem.boxes[0] = torch.tensor([[0.0, 0, 8, 8]]).repeat(30, 1)
    problem.labels[0] = torch.zeros(30, dtype=torch.int64)
    usual = problem._usual_boxes()
    assert len(usual) == 6
    assert len(usual[0]["boxes"]) == 100
    assert (usual[0]["labels"] == 0).all()  # the commonest class first
    problem.labels = [torch.zeros_like(labels) for labels in problem.labels]
    assert not problem._usual_boxes()[0]["labels"].any()  # of no box of a class nothing is said


def cell(epochs=2):
    (cell,) = find("adamp-detection").cells("small", 1, ["adamp"])
    training = replace(cell.training, epochs=epochs, batch_size=2, evaluate_every=epochs)
    return replace(cell, options=options(), training=training)


def test_a_cell_resumes_to_the_same_bits_with_any_number_of_processes(
    root, monkeypatch, assert_resumes
):
    pytest.importorskip("pycocotools", reason="AP is judged by pycocotools")
    assert_resumes(cell(), root, Detection, 5, lambda: monkeypatch.setenv("NORMWISE_WORKERS", "2"))
