"""Data sets in their published formats: read right, or refused with the reason."""

from __future__ import annotations

import gzip
import math
import os
import pickle
import re
import tarfile
import threading
import wave
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from normwise import cli
from normwise.lab.data import boxes, drawings, files, images, sounds, texts
from normwise.lab.data import fetch as fetching
from normwise.lab.data.catalogue import CATALOGUE, Archive, Source
from normwise.lab.data.fetch import fetch, is_there
from normwise.lab.data.files import DataError
from normwise.lab.data.pickles import read_pickle
from normwise.lab.errors import Unavailable, UsageError


def random_bytes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# CIFAR


def write_cifar(path, labels, pixels):
    """Records of label bytes, then the planes of red, green and blue."""
    np.concatenate([labels, pixels.reshape(len(pixels), 3072)], axis=1).tofile(path)


def test_a_cifar_record_is_its_last_label_and_three_planes(tmp_path):
    pixels = random_bytes(4, 3, 32, 32)
    labels = np.array([[19, 99], [0, 0], [3, 7], [1, 42]], np.uint8)
    write_cifar(tmp_path / "part.bin", labels, pixels)
    x, y = images.read_cifar_binary(tmp_path / "part.bin", 2, 100, 4)
    assert np.array_equal(x, pixels)
    assert y.tolist() == [99, 0, 7, 42]


@pytest.mark.parametrize("change", [-1, 1, -3073])
def test_a_cifar_file_of_another_size_is_refused(tmp_path, change):
    content = random_bytes(3 * 3073).tobytes()
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(content[:change] if change < 0 else content + b"x")
    with pytest.raises(DataError, match=f"has {3 * 3073 + change} bytes and should have 9219"):
        images.read_cifar_binary(path, 1, 10, 3)


def test_a_cifar_label_beyond_the_classes_is_refused(tmp_path):
    write_cifar(tmp_path / "b", np.array([[9], [10]], np.uint8), random_bytes(2, 3, 32, 32))
    with pytest.raises(DataError, match="record 1 has label 10, and there are 10 classes"):
        images.read_cifar_binary(tmp_path / "b", 1, 10, 2)


def empty_file(path, size):
    """A file of zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)


def test_cifar_10_needs_the_test_batch_and_any_training_batch(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    empty_file(folder / "test_batch.bin", 10_000 * 3073)
    with pytest.raises(DataError, match="no data_batch_1"):
        images.cifar10(tmp_path)
    empty_file(folder / "data_batch_3.bin", 10_000 * 3073)
    data = images.cifar10(tmp_path)
    assert data.train.shape == data.test.shape == (10_000, 3, 32, 32)
    (folder / "batches.meta.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="2 names and should have 10"):
        images.cifar10(tmp_path)


def test_a_missing_set_says_where_it_was_looked_for_and_what_to_do(tmp_path):
    with pytest.raises(DataError) as error:
        images.cifar100(tmp_path)
    for words in ("cifar-100-binary", "NORMWISE_DATA", "normwise data fetch cifar100"):
        assert words in str(error.value)


def write_pickle(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_the_python_version_of_cifar_reads_as_the_binary_one(tmp_path, protocol):
    pixels, labels = random_bytes(5, 3072), [3, 1, 4, 1, 5]
    path = tmp_path / "test"
    write_pickle(path, {b"data": pixels, b"fine_labels": labels}, protocol)
    x, y = images.read_cifar_pickle(path, "fine_labels", 10)
    assert np.array_equal(x.reshape(5, -1), pixels)
    assert y.tolist() == labels


def test_a_pickle_that_python_2_wrote_is_read(tmp_path):
    """Protocol 2 with byte strings and the old name of numpy's module, as the published files."""
    pixels = random_bytes(2, 3072)
    raw = pixels.tobytes()
    content = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
        b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02M\x00\x0c\x86"
        b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
        b"U\x06labels](K\x03K\x07eu."
    )
    (tmp_path / "data_batch_1").write_bytes(content)
    x, y = images.read_cifar_pickle(tmp_path / "data_batch_1", "labels", 10)
    assert np.array_equal(x.reshape(2, -1), pixels)
    assert y.tolist() == [3, 7]


