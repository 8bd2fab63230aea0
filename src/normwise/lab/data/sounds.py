"""Recorded sounds and their log-mel spectra."""

from __future__ import annotations

import math
import re
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normwise.lab.data.files import DataError, locate, read_bytes
from normwise.lab.data.images import Labelled

__all__ = ["esc10", "log_mel", "mel_filters", "read_wav", "speech_commands", "spoken_digits"]


def read_wav(path: Path) -> tuple[npt.NDArray[np.float32], int]:
    """A mono 16-bit WAV file.

    Returns:
        Samples in [−1, 1), shape ``(N,)``, and the sampling rate in Hz.

    Raises:
        DataError: if it is not mono and 16-bit, is truncated, or is no WAV file.
    """
    try:
        with wave.open(str(path), "rb") as file:
            kind = (file.getnchannels(), file.getsampwidth())
            rate, frames = file.getframerate(), file.getnframes()
            content = file.readframes(frames)
    except (EOFError, OSError, wave.Error) as error:
        raise DataError(f"{path} is not a whole WAV file: {error}") from None
    if kind != (1, 2):
        raise DataError(f"{path} has {kind[0]} channels of {8 * kind[1]} bits; must be 1 of 16")
    if len(content) != 2 * frames or frames == 0:
        raise DataError(f"{path} is truncated: {len(content)} of {2 * frames} bytes of sound")
    return (np.frombuffer(content, "<i2") / 32768).astype(np.float32), rate


