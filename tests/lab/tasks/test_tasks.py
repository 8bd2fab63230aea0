"""Augmentation, networks, classification and language modelling, against their definitions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from normwise.lab import augment
from normwise.lab.data.images import Labelled
from normwise.lab.data.texts import unigram_perplexity
from normwise.lab.errors import UsageError
from normwise.lab.networks import NETWORKS, build
from normwise.lab.tasks import classification, language
from normwise.lab.tasks.kinds import KINDS, kind

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Augmentation


def test_a_flip_mirrors_some_and_leaves_the_others():
    x = torch.randn(64, 3, 5, 7)
    y = augment.flip(x, generator())
    mirrored = [torch.equal(b, a.flip(2)) for a, b in zip(x, y, strict=True)]
    same = [torch.equal(b, a) for a, b in zip(x, y, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


def test_a_crop_is_a_window_of_the_padded_image():
    x = torch.randn(32, 2, 6, 6)
    y = augment.crop(x, generator(), padding=2)
    padded = torch.nn.functional.pad(x, [2] * 4)
    shifts = set()
    for image, cropped in zip(padded, y, strict=True):
        windows = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.equal(cropped, image[:, i : i + 6, j : j + 6])
        ]
        assert len(windows) == 1
        shifts.update(windows)
    assert len(shifts) > 10


def test_cutout_zeroes_a_square_cut_at_the_edges():
    y = augment.cutout(torch.ones(100, 3, 8, 8), generator())
    assert torch.equal(y[:, 0], y[:, 2])
    for hole in y[:, 0] == 0:
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns[None])
        assert 2 <= rows.sum() <= 4
    assert {int(h.sum()) for h in y[:, 0] == 0} >= {4, 16}


def test_mixup_mixes_images_and_targets_alike():
    x, y = torch.randn(16, 3, 4, 4), torch.eye(16)
    mixed, targets = augment.mixup(x, y, generator())
    # Each target says of which images, and in which shares, its image is made.
    assert torch.allclose(torch.einsum("nk,kchw->nchw", targets, x), mixed, atol=1e-6)
    assert torch.allclose(targets.sum(1), torch.ones(16))


def test_the_target_of_cutmix_is_the_share_of_pixels():
    images = torch.arange(8.0)[:, None, None, None].expand(8, 1, 9, 11)
    for seed in range(20):
        mixed, targets = augment.cutmix(images, torch.eye(8), generator(seed))
        for k in range(8):
            share = (mixed == k).flatten(1).double().mean(1)
            assert torch.allclose(targets[:, k].double(), share, atol=1e-6)


@pytest.mark.parametrize("name", [*augment.GEOMETRIC, *augment.MIXING])
def test_augmentation_draws_from_its_generator_alone(name):
    x, y = torch.randn(8, 3, 8, 8), torch.eye(8)

    def run(seed):
        if name in augment.GEOMETRIC:
            return augment.GEOMETRIC[name](x, generator(seed))
        return augment.MIXING[name](x, y, generator(seed))[0]

    before = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), before)


# Networks


@pytest.mark.parametrize("name", sorted({*NETWORKS} - {"resnet56", "resnet110", "wide_resnet34"}))
def test_every_network_gives_logits_and_learns_everywhere(name):
    spectra = {"harmonic": (40, 24), "harmonic64": (64, 24)}
    channels, shape = (1, spectra[name]) if name in spectra else (3, (16, 16))
    model = build(name, channels, 7, 2 if "resnext" in name else 4)
    out = model(torch.randn(3, channels, *shape))
    assert out.shape == (3, 7)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "width", "layers"),
    [("resnet20", 16, 20), ("resnet56", 16, 56), ("resnext29", 64, 29)],
)
def test_a_network_has_as_many_layers_as_its_name_says(name, width, layers):
    with torch.device("meta"):
        model = build(name, 3, 10, width)
    shortcuts = sum(
        isinstance(m, nn.Conv2d) and "shortcut" in path for path, m in model.named_modules()
    )
    weighted = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert weighted - shortcuts == layers


def test_published_sizes():
    """In millions: ResNet-20 0.27 (1512.03385), WRN-28-10 36.5 (1605.07146)."""
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in build(name, 3, 10, width).parameters()) / 1e6
            for name, width in (("resnet20", 16), ("wide_resnet28", 160))
        }
    assert counts["resnet20"] == pytest.approx(0.27, abs=0.005)
    assert counts["wide_resnet28"] == pytest.approx(36.5, abs=0.05)


def test_depthwise_convolutions_are_depthwise():
    for name in ("mobilenet", "shufflenet"):
        model = build(name, 3, 10, 8)
        depthwise = [
            m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels
        ]
        assert len(depthwise) >= 6


def test_the_harmonics_of_a_band_lie_at_multiples_of_its_frequency():
    model = build("harmonic", 1, 10, 4)
    stack = model[0]
    most = 2595 * math.log10(1 + 4000 / 700)
    hertz = [700 * (10 ** (k / 39 * most / 2595) - 1) for k in range(40)]
    for count in range(1, 5):
        for band in range(40):
            wanted = count * hertz[band]
            assert bool(stack.inside[count - 1, band]) == (wanted < 4000 * (1 - 1e-6))
            if wanted < 3990:
                nearest = min(
                    range(40),
                    key=lambda k: abs(
                        math.log10(1 + hertz[k] / 700) - math.log10(1 + wanted / 700)
                    ),
                )
                assert int(stack.index[count - 1, band]) == nearest
    with pytest.raises(ValueError, match="a spectrum has 1"):
        build("harmonic", 3, 10, 4)


def test_a_network_of_transformers_gives_its_logits(tmp_path):
    pytest.importorskip("transformers", reason="the network comes from transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build(f"hf:{tmp_path / 'config.json'}", 1, 7, 16)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_unknown_networks_and_tasks_get_a_suggestion():
    with pytest.raises(UsageError, match="did you mean 'resnet20'"):
        build("resnet-20", 3, 10, 16)
    with pytest.raises(UsageError, match="add --trust nowhere"):
        build("nowhere:net", 3, 10, 16)
    with pytest.raises(UsageError, match="did you mean 'language'"):
        kind("langage")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_names_what_it_is_judged_by(name):
    task = kind(name)
    assert task.name == name
    assert task.metrics
    assert all(metric.title for metric in task.metrics)


# Classification


@pytest.fixture
def small(monkeypatch):
    rng = np.random.default_rng(0)
    data = Labelled(
        "small",
        rng.integers(0, 256, (60, 3, 8, 8), dtype=np.uint8),
        rng.integers(0, 3, 60),
        rng.integers(0, 256, (700, 3, 8, 8), dtype=np.uint8),
        np.repeat([0, 1, 2], [100, 200, 400]),
        ("a", "b", "c"),
    )
    monkeypatch.setattr(classification, "load", lambda *_: data)
    return data


def problem(**options):
    given = {"data": "small", "network": "resnet8", "width": 4, **options}
    return classification.Classification(classification.ClassificationOptions(**given), None, CPU)


def test_inputs_are_standardized_by_channel(small):
    x, y = problem().batch(torch.arange(60), generator())
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert x.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert y.argmax(1).tolist() == small.train_labels.tolist()


def test_accuracy_and_wrong_examples_agree_with_a_loop(small):
    p = problem()
    evaluation = p.evaluate()
    p.model.eval()
    with torch.no_grad():
        wrong = [
            i
            for i in range(700)
            if int(p.model(p.standardized(p.data.test[i : i + 1])).argmax()) != small.test_labels[i]
        ]
    assert evaluation.wrong == wrong
    assert evaluation.metrics["accuracy"] == pytest.approx(1 - len(wrong) / 700)


def test_the_baseline_says_the_commonest_training_class(small):
    commonest = np.bincount(small.train_labels).argmax()
    assert problem().baseline["accuracy"] == np.mean(small.test_labels == commonest)


def test_subsets_are_the_same_every_time_and_not_too_large(small):
    first, second = problem(train_examples=20), problem(train_examples=20)
    assert torch.equal(first.data.train, second.data.train)
    assert first.examples == 20
    with pytest.raises(UsageError, match="61 examples are not allowed: there are 60"):
        problem(train_examples=61)


def test_shrunk_images_are_means_of_squares(small):
    p = problem(shrink=4)
    assert p.data.train.shape == (60, 3, 2, 2)
    assert float(p.data.test[5, 1, 0, 1]) == small.test[5, 1, :4, 4:].mean()
    assert problem(shrink=4).evaluate().metrics["accuracy"] >= 0
    with pytest.raises(UsageError, match="shrink 3 is not allowed: must divide 8 × 8"):
        problem(shrink=3)
    with pytest.raises(UsageError, match="shrink 0 is not allowed"):
        problem(shrink=0)


def test_an_epoch_takes_every_example_once():
    p = type("P", (classification.Classification,), {"__init__": lambda self: None})()
    p.examples = 10
    batches = p.batches(3, generator())
    assert batches.shape == (3, 3)
    assert len(set(batches.flatten().tolist())) == 9


# Language

OPTIONS = language.LanguageOptions("t", context=6, layers=2, width=8, heads=2)


def test_a_prediction_does_not_see_what_follows():
    model = language.Transformer(11, OPTIONS).eval()
    tokens = torch.randint(11, (2, 6))
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


def test_windows_overlap_in_the_token_that_is_only_predicted():
    windows = language._windows(torch.arange(14), 6)
    assert windows.tolist() == [[0, 1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 11, 12]]
    with pytest.raises(UsageError, match="6 tokens are too few for a context of 6"):
        language._windows(torch.arange(6), 6)


def test_unigram_perplexity_of_even_counts_is_the_vocabulary():
    train = torch.arange(8).repeat(50)
    assert unigram_perplexity(train, train, 8) == pytest.approx(8)
    # Two of three tokens are a: −⅔·log ⅗ − ⅓·log ⅖ with one added to each count.
    train = torch.tensor([0, 0, 1])
    expected = math.exp(-(2 * math.log(3 / 5) + math.log(2 / 5)) / 3)
    assert unigram_perplexity(train, train, 2) == pytest.approx(expected)


def test_perplexity_is_that_of_a_loop_over_tokens(monkeypatch):
    from normwise.lab.data.texts import encode

    letters = list("the cat sat on the mat and the rat ran at the cat again and again ")
    text = encode("t", [letters * 3, letters * 5])
    monkeypatch.setattr(language, "_load", lambda *_: text)
    p = language.Language(OPTIONS, None, CPU)
    perplexity = p.evaluate().metrics["perplexity"]
    total, count = 0.0, 0
    with torch.no_grad():
        for window in p.test:
            for k in range(1, 7):
                scores = p.model(window[None, :k])[0, -1].double()
                total -= float(scores.log_softmax(0)[window[k]])
                count += 1
    assert count == 6 * len(p.test)
    assert perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
