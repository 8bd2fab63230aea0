"""``normwise inspect`` prints what the library returns."""

import argparse
import json

import pytest
import torch
from torch import nn

from normwise.invariance import Report, analyze
from normwise.invariance.cli import add_inspect_parser

NETWORK = """
import torch
from torch import nn

def build(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width, bias=False), nn.LayerNorm(width), nn.Linear(width, 2))

def build_with_batch():
    return build(), torch.ones(4, 6).cumsum(1)

def batch():
    return torch.ones(4, 6).cumsum(0)

number = 3

def broken():
    return {}["width"]
"""


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys):
    (tmp_path / "inspected_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(*arguments):
        parser = argparse.ArgumentParser()
        add_inspect_parser(parser.add_subparsers())
        args = parser.parse_args(["inspect", *arguments])
        code = args.run(args)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_factory_of_ones_own(inspect):
    code, out, err = inspect("inspected_network:build", "--batch", "4x6")
    assert (code, err) == (0, "")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 2))
    generator = torch.Generator().manual_seed(0)
    report = analyze(net, torch.randn(4, 6, generator=generator))
    assert out == f"{report}\n\n{report.advice(0.01, 1e-3)}\n"
    code, out, _ = inspect("inspected_network:build", "--batch", "4x6", "--summary")
    assert (code, out) == (0, f"{report.summary()}\n")
    code, out, _ = inspect("inspected_network:build", "--batch", "4x6", "--json")
    assert code == 0
    assert Report.from_json(out).views() == report.views()


def test_a_picture_is_drawn_and_never_over_another_file(inspect, tmp_path):
    pytest.importorskip("matplotlib", reason="the figure is drawn by it")
    arguments = ("inspected_network:build", "--batch", "4x6", "--plot", "figure.png")
    assert inspect(*arguments)[0] == 0
    before = (tmp_path / "figure.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    code, out, err = inspect(*arguments)
    assert (code, out) == (2, "")
    assert "'figure.png' exists" in err
    assert (tmp_path / "figure.png").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspected_network:build_with_batch",),
        ("inspected_network:build", "--batch", "inspected_network:batch"),
        ("inspected_network:build", "--batch", "4x6", "--set", "width=16", "--no-joint"),
    ],
)
def test_batches_and_settings(inspect, arguments):
    code, out, _ = inspect(*arguments)
    assert code == 0
    width = 16 if "width=16" in arguments else 8
    assert out.splitlines()[2].split()[:3] == ["0.weight", f"{width}×6", "layer"]


def test_a_model_too_large_to_copy_is_told_before_it_is_built(inspect):
    pytest.importorskip("transformers", reason="the networks come from transformers")
    code, out, err = inspect("hf:mixtral")
    assert (code, out) == (2, "")
    assert "46.7 billion parameters; make it narrow" in err
    offered = err.partition("the same: ")[2].split()
    code, out, _ = inspect("hf:mixtral", *offered, "--no-joint", "--draws=1")
    assert code == 0
    assert "model.layers.1.mlp.experts.down_proj" in out


def test_a_model_type_and_a_configuration_file_of_transformers(inspect, tmp_path):
    pytest.importorskip("transformers", reason="the networks come from transformers")
    fields = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    settings = [f"--set={key}={value}" for key, value in fields.items()]
    code, out, _ = inspect("hf:gpt2", *settings)
    assert code == 0
    assert "transformer.h.0.attn.c_attn.weight" in out
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **fields}))
    names = [line.split()[:1] for line in out.splitlines()[:12]]
    assert [line.split()[:1] for line in inspect("hf:config.json")[1].splitlines()[:12]] == names
    code, _, err = inspect("hf:nobody/nothing")
    assert code == 2
    assert "'nobody/nothing' is no model type of transformers and no file" in err


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_missing_is_named_with_its_extra(inspect, library, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    code, out, err = inspect(f"{library}:resnet18", "--batch", "2x3x32x32")
    assert (code, out) == (2, "")
    assert f"{library} cannot be imported" in err
    assert "pip install normwise[vision]" in err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("nothing",), "Invalid source: 'nothing'"),
        (("nothing:at_all",), "no module 'nothing'"),
        (("inspected_network:broken",), "raised KeyError: 'width'"),
        (("inspected_network:absent",), "has no function 'absent'"),
        (("inspected_network:number",), "has no function 'number'"),
        (("inspected_network:batch",), "returned Tensor; must return an nn.Module"),
        (("inspected_network:build",), "give --batch"),
        (("inspected_network:build", "--batch", "4by6"), "Invalid batch: '4by6'"),
        (("inspected_network:build", "--batch", "4x7"), "the forward of Sequential raised"),
        (("inspected_network:build", "--set", "width"), "Invalid --set: 'width'"),
        (("inspected_network:build", "--set", "depth=1"), "unexpected keyword argument 'depth'"),
    ],
)
def test_bad_input_is_one_line_on_standard_error(inspect, arguments, match):
    code, out, err = inspect(*arguments)
    assert (code, out) == (2, "")
    assert match in err
    assert err.count("\n") == 1
