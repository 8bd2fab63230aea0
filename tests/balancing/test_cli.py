"""``normwise balance`` writes the same function, and says what has changed."""

import argparse

import pytest
import torch
from torch import nn

from normwise.balancing.cli import add_balance_parser

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2))
"""

safetensors = pytest.importorskip("safetensors.torch", reason="the command reads its files")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    (tmp_path / "balanced_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def call(*arguments):
        parser = argparse.ArgumentParser()
        add_balance_parser(parser.add_subparsers())
        args = parser.parse_args(
            ["balance", "balanced_network:build", "--batch", "16x6", *arguments]
        )
        code = args.run(args)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def network(state=None):
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2))
    if state is not None:
        model.load_state_dict(state)
    return model


def column(out, name):
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    return [float(cell) for cell in line.removeprefix(name).split()]


@pytest.mark.parametrize("to", ["least-mass", "equal-ranges"])
def test_a_checkpoint_whose_scales_are_spread_is_balanced(run, tmp_path, to):
    model = network()
    factors = torch.logspace(-2, 2, 9)
    with torch.no_grad():
        model[0].weight.mul_(factors[:, None])
        model[0].bias.mul_(factors)
        model[2].weight.div_(factors)
    safetensors.save_file(model.state_dict(), tmp_path / "in.safetensors")
    code, out, err = run("--checkpoint", "in.safetensors", "--out", "out.safetensors", "--to", to)
    assert code == 0, err
    found = network(safetensors.load_file(tmp_path / "out.safetensors"))
    x = torch.randn(7, 6)
    torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)
    before, after = column(out, "mass")
    assert after < before
    before, after = column(out, "error of int8 by tensor")
    assert after < 0.1 * before
    assert column(out, "largest difference of outputs")[0] < 1e-9


def test_names_and_dtypes_are_those_of_the_checkpoint(run, tmp_path):
    state = {name: value.to(torch.bfloat16) for name, value in network().state_dict().items()}
    safetensors.save_file(state, tmp_path / "in.safetensors")
    assert run("--checkpoint", "in.safetensors", "--out", "out.safetensors")[0] == 0
    written = safetensors.load_file(tmp_path / "out.safetensors")
    assert {n: v.dtype for n, v in written.items()} == {n: v.dtype for n, v in state.items()}


def test_what_does_not_fit_is_said_in_one_line(run, tmp_path):
    state = network().state_dict()
    safetensors.save_file({"0.weight": state["0.weight"]}, tmp_path / "part.safetensors")
    safetensors.save_file({**state, "9.weight": torch.ones(2)}, tmp_path / "more.safetensors")
    for name, word in (("part", "lacks '0.bias'"), ("more", "has '9.weight'")):
        code, out, err = run("--checkpoint", f"{name}.safetensors")
        assert code == 2
        assert word in err
        assert err.count("\n") == 1
        assert not out
    assert "exists" in run("--out", "more.safetensors")[2]
