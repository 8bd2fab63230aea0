"""The sets of retrieval papers: read as published or refused, and streamed to the same bits."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from normwise.lab.data import folders
from normwise.lab.data.files import DataError
from normwise.lab.data.matlab import read_records
from normwise.lab.data.retrieval import Items, Split, cars, cub, inshop, sop
from normwise.lab.errors import UsageError
from normwise.lab.recipes import find
from normwise.lab.tasks import retrieval
from normwise.lab.tasks.retrieval import Retrieval, RetrievalOptions, hits

CPU = torch.device("cpu")
rng = np.random.default_rng(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("NORMWISE_WORKERS", "0")


def draw(path, k):
    """A noisy image of class ``k``: a pattern of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pattern = np.random.default_rng(k).integers(30, 226, (4, 5, 1)).repeat(6, 0).repeat(6, 1)
    pixels = rng.normal(pattern, 10, (24, 30, 3)).clip(0, 255).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(path)


def write_cub(root):
    folder = root / "CUB_200_2011"
    names, classes = [], []
    for k in (1, 7, 100, 101, 200):
        for i in range(3):
            names.append(f"{k:03}.Bird/Bird_{i}.jpg")
            classes.append(k)
            draw(folder / "images" / names[-1], k)
    (folder / "images.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names, 1)))
    text = "".join(f"{i} {k}\n" for i, k in enumerate(classes, 1))
    (folder / "image_class_labels.txt").write_text(text)
    return folder


def write_cars(root, classes=(196, 1, 98, 99, 1), packed=True):
    from scipy.io import savemat

    folder = root / "cars"
    folder.mkdir(exist_ok=True)
    kinds = [(name, object) for name in ("relative_im_path", "bbox_x1", "class", "test")]
    rows = [(f"car_ims/{i:06}.jpg", 3, k, 0) for i, k in enumerate(classes, 1)]
    names = np.array([f"car {k}" for k in range(1, 197)], object)
    content = {"annotations": np.array(rows, kinds), "class_names": names}
    savemat(folder / "cars_annos.mat", content, do_compression=packed)
    return folder


def write_sop(root):
    folder = root / "Stanford_Online_Products"
    for part, classes in (("train", (1, 2, 3)), ("test", (11319, 11320))):
        lines = ["image_id class_id super_class_id path"]
        for k in classes:
            for i in range(2 + k % 3):
                lines.append(f"{len(lines)} {k} 1 bicycle_final/{k}_{i}.JPG")
                draw(folder / "bicycle_final" / f"{k}_{i}.JPG", k)
        (folder / f"Ebay_{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


INSHOP = [
    *(
        (f"img/MEN/Pants/id_{k:08}/{i}_front.jpg", f"id_{k:08}", "train")
        for k in (1, 4)
        for i in (1, 2, 3)
    ),
    *(
        (f"img/MEN/Pants/id_{k:08}/{i}_front.jpg", f"id_{k:08}", part)
        for k in (2, 5, 9)
        for i, part in enumerate(("query", "gallery", "gallery"))
    ),
]


def write_inshop(root, rows=INSHOP, count=None, outer=True):
    folder = root / "inshop"
    place = folder / "Eval" if outer else folder
    place.mkdir(parents=True)
    head = f"{len(rows) if count is None else count}\nimage_name item_id evaluation_status\n"
    text = "".join(f"{name}    {item} {part}\n" for name, item, part in rows)
    (place / "list_eval_partition.txt").write_text(head + text)
    for name, item, _ in rows:
        draw((folder / "Img" if outer else folder) / name, int(item[3:]))
    return place / "list_eval_partition.txt"


# Reading


def test_cub_is_split_at_the_hundredth_class(tmp_path):
    folder = write_cub(tmp_path)
    split = cub(tmp_path)
    assert split.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert split.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert split.test.paths[0] == str(folder / "images" / "101.Bird" / "Bird_0.jpg")
    assert split.gallery is None
    fewer = split.train.first(2)
    assert (fewer.paths, fewer.labels.tolist()) == (split.train.paths[:6], [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("images.txt", lambda t: t[:-40], r"images.txt differ: image \d+ is in one of them only"),
        ("images.txt", lambda t: t.replace(" ", "", 1), r"images.txt: line 1 is .* 2 columns"),
        ("images.txt", lambda t: t.replace("Bird_0", "Bi rd"), r"line 1 is .* 2 columns"),
        ("image_class_labels.txt", lambda t: t.replace(" 200", " 201"), r"line 13 has class '201'"),
        ("image_class_labels.txt", lambda t: t.replace(" 7", " x"), r"line 4 has class 'x'; must"),
        ("image_class_labels.txt", lambda t: t.replace(" 1\n", " 101\n"), None),
        ("image_class_labels.txt", lambda t: "\n".join(f"{i} 5" for i in range(1, 16)), "to test"),
        ("image_class_labels.txt", lambda t: "", "in one of them only"),
    ],
)
def test_damaged_lists_of_cub_are_refused(tmp_path, name, change, words):
    path = write_cub(tmp_path) / name
    path.write_text(change(path.read_text()))
    if words is None:
        assert len(cub(tmp_path).test.paths) == 9
        return
    with pytest.raises(DataError, match=words):
        cub(tmp_path)


def test_what_is_no_text_or_not_there_is_refused(tmp_path):
    for reader, name in ((cub, "cub"), (cars, "cars"), (sop, "sop"), (inshop, "inshop")):
        with pytest.raises(DataError, match=f"data set '{name}' not found.*data fetch {name}"):
            reader(tmp_path)
    folder = write_cub(tmp_path)
    (folder / "images.txt").write_bytes(b"\xff\xfe1 a\n")
    with pytest.raises(DataError, match=r"images\.txt is not UTF-8"):
        cub(tmp_path)


def test_cars_are_split_at_class_98(tmp_path):
    folder = write_cars(tmp_path)
    split = cars(tmp_path)
    assert split.train.labels.tolist() == [0, 1, 0]
    assert split.test.labels.tolist() == [1, 0]
    assert split.test.paths == tuple(os.path.join(folder, f"car_ims/{i:06}.jpg") for i in (1, 4))


@pytest.mark.parametrize("label", [0, 197, "x"])
def test_a_car_of_no_class_is_refused(tmp_path, label):
    write_cars(tmp_path, (1, label, 99))
    with pytest.raises(DataError, match=rf"annotation 1 has class .*{label}.* from 1 to 196"):
        cars(tmp_path)


class Payload:
    """Something that creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_damaged_mat_file_is_refused_and_a_pickle_not_run(tmp_path):
    path = write_cars(tmp_path) / "cars_annos.mat"
    whole = path.read_bytes()
    victim = tmp_path / "victim"
    for content in (whole[:250], whole[:100], b"", pickle.dumps(Payload(str(victim)))):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cars_annos\.mat (is damaged|is not|has no)") as error:
            cars(tmp_path)
        assert "\n" not in str(error.value)
    assert not victim.exists()
    path.write_bytes(whole[:128])
    with pytest.raises(DataError, match="has no variable 'annotations'"):
        cars(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_no_change_of_a_mat_file_does_more_than_an_error(tmp_path, packed):
    """Some of these files end scipy's reader with a segmentation fault."""
    path = write_cars(tmp_path, packed=packed) / "cars_annos.mat"
    whole = path.read_bytes()
    draws = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        for place in draws.integers(128, len(whole), 3):
            changed[place] = draws.integers(256)
        path.write_bytes(changed[: draws.integers(128, 3 * len(whole))])
        try:
            cars(tmp_path)
        except DataError:
            refused += 1
    assert refused > 30


def test_records_are_those_that_matlab_wrote():
    """Files that scipy keeps for its own tests: of several versions, in both orders of bytes."""
    import scipy.io.matlab

    places = [Path(place) / "tests" / "data" for place in scipy.io.matlab.__path__]
    found = [file for place in places for file in place.glob("teststructarr_*.mat")]
    if not found:
        pytest.skip("this scipy comes without its tests")
    for file in found:
        one, two = read_records(file, "teststructarr")
        assert one == {"one": 1, "two": 2}
        assert two == {"one": "number 1", "two": "number 2"}
        with pytest.raises(DataError, match="no variable 'other'"):
            read_records(file, "other")


def test_sop_is_split_by_its_two_lists(tmp_path):
    folder = write_sop(tmp_path)
    split = sop(tmp_path)
    assert split.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert split.test.labels.tolist() == [0, 0, 1, 1, 1]
    assert split.train.paths[0] == str(folder / "bicycle_final" / "1_0.JPG")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.replace("class_id", "class"), r"Ebay_test.txt has no line 'image_id class_id"),
        (lambda t: t[:-30], r"Ebay_test.txt: line 6 is .* 4 columns"),
        (lambda t: t.replace(" 11320 ", " 3 "), r"lists class 3 both to learn and to test on"),
        (lambda t: t.replace(" 11320 ", " 22635 "), r"line 4 has class '22635'"),
        (lambda t: t.splitlines()[0], r"lists no image to test on"),
    ],
)
def test_damaged_lists_of_sop_are_refused(tmp_path, change, words):
    path = write_sop(tmp_path) / "Ebay_test.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=words):
        sop(tmp_path)


