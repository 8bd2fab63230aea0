"""Recordings with several tags each: MagnaTagATune's format, and areas under curves."""

from __future__ import annotations

import itertools
import math
import sys
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normwise.lab.data.clips import ClipJob, Spectra, magnatagatune, read_sound, spoken_pairs
from normwise.lab.data.files import DataError
from normwise.lab.errors import UsageError
from normwise.lab.recipes import find
from normwise.lab.running.cell import run_cell
from normwise.lab.tasks.tagging import Tagging, TaggingOptions, average_precision, roc_auc

CPU = torch.device("cpu")
RATE = 16_000
TAGS = ("low", "high", "never", "seldom")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMWISE_WORKERS", "0")


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mp3":
        soundfile = pytest.importorskip("soundfile", reason="it encodes what is decoded here")
        if "MP3" not in soundfile.available_formats():
            pytest.skip("this libsndfile writes no MP3")
        soundfile.write(path, samples, rate)
        return
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((32767 * samples).astype("<i2").tobytes())


def tone(*hertz: float, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    waves = [0.3 * np.sin(2 * np.pi * f * time) for f in hertz]
    return np.sum([np.zeros_like(time), *waves], axis=0)


def set_of(root: Path, suffix: str = ".wav", each: int = 1) -> Path:
    """A set in the published layout: tones, and which of two heights each has."""
    rows = [["clip_id", *TAGS, "mp3_path"]]
    for folder, i in itertools.product("0123456789abcdef", range(each)):
        number = int(folder, 16) + i
        low, high = number % 2 == 0, number % 4 < 2
        name = f"{folder}/artist-album-{i}{suffix}"
        heights = [f for f, there in ((300.0, low), (3000.0, high)) if there]
        write(root / "magnatagatune" / name, tone(*heights))
        marks = [str(int(mark)) for mark in (low, high, False, folder == "d")]
        rows.append([str(len(rows)), *marks, name])
    table = root / "magnatagatune" / "annotations_final.csv"
    table.write_text("".join("\t".join(f'"{v}"' for v in row) + "\n" for row in rows))
    return root


def test_the_published_table_is_read(tmp_path: Path) -> None:
    data = magnatagatune(set_of(tmp_path))
    assert data.tags == ("high", "low", "seldom", "never"), "the most frequent first, then by name"
    assert (len(data.train), len(data.test)) == (12, 3), "c is for validation"
    assert data.train_tags[:4].tolist() == [
        [True, True, False, False],
        [True, False, False, False],
        [False, True, False, False],
        [False, False, False, False],
    ]
    assert [Path(file).parent.name for (file,) in data.test] == ["d", "e", "f"]
    assert data.test_tags[:, 2].tolist() == [True, False, False]


def test_of_many_tags_the_fifty_most_frequent_are_kept(tmp_path: Path) -> None:
    set_of(tmp_path)
    table = tmp_path / "magnatagatune" / "annotations_final.csv"
    lines = [line.split("\t") for line in table.read_text().splitlines()]
    for line, row in enumerate(lines):
        new = [f'"t{k:02}"' if line == 0 else f'"{int(line <= k)}"' for k in range(60)]
        row[1:-1] = new
    table.write_text("\n".join("\t".join(row) for row in lines) + "\n")
    data = magnatagatune(tmp_path)
    # Tag k is on the first k clips, so those from 16 on are on all.
    assert data.tags == tuple(f"t{k:02}" for k in (*range(16, 60), 15, 14, 13, 12, 11, 10))


def test_files_without_a_byte_are_left_out_and_counted(tmp_path: Path) -> None:
    set_of(tmp_path)
    (tmp_path / "magnatagatune" / "3" / "artist-album-0.wav").write_bytes(b"")
    data = magnatagatune(tmp_path)
    assert (len(data.train), data.left_out) == (11, 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"clip_id"', '"clip"', "does not begin with clip_id"),
        ('"1"\t"1"\t"1"', '"1"\t"1"\t"2"', "line 2, says '2' of a tag"),
        ('"2"\t"0"\t', '"2"\t', "line 3, has 5 fields; must be 6"),
        ("0/artist", "x/artist", "line 2, has the recording 'x/artist"),
        ("1/artist", "1/nobody", "cannot read .*nobody"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    set_of(tmp_path)
    table = tmp_path / "magnatagatune" / "annotations_final.csv"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=words):
        magnatagatune(tmp_path)


def test_an_mp3_is_decoded(tmp_path: Path) -> None:
    write(tmp_path / "a.mp3", tone(440.0))
    sound = read_sound(str(tmp_path / "a.mp3"), RATE)
    spectrum = torch.fft.rfft(sound[:RATE]).abs()
    assert abs(int(spectrum.argmax()) - 440) <= 1
    with pytest.raises(DataError, match="rate of 16000 Hz; must be 8000"):
        read_sound(str(tmp_path / "a.mp3"), 8000)
    (tmp_path / "b.mp3").write_bytes(b"no sound" * 20)
    with pytest.raises(DataError, match=r"b\.mp3 cannot be decoded"):
        read_sound(str(tmp_path / "b.mp3"), RATE)


def test_without_soundfile_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UsageError, match=r'soundfile: pip install "normwise\[audio\]"'):
        read_sound(str(tmp_path / "a.mp3"), RATE)


def test_excerpts_are_where_they_are_asked_for_and_the_tests_lie_side_by_side(
    tmp_path: Path,
) -> None:
    """A clip is silent but for a tone in its last quarter."""
    sound = np.concatenate([tone(seconds=0.75), tone(1000.0, seconds=0.25)])
    set_of(tmp_path)
    data = magnatagatune(tmp_path)
    (path,) = data.train[0]
    write(Path(path), sound)
    spectra = Spectra(data, 0.25, processes=0)
    ((first, counts), (last, _), (every, all_counts)) = spectra.run(
        [
            ClipJob([(path,)], [0.0]),
            ClipJob([(path,)], [1 - 1e-12]),
            ClipJob([(path,), data.test[0]]),
        ]
    )
    assert first.shape == (1, 1, 64, 26)
    assert counts == [1]
    assert all_counts == [4, 4]
    assert torch.equal(every[:1], first)
    torch.testing.assert_close(every[3:4], last, rtol=0, atol=1e-3)
    assert float(last.max() - first.max()) > 10


def test_a_short_recording_ends_in_silence_and_several_are_added(tmp_path: Path) -> None:
    set_of(tmp_path)
    data = magnatagatune(tmp_path)
    low, high = (str(tmp_path / f"{name}.wav") for name in ("low", "high"))
    write(Path(low), tone(300.0, seconds=0.1))
    write(Path(high), tone(3000.0, seconds=0.2))
    write(
        tmp_path / "both.wav",
        tone(3000.0, seconds=0.2) + np.pad(tone(300.0, seconds=0.1), (0, 1600)),
    )
    spectra = Spectra(data, 0.3, processes=0)
    ((sums, counts),) = spectra.run([ClipJob([(low, high), (str(tmp_path / "both.wav"),)])])
    assert counts == [1, 1]
    added, once = (
        sums.exp()
    )  # power: its logarithm shows the rounding to 16 bits where it is silent
    torch.testing.assert_close(added, once, rtol=0, atol=1e-3 * float(once.max()))


@pytest.mark.parametrize("seed", range(4))
def test_areas_are_those_of_scikit_learn(seed: int) -> None:
    """With many equal scores, and with none."""
    metrics = pytest.importorskip("sklearn.metrics", reason="what areas are compared with")
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(200, generator=draw, dtype=torch.float64)
    scores = scores if seed % 2 else (6 * scores).floor()
    truth = torch.rand(200, generator=draw) < 0.2
    assert roc_auc(scores, truth) == pytest.approx(metrics.roc_auc_score(truth, scores), abs=1e-12)
    expected = metrics.average_precision_score(truth, scores)
    assert average_precision(scores, truth) == pytest.approx(expected, abs=1e-12)


def test_areas_by_hand() -> None:
    """Of 2 · 2 pairs three are in order; both are found after 1 of 1 and 2 of 3."""
    scores, truth = torch.tensor([4.0, 3, 2, 1]), torch.tensor([True, False, True, False])
    assert roc_auc(scores, truth) == 3 / 4
    assert average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)
    assert roc_auc(torch.zeros(4), truth) == 1 / 2
    assert average_precision(torch.zeros(4), truth) == 1 / 2
    assert math.isnan(roc_auc(scores, torch.ones(4, dtype=torch.bool)))
    assert math.isnan(average_precision(scores, torch.zeros(4, dtype=torch.bool)))


