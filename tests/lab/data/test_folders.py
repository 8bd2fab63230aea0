"""ImageNet-style folders: listed at once, decoded when needed, the same bits from any processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import PIL.Image
import pytest
import torch

from normwise.lab.data import folders
from normwise.lab.data.files import DataError
from normwise.lab.data.folders import Decoder, Job, crop_numbers, crop_of, image_folder
from normwise.lab.errors import UsageError
from normwise.lab.recipes import find
from normwise.lab.running import cell as running
from normwise.lab.running.cell import run_cell
from normwise.lab.tasks.adversarial import Adversarial, AdversarialOptions
from normwise.lab.tasks.classification import Classification, ClassificationOptions

CPU = torch.device("cpu")
CLASSES = ("ant", "bee")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of 2 × 12 JPEG and PNG images of noise to train on, and 2 × 3 to test on."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 3)):
        for name in CLASSES:
            folder = root / "tiny" / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (20 + k, 37 - k, 3), dtype=np.uint8)
                image = PIL.Image.fromarray(pixels)
                image.save(folder / (f"{k:02}.JPEG" if k % 2 else f"{k:02}.png"))
            (folder / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def opened(monkeypatch):
    """The files that were opened as images."""
    monkeypatch.setenv("NORMWISE_WORKERS", "0")
    original, paths = PIL.Image.open, []

    def noted(path):
        paths.append(path)
        return original(path)

    monkeypatch.setattr(PIL.Image, "open", noted)
    return paths


@pytest.fixture(scope="module")
def two():
    return Decoder(8, 2)


def options(**given):
    return ClassificationOptions("folder:tiny", "resnet8", **{"width": 4, "image_size": 8, **given})


# Listing


def test_listing_sorts_and_opens_no_image(root, opened):
    data = image_folder(root / "tiny")
    assert data.classes == CLASSES
    assert list(data.train) == sorted(data.train)
    assert (len(data.train), len(data.test)) == (24, 6)
    assert data.train_labels.tolist() == [0] * 12 + [1] * 12
    assert data.train[1].endswith(os.path.join("train", "ant", "01.JPEG"))
    assert opened == []


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match="no folder 'train'"):
        image_folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no folder 'test'"):
        image_folder(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="has no folders"):
        image_folder(tmp_path)
    (tmp_path / "train" / "ant").mkdir()
    with pytest.raises(DataError, match="'ant' is in one of them only"):
        image_folder(tmp_path)
    (tmp_path / "val" / "ant").mkdir()
    with pytest.raises(DataError, match="ant has no images"):
        image_folder(tmp_path)


# Decoding


def test_random_crops_have_the_stated_areas_and_aspects():
    crops = np.array([crop_of(400, 300, n) for n in crop_numbers(4000, generator()).tolist()])
    left, top, right, bottom = crops.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 400
    assert bottom.max() <= 300
    width, height = right - left, bottom - top
    area, aspect = width * height / 120_000, width / height
    # Rounding to pixels moves both a little.
    assert 0.08 <= area.min() + 0.002 <= 0.1
    assert area.max() > 0.95
    assert 0.75 <= aspect.min() + 0.01 <= 0.78
    assert 1.3 <= aspect.max() - 0.01 <= 4 / 3
    # Up to half of the image every crop fits, so that nothing favours small ones.
    assert np.mean(area < 0.29) == pytest.approx(np.mean((area >= 0.29) & (area < 0.5)), rel=0.15)
    # Small crops lie anywhere.
    small = area < 0.15
    assert (left[small] / (400 - width[small])).mean() == pytest.approx(0.5, abs=0.05)


def test_where_no_crop_fits_it_is_central():
    numbers = [0.999] * 22
    assert crop_of(1000, 100, numbers) == (433, 0, 566, 100)
    assert crop_of(100, 1000, numbers) == (0, 433, 100, 566)
    assert crop_of(1, 1, [0.0] * 22) == (0, 0, 1, 1)


def test_a_training_image_is_its_crop_scaled(tmp_path):
    across, down = np.meshgrid(np.arange(200), np.arange(100))
    pixels = np.stack([across, down, 0 * down], 2).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "x.png")
    for numbers in crop_numbers(20, generator()):
        left, top, right, bottom = crop_of(200, 100, numbers)
        job = Job([str(tmp_path / "x.png")], numbers[None])
        (x,) = next(Decoder(8, 0).run([job])).float()
        # Its first and last pixels are half a pixel of its own from the edges of the crop.
        half = (right - left) / 16
        assert x[0].mean() == pytest.approx((left + right - 1) / 2, abs=1)
        assert x[1].mean() == pytest.approx((top + bottom - 1) / 2, abs=1)
        assert x[0, 0, 0] == pytest.approx(left + half - 0.5, abs=0.2 * half + 1)
        assert x[0, 0, -1] == pytest.approx(right - half - 0.5, abs=0.2 * half + 1)


def test_a_test_image_is_scaled_by_its_shorter_side_and_cut_in_the_middle(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "x.png")
    jobs = [Job([str(tmp_path / "x.png")])]
    # 28 · 256/224 = 32: nothing is scaled.
    (x,) = next(Decoder(28, 0).run(jobs))
    assert np.array_equal(x, pixels[2:30, 10:38].transpose(2, 0, 1))
    # 14 · 256/224 = 16: both sides halve, and 7 pixels at each end of the longer one are cut.
    flat = np.repeat(np.arange(48, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2)
    PIL.Image.fromarray(flat).save(tmp_path / "x.png")
    (x,) = next(Decoder(14, 0).run(jobs)).float()
    assert torch.allclose(x[0, 5], 2 * torch.arange(5, 19) + 0.5, atol=1)


def test_grey_and_palette_images_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK"):
        PIL.Image.new(mode, (9, 9), 0).save(
            tmp_path / (f"{mode}.{'png' if mode != 'CMYK' else 'jpg'}")
        )
    paths = sorted(map(str, tmp_path.iterdir()))
    jobs = [Job(paths), Job(paths, crop_numbers(len(paths), generator()))]
    assert [x.shape for x in Decoder(4, 0).run(jobs)] == [(4, 3, 4, 4)] * 2


def test_any_number_of_processes_makes_the_same_images_and_draws_nothing(root, two):
    paths = image_folder(root / "tiny").train
    state = torch.get_rng_state()

    def images(decoder):
        jobs = (Job(paths[k : k + 5], crop_numbers(5, generator(k))) for k in range(0, 20, 5))
        return torch.stack(list(decoder.run(jobs)))

    alone = images(Decoder(8, 0))
    assert alone.shape == (4, 5, 3, 8, 8)
    assert len(alone.flatten(2).unique(dim=1)[0]) == 5
    for _ in range(2):
        assert torch.equal(images(two), alone)
    assert torch.equal(torch.get_rng_state(), state)


def test_few_jobs_are_taken_ahead_and_a_new_run_ends_the_old(root, two):
    paths = image_folder(root / "tiny").test
    taken = []

    def jobs():
        for k in range(1000):
            taken.append(k)
            yield Job([paths[k % 2]])

    old = two.run(jobs())
    next(old)
    assert 2 <= len(taken) <= 5
    (expected,) = Decoder(8, 0).run([Job([paths[3]])])
    (x,) = two.run([Job([paths[3]])])
    assert torch.equal(x, expected)
    with pytest.raises(RuntimeError, match="another run"):
        next(old)


@pytest.mark.parametrize("content", [b"no picture", "cut", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_a_corrupt_image_is_an_error_that_names_it_when_its_turn_comes(
    tmp_path, root, two, content
):
    good = image_folder(root / "tiny").train[1]
    if content == "cut":
        with open(good, "rb") as file:
            content = file.read()[:-200]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(content)
    for decoder in (Decoder(8, 0), two):
        run = decoder.run([Job([good]), Job([good, str(bad)])])
        next(run)
        with pytest.raises(DataError, match=r"bad\.jpg cannot be decoded") as error:
            next(run)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["two", "-1", "1.5"])
def test_the_number_of_processes_must_be_one(monkeypatch, given):
    monkeypatch.setenv("NORMWISE_WORKERS", given)
    with pytest.raises(UsageError, match=f"NORMWISE_WORKERS is '{given}' and must be"):
        folders.workers()
    monkeypatch.delenv("NORMWISE_WORKERS")
    assert 1 <= folders.workers() <= 16


# Training


def test_a_problem_opens_only_what_its_batches_hold(root, opened):
    problem = Classification(options(train_examples=10, test_examples=4), root, CPU)
    assert opened == []
    assert problem.examples == 10
    assert problem.facts["train_examples"] == 10
    x, y = problem.batch(torch.tensor([7, 2, 3]), generator())
    assert opened == [problem.data.train[k] for k in (7, 2, 3)]
    assert y.argmax(1).tolist() == [CLASSES.index(path.split(os.sep)[-2]) for path in opened]
    # Standardized by ImageNet's constants: black and white lie at about ±2.
    assert -2.2 < float(x.min()) < -0.5
    assert 0.5 < float(x.max()) < 2.7
    opened.clear()
    problem.evaluate()
    assert len(opened) == 4
    assert all("val" in path for path in opened)


def test_a_stream_is_its_batches_one_by_one(root, monkeypatch):
    monkeypatch.setenv("NORMWISE_WORKERS", "0")
    problem = Classification(options(augment=("flip", "cutmix"), shrink=2), root, CPU)
    steps = problem.batches(6, generator())
    streamed = list(problem.stream(steps, [generator(k) for k in range(4)]))
    assert len(streamed) == 4
    for k, (x, y) in enumerate(streamed):
        assert x.shape == (6, 3, 4, 4)
        alone = problem.batch(steps[k], generator(k))
        assert torch.equal(alone[0], x)
        assert torch.equal(alone[1], y)
    other, _ = problem.batch(steps[0], generator(99))
    assert not torch.equal(other, streamed[0][0])
    with pytest.raises(UsageError, match="shrink 3 is not allowed: must divide 8 × 8"):
        Classification(options(shrink=3), root, CPU)
    with pytest.raises(UsageError, match="image_size 0 is not allowed"):
        Classification(options(image_size=0), root, CPU)


def test_streamed_images_can_be_attacked(root, monkeypatch):
    monkeypatch.setenv("NORMWISE_WORKERS", "0")
    given = AdversarialOptions("folder:tiny", "resnet8", width=4, image_size=8, attack_steps=1)
    problem = Adversarial(given, root, CPU)
    batch = problem.batch(torch.arange(4), generator())
    assert problem.loss(batch).isfinite()
    metrics = problem.evaluate().metrics
    assert metrics["attacked_accuracy"] <= metrics["accuracy"]


def cell():
    """Two epochs of four steps on the folder."""
    (cell,) = find("digits").cells("small", 1, ["adamp"])
    training = replace(cell.training, epochs=2, batch_size=6)
    return replace(cell, options=options(augment=("flip", "cutmix")), training=training)


def contents(out):
    names = ("metrics.jsonl", "result.json", "config.json")
    return {name: (out / cell().folder / name).read_bytes() for name in names}


def test_a_cell_goes_on_from_the_middle_of_an_epoch(tmp_path, root, monkeypatch):
    monkeypatch.setenv("NORMWISE_WORKERS", "0")
    run_cell(cell(), tmp_path / "whole", root)
    take, steps = running.Trainer.take, []

    def stop(self, batches):
        if len(steps) == 6:
            raise KeyboardInterrupt
        steps.append(self.step)
        return take(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(running.Trainer, "take", stop)
        with pytest.raises(KeyboardInterrupt):
            run_cell(cell(), tmp_path / "cut", root, checkpoint_seconds=0)
    run_cell(cell(), tmp_path / "cut", root)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")
def test_killed_with_processes_it_goes_on_at_once_to_the_same_bits(tmp_path, root, monkeypatch):
    """The processes outlive it by some seconds, and must not hold its lock."""
    monkeypatch.setenv("NORMWISE_WORKERS", "0")
    run_cell(cell(), tmp_path / "whole", root)
    monkeypatch.setenv("NORMWISE_WORKERS", "2")

    def run():
        torch.set_num_threads(1)
        save = running.Trainer.save

        def last(self):
            save(self)
            if (self.epoch, self.step) == (1, 2):
                os.kill(os.getpid(), signal.SIGKILL)

        running.Trainer.save = last
        run_cell(cell(), tmp_path / "cut", root, checkpoint_seconds=0)

    child = get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    monkeypatch.setenv("NORMWISE_WORKERS", "1")
    run_cell(cell(), tmp_path / "cut", root)
    assert (
        "resumed after epoch 1, step 2"
        in (tmp_path / "cut" / cell().folder / "log.txt").read_text()
    )
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_wait_for_images_counts_as_data_time(tmp_path, root, monkeypatch):
    monkeypatch.setenv("NORMWISE_WORKERS", "0")
    decoded = folders._decoded

    def slow(path, size, numbers):
        if numbers is not None:
            time.sleep(0.1)
        return decoded(path, size, numbers)

    monkeypatch.setattr(folders, "_decoded", slow)
    run_cell(cell(), tmp_path, root)
    for line in (tmp_path / cell().folder / "times.jsonl").read_text().splitlines():
        # Six images a step.
        assert json.loads(line)["data_share"] > 0.5
        assert json.loads(line)["steps_per_second"] < 1 / 0.6
