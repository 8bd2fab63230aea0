"""Networks and data by name: tables, folders of images, texts, and networks that fit them."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from normwise.lab.data.own import Images, Rows, fingerprint, open_data
from normwise.lab.errors import UsageError
from normwise.lab.tasks.named import named


def write_table(path, rows, header="length,colour,note,kept", delimiter=","):
    lines = [header, *(delimiter.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"csv:{path}:kept"


def rows(count=200, seed=0):
    draw = random.Random(seed)
    return [
        (f"{draw.gauss(5, 2):.3f}", draw.choice("rgb"), f"note {i}", draw.choice(["yes", "no"]))
        for i in range(count)
    ]


def test_a_row_becomes_standardized_numbers_and_one_number_for_each_category(tmp_path):
    given = rows()
    source = open_data(write_table(tmp_path / "t.csv", given))
    assert (source.loss, source.inputs, source.outputs) == ("cross-entropy", 1 + 3, 2)
    assert source.facts == {"left_out": "note"}  # 200 different texts
    assert len(source.train) + len(source.test) == 200
    trained = np.array([float(given[i][0]) for i in source.train.chosen])
    for number in (0, 17, len(source.train) - 1):
        x, y = source.train[number]
        length, colour, _, kept = given[source.train.chosen[number]]
        expected = (float(length) - trained.mean()) / trained.std()
        assert x[0].item() == pytest.approx(expected, rel=1e-5)
        assert x[1:].tolist() == [float(colour == c) for c in "bgr"]
        assert int(y) == ["no", "yes"].index(kept)


def test_cells_in_quotes_with_line_ends_blank_lines_and_other_delimiters_are_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a;"b;b";kept\n1;"x\ny";1.5\n\n2;"u;v";2.5\n3;"x\ny";3.25\n\n', "utf-8")
    source = open_data(f"csv:{path}:kept")
    whole = Rows(path, ";", source.train.starts, [0, 1, 2], *fields(source))
    assert [len(x) for x, _ in (whole[0], whole[2])] == [3, 3]
    unit, targets = source.unit, [float(whole[i][1]) for i in range(3)]
    assert [(t - targets[0]) * unit for t in targets] == pytest.approx([0, 1.0, 1.75])


def fields(source):
    return source.train.columns, source.train.target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({3: ("", "r", "n", "yes")}, "column 'length' .* holds no number in row 4"),
        ({3: ("nan", "r", "n", "yes")}, "column 'length' .* holds no number in row 4"),
        ({3: ("1", "r", "n")}, "row 4 .* has 3 cells, and the header 4"),
        ({i: ("1", "r", "n", "yes") for i in range(200)}, "column 'kept' .* is 'yes' in every row"),
    ],
)
def test_a_table_with_gaps_or_nothing_to_learn_is_refused(tmp_path, change, words):
    given = [change.get(i, row) for i, row in enumerate(rows())]
    with pytest.raises(UsageError, match=words):
        open_data(write_table(tmp_path / "t.csv", given))


def pictures(root, classes=("a", "b"), count=20):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((10, 14, 3), 40 * number + i, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return f"folder:{root}"


def test_images_are_decoded_when_they_are_asked_for(tmp_path):
    source = open_data(pictures(tmp_path / "p"), 8)
    assert (source.inputs, source.outputs, source.size) == (3, 2, 8)
    assert len(source.train) + len(source.test) == 40
    assert set(source.train.paths).isdisjoint(source.test.paths)
    x, y = source.train[0]
    assert (x.shape, y) == ((3, 8, 8), 0)
    value = int(source.train.paths[0][-6:-4])
    assert x[0, 0, 0].item() == pytest.approx((value / 255 - 0.485) / 0.229, abs=1e-4)
    (tmp_path / "p" / "a" / "00.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"00\.png cannot be decoded"):
        _ = Images([str(tmp_path / "p" / "a" / "00.png")], [0], 8)[0]


def test_a_text_is_cut_into_sequences_that_share_their_ends(tmp_path):
    text = bytes(range(101))
    (tmp_path / "t.txt").write_bytes(text)
    source = open_data(f"text:{tmp_path / 't.txt'}", 10)
    assert [len(source.train), len(source.test)] == [9, 1]
    assert source.train[2].tolist() == list(text[20:31])
    assert source.test[0].tolist() == list(text[90:101])
    assert [row.tolist()[0] for row in source.train] == list(range(0, 90, 10))


def test_a_fingerprint_changes_with_the_data(tmp_path):
    name, folder = write_table(tmp_path / "t.csv", rows()), pictures(tmp_path / "p")
    before = fingerprint(name), fingerprint(folder)
    write_table(tmp_path / "t.csv", rows(seed=1))
    (tmp_path / "p" / "a" / "00.png").unlink()
    assert fingerprint(name) != before[0]
    assert fingerprint(folder) != before[1]


@pytest.mark.parametrize("network", ["hf:gpt2", "hf:llama"])
def test_a_language_model_of_transformers_is_narrow_and_reads_bytes(tmp_path, network):
    pytest.importorskip("transformers", reason="the networks come from transformers")
    (tmp_path / "t.txt").write_bytes(bytes(200))
    problem = named(network, f"text:{tmp_path / 't.txt'}", 16, {}, None).fresh(torch.device("cpu"))
    assert sum(p.numel() for p in problem.model.parameters()) < 400_000
    batch = problem.batch(torch.arange(2), torch.Generator().manual_seed(0))
    logits = problem._output(*batch[:2])
    assert logits.shape == (2, 16, 256)


def test_a_network_of_transformers_for_images_fits_the_folder(tmp_path):
    pytest.importorskip("transformers", reason="the networks come from transformers")
    data = pictures(tmp_path / "p", ("a", "b", "c"))
    for network in ("hf:vit", "hf:resnet"):
        problem = named(network, data, 16, {}, None).fresh(torch.device("cpu"))
        batch = problem.batch(torch.arange(2), torch.Generator().manual_seed(0))
        assert problem._output(*batch[:2]).shape == (2, 3)


def test_timm_is_asked_for_the_number_of_classes_and_missed_in_one_line(tmp_path, monkeypatch):
    asked = {}

    def create_model(name, **given):
        asked.update(given, name=name)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, given["num_classes"]))

    data = pictures(tmp_path / "p")
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    named("timm:resnet18", data, 8, {"width": 4}, None).fresh(torch.device("cpu"))
    assert asked == {"name": "resnet18", "pretrained": False, "num_classes": 2, "width": 4}
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"timm cannot be imported .* normwise\[vision\]"):
        named("timm:resnet18", data, 8, {}, None).fresh(torch.device("cpu"))


def test_a_factory_takes_the_sizes_that_it_names(tmp_path):
    data = write_table(tmp_path / "t.csv", rows())
    problem = named("m:f", data, None, {}, lambda inputs, outputs: nn.Linear(inputs, outputs))
    assert problem.fresh(torch.device("cpu")).model.weight.shape == (2, 4)
    named("m:f", data, None, {}, lambda: nn.Linear(4, 2)).fresh(torch.device("cpu"))
    with pytest.raises(UsageError, match="takes 'width', which data do not say"):
        named("m:f", data, None, {}, lambda width: nn.Linear(width, 2))


def test_errors_of_a_regression_are_in_the_unit_of_the_file(tmp_path):
    path = tmp_path / "t.csv"
    lines = [f"{i},{1000 * i + 0.5}" for i in range(50)]
    path.write_text("\n".join(["x,price", *lines]), "utf-8")

    class Zero(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0

    problem = named("m:f", f"csv:{path}:price", None, {}, lambda: Zero(1, 1))
    prices = [1000 * i + 0.5 for i in problem.parts["test"].chosen]
    mean = np.mean([1000 * i + 0.5 for i in problem.parts["train"].chosen])
    metrics = problem.fresh(torch.device("cpu")).evaluate().metrics
    expected = np.sqrt(np.mean((np.array(prices) - mean) ** 2))
    assert metrics["rmse"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("network", "data", "size", "words"),
    [
        ("mlp:64x64", "cvs:t.csv:kept", None, "unknown data 'cvs:t.csv:kept'"),
        ("mlp:64x64", "csv:t.csv", None, "names no target"),
        ("mlp:64x64", "csv:t.csv:kepd", None, "did you mean 'kept'"),
        ("mlp:64x64", "csv:none.csv:kept", None, "cannot read none.csv"),
        ("mlp:64x64", "csv:latin.csv:kept", None, "is no table of UTF-8 text"),
        ("mlp:64x64", "csv:t.csv:kept", 8, "goes with images and texts"),
        ("mlp:wide", "csv:t.csv:kept", None, "must be widths such as mlp:64x64"),
        ("mlp:64x64", "text:t.csv", 8, "name a network, such as hf:gpt2"),
        ("hf:gpt2", "csv:t.csv:kept", None, "give mlp:64x64, or MODULE:FACTORY"),
        ("hf:gpt22", "text:t.csv", 8, "no model type of transformers and no file"),
        ("hf:gpt2", "text:t.csv", 10**6, "give a smaller --size"),
        ("timm:resnet18", "text:t.csv", 8, "is a network for images"),
        ("hf:vit", "folder:none", None, "no folder 'none'"),
        ("hf:vit", "folder:.", None, "holds 1 folders"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path, monkeypatch, network, data, size, words):
    pytest.importorskip("transformers", reason="the networks come from transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "latin.csv").write_bytes("größe,kept\n1,2\n".encode("latin-1"))
    write_table(tmp_path / "t.csv", rows())
    with pytest.raises(UsageError, match=words):
        named(network, data, size, {}, None)


def test_a_folder_with_a_tokenizer_cuts_the_text_and_its_configuration_is_taken_as_it_is(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="it cuts the text")
    pytest.importorskip("transformers", reason="the networks come from transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    words = {"<unk>": 0, "to": 1, "be": 2, "or": 3, "not": 4}
    cut = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    cut.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    cut.save(str(folder / "tokenizer.json"))
    config = '{"model_type": "gpt2", "vocab_size": 5, "n_embd": 8, "n_layer": 1, "n_head": 2}'
    (folder / "config.json").write_text(config)
    (tmp_path / "t.txt").write_text("to be or not to be\n" * 10)
    problem = named(f"hf:{folder}", f"text:{tmp_path / 't.txt'}", 6, {}, None)
    assert problem.parts["train"][1].tolist() == [1, 2, 3, 4, 1, 2, 1]
    assert problem.fresh(torch.device("cpu")).model.config.n_embd == 8
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="vocabulary of 5, and the text one of 256 bytes"):
        named(f"hf:{folder}", f"text:{tmp_path / 't.txt'}", 6, {}, None)