def options(**given: Any) -> TaggingOptions:
    return TaggingOptions(
        **{"data": "magnatagatune", "network": "harmonic64", "width": 4, "seconds": 0.5, **given}
    )


def test_a_clip_is_judged_by_the_mean_of_its_excerpts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    p = Tagging(options(seconds=0.3), set_of(tmp_path), CPU)
    assert p.facts["tags_judged"] == 3, "one tag is on no clip"
    assert p.baseline == {"roc_auc": 0.5, "pr_auc": pytest.approx(1 / 3)}
    p.model.eval()
    scores = []
    for files in p.test:
        ((spectra, counts),) = p.spectra.run([ClipJob([files])])
        assert counts == [3]
        one_by_one = [p.model(p._standardized(x[None])).sigmoid() for x in spectra]
        scores.append(torch.cat(one_by_one).mean(0))
    areas = [roc_auc(torch.stack(scores)[:, k].double(), p.test_tags[:, k]) for k in p.judged]
    found = p.evaluate()
    assert found.metrics["roc_auc"] == pytest.approx(sum(areas) / 3)
    assert found == p.evaluate()


def cell() -> Any:
    (made,) = find("adamp-tagging").cells("small", 1, ["adamp"])
    training = replace(made.training, epochs=5, batch_size=8, evaluate_every=5)
    return replace(made, training=training, options=options())


