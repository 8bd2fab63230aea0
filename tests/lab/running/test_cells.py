"""Cells: killed anywhere they go on to the same bits, and nothing that was written is lost."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

from normwise.lab.errors import Damaged, UsageError
from normwise.lab.parallel import ALONE, Processes
from normwise.lab.recipes import find, read
from normwise.lab.recipes.schema import Training
from normwise.lab.running import cell as module
from normwise.lab.running.cell import DiskFull, run_cell
from normwise.lab.running.events import Finished, Measured
from normwise.lab.running.executors import run_cells
from normwise.lab.running.prepare import (
    make_optimizer,
    normalize_weights,
    scale_invariant_weights,
)
from normwise.lab.running.trainer import Trainer
from normwise.lab.store import locked, read_metrics, seal
from normwise.theory import sgd_without_decay

ROOT = Path("no data is needed")
UNDECAYED = {"epsilon_shift": None, "weight_decay": 0.0}
FILES = ("metrics.jsonl", "result.json", "config.json")


def tiny(method="adamp", **training):
    """A cell of two epochs of three steps, which draws in every way there is."""
    (cell,) = find("digits").cells("small", 1, [method])
    options = replace(cell.options, width=4, augment=("crop", "flip", "cutout", "cutmix"))
    quick = {"epochs": 2, "batch_size": 256, "normalization": "WS", "epsilon_shift": 0.1}
    return replace(cell, options=options, training=replace(cell.training, **{**quick, **training}))


def contents(out, cell):
    return {name: (out / cell.folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run leaves."""
    out = tmp_path_factory.mktemp("whole")
    run_cell(tiny(), out, ROOT, checkpoint_seconds=0)
    return contents(out, tiny())


def in_a_child(prepare, out, cell=None):
    """Run a cell in a forked process; its exit code, −9 if it was killed."""

    def run():
        torch.set_num_threads(1)
        prepare()
        run_cell(cell or tiny(), out, ROOT, checkpoint_seconds=0)

    child = get_context("fork").Process(target=run)
    child.start()
    return child


def killed_at(call, n, before):
    """Make the ``n``-th ``os.fsync`` or ``os.replace`` of this process its last."""
    original, count = getattr(os, call), 0

    def last(*arguments):
        nonlocal count
        count += 1
        if count == n and before:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, call, last)


fork_only = pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")
MOMENTS = [
    (call, n, before)
    for call in ("fsync", "replace")
    for n in (1, 2, 3, 5, 7, 9)
    for before in (True, False)
]


@fork_only
@pytest.mark.parametrize(
    ("call", "n", "before"),
    [
        m if m in [("fsync", 5, True), ("replace", 5, False), ("replace", 7, True)] else slow
        for m in MOMENTS
        for slow in [pytest.param(*m, marks=pytest.mark.slow)]
    ],
)
def test_killed_around_any_write_it_goes_on_to_the_same_bits(tmp_path, whole, call, n, before):
    child = in_a_child(lambda: killed_at(call, n, before), tmp_path)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    run_cell(tiny(), tmp_path, ROOT, checkpoint_seconds=0)
    assert contents(tmp_path, tiny()) == whole
    assert not list((tmp_path / tiny().folder).glob(".*"))


@fork_only
@pytest.mark.slow
def test_killed_at_20_random_moments_it_goes_on_to_the_same_bits(tmp_path):
    cell = tiny(epochs=8)
    began = time.monotonic()
    run_cell(cell, tmp_path / "whole", ROOT, checkpoint_seconds=0)
    seconds = time.monotonic() - began
    expected = contents(tmp_path / "whole", cell)
    moment = random.Random(0)
    kills = tries = 0
    while kills < 20:
        tries += 1
        out = tmp_path / str(tries)
        for _ in range(4):
            child = in_a_child(lambda: None, out, cell)
            time.sleep(moment.uniform(0, 0.6 * seconds))
            child.kill()
            child.join()
            kills += child.exitcode == -signal.SIGKILL
        run_cell(cell, out, ROOT, checkpoint_seconds=0)
        assert contents(out, cell) == expected
        assert tries < 20