class Payload:
    """Something that creates a file when it is unpickled by the usual reader."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    for call, arguments in (
        (os.mkdir, (str(victim),)),
        (eval, (f"__import__('os').mkdir({str(victim)!r})",)),
        (getattr, ("", "join")),
        (np.save, (str(victim), np.zeros(1))),
    ):
        write_pickle(tmp_path / "bad", {b"data": Payload(call, *arguments), b"labels": [0]})
        with pytest.raises(DataError, match="refused and not run: it names"):
            read_pickle(tmp_path / "bad")
    assert not any(path.name.startswith("victim") for path in tmp_path.iterdir())
    # The payload is no dud: the usual reader runs it.
    write_pickle(tmp_path / "bad", Payload(os.mkdir, str(victim)))
    pickle.loads((tmp_path / "bad").read_bytes())
    assert victim.is_dir()


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"garbage", b"\x80\x05\x95" + b"\xff" * 8])
def test_a_truncated_pickle_is_refused(tmp_path, content):
    (tmp_path / "cut").write_bytes(content)
    with pytest.raises(DataError, match="truncated or corrupt"):
        read_pickle(tmp_path / "cut")


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {b"labels": [0]},
        {b"data": np.zeros((1, 3072)), b"labels": [0]},
        {b"data": np.zeros((1, 3071), np.uint8), b"labels": [0]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [0, 1]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [True]},
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    write_pickle(tmp_path / "odd", content)
    with pytest.raises(DataError, match=r"should hold|has no"):
        images.read_cifar_pickle(tmp_path / "odd", "labels", 10)


# IDX


def idx(array):
    head = bytes([0, 0, 8, array.ndim])
    return head + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(folder, packed=False):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    made = {}
    for part, n in (("train", 7), ("t10k", 4)):
        made[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        made[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n, dtype=np.uint8)
    for name, array in made.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_plain_and_gzipped(tmp_path, packed):
    made = write_mnist(tmp_path / "mnist", packed)
    write_mnist(tmp_path / "fashion-mnist", packed)
    data = images.mnist(tmp_path)
    assert np.array_equal(data.train[:, 0], made["train-images-idx3-ubyte"])
    assert np.array_equal(data.test_labels, made["t10k-labels-idx1-ubyte"])
    fashion = images.fashion_mnist(tmp_path)
    assert np.array_equal(fashion.train, data.train)
    assert fashion.classes[9] == "Ankle-boot"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[:-1], "truncated or corrupt"),
        (lambda c: c + b"\0", "truncated or corrupt"),
        (lambda c: c[:3], "not an IDX file"),
        (lambda c: b"\x89PNG" + c[4:], "not an IDX file.*89 50 4e 47"),
        (lambda c: gzip.compress(c)[:-9], "truncated or corrupt gzip"),
        (lambda c: gzip.compress(c)[:20] + b"\0\0\0" + gzip.compress(c)[23:], "corrupt gzip"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path, change, words):
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=words) as error:
        images.mnist(tmp_path)
    assert path.name in str(error.value)


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(5, np.uint8)))
    with pytest.raises(DataError, match="4 images and 5 labels"):
        images.mnist(tmp_path)


# Sounds


def write_wav(path, samples, rate=8000, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, "<i2").tobytes())


def test_wav_samples_are_shares_of_full_scale(tmp_path):
    write_wav(tmp_path / "a.wav", [0, 16384, -32768])
    samples, rate = sounds.read_wav(tmp_path / "a.wav")
    assert (samples.tolist(), rate) == ([0, 0.5, -1], 8000)


def test_damaged_wavs_are_refused(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, range(100))
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:30], b"", b"RIFX" + whole[4:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.wav"):
            sounds.read_wav(path)
    write_wav(path, range(100), channels=2)
    with pytest.raises(DataError, match="2 channels of 16 bits"):
        sounds.read_wav(path)


def test_takes_0_to_4_are_the_test_split(tmp_path):
    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    for take in (0, 4, 5, 49):
        for digit in (3, 8):
            write_wav(folder / f"{digit}_jo_{take}.wav", np.arange(50 * (take + 1)))
    data = sounds.spoken_digits(tmp_path)
    assert data.train_labels.tolist() == data.test_labels.tolist() == [3, 3, 8, 8]
    assert data.train.shape == (4, 1, 40, 61)
    write_wav(folder / "nine.wav", [0])
    with pytest.raises(DataError, match="DIGIT_SPEAKER_TAKE"):
        sounds.spoken_digits(tmp_path)


def test_speech_commands_are_split_by_the_published_lists(tmp_path):
    folder = tmp_path / "speech_commands"
    for word in ("yes", "no", "_background_noise_"):
        (folder / word).mkdir(parents=True)
        for take, length in enumerate((8_000, 16_000, 20_000)):
            write_wav(folder / word / f"{take}.wav", np.arange(length) % 99, rate=16_000)
    (folder / "validation_list.txt").write_text("no/1.wav\n")
    (folder / "testing_list.txt").write_text("yes/2.wav\nno/0.wav\n")
    data = sounds.speech_commands(tmp_path)
    assert data.classes == ("no", "yes")
    assert data.test_labels.tolist() == [0, 1]
    assert data.train_labels.tolist() == [0, 1, 1]
    assert data.train.shape == (3, 1, 64, 101)
    silence = data.test[0, 0, :, 60:]  # the second half of a second
    assert silence.max() == pytest.approx(math.log(1e-10))
    write_wav(folder / "no" / "0.wav", [0], rate=8_000)
    with pytest.raises(DataError, match=r"0\.wav has a rate of 8000 Hz; must be 16000"):
        sounds.speech_commands(tmp_path)
    (folder / "yes" / "2.wav").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of the listed recordings: yes/2\.wav"):
        sounds.speech_commands(tmp_path)
    (folder / "testing_list.txt").write_text("")
    with pytest.raises(DataError, match="no recordings to test on"):
        sounds.speech_commands(tmp_path)


def test_mel_filters_are_those_of_transformers():
    audio = pytest.importorskip("transformers.audio_utils", reason="compares with transformers")
    for bands, bins, rate in ((40, 129, 8000), (64, 257, 16000)):
        theirs = audio.mel_filter_bank(bins, bands, 0, rate / 2, rate, None, "htk")
        ours = sounds.mel_filters(bands, bins, rate).numpy().T
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_pure_tone_is_loudest_in_the_band_around_it():
    rate, hertz = 8000, 1000
    tone = torch.sin(2 * torch.pi * hertz * torch.arange(4000) / rate)
    spectrum = sounds.log_mel(tone, rate)
    filters = sounds.mel_filters(40, 129, rate)
    nearest = int(filters[:, hertz * 256 // rate].argmax())
    assert (spectrum[:, 5:-5].argmax(0) == nearest).all()
    # The power of a louder sound is the square of the factor.
    louder = sounds.log_mel(10 * tone, rate) - spectrum
    assert louder[nearest, 5:-5].numpy() == pytest.approx(np.log(100), abs=1e-4)


# Arrays


def write_esc10(folder, **changes):
    folder.mkdir(exist_ok=True)
    content = {
        "logmel_u8": random_bytes(10, 64, 500),
        "label": np.arange(10, dtype=np.uint8),
        "fold": np.repeat(np.arange(1, 6, dtype=np.uint8), 2),
        "classes": np.array([f"c{k}" for k in range(10)]),
    }
    np.savez(folder / "esc10_logmel.npz", **{**content, **changes})


def test_one_fold_of_esc_10_is_held_out(tmp_path):
    write_esc10(tmp_path / "esc10")
    data = sounds.esc10(tmp_path, fold=2)
    assert data.test_labels.tolist() == [2, 3]
    assert data.train.shape == (8, 1, 64, 500)
    assert torch.tensor(data.train).stride() == (32000, 32000, 500, 1)  # not of channels_last
    with pytest.raises(DataError, match="no fold 6"):
        sounds.esc10(tmp_path, fold=6)
    path = tmp_path / "esc10" / "esc10_logmel.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="truncated"):
        sounds.esc10(tmp_path)


def test_an_array_of_objects_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    objects = np.array([Payload(os.mkdir, str(victim))], dtype=object)
    write_esc10(tmp_path / "esc10", label=objects)
    with pytest.raises(DataError, match="refused"):
        sounds.esc10(tmp_path)
    assert not victim.exists()


# Drawings, boxes, folders


def write_omniglot(root, drawings_each=20):
    from PIL import Image

    for part in ("background", "evaluation"):
        for character in ("Greek/character01", "Greek/character02", "Latin/character01"):
            folder = root / "omniglot" / f"images_{part}" / character
            folder.mkdir(parents=True)
            for k in range(drawings_each):
                picture = Image.new("1", (105, 105), 1)
                picture.paste(0, (0, 0, 105, 53 if "01" in character else 20))
                picture.save(folder / f"{k:02}.png")


def test_ink_is_white_and_characters_are_classes(tmp_path):
    write_omniglot(tmp_path)
    data = drawings.omniglot(tmp_path, "background", size=21)
    assert data.images.shape == (60, 1, 21, 21)
    assert data.images[0, 0, 0, 0] == 255
    assert data.images[0, 0, -1, -1] == 0
    assert np.bincount(data.labels).tolist() == [20, 20, 20]
    assert data.names == ("Greek/character01", "Greek/character02", "Latin/character01")
    two = drawings.omniglot(tmp_path, "evaluation", characters=2)
    assert two.names == ("Greek/character01", "Latin/character01")


def test_damaged_drawings_are_refused(tmp_path):
    write_omniglot(tmp_path)
    bad = tmp_path / "omniglot/images_background/Greek/character02/07.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:40])
    with pytest.raises(DataError, match=r"07\.png cannot be decoded"):
        drawings.omniglot(tmp_path, "background")
    bad.unlink()
    with pytest.raises(DataError, match="has 19 drawings"):
        drawings.omniglot(tmp_path, "background")


def write_voc(folder, objects, size=(40, 20), stated=(40, 20)):
    from PIL import Image

    folder.mkdir(exist_ok=True)
    Image.new("RGB", size, (255, 0, 0)).save(folder / "a.jpg")
    xml = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin>"
        f"<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for name, b in objects
    )
    (folder / "a.xml").write_text(
        f"<annotation><size><width>{stated[0]}</width><height>{stated[1]}</height></size>{xml}"
        "</annotation>"
    )
    return folder / "a.xml", folder / "a.jpg"


def test_boxes_shrink_with_their_image_and_empty_ones_are_counted(tmp_path):
    paths = write_voc(tmp_path, [("RBC", (2, 4, 10, 12)), ("WBC", (5, 5, 5, 9))])
    item = boxes.read_voc(*paths, ("RBC", "WBC"), scale=0.5)
    assert item.image.shape == (3, 10, 20)
    assert item.boxes.tolist() == [[1, 2, 5, 6]]
    assert (item.labels.tolist(), item.dropped) == ([0], 1)


def test_annotations_that_do_not_fit_are_refused(tmp_path):
    paths = write_voc(tmp_path, [("cat", (0, 0, 1, 1))])
    with pytest.raises(DataError, match="class 'cat'; must be one of RBC, WBC"):
        boxes.read_voc(*paths, ("RBC", "WBC"))
    paths = write_voc(tmp_path, [], stated=(41, 20))
    with pytest.raises(DataError, match=r"\(40, 20\) pixels, and a.xml says \(41, 20\)"):
        boxes.read_voc(*paths, ("RBC",))
    paths[0].write_text(paths[0].read_text()[:-20])
    with pytest.raises(DataError, match="not a whole VOC annotation"):
        boxes.read_voc(*paths, ("RBC",))


# Text


def test_the_vocabulary_is_the_training_parts_and_the_rest_is_unknown():
    text = texts.encode("t", ["abracadabra", "cabz"], size=4)
    assert text.vocabulary == ("<unk>", "a", "b", "r")
    assert text.train.tolist() == [1, 2, 3, 1, 0, 1, 0, 1, 2, 3, 1]
    assert text.test.tolist() == [0, 1, 2, 0]


def test_brown_is_split_by_documents(tmp_path):
    (tmp_path / "brown").mkdir()
    lines = [f"= ca{k:02} =\nword{k} .\nmore{k}\n" for k in range(20)]
    (tmp_path / "brown" / "brown.txt").write_text("".join(lines))
    text = texts.brown(tmp_path, None)
    assert (len(text.train), len(text.test)) == (16 * 5, 2 * 5)
    assert text.test.tolist().count(0) == 4
    assert not any("word8" in word or "word18" in word for word in text.vocabulary)
    (tmp_path / "brown" / "brown.txt").write_text("".join(lines[:3]))
    with pytest.raises(DataError, match="3 documents"):
        texts.brown(tmp_path)


def test_wikitext_needs_its_training_part(tmp_path):
    (tmp_path / "wikitext-2").mkdir()
    for part in ("valid", "test"):
        (tmp_path / "wikitext-2" / f"wiki.{part}.tokens").write_text("a b <unk> b\n")
    with pytest.raises(DataError, match=r"wiki\.train\.tokens"):
        texts.wikitext(tmp_path)
    (tmp_path / "wikitext-2" / "wiki.train.tokens").write_text("b b <unk> a\n")
    text = texts.wikitext(tmp_path)
    assert text.vocabulary == ("<unk>", "b", "<eos>", "a") or text.vocabulary[1] == "b"
    assert text.test.tolist().count(0) == 1
    (tmp_path / "wikitext-2" / "wiki.test.tokens").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        texts.wikitext(tmp_path)


# Fetching


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A data set whose archive a server on this machine offers."""
    place = tmp_path / "server"
    (place / "top").mkdir(parents=True)
    (place / "top" / "a.bin").write_bytes(b"data")
    with tarfile.open(place / "set.tar.gz", "w:gz") as archive:
        archive.add(place / "top", "top")
    digest = f"md5:{files.checksum(place / 'set.tar.gz', 'md5')}"
    handler = partial(SimpleHTTPRequestHandler, directory=str(place))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/set.tar.gz"
    archives = (Archive(address, "set.tar.gz", digest, unpack=True),)
    source = Source("set", "A set", "set", archives, ("a.bin",), "free")
    monkeypatch.setitem(CATALOGUE, "set", source)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield tmp_path / "data", place / "set.tar.gz", source
    server.shutdown()
    server.server_close()


