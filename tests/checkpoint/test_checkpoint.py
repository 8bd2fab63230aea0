"""What a checkpoint says of its training, on weights whose training is known."""

import io
import json
import os
import pickle
from pathlib import Path, PurePosixPath

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import normwise as nw
from normwise.checkpoint import CheckpointError, State, examine, stored
from normwise.cli import main

SHAPES = {"a": (64, 32), "b": (32, 128), "c": (48, 256), "d": (96, 64)}


def trained_on_noise(lr, weight_decay, steps):
    """AdamW on weights whose scale does nothing, under gradients that are noise alone."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: nn.Parameter(torch.randn(shape, generator=generator) * shape[1] ** -0.5)
        for name, shape in SHAPES.items()
    }
    optimizer = torch.optim.AdamW(
        weights.values(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )
    for _ in range(steps):
        for w in weights.values():
            noise = torch.randn(w.shape, generator=generator)
            w.grad = nw.geometry.tangential(noise, w.detach(), nw.View.layer())
            w.grad /= w.detach().norm()
        optimizer.step()
    return {name: w.detach() for name, w in weights.items()}


@pytest.fixture
def saved(tmp_path):
    def save(tensors):
        path = tmp_path / "weights.safetensors"
        save_file(tensors, path)
        return path

    return save


@pytest.mark.parametrize(("lr", "weight_decay"), [(2e-2, 0.25), (5e-3, 1.0)])
def test_settled_weights_say_lr_over_weight_decay(saved, lr, weight_decay):
    path = saved(trained_on_noise(lr, weight_decay, round(4 / (lr * weight_decay))))
    report = examine(path, lr=lr)
    assert len(report.of(State.SETTLED)) == len(SHAPES)
    assert report.lr_over_decay == pytest.approx(lr / weight_decay, rel=0.2)
    assert lr * report.implied_weight_decay == pytest.approx(lr * weight_decay, rel=0.2)
    assert examine(path, weight_decay=weight_decay).implied_lr == pytest.approx(lr, rel=0.2)


def test_weights_on_their_way_are_not_said_to_have_settled(saved):
    report = examine(saved(trained_on_noise(1e-2, 0.1, 100)))
    assert report.consensus is None
    assert len(report.of(State.MOVING)) == len(SHAPES)
    assert "Not settled" in report.findings()[0]


@pytest.mark.parametrize(
    "start",
    [
        lambda w: nn.init.normal_(w, std=0.02),
        lambda w: nn.init.kaiming_uniform_(w, a=5**0.5),
        nn.init.kaiming_normal_,
        nn.init.xavier_uniform_,
    ],
    ids=["normal", "torch", "He", "Glorot"],
)
def test_fresh_weights_are_as_drawn_even_where_all_have_one_rms(saved, start):
    torch.manual_seed(0)
    report = examine(saved({name: start(torch.empty(shape)) for name, shape in SHAPES.items()}))
    assert {t.state for t in report.tensors} == {State.DRAWN}
    assert report.consensus is None


def test_the_networks_own_start_tells_what_moved(saved):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    nn.init.normal_(model[1].weight, std=0.37)
    trained = {name: w.detach().clone() for name, w in model.state_dict().items()}
    trained["0.weight"] *= 2
    first, second = (t for t in examine(saved(trained), initial=model).tensors if t.is_matrix)
    assert first.rms / first.initial == pytest.approx(2)
    assert first.state is State.MOVING
    assert second.state is State.DRAWN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constraints_are_seen(saved, dtype):
    torch.manual_seed(0)
    rows = torch.randn(64, 48)
    capped = torch.randn(64, 48)
    spheres = {f"sphere{k}": torch.randn(32, 40) * torch.rand(32, 1) for k in range(3)}
    tensors = {
        "rows": 3 * rows / rows.norm(dim=1, keepdim=True),
        "columns": rows / rows.norm(dim=0),
        "capped": capped * (6 / capped.norm(dim=1, keepdim=True)).clamp(max=1),
        **{name: 5 * w / w.norm() for name, w in spheres.items()},
        "free": torch.randn(64, 48) * torch.rand(64, 1),
    }
    found = {
        t.name: t for t in examine(saved({k: t.to(dtype) for k, t in tensors.items()})).tensors
    }
    assert {name for name, t in found.items() if t.state is State.CONSTRAINED} == {*tensors} - {
        "free"
    }
    assert "all 64 rows have norm 3" in found["rows"].reason
    assert "at one largest norm, 6" in found["capped"].reason
    assert "3 matrices of this shape have norm 5" in found["sphere0"].reason


def test_dead_rows_ends_of_the_range_and_what_never_moved(saved):
    torch.manual_seed(0)
    w = torch.randn(32, 48) * torch.rand(32, 1)
    w[3], w[7] = 0, w[7] * 1e-6
    far = torch.randn(32, 48) * torch.rand(32, 1)
    far[5] = 1e-19
    broken = torch.ones(4, 4)
    broken[0, 0] = torch.nan
    report = examine(saved({"w": w, "far": far, "gain": torch.ones(8), "broken": broken}))
    found = {t.name: t for t in report.tensors}
    assert found["w"].dead_rows == (3, 7)
    assert found["far"].rows_near_range == (5,)
    assert found["gain"].state is State.CONSTANT
    assert found["broken"].state is State.BROKEN
    assert found["broken"].not_finite == 1
    text = str(report)
    assert "go back to a checkpoint" in report.findings()[0]
    assert "row 3, 7" in text


def test_every_layout_and_size_of_block_reads_the_same(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) * 0.3 for name, shape in SHAPES.items()}
    tensors |= {"kernel": torch.randn(6, 5, 3, 3), "scalar": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "one.safetensors")
    parts = tmp_path / "sharded"
    parts.mkdir()
    place = {name: f"model-{k % 2 + 1}.safetensors" for k, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file({n: t for n, t in tensors.items() if place[n] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    dcp.save(
        {"model": tensors, "optimizer": {"exp_avg": torch.ones(4, 4)}},
        checkpoint_id=tmp_path / "dcp",
        no_dist=True,
    )

    def numbers(path):
        return {t.name: (t.rms, t.kurtosis, t.rows.tolist()) for t in examine(path).tensors}

    whole = numbers(tmp_path / "one.safetensors")
    for name, (rms, _, rows) in whole.items():
        assert rms == pytest.approx(float(tensors[name].double().square().mean().sqrt()), rel=1e-12)
        if tensors[name].ndim:
            expected = tensors[name].double().flatten(1).norm(dim=1) if tensors[name].ndim else 0
            assert rows == pytest.approx(expected.tolist(), rel=1e-12)
    monkeypatch.setattr(stored, "_BLOCK", 500)
    for path in ("one.safetensors", "sharded", "sharded/model.safetensors.index.json", "dcp"):
        found = numbers(tmp_path / path)
        assert found.keys() == whole.keys()
        for name, (rms, kurtosis, rows) in found.items():
            assert (rms, kurtosis) == pytest.approx(whole[name][:2], rel=1e-12)
            assert rows == pytest.approx(whole[name][2], rel=1e-12)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_that_any_python_pickled_are_read(module):
    pickled = f"c{module}\nPosixPath\n(Va\nVb\ntR.".encode()
    assert stored._MetadataUnpickler(io.BytesIO(pickled)).load() == PurePosixPath("a/b")


def test_a_block_is_all_that_is_read_at_once(tmp_path, monkeypatch):
    save_file({"w": torch.randn(1000, 50)}, tmp_path / "w.safetensors")
    monkeypatch.setattr(stored, "_BLOCK", 5000)
    (tensor,) = stored.stored_tensors(tmp_path / "w.safetensors")
    assert [len(block) for block in tensor.blocks()] == [100] * 10


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damaged(kind, folder):
    if kind == "missing":
        return folder / "none.safetensors"
    if kind == "empty folder":
        return folder
    if kind == "pickle":
        torch.save({"w": torch.ones(2)}, folder / "model.pt")
        return folder / "model.pt"
    if kind == "folder of pickles":
        torch.save({"w": torch.ones(2)}, folder / "model.bin")
        return folder
    if kind == "malicious list":
        (folder / "dcp").mkdir()
        (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(Malicious(folder / "ran")))
        return folder / "dcp"
    if kind == "index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": [1, 2')
        return folder
    if kind == "index of nothing":
        text = json.dumps({"weight_map": {"w": "model-1.safetensors"}})
        (folder / "model.safetensors.index.json").write_text(text)
        return folder
    if kind.startswith("dcp"):
        dcp.save({"w": torch.randn(64, 64)}, checkpoint_id=folder / "dcp", no_dist=True)
        (file,) = (folder / "dcp").glob("*.distcp")
        raw = file.read_bytes()
        file.write_bytes(raw[: len(raw) // 2] if kind == "dcp truncated" else b"x" * len(raw))
        return folder / "dcp"
    save_file({"w": torch.randn(64, 64)}, folder / "w.safetensors")
    raw = (folder / "w.safetensors").read_bytes()
    (folder / "w.safetensors").write_bytes(raw[:-100] if kind == "truncated" else b"\xff" * 64)
    return folder / "w.safetensors"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "does not exist"),
        ("empty folder", "neither"),
        ("pickle", "is a pickle"),
        ("folder of pickles", "is a pickle"),
        ("malicious list", "mkdir"),
        ("index", "is damaged"),
        ("index of nothing", "model-1.safetensors"),
        ("dcp truncated", "is cut short"),
        ("dcp overwritten", "is damaged at 'w'"),
        ("truncated", "is damaged"),
        ("overwritten", "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, capsys, kind, words):
    path = damaged(kind, tmp_path)
    assert main(["checkpoint", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("normwise: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError):
        examine(path)


def test_bad_numbers_are_named(saved):
    path = saved({"w": torch.randn(8, 8)})
    with pytest.raises(ValueError, match="Invalid lr: -1"):
        examine(path, lr=-1)
    with pytest.raises(CheckpointError, match="no tensor name in common"):
        examine(path, initial={"other": torch.ones(2)})
    with pytest.raises(CheckpointError, match="under 'x\\.'"):
        examine(path, prefix="x.")


def test_the_command_prints_a_table_json_and_a_page(saved, tmp_path, capsys):
    path = saved(trained_on_noise(2e-2, 0.2, 900) | {"bias": torch.zeros(4)})
    assert main(["checkpoint", str(path), "--lr", "0.01", "--html", str(tmp_path / "p.html")]) == 0
    out = capsys.readouterr().out
    assert "Settled: 4 of 4 matrices" in out
    assert "64×32" in out
    page = (tmp_path / "p.html").read_text()
    assert "<svg" in page
    assert "Settled: 4 of 4 matrices" in page
    assert main(["checkpoint", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lr_over_decay"] == pytest.approx(0.1, rel=0.2)
    assert found["implied_lr"] is None
    assert main(["checkpoint", str(path), "--html", str(tmp_path / "p.html")]) == 2
    assert "exists" in capsys.readouterr().err


def normalized(x):
    return nn.functional.rms_norm(x, x.shape[-1:])


class Block(nn.Module):
    """Attention with normalized queries and keys, and an MLP."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        h = normalized(x)
        q, k, v = (m(h).unflatten(-1, (-1, 16)).transpose(1, 2) for m in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(
            normalized(q), normalized(k), v, is_causal=True
        )
        x = x + self.o(heads.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.relu(self.up(normalized(x))))


def characters(width=64):
    """A small language model."""
    return nn.Sequential(
        nn.Embedding(128, width), Block(width), Block(width), nn.Linear(width, 128, bias=False)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "weight_decay"), [(3e-3, 0.5), (2e-3, 1.0)])
def test_a_language_model_that_settled_says_lr_times_weight_decay(saved, lr, weight_decay):
    root = os.environ.get("NORMWISE_DATA")
    if not root:
        pytest.skip("NORMWISE_DATA is not set: needs tinyshakespeare")
    text = torch.tensor(list((Path(root) / "tinyshakespeare" / "input.txt").read_bytes()))
    torch.manual_seed(0)
    model = characters()
    start = {name: w.clone() for name, w in model.state_dict().items()}
    invariant = nw.analyze(model, text[:64].expand(2, -1), joint=False).views()
    assert {name.split(".")[1] for name in invariant} == {"q", "k"}
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    for step in range(round(4 / (lr * weight_decay))):
        if step == 50:
            early = examine(saved(model.state_dict()), initial=start)
        windows = text[torch.randint(len(text) - 64, (16, 1)) + torch.arange(65)]
        logits = model(windows[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = examine(saved(model.state_dict()), initial=start, invariant=invariant, lr=lr)
    print(report)
    assert early.consensus is None
    assert lr * report.implied_weight_decay == pytest.approx(lr * weight_decay, rel=0.2)