@pytest.mark.parametrize(
    ("method", "training"),
    [
        ("sgdp", {"nesterov": True, "schedule": "cosine", "warmup": 0.3}),
        ("sgd", {"normalization": "none", "epsilon_shift": None, "weight_decay": 0.1}),
        ("sgd", {"epsilon_shift": None, "weight_decay": 0.1, "decay_window": (0.0, 0.5)}),
        (
            "adamw",
            {
                "epsilon_shift": None,
                "coupling": "schedule",
                "weight_decay": 0.1,
                "decay_window": (0.8, 1.0),
            },
        ),
        ("adamw", {"normalization": "CWN", "gain": True, "decay_on": "all", "clip": 0.1}),
        ("sgd", {**UNDECAYED, "norm_correction": "projected"}),
        ("adamw", {**UNDECAYED, "norm_correction": "rescaled", "initial_scale": 0.3}),
    ],
)
def test_every_optimizer_goes_on_from_the_middle_of_an_epoch(
    tmp_path, monkeypatch, method, training
):
    cell = tiny(method, **training)
    run_cell(cell, tmp_path / "whole", ROOT)
    take, steps = Trainer.take, []

    def stop(self, chosen):
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(chosen)
        return take(self, chosen)

    monkeypatch.setattr(Trainer, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path / "cut", ROOT, checkpoint_seconds=0)
    monkeypatch.setattr(Trainer, "take", take)
    run_cell(cell, tmp_path / "cut", ROOT)
    assert contents(tmp_path / "cut", cell) == contents(tmp_path / "whole", cell)
    assert (
        "resumed after epoch 1, step 1" in (tmp_path / "cut" / cell.folder / "log.txt").read_text()
    )


def test_a_finished_cell_is_not_run_again(tmp_path, whole, monkeypatch):
    folder = tmp_path / tiny().folder
    folder.mkdir(parents=True)
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(module, "CellStart", None)
    assert run_cell(tiny(), tmp_path, ROOT) == json.loads(whole["result.json"])


def test_the_result_depends_on_the_seed_and_on_nothing_around_it(tmp_path, whole):
    torch.manual_seed(1234)
    expected = torch.get_rng_state()
    torch.manual_seed(1234)
    other = run_cell(replace(tiny(), seed=1), tmp_path, ROOT)
    assert torch.equal(torch.get_rng_state(), expected)
    again = run_cell(tiny(), tmp_path, ROOT)
    assert again == json.loads(whole["result.json"])
    assert again["weights"] != other["weights"]


def test_another_config_in_the_same_folder_is_refused(tmp_path, whole):
    folder = tmp_path / tiny().folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(whole["config.json"])
    with pytest.raises(UsageError, match=r"training: lr is 0\.001, not 0\.5.*another --out"):
        run_cell(tiny(lr=0.5), tmp_path, ROOT)
    older = json.loads(whole["config.json"])
    del older["training"]["normalization_eps"]
    (folder / "config.json").write_text(json.dumps(older))
    with pytest.raises(UsageError, match="training: normalization_eps is 'not set', not None"):
        run_cell(tiny(), tmp_path, ROOT)
    old = {**json.loads(whole["config.json"]), "schema": 0}
    (folder / "config.json").write_text(json.dumps(old))
    with pytest.raises(UsageError, match=r"another version .schema 0, not 2"):
        run_cell(tiny(), tmp_path, ROOT)