def mel_filters(bands: int, bins: int, rate: int) -> Tensor:
    """Triangular filters, evenly spaced on the HTK mel scale 2595·log₁₀(1 + f/700) up to rate/2.

    Returns:
        Shape ``(bands, bins)``: the weight of each frequency bin, at most 1.
    """
    top = 2595 * math.log10(1 + rate / 2 / 700)
    mels = torch.linspace(0, top, bands + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins, dtype=torch.float64)
    low, middle, high = (edges[i : i + bands, None] for i in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel(sound: Tensor, rate: int, *, bands: int = 40, fft: int = 256, hop: int = 80) -> Tensor:
    """The logarithm of the mel power spectrum.

    Args:
        sound: samples, shape ``(…, N)``.
        rate: in Hz.
        bands: of the mel scale (default: 40).
        fft: samples a window, Hann (default: 256).
        hop: samples between windows (default: 80).

    Returns:
        Shape ``(…, bands, 1 + N // hop)``, in nats, no lower than log 1e-10.
    """
    window = torch.hann_window(fft)
    spectrum = torch.stft(sound, fft, hop, window=window, pad_mode="constant", return_complex=True)
    power = mel_filters(bands, fft // 2 + 1, rate) @ spectrum.abs().square()
    return power.clamp(min=1e-10).log()


def _fitted(path: Path, rate: int, length: int) -> Tensor:
    """A recording of a known rate, cut or padded with silence to a number of samples."""
    samples, found = read_wav(path)
    if found != rate:
        raise DataError(f"{path} has a rate of {found} Hz; must be {rate}")
    sound = torch.zeros(length)
    kept = torch.from_numpy(samples[:length])
    sound[: len(kept)] = kept
    return sound


def spoken_digits(root: Path, seconds: float = 0.6) -> Labelled:
    """The Free Spoken Digit Dataset as log-mel spectra; takes 0–4 are the test split, as published.

    Args:
        root: where the data sets are.
        seconds: recordings are cut, or padded with silence, to this length (default: 0.6).
    """
    folder = locate(root, "fsdd", ("fsdd/recordings", "free-spoken-digit-dataset/recordings"), "*")
    parts: dict[bool, tuple[list[Tensor], list[int]]] = {True: ([], []), False: ([], [])}
    for path in sorted(folder.glob("*.wav")):
        named = re.fullmatch(r"(\d)_[^_]+_(\d+)", path.stem)
        if named is None:
            raise DataError(f"{path} is not named DIGIT_SPEAKER_TAKE.wav")
        inputs, labels = parts[int(named[2]) < 5]
        inputs.append(_fitted(path, 8000, round(seconds * 8000)))
        labels.append(int(named[1]))
    if not parts[True][1] or not parts[False][1]:
        raise DataError(f"{folder} has no recordings, or none of takes 0–4, or none of the others")
    (test, test_labels), (train, train_labels) = parts[True], parts[False]
    return Labelled(
        "fsdd",
        log_mel(torch.stack(train), 8000)[:, None].numpy(),
        np.array(train_labels, np.int64),
        log_mel(torch.stack(test), 8000)[:, None].numpy(),
        np.array(test_labels, np.int64),
        tuple(map(str, range(10))),
    )


def speech_commands(root: Path) -> Labelled:
    """Google's Speech Commands as log-mel spectra of 64 bands and 101 frames, held in memory.

    Recordings are of 16 kHz, and are cut or padded with silence to a second. Version 2 has 35 words
    and needs 3 GB. The parts are the published ones: to test on what ``testing_list.txt`` names, to
    learn on what neither it nor ``validation_list.txt`` does.

    Raises:
        DataError: if a list is missing or names what is not there, a recording is damaged or of
            another rate, or a part is empty.
    """
    names = ("speech_commands", "speech_commands_v0.02", "SpeechCommands/speech_commands_v0.02")
    folder = locate(root, "speech-commands", names, "testing_list.txt")
    words = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("_"))
    all_names = {f"{word}/{p.name}" for word in words for p in (folder / word).glob("*.wav")}
    test, validation = (
        set(read_bytes(folder / f"{part}_list.txt").decode(errors="replace").split())
        for part in ("testing", "validation")
    )
    if absent := (test | validation) - all_names:
        raise DataError(f"{folder} lacks {len(absent)} of the listed recordings: {min(absent)}, …")
    train = all_names - test - validation
    if not train or not test:
        raise DataError(f"{folder} has no recordings to {'test' if train else 'learn'} on")

    def read(part: set[str]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        spectra = np.empty((len(part), 1, 64, 101), np.float32)
        for i, name in enumerate(sorted(part)):
            sound = _fitted(folder / name, 16_000, 16_000)
            spectra[i, 0] = log_mel(sound, 16_000, bands=64, fft=512, hop=160).numpy()
        return spectra, np.array([words.index(n.split("/")[0]) for n in sorted(part)], np.int64)

    return Labelled("speech-commands", *read(train), *read(test), tuple(words))


def esc10(root: Path, fold: int = 1) -> Labelled:
    """ESC-10 as log-mel spectra of 64 bands and 500 frames (``esc10_logmel.npz``, uint8).

    Args:
        root: where the data sets are.
        fold: the one of the five folds to test on (default: 1).
    """
    path = locate(root, "esc10", ("esc10", "."), "esc10_logmel.npz") / "esc10_logmel.npz"
    content = read_npz(path, ("logmel_u8", "label", "fold", "classes"))
    spectra, labels = content["logmel_u8"], content["label"].astype(np.int64)
    held_out = content["fold"] == fold
    if not (spectra.dtype == np.uint8 and spectra.shape == (len(labels), 64, 500)):
        raise DataError(f"{path} has spectra of shape {spectra.shape}; must be (N, 64, 500)")
    if not held_out.any() or held_out.all():
        folds = sorted({int(value) for value in content["fold"]})
        raise DataError(f"{path} has no fold {fold} to test on beside others; it has {folds}")
    names = tuple(map(str, content["classes"]))
    # With a new axis in place of a reshape, strides would say that channels come last, and torch
    # 2.13 would convolve in that format, in which some backward passes on the CPU corrupt memory.
    x = spectra.reshape(-1, 1, *spectra.shape[1:])
    return Labelled("esc10", x[~held_out], labels[~held_out], x[held_out], labels[held_out], names)


def read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of a ``.npz`` file; arrays of objects, which are pickles, are refused.

    Raises:
        DataError: if it is truncated or corrupt, or a key is missing.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return {key: content[key] for key in keys}
    except KeyError as error:
        raise DataError(f"{path} has no array {error}") from None
    except Exception as error:
        # A damaged zip or array raises nearly anything.
        raise DataError(f"{path} is truncated, corrupt or refused: {error}") from None
