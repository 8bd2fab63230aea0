"""Trainings that begin with the weights of a file."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normwise.lab.errors import UsageError
from normwise.lab.networks import build
from normwise.lab.networks.centernet import CentreNet
from normwise.lab.recipes import RecipeCell, find, read
from normwise.lab.recipes.schema import Training
from normwise.lab.running.cell import config_of, run_cell
from normwise.lab.running.prepare import normalize_weights
from normwise.lab.running.pretrained import load_pretrained, read_weights

TEXT = """
schema: 1
id: mine
title: Mine
question: Which?
task: classification
paper: {source: none, metric: accuracy}
methods: {sgd: {label: SGD, settings: {}}}
settings: {data: digits, network: resnet8, width: 4, batch_size: 64, optimizer: sgd, lr: 0}
scales:
  paper: {settings: {epochs: 1}, rows: {digits: {}}}
  small: {settings: {epochs: 1}, rows: {digits: {}}}
"""


def cell(**training: Any) -> RecipeCell:
    (made,) = read(TEXT, "mine.yaml").cells("small", 1)
    return replace(made, training=replace(made.training, **training))


def network(seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return build("resnet8", 1, 10, 4)


def training(**given: Any) -> Training:
    return Training(epochs=1, batch_size=1, optimizer="sgd", lr=0.1, **given)


def final(out: Path, made: RecipeCell) -> dict[str, Tensor]:
    return torch.load(out / made.folder / "checkpoint.pt", weights_only=True)["model"]


HEAD = [name for name, module in network().named_modules() if isinstance(module, nn.Linear)][-1]


def save(weights: dict[str, Tensor], path: Path, form: str) -> None:
    if form == "safetensors":
        save_file = pytest.importorskip(
            "safetensors.torch", reason="the file is written with it"
        ).save_file
        save_file(weights, path)
    else:
        torch.save(weights if form == "plain" else {form: weights, "epoch": 3}, path)


@pytest.mark.parametrize("form", ["safetensors", "plain", "model", "state_dict"])
def test_a_training_begins_with_the_weights_of_the_file(tmp_path: Path, form: str) -> None:
    """At a learning rate of 0 it also ends with them."""
    name = "start.safetensors" if form == "safetensors" else "start.pt"
    weights = network().state_dict()
    save(weights, tmp_path / name, form)
    made = cell(pretrained=name)
    assert run_cell(made, tmp_path / "out", tmp_path)["status"] == "ok"
    after = final(tmp_path / "out", made)
    trained = [k for k, _ in network().named_parameters()]
    assert all(torch.equal(after[k], weights[k]) for k in trained)
    line = json.loads((tmp_path / "out" / made.folder / "metrics.jsonl").open().readline())
    assert line["norm_growth"] == 1.0, "they are there before norms are first measured"


def test_a_cell_goes_on_from_the_checkpoint_of_another(tmp_path: Path) -> None:
    first = cell(lr=0.1)
    run_cell(first, tmp_path, tmp_path)
    second = replace(cell(pretrained=f"{first.folder}/checkpoint.pt"), method="second")
    run_cell(second, tmp_path, tmp_path)
    before, after = final(tmp_path, first), final(tmp_path, second)
    assert all(torch.equal(before[k], after[k]) for k, _ in network().named_parameters())


def test_what_is_left_out_stays_as_it_was_drawn(tmp_path: Path) -> None:
    head = HEAD
    weights = {k: v for k, v in network().state_dict().items() if not k.startswith(head)}
    torch.save({**weights, f"{head}.weight": torch.zeros(1000, 3)}, tmp_path / "start.pt")
    drawn, model = network(6), network(6)
    load_pretrained(
        model, training(pretrained="start.pt", pretrained_skip=(head, "*.num_batches_*")), tmp_path
    )
    for name, value in model.state_dict().items():
        source = drawn.state_dict() if name.startswith(head) else weights
        assert torch.equal(value, source[name]), name


def test_weights_are_loaded_before_they_are_normalized(tmp_path: Path) -> None:
    """A gain begins at the norm of the file's weight, so the network is the file's."""
    torch.save(network().state_dict(), tmp_path / "start.pt")
    settings = training(pretrained="start.pt", normalization="WN", gain=True)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = network(6)
    load_pretrained(model, settings, tmp_path)
    normalize_weights(model, settings)
    torch.testing.assert_close(model.eval()(x), network().eval()(x))


def test_numbers_are_converted_and_a_module_may_be_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3, 2, dtype=torch.float64)}, tmp_path / "start.pt")
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 3, bias=False))
    load_pretrained(model, training(pretrained="start.pt", pretrained_into="1"), tmp_path)
    assert torch.equal(model[1].weight, torch.ones(3, 2))


def test_centernet_takes_the_blocks_of_a_classifier(tmp_path: Path) -> None:
    body = build("centernet_body", 3, 7, 4)
    torch.save({"model": body.state_dict()}, tmp_path / "centernet-body.pt")
    (made,) = find("adamp-detection").cells("paper", 1, ["adamp"], ["centernet-pretrained"])
    model = CentreNet(80, 4)
    load_pretrained(model, made.training, tmp_path)
    for name, value in model.blocks.state_dict().items():
        assert torch.equal(value, body.state_dict()[f"blocks.{name}"])


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    head = HEAD
    weights = network().state_dict()
    absent, first = [k for k in weights if not k.startswith(head)][:2]
    del weights[absent]
    weights[first] = torch.zeros(2)
    weights["other.weight"] = torch.zeros(3)
    torch.save(weights, tmp_path / "start.pt")
    model, drawn = network(6), network(6)
    with pytest.raises(UsageError) as error:
        load_pretrained(model, training(pretrained="start.pt"), tmp_path)
    message = str(error.value)
    assert f"missing in the file: {absent}" in message
    assert "unexpected: other.weight" in message
    assert f"of another shape: {first} (2,) for" in message
    assert "\n" not in message
    same = zip(model.state_dict().values(), drawn.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same), "nothing is loaded in part"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pretrained": "none.pt"}, "none.pt' are not there"),
        ({"pretrained": "start.pt", "pretrained_into": "bdy"}, "'bdy' is no module"),
        ({"pretrained": "start.pt", "pretrained_skip": ("hed",)}, "skip names 'hed', which is ne"),
    ],
)
def test_a_wrong_setting_says_what(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    torch.save(network().state_dict(), tmp_path / "start.pt")
    with pytest.raises(UsageError, match=words):
        load_pretrained(network(), training(**given), tmp_path)


def test_a_setting_without_a_file_is_refused() -> None:
    with pytest.raises(UsageError, match="pretrained_skip is set, but pretrained is not"):
        training(pretrained_skip=("head",))


RUN: list[str] = []


class Payload:
    def __reduce__(self) -> Any:
        return RUN.append, ("run",)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "start.pt"
    for write in (lambda f: torch.save({"w": Payload()}, f), lambda f: pickle.dump(Payload(), f)):
        with path.open("wb") as file:
            write(file)
        with pytest.raises(UsageError, match="nothing is unpickled"):
            read_weights(path)
    assert not RUN


@pytest.mark.parametrize("name", ["start.pt", "start.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    save({"w": torch.ones(50)}, tmp_path / name, name.partition(".")[2].replace("pt", "plain"))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=f"{name}' are damaged"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [({}, "hold a dict"), ([torch.ones(1)], "hold a list"), ({"w": 3}, "have 'w' of type int")],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "start.pt")
    with pytest.raises(UsageError, match=words):
        read_weights(tmp_path / "start.pt")


def test_an_exchanged_file_is_another_run(tmp_path: Path) -> None:
    torch.save(network(1).state_dict(), tmp_path / "start.pt")
    made = cell(pretrained="start.pt")
    result = run_cell(made, tmp_path / "out", tmp_path)
    assert run_cell(made, tmp_path / "out", tmp_path) == result
    torch.save(network(2).state_dict(), tmp_path / "start.pt")
    with pytest.raises(UsageError, match="holds another run: its pretrained_sha256"):
        run_cell(made, tmp_path / "out", tmp_path)


def test_without_a_file_the_config_is_what_it_was_before_there_was_the_setting() -> None:
    made = cell()
    config = config_of(made, "cpu")
    assert not any("pretrained" in key for key in (*config, *config["training"]))
    with_one = config_of(cell(pretrained="a.pt", pretrained_skip=("fc",)), "cpu")["training"]
    assert {k: v for k, v in with_one.items() if k not in config["training"]} == {
        "pretrained": "a.pt",
        "pretrained_skip": ["fc"],
    }