def begun(out, cell, monkeypatch, steps=4):
    """Leave a cell that was cut off after some steps, each with a checkpoint."""
    take, taken = Trainer.take, []

    def stop(self, batches):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(batches)
        take(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take", stop)
        with pytest.raises(KeyboardInterrupt):
            run_cell(cell, out, ROOT, checkpoint_seconds=0)
    return out / cell.folder


def flipped(path):
    """Turn 200 bytes of the weights in a checkpoint into others, as a bad disk would."""
    content = bytearray(path.read_bytes())
    for place in random.Random(0).sample(range(len(content) // 3, 2 * len(content) // 3), 200):
        content[place] ^= 0xFF
    path.write_bytes(content)


def sealed(state):
    """A file that is whole, of something that is no checkpoint."""

    def write(path):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(seal(buffer.getvalue()))

    return write


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("checkpoint.pt", flipped),
        ("checkpoint.pt", lambda path: path.write_bytes(b"PK\x03\x04 but no more")),
        ("checkpoint.pt", lambda path: path.write_bytes(b"")),
        ("checkpoint.pt", sealed({"epoch": 1})),
        ("checkpoint.pt", sealed([1, 2])),
        ("checkpoint.pt", sealed({"model": {"0.weight": torch.ones(2)}, "optimizer": {}})),
        ("metrics.jsonl", lambda path: path.write_text(path.read_text().replace("0.", "1.", 1))),
        ("metrics.jsonl", lambda path: path.unlink()),
        ("config.json", lambda path: path.write_text("[]")),
        ("config.json", lambda path: path.write_text("{")),
        ("environment.json", lambda path: path.write_text("{")),
    ],
)
def test_a_damaged_cell_is_skipped_and_the_next_is_trained(tmp_path, monkeypatch, name, damage):
    """Nothing goes on from a file that is not what was written, and one bad cell stops no other."""
    bad, good = tiny(), tiny("sgd", epochs=1)
    damage(begun(tmp_path, bad, monkeypatch) / name)
    with pytest.raises(Damaged, match=rf"{re.escape(name)} is damaged .*delete .*{bad.folder}"):
        run_cell(bad, tmp_path, ROOT)
    skipped, trained = run_cells([bad, good], tmp_path, ROOT)
    assert skipped["status"] == "skipped"
    assert trained["status"] == "ok"


def test_a_damaged_result_is_not_taken_for_one(tmp_path, whole):
    folder = tmp_path / tiny().folder
    folder.mkdir(parents=True)
    for name, content in whole.items():
        (folder / name).write_bytes(content.replace(b'"accuracy": 0.', b'"accuracy": 1.'))
    with pytest.raises(Damaged, match=r"result\.json is damaged .its checksum differs"):
        run_cell(tiny(), tmp_path, ROOT)


def test_torch_reads_a_checkpoint_as_it_is(tmp_path, whole):
    run_cell(tiny(epochs=1), tmp_path, ROOT)
    state = torch.load(tmp_path / tiny().folder / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1


# Code of the user's


@pytest.fixture
def own_network(tmp_path, monkeypatch):
    """A folder with a network of the user's, in two modules, and a cell that names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_parts.py").write_text("from torch import nn\nact = nn.ReLU\n")
    (tmp_path / "my_net.py").write_text(
        "import my_parts\nfrom torch import nn\n"
        "def make():\n"
        "    conv = nn.Conv2d(1, 4, 3)\n"
        "    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))\n"
        "    return nn.Sequential(conv, nn.BatchNorm2d(4), my_parts.act(), head)\n"
    )
    yield replace(tiny("sgd", epochs=1), options=replace(tiny().options, network="my_net:make"))
    for name in ("my_net", "my_parts"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("network", ["os:abort", "my_net:make"])
def test_a_recipe_runs_no_code_that_is_not_trusted(own_network, tmp_path, network):
    cell = replace(own_network, options=replace(own_network.options, network=network))
    for trust in ((), ("another",)):
        with pytest.raises(UsageError, match=rf"{network}.*--trust {network.split(':')[0]}"):
            run_cells([cell], tmp_path / "out", ROOT, trust=trust)
    assert not (tmp_path / "out").exists()
    assert "my_net" not in sys.modules


def test_an_edited_network_is_another_run(own_network, tmp_path):
    (result,) = run_cells([own_network], tmp_path / "out", ROOT, trust=["my_net"])
    assert result["status"] == "ok"
    assert result["facts"]["invariant_weights"] == 1
    with (tmp_path / "my_parts.py").open("a") as file:
        file.write("# edited\n")
    with pytest.raises(UsageError, match=r"another source of 'my_net:make'.*edited since"):
        run_cells([own_network], tmp_path / "out", ROOT, trust=["my_net"])


# Processes


@fork_only
def test_two_processes_do_not_run_the_same_cell(tmp_path):
    folder = tmp_path / tiny().folder
    folder.mkdir(parents=True)
    with (
        locked(folder / "lock"),
        pytest.raises(UsageError, match="another process is running"),
    ):
        run_cell(tiny(), tmp_path, ROOT)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(tmp_path, whole, monkeypatch, n):
    fsync, count = os.fsync, 0

    def full(descriptor):
        nonlocal count
        count += 1
        if count >= n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            DiskFull, match=r"no room to write .*(json|jsonl|pt) .No space left.*make room"
        ):
            run_cell(tiny(), tmp_path, ROOT, checkpoint_seconds=0)
    run_cell(tiny(), tmp_path, ROOT)
    assert contents(tmp_path, tiny()) == whole


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk")
def test_a_disk_that_is_really_full(tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a disk here")
    try:
        with pytest.raises(DiskFull):
            run_cell(tiny(), disk, ROOT, checkpoint_seconds=0)
        subprocess.run([*mount[:3], "-o", "remount,size=10m", str(disk)], check=True)
        run_cell(tiny(), disk, ROOT)
        assert contents(disk, tiny()) == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_training_that_diverges_is_a_result_and_is_not_repeated(tmp_path):
    cell = tiny("sgd", lr=1e30, normalization="none", epsilon_shift=None)
    result = run_cell(cell, tmp_path, ROOT)
    assert result["status"] == "failed"
    assert "not finite" in result["error"]
    assert run_cell(cell, tmp_path, ROOT) == result


def prepared(network, training):
    normalize_weights(network, training)
    return make_optimizer(network, training)


def test_bare_division_fails_where_the_guarded_does_not(tmp_path):
    """A slice of zeros has no direction: 0/0 by the bare norm, and 0 by the library's."""
    outcomes = {}
    for guard in (None, 0.0):
        network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False))
        training = replace(tiny().training, normalization="WN", normalization_eps=guard)
        normalize_weights(network, training)
        with torch.no_grad():
            network[0].parametrizations.weight.original[0] = 0
        outcomes[guard] = network(torch.ones(1, 1, 1, 1)).isfinite().all().item()
    assert outcomes == {None: True, 0.0: False}


