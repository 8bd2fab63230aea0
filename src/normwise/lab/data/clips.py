"""Recordings with tags, listed at the start and decoded when a batch is needed."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from normwise.lab.data.ahead import Ahead
from normwise.lab.data.files import DataError, locate, read_bytes
from normwise.lab.data.folders import workers
from normwise.lab.data.sounds import log_mel, read_wav
from normwise.lab.errors import UsageError
from normwise.lab.imports import reason

__all__ = ["READERS", "ClipJob", "Spectra", "Tagged", "magnatagatune", "read_sound", "spoken_pairs"]

Tags = npt.NDArray[np.bool_]
Clips = tuple[tuple[str, ...], ...]

# Of MagnaTagATune's sixteen folders twelve to learn on, one (c) to validate, three to test on.
_TRAIN, _VALIDATION, _TEST = "0123456789ab", "c", "def"
_MOST_FREQUENT = 50


@dataclass(frozen=True)
class Tagged:
    """Recordings and which tags each has; none has been opened.

    Args:
        name: of the data set.
        train: for each clip the files whose sum it is, mostly one.
        train_tags: shape ``(N, T)``.
        test: as ``train``.
        test_tags: as ``train_tags``.
        tags: their names.
        rate: of the recordings, in Hz.
        bands: of their mel spectra.
        left_out: how many clips are empty files.
    """

    name: str
    train: Clips
    train_tags: Tags
    test: Clips
    test_tags: Tags
    tags: tuple[str, ...]
    rate: int
    bands: int
    left_out: int = 0


def magnatagatune(root: Path) -> Tagged:
    """MagnaTagATune (Law et al., 2009): its 50 most frequent tags; folders d, e and f test.

    ``annotations_final.csv`` has, between tabs, a clip's id, 0 or 1 for each of 188 tags, and the
    path of its recording, whose first letter is its folder. Clips without any of the 50 tags count;
    files without a byte, of which three were published, are left out.

    Raises:
        DataError: if the table is damaged, or names a recording that is not there.
    """
    name = "annotations_final.csv"
    folder = locate(root, "magnatagatune", ("magnatagatune", "MagnaTagATune", "mtat"), name)
    path = folder / name
    text = read_bytes(path).decode("utf-8", errors="replace")
    rows = list(csv.reader(io.StringIO(text), delimiter="\t"))
    header = rows[0] if rows else []
    if len(header) < 3 or (header[0], header[-1]) != ("clip_id", "mp3_path"):
        raise DataError(f"{path} does not begin with clip_id, tags and mp3_path between tabs")
    files, marks = [], []
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}, has {len(row)} fields; must be {len(header)}")
        if not set(row[1:-1]) <= {"0", "1"}:
            odd = next(value for value in row[1:-1] if value not in ("0", "1"))
            raise DataError(f"{path}, line {line}, says {odd!r} of a tag; must be 0 or 1")
        if row[-1][:1] not in set(_TRAIN + _VALIDATION + _TEST) or row[-1][1:2] != "/":
            raise DataError(
                f"{path}, line {line}, has the recording {row[-1]!r}; must be in a folder 0 to f"
            )
        files.append(row[-1])
        marks.append([value == "1" for value in row[1:-1]])
    table = np.array(marks, np.bool_).reshape(len(files), len(header) - 2)
    names = header[1:-1]
    counts = table.sum(0)
    # Ties in the order of the letters.
    ranked = sorted(range(len(names)), key=lambda k: (-int(counts[k]), names[k]))
    kept = ranked[:_MOST_FREQUENT]
    empty = {file for file in files if _size(folder / file) == 0}

    def part(folders: str) -> tuple[Clips, Tags]:
        own = [i for i, f in enumerate(files) if f[0] in folders and f not in empty]
        if not own:
            raise DataError(f"{path} has no recordings in the folders {', '.join(folders)}")
        return tuple((str(folder / files[i]),) for i in own), table[np.ix_(own, kept)]

    tags = tuple(names[k] for k in kept)
    return Tagged(
        "magnatagatune", *part(_TRAIN), *part(_TEST), tags, 16_000, 64, left_out=len(empty)
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def spoken_pairs(root: Path) -> Tagged:
    """Two spoken digits at once, of the Free Spoken Digit Dataset: which two are heard?

    Each recording is the first of one pair, and the second is one of another digit, drawn once and
    for all from the same part; takes 0–4 test, as in the set itself.
    """
    folder = locate(root, "fsdd", ("fsdd/recordings", "free-spoken-digit-dataset/recordings"), "*")
    paths = sorted(folder.glob("*.wav"))
    draw = np.random.default_rng(0)

    def part(tested: bool) -> tuple[Clips, Tags]:
        own = [p for p in paths if (int(p.stem.rpartition("_")[2]) < 5) == tested]
        digits = np.array([int(p.stem[0]) for p in own])
        if len(set(digits.tolist())) < 2:
            raise DataError(f"{folder} has recordings of less than two digits in a part")
        clips, tags = [], np.zeros((len(own), 10), np.bool_)
        for i, (path, digit) in enumerate(zip(own, digits.tolist(), strict=True)):
            j = int(draw.choice(np.flatnonzero(digits != digit)))
            clips.append((str(path), str(own[j])))
            tags[i, [digit, int(digits[j])]] = True
        return tuple(clips), tags

    return Tagged("fsdd-pairs", *part(False), *part(True), tuple("0123456789"), 8000, 40)


READERS: dict[str, Callable[[Path], Tagged]] = {
    "magnatagatune": magnatagatune,
    "fsdd-pairs": spoken_pairs,
}


def read_sound(path: str, rate: int) -> Tensor:
    """A recording as one channel: 16-bit mono WAV by itself, anything else with soundfile.

    Args:
        path: the file.
        rate: that it must have, in Hz.

    Returns:
        Samples in [−1, 1], shape ``(N,)``; of several channels the mean.

    Raises:
        DataError: if it is damaged, empty, or of another rate.
        UsageError: if it needs soundfile, which is not installed.
    """
    if path.lower().endswith(".wav"):
        samples, found = read_wav(Path(path))
    else:
        samples, found = _decoded(path)
    if found != rate:
        raise DataError(f"{path} has a rate of {found} Hz; must be {rate}")
    return torch.from_numpy(samples)


def _decoded(path: str) -> tuple[npt.NDArray[np.float32], int]:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: its library is missing
        raise UsageError(
            f'decoding {path} needs soundfile: pip install "normwise[audio]"'
        ) from None
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except Exception as error:  # libsndfile's errors, and what its binding makes of bytes
        raise DataError(f"{path} cannot be decoded: {reason(error)}") from None
    if not len(samples):
        raise DataError(f"{path} cannot be decoded: it holds no sound")
    return samples.mean(1, dtype=np.float32), int(rate)


@dataclass(frozen=True)
class ClipJob:
    """The clips of one batch.

    Args:
        clips: for each the files whose sum it is.
        places: for each where its excerpt begins, as a share of what can be chosen; None for
            excerpts side by side from the first to the last sample.
    """

    clips: Sequence[tuple[str, ...]]
    places: Sequence[float] | None = None


class _Excerpts(Dataset[Any]):
    """What a worker does: a job in, log-mel spectra out, and how many there are of each clip."""

    def __init__(self, rate: int, bands: int, seconds: float) -> None:
        self.rate, self.bands, self.length = rate, bands, round(seconds * rate)

    def __getitem__(self, job: ClipJob) -> tuple[Tensor, list[int]] | UsageError:
        cut = []
        try:
            for i, files in enumerate(job.clips):
                sounds = [read_sound(file, self.rate) for file in files]
                cut.append(self._cut(sounds, None if job.places is None else job.places[i]))
        except UsageError as error:
            return error
        sound = torch.cat(cut)
        spectra = log_mel(
            sound, self.rate, bands=self.bands, fft=round(0.032 * self.rate), hop=self.rate // 100
        )
        return spectra[:, None], [len(part) for part in cut]

    def _cut(self, sounds: list[Tensor], place: float | None) -> Tensor:
        """Excerpts of the sum of sounds, shape ``(n, length)``, ended by silence if too short."""
        longest = max(map(len, sounds))
        total = torch.zeros(max(longest, self.length))
        for sound in sounds:
            total[: len(sound)] += sound
        if place is None:
            count = len(total) // self.length
            return total[: count * self.length].view(count, self.length)
        begin = int(place * (len(total) - self.length + 1))
        return total[None, begin : begin + self.length]


class Spectra(Ahead):
    """Makes spectra of excerpts in processes of its own.

    Args:
        data: whose recordings they are.
        seconds: of an excerpt.
        processes: how many; 0 decodes where it is asked (default: as for images).
    """

    def __init__(self, data: Tagged, seconds: float, processes: int | None = None) -> None:
        super().__init__(
            _Excerpts(data.rate, data.bands, seconds),
            workers() if processes is None else processes,
        )