@pytest.mark.parametrize("outer", [True, False])
def test_inshop_has_queries_and_a_gallery(tmp_path, outer):
    write_inshop(tmp_path, outer=outer)
    split = inshop(tmp_path)
    assert split.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert split.test.labels.tolist() == [0, 1, 2]
    assert split.gallery.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert all(map(os.path.exists, split.train.paths + split.test.paths + split.gallery.paths))


@pytest.mark.parametrize(
    ("rows", "count", "words"),
    [
        (INSHOP, 16, r"has 15 images and says 16: it is truncated"),
        (
            [*INSHOP[:-1], (*INSHOP[-1][:2], "galery")],
            None,
            r"line 17 has 'galery'; must be one of",
        ),
        (
            [*INSHOP, ("img/x.jpg", "id_00000001", "query")],
            None,
            r"'id_00000001' both to learn and",
        ),
        (INSHOP[:6], None, "lists no image to test on"),
        ([row for row in INSHOP if row[2] != "gallery"], None, "lists no image in its gallery"),
    ],
)
def test_a_damaged_list_of_inshop_is_refused(tmp_path, rows, count, words):
    write_inshop(tmp_path, rows, count)
    with pytest.raises(DataError, match=words):
        inshop(tmp_path)


# The task


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_cub(root)
    write_sop(root)
    write_inshop(root)
    return root