@pytest.mark.parametrize(
    ("decay_on", "decayed"),
    [
        ("weights", {"0.weight"}),
        ("no-biases", {"0.weight", "1.weight"}),
        ("all", {"0.weight", "0.bias", "1.weight", "1.bias"}),
    ],
)
def test_what_decays(decay_on, decayed):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    plain = {"normalization": "none", "epsilon_shift": None, "weight_decay": 0.1}
    optimizer = prepared(network, tiny(decay_on=decay_on, **plain).training)
    names = {id(p): name for name, p in network.named_parameters()}
    groups = {
        names[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert groups == {name: 0.1 if name in decayed else 0.0 for name in names.values()}


def one_step(training, gradient=0.5, lr=0.3):
    """What the first step, at a share of the learning rate, leaves of a weight of ones."""
    network = nn.Linear(2, 1, bias=False)
    nn.init.ones_(network.weight)
    optimizer = prepared(network, training)
    for group in optimizer.param_groups:
        group["lr"] = lr * training.lr
    network.weight.grad = torch.full((1, 2), gradient)
    optimizer.step()
    return network.weight[0, 0].item()


@pytest.mark.parametrize(
    ("optimizer", "coupling", "left"),
    [
        # η = 2, s = 0.3, λ = 0.1, g = 0.5, w = 1
        ("sgd", "own", 1 - 0.6 * (0.5 + 0.1)),
        ("sgd", "l2", 1 - 0.6 * (0.5 + 0.1)),
        ("sgd", "decoupled", 1 - 0.6 * 0.5 - 0.6 * 0.1),
        ("sgd", "schedule", 1 - 0.6 * 0.5 - 0.3 * 0.1),
        # Adam's first step is lr·sign(g), whatever L2 adds to g.
        ("adam", "own", 1 - 0.6),
        ("adam", "decoupled", 1 - 0.6 - 0.6 * 0.1),
        ("adam", "schedule", 1 - 0.6 - 0.3 * 0.1),
        ("adamw", "own", 1 - 0.6 - 0.6 * 0.1),
        ("adamw", "l2", 1 - 0.6),
        ("adamp", "schedule", 1 - 0.6 - 0.3 * 0.1),
    ],
)
def test_the_coupling_is_its_formula(optimizer, coupling, left):
    training = Training(
        epochs=1, batch_size=1, optimizer=optimizer, lr=2.0, weight_decay=0.1, coupling=coupling
    )
    # With δ = 0 AdamP projects nothing.
    assert one_step(replace(training, delta=0.0)) == pytest.approx(left, rel=1e-6)


def test_a_window_without_a_step_is_refused(tmp_path):
    cell = tiny(epsilon_shift=None, weight_decay=0.1, decay_window=(0.5, 0.55))
    with pytest.raises(UsageError, match=r"decay_window \[0\.5, 0\.55\].*none of the 6 steps"):
        run_cell(cell, tmp_path, ROOT)


def test_weights_decay_in_the_window_alone(tmp_path, monkeypatch):
    take, seen = Trainer.take, []

    def look(self, chosen):
        seen.append([group["weight_decay"] for group in self.optimizer.param_groups])
        return take(self, chosen)

    monkeypatch.setattr(Trainer, "take", look)
    cell = tiny(epsilon_shift=None, weight_decay=0.1, decay_window=(0.3, 0.7))
    run_cell(cell, tmp_path, ROOT)
    assert seen == [[on * 0.1, 0.0] for on in (0, 0, 1, 1, 0, 0)]


def depthwise_network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def test_depthwise_convolutions_are_normalized_if_asked():
    for asked, expected in ((False, {"0"}), (True, {"0", "1"})):
        network = depthwise_network()
        prepared(network, tiny(normalize_depthwise=asked).training)
        assert {n[0] for n, _ in network.named_parameters() if "original" in n} == expected
    with pytest.raises(UsageError, match="has no depthwise convolution"):
        prepared(nn.Sequential(nn.Conv2d(2, 4, 3)), tiny(normalize_depthwise=True).training)


def test_named_modules_are_not_normalized():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3))
    prepared(network, tiny(normalization_skip=("1",)).training)
    assert {n[0] for n, _ in network.named_parameters() if "original" in n} == {"0"}
    with pytest.raises(UsageError, match="'last', which matches no module"):
        prepared(network, tiny(normalization_skip=("last",)).training)