def test_tags_are_learnt(tmp_path: Path) -> None:
    result = run_cell(cell(), tmp_path / "out", set_of(tmp_path, each=2))
    assert result["facts"]["train_examples"] == 24
    assert result["metrics"]["pr_auc"] > result["baseline"]["pr_auc"] + 0.2


def test_an_interrupted_run_ends_in_the_same_bits(
    tmp_path: Path, assert_resumes: Callable[..., None]
) -> None:
    made = cell()
    made = replace(made, training=replace(made.training, epochs=2))
    assert_resumes(made, set_of(tmp_path), Tagging, 3, lambda: torch.rand(3))


def test_pairs_are_of_two_different_digits_of_the_same_part(tmp_path: Path) -> None:
    folder = tmp_path / "fsdd" / "recordings"
    for digit, take in itertools.product(range(3), range(7)):
        write(folder / f"{digit}_speaker_{take}.wav", tone(100.0, seconds=0.1), 8000)
    data = spoken_pairs(tmp_path)
    assert (len(data.train), len(data.test)) == (6, 15)
    for clips, tags, takes in (
        (data.train, data.train_tags, {5, 6}),
        (data.test, data.test_tags, {0, 1, 2, 3, 4}),
    ):
        for files, marks in zip(clips, tags, strict=True):
            named = [Path(file).stem.split("_") for file in files]
            assert np.flatnonzero(marks).tolist() == sorted({int(n[0]) for n in named})
            assert marks.sum() == 2
            assert {int(n[2]) for n in named} <= takes
    assert spoken_pairs(tmp_path).train == data.train


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": "magna"}, "did you mean 'magnatagatune'"),
        ({"seconds": 0.0}, "seconds 0.0 is not allowed"),
        ({"width": 0}, "width 0 is not allowed"),
    ],
)
def test_a_mistake_in_the_options_is_shown(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        options(**given)