def options(**given):
    return RetrievalOptions(
        **{"data": "cub", "network": "resnet8", "loss": "triplet", "width": 4, "image_size": 8}
        | {"embedding": 8, "images_per_class": 2}
        | given
    )


def test_only_images_of_the_gallery_are_neighbours():
    # The query nearest to each query is of its class, and the image of the gallery is not.
    queries, labels = torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), torch.tensor([0, 0, 1])
    gallery = torch.tensor([[1.0, 0.05], [0.1, 1]]), torch.tensor([1, 1])
    assert hits(queries, labels, 1).tolist() == [True, True, False]
    assert hits(queries, labels, 1, gallery).tolist() == [False, False, True]
    # An image of the gallery that coincides with a query counts, for it is another image.
    assert hits(queries, labels, 1, (queries, labels)).all()
    assert hits(queries, labels, 4, gallery).tolist() == [False, False, True]


def test_inshop_is_judged_by_its_queries(root):
    pytest.importorskip("pytorch_metric_learning", reason="the losses come from it")
    problem = Retrieval(options(data="inshop"), root, CPU)
    assert problem.facts == {
        "data": "inshop",
        "train_examples": 6,
        "test_examples": 3,
        "train_classes": 2,
        "test_classes": 3,
        "gallery_examples": 6,
    }
    # Each item has a pattern of its own.
    assert problem.baseline == {"recall_at_1": 1.0, "recall_at_4": 1.0}
    problem.test_labels[:3] = 7  # an item that is not in the gallery
    evaluation = problem.evaluate()
    assert evaluation.metrics == {"recall_at_1": 0.0, "recall_at_4": 0.0}
    assert evaluation.wrong == [0, 1, 2]
    fewer = Retrieval(options(data="inshop", test_classes=2), root, CPU)
    assert (fewer.facts["test_examples"], fewer.facts["gallery_examples"]) == (2, 4)


def test_classes_held_out_are_the_last_of_those_to_learn_on(root, monkeypatch):
    """And not in the test set, nor in a gallery."""
    pytest.importorskip("pytorch_metric_learning", reason="the losses come from it")
    files = Retrieval(options(), root, CPU).data.train[:5]
    learned = Items(files, np.array([2, 0, 3, 1, 3]))
    split = Split(learned, test=Items(files[:2], np.array([0, 1])), gallery=learned)
    monkeypatch.setattr(retrieval, "_list", lambda *_: split)
    problem = Retrieval(options(held_out=0.5), root, CPU)
    assert (problem.data.train, problem.labels.tolist()) == ((files[1], files[3]), [0, 1])
    assert problem.data.test == (files[0], files[2], files[4])
    assert problem.test_labels.tolist() == [0, 1, 1]
    assert problem.queries is None
    with pytest.raises(UsageError, match=r"held_out 0\.25 is not allowed: of 4 classes 3 are left"):
        Retrieval(options(held_out=0.25), root, CPU)


def test_held_drawings_are_held_out_by_their_classes(monkeypatch):
    pytest.importorskip("pytorch_metric_learning", reason="the losses come from it")
    images = torch.arange(10.0)[:, None, None, None].expand(10, 1, 8, 8).repeat_interleave(2, 0)
    labels = torch.arange(10).repeat_interleave(2)
    monkeypatch.setattr(retrieval, "_load", lambda *_: (images, labels, images[:2], labels[:2]))
    problem = Retrieval(options(data="omniglot", held_out=0.3), None, CPU)
    assert problem.labels.unique().tolist() == list(range(7))
    assert problem.test_labels.unique().tolist() == [7, 8, 9]
    assert problem.data.test[:, 0, 0, 0].unique().tolist() == [7, 8, 9]