@pytest.mark.parametrize("normalized", [False, True])
def test_depthwise_convolutions_need_not_decay(normalized):
    network = depthwise_network()
    training = tiny(
        decay_on="no-depthwise",
        weight_decay=0.1,
        epsilon_shift=None,
        normalize_depthwise=normalized,
    ).training
    optimizer = prepared(network, training)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    found = {name[0]: decays[id(p)] for name, p in network.named_parameters() if p.ndim > 1}
    assert found == {"0": 0.1, "1": 0.0, "3": 0.1}


@pytest.mark.parametrize("changed", [{"coupling": "l2"}, {"decay_window": (0.0, 0.5)}])
def test_processes_refuse_what_their_checkpoint_would_not_hold(tmp_path, changed):
    cell = tiny(epsilon_shift=None, **changed)
    with pytest.raises(UsageError, match="not allowed with --parallel"):
        run_cell(cell, tmp_path, ROOT, processes=Processes("ddp", 0, 2))
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_what_they_say(tmp_path, whole):
    records = [json.loads(line) for line in whole["metrics.jsonl"].splitlines()]
    result = json.loads(whole["result.json"])
    assert [r["epoch"] for r in records] == [0, 1, 2]
    assert [r["step"] for r in records] == [0, 3, 6]
    assert records[0]["norm_growth"] == 1
    assert records[-1]["accuracy"] == result["metrics"]["accuracy"]
    assert len(result["wrong"]) == round(899 * (1 - result["metrics"]["accuracy"]))
    for r in records:
        assert r["effective_lr"] == pytest.approx(r["lr"] / r["norm"])