def test_fetching_checks_and_unpacks_and_then_leaves_alone(offered):
    root, archive, source = offered
    root.mkdir()
    assert "is now in" in fetch(root, "set")
    assert (root / "set" / "a.bin").read_bytes() == b"data"
    assert is_there(root, source)
    archive.unlink()
    assert "is in" in fetch(root, "set")
    assert [path.name for path in root.iterdir()] == ["set"]


def test_a_checksum_that_differs_stops_before_anything_is_unpacked(offered):
    root, archive, _ = offered
    root.mkdir()
    archive.write_bytes(archive.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"md5 .* and should have .*nothing was unpacked"):
        fetch(root, "set")
    assert not list((root / "set").iterdir())


def test_without_a_network_it_says_what_to_put_where(offered):
    root, archive, _ = offered
    root.mkdir()
    archive.unlink()
    with pytest.raises(Unavailable) as error:
        fetch(root, "set")
    assert "cannot reach" in str(error.value)
    assert f"put set.tar.gz in {root / 'set'}" in str(error.value)
    with pytest.raises(DataError, match=r"no official address.*get it from its makers"):
        fetch(root, "bccd")
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        fetch(root, "cifar1")


def test_a_download_that_fails_is_no_wrong_usage(offered, monkeypatch, capsys):
    root, archive, _ = offered
    root.mkdir()
    archive.unlink()
    monkeypatch.setenv("NORMWISE_DATA", str(root))
    assert cli.main(["data", "fetch", "set"]) == 1
    assert "cannot reach" in capsys.readouterr().err


