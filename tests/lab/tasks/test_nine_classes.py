"""Nine classes of ImageNet: the published mapping, clusters, and what each network sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normwise.lab.data.files import DataError
from normwise.lab.data.nine_classes import CLASSES, SYNSETS, nine_classes
from normwise.lab.dependence import hsic
from normwise.lab.errors import UsageError
from normwise.lab.networks import build
from normwise.lab.recipes import find
from normwise.lab.running.cell import run_cell
from normwise.lab.tasks.nine_classes import (
    NineClasses,
    NineClassesOptions,
    _scaled,
    _Seen,
    unbiased_accuracy,
)

CPU = torch.device("cpu")
SYNSETS_IN_ORDER = sorted(s for own in SYNSETS.values() for s in own)
CLASS_OF = {s: k for k, own in enumerate(SYNSETS.values()) for s in own}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMWISE_WORKERS", "0")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain images, each of a colour of its class, and clusters in turn."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    rows = ["path,category,cluster1,cluster2,cluster3"]

    def image(path: Path, synset: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = np.array([CLASS_OF[synset] * 28, 255 - CLASS_OF[synset] * 28, 100])
        pixels = np.clip(colour + draw.integers(-20, 20, (24, 24, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path)

    for number, synset in enumerate(SYNSETS_IN_ORDER):
        for i in range(2):
            image(folder / "imagenet" / "train" / synset / f"{i}.png", synset)
        name = f"{synset}/ILSVRC2012_val_{number:08}.JPEG"
        image(folder / "imagenet" / "val" / name, synset)
        clusters = f"{number % 2},{number % 3},{number % 9}"
        rows.append(f"{name},{CLASSES[CLASS_OF[synset]]},{clusters}")
        if number % 5 == 0:
            image(folder / "imagenet-a" / synset / "a.png", synset)
    image(folder / "imagenet" / "train" / "n00000000" / "other.png", SYNSETS_IN_ORDER[0])
    (folder / "9class_imagenet_val.csv").write_text("\n".join(rows) + "\n")
    return folder


def parts(root: Path) -> tuple[Path, Path, Path]:
    return root / "imagenet", root / "imagenet-a", root / "9class_imagenet_val.csv"


def test_nine_classes_are_42_synsets_as_published() -> None:
    """In the order of the published numbers."""
    published = ["dog", "cat", "frog", "turtle", "bird", "monkey", "fish", "crab", "insect"]
    assert list(CLASSES) == published
    assert [len(own) for own in SYNSETS.values()] == [5, 5, 3, 5, 5, 5, 5, 4, 5]
    assert len(set(SYNSETS_IN_ORDER)) == 42
    # ImageNet's order is that of the synsets, and the published ranges of classes follow it.
    for own in SYNSETS.values():
        assert list(own) == sorted(own)


def test_images_have_the_class_of_their_synset_and_their_clusters(root: Path) -> None:
    data = nine_classes(*parts(root))
    for paths, labels in (data.train, data.test, data.hard):
        assert [CLASS_OF[Path(path).parent.name] for path in paths] == labels.tolist()
    assert (len(data.train[0]), len(data.test[0]), len(data.hard[0])) == (84, 42, 9)
    assert data.clusters.tolist() == [[n % k for n in range(42)] for k in (2, 3, 9)]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("path,category", "file,category", "does not begin with the columns path"),
        (",0,0,0\n", ",0,0\n", "line 2, is"),
        (",0,0,0\n", ",0,0,x\n", "line 2, is"),
        ("frog", "dog", "line 2, has .* as 'dog'"),
        (f"{SYNSETS_IN_ORDER[0]}/ILSVRC2012_val_00000000", "", "line 2, has"),
        ("val_00000000", "val_1", "lacks 1 images of .*val_00000000"),
    ],
)
def test_a_damaged_table_is_refused(
    root: Path, tmp_path: Path, old: str, new: str, words: str
) -> None:
    text = parts(root)[2].read_text()
    assert old in text
    (tmp_path / "table.csv").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=words):
        nine_classes(*parts(root)[:2], tmp_path / "table.csv")


def test_a_missing_folder_or_synset_is_named(root: Path, tmp_path: Path) -> None:
    imagenet, hard, table = parts(root)
    with pytest.raises(DataError, match="nowhere/train is not there"):
        nine_classes(tmp_path / "nowhere", hard, table)
    (tmp_path / "train" / SYNSETS_IN_ORDER[0]).mkdir(parents=True)
    with pytest.raises(DataError, match=f"lacks 41 synsets.*{SYNSETS_IN_ORDER[1]}"):
        nine_classes(tmp_path, hard, table)
    with pytest.raises(DataError, match="lacks 42 synsets"):
        nine_classes(imagenet, tmp_path, table)


def test_unbiased_accuracy_is_the_mean_over_pairs_of_class_and_cluster() -> None:
    """By a loop; pairs of few images do not count."""
    draw = torch.Generator().manual_seed(0)
    labels, right = torch.randint(3, (200,), generator=draw), torch.rand(200, generator=draw) < 0.6
    clusters = torch.randint(4, (2, 200), generator=draw).square()
    means = []
    for own in clusters:
        found = []
        for label in range(3):
            for cluster in range(10):
                pair = (labels == label) & (own == cluster)
                if pair.sum() >= 15:
                    found.append(float(right[pair].double().mean()))
        assert 0 < len(found) < 12
        means.append(sum(found) / len(found))
    expected = sum(means) / 2
    assert unbiased_accuracy(right, labels, clusters, 15) == pytest.approx(expected)
    assert math.isnan(unbiased_accuracy(right, labels, clusters, 201))


def test_a_rare_texture_weighs_as_much_as_a_frequent_one() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    clusters = torch.zeros(1, 100, dtype=torch.int64)
    clusters[0, 90:] = 1
    right = torch.arange(100) < 90
    assert unbiased_accuracy(right, labels, clusters) == 0.5


def test_the_bagnet_sees_five_by_five_pixels() -> None:
    torch.manual_seed(0)
    body = build("bagnet18", 3, 9, 4)[:-3].eval()
    x = torch.randn(1, 3, 65, 65, requires_grad=True)
    places = body(x)
    assert places.shape[2] > 4
    (gradient,) = torch.autograd.grad(places[0, :, 2, 3].square().sum(), x)
    touched = gradient[0].abs().sum(0) > 0
    rows, columns = touched.any(1).nonzero(), touched.any(0).nonzero()
    assert int(rows.max() - rows.min()) < 5
    assert int(columns.max() - columns.min()) < 5
    assert touched.sum() > 1


@pytest.mark.parametrize("name", ["resnet8", "bagnet18"])
def test_features_are_what_the_classifier_sees(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, 3, 9, 4).eval()
    x = torch.randn(2, 3, 32, 32)
    whole = network(x)
    logits, features = _Seen(network, name).eval()(x)
    torch.testing.assert_close(logits, whole)
    assert features.shape[0] == 2
    assert features.shape[1] != 9


def test_a_network_without_a_classifier_is_refused() -> None:
    with pytest.raises(UsageError, match="no linear layer"):
        _Seen(nn.Sequential(nn.Conv2d(3, 3, 1)), "mine")


def test_the_dependence_does_not_change_with_the_unit_of_the_features() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, 5, generator=draw)
    once, other = (hsic(_scaled(x), _scaled(k * y)) for k in (1, 1000))
    torch.testing.assert_close(once, other)
    assert hsic(x, 1000 * y).abs() < 1e-3 * other.abs(), "without it the kernel vanishes"


def options(**given: Any) -> NineClassesOptions:
    return NineClassesOptions(
        **{"network": "resnet8", "width": 4, "image_size": 16, "least_images": 1, **given}
    )


def test_each_network_follows_its_own_part_of_the_loss(root: Path) -> None:
    torch.manual_seed(0)
    p = NineClasses(options(penalty=3.0), root, CPU)
    x, y = p.batch(torch.arange(0, 84, 7), torch.Generator().manual_seed(0))
    p.model.train()
    p.loss((x, y)).backward()
    for key, sign in (("f", 1), ("g", -1)):
        other = "g" if key == "f" else "f"
        logits, seen = p.model[key](x)
        with torch.no_grad():
            held = _scaled(p.model[other](x)[1])
        own = torch.nn.functional.cross_entropy(logits, y) + sign * 3 * hsic(_scaled(seen), held)
        parameters = list(p.model[key].parameters())
        for q, g in zip(parameters, torch.autograd.grad(own, parameters), strict=True):
            torch.testing.assert_close(q.grad, g, rtol=1e-3, atol=1e-4)


def test_accuracies_are_those_of_a_loop(root: Path) -> None:
    torch.manual_seed(0)
    p = NineClasses(options(), root, CPU)
    p.model.eval()
    right = []
    with torch.no_grad():
        for x, y in p.data.test_parts():
            for one, label in zip(x, y, strict=True):
                logits = p.model["f"](p.data.standardized(one[None]))[0]
                right.append(int(logits.argmax()) == int(label))
    metrics = p.evaluate().metrics
    assert len(right) == 51
    assert metrics["biased_accuracy"] == pytest.approx(sum(right[:42]) / 42)
    assert metrics["imagenet_a_accuracy"] == pytest.approx(sum(right[42:]) / 9)
    assert p.baseline["biased_accuracy"] == pytest.approx(5 / 42)


def cell() -> Any:
    (made,) = find("adamp-nine-classes").cells("small", 1, ["adamp"])
    training = replace(made.training, epochs=2, batch_size=14, lr=1e-2, evaluate_every=2)
    return replace(made, training=training, options=options())


def test_an_interrupted_run_ends_in_the_same_bits(
    root: Path, assert_resumes: Callable[..., None]
) -> None:
    made = cell()
    made = replace(made, training=replace(made.training, epochs=1))
    assert_resumes(made, root, NineClasses, 4, lambda: torch.rand(3))


def test_colours_are_learnt(root: Path, tmp_path: Path) -> None:
    made = cell()
    made = replace(made, training=replace(made.training, epochs=6, evaluate_every=6))
    result = run_cell(made, tmp_path, root)
    assert result["metrics"]["biased_accuracy"] > result["baseline"]["biased_accuracy"] + 0.2


def test_a_mistake_in_the_options_is_shown(root: Path) -> None:
    for given in ({"penalty": -1.0}, {"width": 0}, {"least_images": 0}):
        with pytest.raises(UsageError, match=next(iter(given))):
            options(**given)
    with pytest.raises(UsageError, match="no class and cluster share as many"):
        NineClasses(options(least_images=50), root, CPU)