def test_processes_give_what_one_after_the_other_gives(tmp_path):
    cells = [tiny(m, epochs=1) for m in ("sgd", "adamp")]
    seen = []
    sequential = run_cells(cells, tmp_path / "a", ROOT)
    parallel = run_cells(cells, tmp_path / "b", ROOT, jobs=2, observe=seen.append)
    assert parallel == sequential
    ends = [event for event in seen if isinstance(event, Finished)]
    assert sorted(e.cell.method for e in ends) == ["adamp", "sgd"]
    epochs = [e.record for e in seen if isinstance(e, Measured) and e.cell.method == "sgd"]
    assert epochs == read_metrics(tmp_path / "a" / cells[0].folder)
    for cell in cells:
        assert contents(tmp_path / "a", cell) == contents(tmp_path / "b", cell)


def children_of(pid):
    """The processes that one has started, and those have."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            child = int(stat.parent.name)
            found += [child, *children_of(child)]
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_was_started(tmp_path, end):
    command = [sys.executable, "-m", "normwise", "paper", "run", "digits", "--scale", "paper"]
    process = subprocess.Popen([*command, "--jobs", "2", "--out", str(tmp_path)], stderr=-3)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("metrics.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = children_of(process.pid)
        assert len(children) >= 2
        process.send_signal(end)
        process.wait(30)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
    assert process.returncode == (130 if end == signal.SIGTERM else -signal.SIGKILL)


@fork_only
@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_stops_all_processes_and_says_how_to_go_on(tmp_path, jobs):
    command = [sys.executable, "-m", "normwise", "paper", "run", "digits", "--scale", "paper"]
    process = subprocess.Popen(
        [*command, "--jobs", jobs, "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell may have told its background jobs to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error == "normwise: interrupted; run the same command again to go on\n"


def test_an_error_in_a_process_stops_the_others_with_its_message(tmp_path):
    bad = tiny(batch_size=10_000)
    with pytest.raises(UsageError, match="batch_size 10000 is not allowed: there are 898"):
        run_cells([bad, replace(bad, seed=1)], tmp_path, ROOT, jobs=2)


@pytest.mark.slow
def test_ray_gives_what_one_after_the_other_gives(tmp_path):
    ray = pytest.importorskip("ray", reason="compares with a local Ray cluster")
    cells = [tiny(m, epochs=1) for m in ("sgd", "sgdp", "adamp")]
    sequential = run_cells(cells, tmp_path / "a", ROOT)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        on_ray = run_cells(cells, tmp_path / "b", ROOT, executor="ray")
        with pytest.raises(UsageError, match="batch_size 10000"):
            run_cells([tiny(batch_size=10_000)], tmp_path / "c", ROOT, executor="ray")
    finally:
        ray.shutdown()
    assert on_ray == sequential
    for cell in cells:
        assert contents(tmp_path / "a", cell) == contents(tmp_path / "b", cell)


def test_without_a_ray_cluster_it_says_how_to_start_one(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs Ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match="ray start --head"):
        run_cells([tiny()], tmp_path, ROOT, executor="ray")


def test_metrics_can_be_read_while_a_cell_runs(tmp_path, monkeypatch):
    save, seen = Trainer.save, []

    def look(self):
        seen.append(len(read_metrics(self.folder)))
        save(self)

    monkeypatch.setattr(Trainer, "save", look)
    run_cell(tiny(), tmp_path, ROOT, checkpoint_seconds=0)
    assert seen == [1, 1, 2, 2, 2, 3]


def test_the_schedules_are_their_formulas():
    training = Training(epochs=1, batch_size=1, optimizer="sgd", lr=1.0)
    steps = [training.factor(s, 100) for s in (0, 29, 30, 59, 60, 90)]
    assert steps == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001])
    cosine = replace(training, schedule="cosine", warmup=0.2)
    assert [cosine.factor(s, 100) for s in (0, 9, 19, 20, 60, 100)] == pytest.approx(
        [0.05, 0.5, 1, 1, 0.5, 0]
    )


TRANSLATED = """
schema: 1
id: translated
title: Decay as a schedule
question: Is it the same way?
task: classification
paper: {source: Theorem 1, metric: accuracy}
methods:
  decay: {label: decay, settings: {}}
  translated: {label: translated, settings: {coupling: translated}}
  none: {label: none, settings: {weight_decay: 0}}