def test_an_archive_put_there_by_hand_is_used(offered):
    root, archive, _ = offered
    (root / "set").mkdir(parents=True)
    archive.rename(root / "set" / "set.tar.gz")
    fetch(root, "set")
    assert (root / "set" / "a.bin").exists()


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../outside", "gotcha")
    with pytest.raises(DataError, match="outside its folder"):
        fetching._unpack(tmp_path / "evil.zip", folder)
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        (tmp_path / "payload").write_text("gotcha")
        archive.add(tmp_path / "payload", "top/../../outside")
    with pytest.raises(DataError, match="outside its folder"):
        fetching._unpack(tmp_path / "evil.tar", folder)
    assert not (tmp_path / "outside").exists()
    (tmp_path / "cut.tar").write_bytes((tmp_path / "evil.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"truncated or corrupt|outside"):
        fetching._unpack(tmp_path / "cut.tar", folder)


def test_known_checksums_are_of_the_right_length():
    for source in CATALOGUE.values():
        for archive in source.archives:
            if archive.digest is not None:
                algorithm, _, digest = archive.digest.partition(":")
                assert len(digest) == {"md5": 32, "sha256": 64}[algorithm]
            assert (archive.url is None) == (archive.digest is None)


# The real sets

REAL = {
    "cifar10": (images.cifar10, (10_000, 10_000, 10)),
    "cifar100": (images.cifar100, (50_000, 10_000, 100)),
    "mnist": (images.mnist, (60_000, 10_000, 10)),
    "fsdd": (sounds.spoken_digits, (2_700, 300, 10)),
    "esc10": (sounds.esc10, (320, 80, 10)),
}


def real_root():
    if not os.environ.get("NORMWISE_DATA"):
        pytest.skip("NORMWISE_DATA does not name a folder with the data sets")
    return Path(os.environ["NORMWISE_DATA"])


@pytest.mark.parametrize("name", REAL)
def test_real_sets_have_their_published_sizes(name):
    reader, (train, test, classes) = REAL[name]
    data = reader(real_root())
    assert len(data.train_labels) >= train
    assert len(data.test_labels) == test
    assert sorted(set(data.test_labels.tolist())) == list(range(classes))


def test_the_real_texts_have_their_published_counts():
    root = real_root()
    shakespeare = texts.tinyshakespeare(root)
    assert len(shakespeare.train) == 1_115_394 * 90 // 100
    assert len(shakespeare.test) == 1_115_394 - 1_115_394 * 95 // 100
    # 1,161,192 tokens, and one <eos> for each of the corpus's 57,340 sentences.
    brown = texts.brown(root)
    documents = re.split(r"^= \w+ =\n", (root / "brown" / "brown.txt").read_text(), flags=re.M)[1:]
    kept = [(len(d.split()), d.count("\n")) for d in documents[8::10]]
    assert len(documents) == 500
    validation = sum(words + sentences for words, sentences in kept)
    assert len(brown.train) + validation + len(brown.test) == 1_161_192 + 57_340


def test_the_real_blood_cells_have_two_boxes_without_an_area():
    root = real_root()
    parts = [boxes.bccd(root, part, scale=0.05) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [205, 87, 72]
    counts = np.bincount(np.concatenate([item.labels for part in parts for item in part]))
    dropped = sum(item.dropped for part in parts for item in part)
    assert counts.sum() + dropped == 4155 + 372 + 361
    assert dropped == 2
