"""What is written is what the real packages read back."""

import json
import math

import pytest
import torch

from normwise.monitor import JsonLines, MLflow, Monitor, Parquet, TensorBoard, WandB

VIEWS = {"0.weight": "channel", "3.weight": "blocks(2)"}


@pytest.fixture
def watch(training):
    """Train five steps with a writer; the monitor."""

    def run(*writers):
        with Monitor(
            training.model, training.optimizer, VIEWS, every=2, writers=writers
        ) as monitor:
            training.run(5)
        return monitor

    return run


def scalars(monitor):
    return {m.step: m.scalars() for m in monitor.history}


def test_any_callable_is_a_writer(watch):
    seen = []
    monitor = watch(seen.append)
    assert [m.step for m in seen] == [1, 2, 4]
    assert torch.equal(seen[0].values, monitor.history[0].values) or any(
        math.isnan(v) for v in seen[0].values.flatten().tolist()
    )
    assert seen[0].of_slices("norm", "0.weight").shape == (6,)


def test_json_lines(watch, tmp_path):
    monitor = watch(JsonLines(tmp_path / "run.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert lines[1]["norm"] == monitor.history[1]["norm"]
    assert lines[1]["predicted_norm"]["0.weight"] is None  # NaN is not JSON


def test_parquet(watch, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="reads the Parquet file with pyarrow")
    monitor = watch(Parquet(tmp_path / "run.parquet", rows=30))
    table = parquet.read_table(tmp_path / "run.parquet").to_pylist()
    found = {
        (row["step"], row["quantity"], row["layer"]): row["value"]
        for row in table
        if math.isfinite(row["value"])
    }
    expected = {
        (step, *tag.split("/")): value
        for step, values in scalars(monitor).items()
        for tag, value in values.items()
    }
    assert found == expected


def test_tensorboard(watch, tmp_path):
    pytest.importorskip("tensorboard", reason="reads the events with TensorBoard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    own = SummaryWriter(str(tmp_path / "own"))
    monitor = watch(TensorBoard(tmp_path / "new"), TensorBoard(own))
    own.add_scalar("still", 1.0)  # a writer that was given stays open
    own.close()
    for folder in ("new", "own"):
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        for tag, value in monitor.history[-1].scalars().items():
            last = events.Scalars(tag)[-1]
            assert last.step == 4
            assert last.value == pytest.approx(value, rel=1e-6)


def test_wandb(watch, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="logs with W&B's own client")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(ValueError, match="no W&B run is active"):
        WandB()
    run = wandb.init(project="norms", dir=str(tmp_path))
    run.log({"loss": 1.0})
    monitor = watch(WandB(run))
    run.log({"loss": 0.5})
    for tag, value in monitor.history[-1].scalars().items():
        assert run.summary[tag] == pytest.approx(value)
    assert run.summary["normwise/step"] == 4
    assert run.summary["loss"] == 0.5
    run.finish()
    assert list(tmp_path.rglob("*.wandb"))


def test_mlflow(watch, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="logs with MLflow's own client")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=tmp_path.as_uri())
    experiment = client.create_experiment("norms")
    run = client.create_run(experiment)
    monitor = watch(MLflow(run.info.run_id, client))
    for step, values in scalars(monitor).items():
        for tag, value in values.items():
            history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, tag)}
            assert history[step] == pytest.approx(value)


@pytest.mark.parametrize(
    ("writer", "package"), [(Parquet, "pyarrow"), (TensorBoard, "tensorboard"), (MLflow, "mlflow")]
)
def test_a_missing_package_is_named_with_its_extra(writer, package, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}; install it with `pip install normwise\["):
        writer(str(tmp_path / "x"))