settings:
  {data: digits, network: convnet, width: 4, optimizer: sgd, lr: 0.02, weight_decay: 0.05,
   decay_on: invariant, schedule: cosine, batch_size: 64, epochs: 2}
scales: {paper: {settings: {}, rows: {a: {}}}, small: {settings: {}, rows: {a: {}}}}
"""


def test_translated_decay_takes_the_way_of_decay_at_other_norms(tmp_path):
    """Theorem 1: the norms grow by P_T, and the losses are the same up to rounding."""
    lines = {}
    for one in read(TRANSLATED, "translated.yaml").cells("small", 1):
        run_cell(one, tmp_path, tmp_path)
        lines[one.method] = read_metrics(tmp_path / one.folder / "metrics.jsonl")
    steps = lines["decay"][-1]["step"]
    lrs = [0.02 * one.training.factor(step, steps) for step in range(steps)]
    plan = sgd_without_decay(lrs, 0.05, 0.9)
    ends = {method: records[-1] for method, records in lines.items()}
    assert ends["translated"]["norm"] / ends["decay"]["norm"] == pytest.approx(
        plan.scales[-1], rel=1e-3
    )
    assert ends["translated"]["lr"] == pytest.approx(plan.lrs[-1])
    assert ends["translated"]["train_loss"] == pytest.approx(ends["decay"]["train_loss"], rel=1e-3)
    assert ends["none"]["train_loss"] != pytest.approx(ends["decay"]["train_loss"], rel=1e-3)


def test_the_initial_scale_changes_norms_and_not_what_is_computed(tmp_path):
    lines = {}
    for scale in (1.0, 0.25):
        one = tiny("sgd", **UNDECAYED, initial_scale=scale, normalization="none")
        trainer = Trainer(one, tmp_path, tmp_path, torch.device("cpu"), ALONE)
        lines[scale] = trainer.line({})
        batch = next(trainer.stream())
        lines[scale]["loss"] = trainer.problem.loss(batch).item()
    assert lines[0.25]["norm"] == pytest.approx(0.25 * lines[1.0]["norm"], rel=1e-6)
    assert lines[0.25]["norm_growth"] == 1.0
    assert lines[0.25]["loss"] == pytest.approx(lines[1.0]["loss"], rel=1e-3)


def test_an_initial_scale_needs_drawn_weights_that_are_invariant(tmp_path):
    one = tiny("sgd", **UNDECAYED, initial_scale=0.5)
    model = Trainer(one, tmp_path, tmp_path, torch.device("cpu"), ALONE).problem.model
    with pytest.raises(
        UsageError, match=r"initial_scale 0\.5 is not allowed where a method starts"
    ):
        Trainer(one, tmp_path, tmp_path, torch.device("cpu"), ALONE, model.state_dict())
    with pytest.raises(UsageError, match="needs scale-invariant weights, and there are none"):
        scale_invariant_weights(nn.Linear(2, 2), [], 0.5, drawn=True)


def test_what_has_no_say_is_not_in_the_config():
    """So that a cell of an older version, which did not have it, goes on."""
    config = module.config_of(tiny("sgd", **UNDECAYED), "cpu")["training"]
    assert "initial_scale" not in config
    assert "norm_correction" not in config
    scaled = tiny("sgd", **UNDECAYED, initial_scale=2.0, norm_correction="fixed")
    config = module.config_of(scaled, "cpu")["training"]
    assert (config["initial_scale"], config["norm_correction"]) == (2.0, "fixed")


def test_the_smallest_norm_is_that_of_the_slice_that_shrinks(tmp_path):
    (one,) = find("digits").cells("small", 1, ["sgd"])
    trainer = Trainer(one, tmp_path, tmp_path, torch.device("cpu"), ALONE)
    with torch.no_grad():
        trainer.problem.model.get_parameter(next(iter(trainer.views)))[0] *= 1e-6
    line = trainer.line({})
    assert line["smallest_norm"] < 1e-5 < line["norm"]