def test_small_classes_are_drawn_from_with_replacement():
    problem = object.__new__(Retrieval)  # without the data
    problem.options = options(images_per_class=4)
    problem.members = (torch.arange(2), torch.arange(2, 8), torch.arange(8, 12))
    problem.examples = 120
    batches = problem.batches(12, generator())
    assert batches.shape == (10, 12)
    for batch in batches:
        few, many, exact = ([i for i in batch.tolist() if i in own] for own in problem.members)
        assert (len(few), len(many), len(exact)) == (4, 4, 4)
        assert len(set(many)) == len(set(exact)) == 4
    assert set(batches.flatten().tolist()) == set(range(12))
    assert torch.equal(problem.batches(12, generator()), batches)
    with pytest.raises(UsageError, match=r"4 images each of at most 3 classes"):
        problem.batches(16, generator())


def test_classes_of_equal_size_are_drawn_from_as_in_one_table():
    """What the recipes' results on Omniglot and CIFAR-100 were drawn by."""
    problem = object.__new__(Retrieval)
    problem.options = options(images_per_class=4)
    problem.members, problem.examples = torch.arange(200).view(10, 20), 200
    draw = generator(3)
    expected = []
    for _ in range(8):
        some = problem.members[torch.randperm(10, generator=draw)[:6]]
        order = torch.rand(some.shape, generator=draw).argsort(1)[:, :4]
        expected.append(some.gather(1, order).flatten())
    assert torch.equal(problem.batches(24, generator(3)), torch.stack(expected))


def test_streamed_images_are_opened_as_they_are_needed(root, monkeypatch):
    pytest.importorskip("pytorch_metric_learning", reason="the losses come from it")
    planes, opened = folders._planes, []
    monkeypatch.setattr(folders, "_planes", lambda *a: opened.append(a[0]) or planes(*a))
    problem = Retrieval(options(data="sop"), root, CPU)
    # The baseline has seen the test images, and keeps small ones in grey.
    assert opened == list(problem.data.test)
    assert problem._pixels().shape == (5, 1, 16, 16)
    opened.clear()
    steps = problem.batches(4, generator())
    assert steps.shape == (2, 4)
    streamed = list(problem.stream(steps, [generator(1), generator(2)]))
    assert opened == [problem.data.train[i] for i in steps.flatten().tolist()]
    for chosen, seed, (x, y) in zip(steps, (1, 2), streamed, strict=True):
        assert x.shape == (4, 3, 8, 8)
        assert y.tolist() == problem.labels[chosen].tolist()
        alone, _ = problem.batch(chosen, generator(seed))
        assert torch.equal(alone, x)
    assert not torch.equal(problem.batch(steps[0], generator(9))[0], streamed[0][0])
    with pytest.raises(UsageError, match="image_size 0 is not allowed"):
        options(image_size=0)


def test_a_missing_image_is_named_when_its_turn_comes(tmp_path):
    pytest.importorskip("pytorch_metric_learning", reason="the losses come from it")
    folder = write_cub(tmp_path)
    (folder / "images" / "007.Bird" / "Bird_1.jpg").unlink()
    problem = Retrieval(options(), tmp_path, CPU)
    problem.batch(torch.arange(3), generator())
    with pytest.raises(DataError, match=r"007\.Bird.Bird_1\.jpg cannot be decoded"):
        problem.batch(torch.arange(6), generator())


def test_a_cell_resumes_to_the_same_bits_with_any_number_of_processes(
    root, monkeypatch, assert_resumes
):
    pytest.importorskip("pytorch_metric_learning", reason="the losses come from it")
    (cell,) = find("adamp-retrieval").cells("small", 1, ["adamp"], ["omniglot-proxy-anchor"])
    training = replace(cell.training, epochs=2, batch_size=4, evaluate_every=1)
    given = options(data="sop", loss="proxy-anchor")
    cell = replace(cell, options=given, training=training)
    assert_resumes(cell, root, Retrieval, 4, lambda: monkeypatch.setenv("NORMWISE_WORKERS", "2"))


def test_the_papers_own_rows_are_at_its_scale():
    recipe = find("adamp-retrieval")
    rows = recipe.scales["paper"].rows
    assert set(recipe.paper.rows) <= set(rows)
    for cell in recipe.cells("paper", 1):
        assert cell.row == f"{cell.options.data}-{cell.options.loss}"
        assert cell.options.image_size == 224
    for name in ("adamp-detection", "epsilon-table-7-8"):
        for cell in find(name).cells("paper", 1):
            assert (cell.options.data, cell.options.image_size) == ("coco", 512)
        assert all(cell.options.data == "bccd" for cell in find(name).cells("small", 1))
