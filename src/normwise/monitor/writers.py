"""Where measurements go: files, and trackers of experiments by their own clients.

A writer is called with each measurement; any other callable does as well. Packages load when a
writer is made.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from normwise.monitor.measurement import Measurement, as_mapping

__all__ = ["JsonLines", "MLflow", "Parquet", "TensorBoard", "WandB"]


class JsonLines:
    """One JSON object a line for each measurement: the step, and every quantity by layer.

    Numbers that are not finite are null.

    Args:
        path: a file; a new one, or one to append to.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 -- until close()

    def __call__(self, m: Measurement) -> None:
        self._file.write(json.dumps(as_mapping(m), allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Parquet:
    """A table with the columns step, layer, quantity and value, readable once closed.

    Args:
        path: a file, which is overwritten.
        rows: how many to hold before they are written (default: 100,000).

    Raises:
        ImportError: without pyarrow.
    """

    def __init__(self, path: str | Path, rows: int = 100_000) -> None:
        self._arrow = _needed("pyarrow", "pyarrow")
        parquet = _needed("pyarrow.parquet", "pyarrow")
        self._schema = self._arrow.schema(
            [
                ("step", self._arrow.int64()),
                ("layer", self._arrow.string()),
                ("quantity", self._arrow.string()),
                ("value", self._arrow.float64()),
            ]
        )
        self._writer = parquet.ParquetWriter(str(path), self._schema)
        self._most = rows
        self._rows: list[tuple[int, str, str, float]] = []

    def __call__(self, m: Measurement) -> None:
        self._rows += [(m.step, layer, name, value) for layer, name, value in m.rows()]
        if len(self._rows) >= self._most:
            self._write()

    def _write(self) -> None:
        columns = [list(column) for column in zip(*self._rows, strict=True)]
        if columns:
            self._writer.write_table(self._arrow.table(columns, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        """Write what is held, and the end of the file."""
        self._write()
        self._writer.close()


class TensorBoard:
    """Scalars ``quantity/layer`` in a folder that TensorBoard reads.

    Args:
        folder: where to write, or a ``SummaryWriter`` of yours, which then stays open.

    Raises:
        ImportError: without tensorboard.
    """

    def __init__(self, folder: str | Path | Any) -> None:
        self._writer: Any = folder
        self._own = isinstance(folder, str | Path)
        if self._own:
            _needed("tensorboard", "tensorboard")
            module = importlib.import_module("torch.utils.tensorboard")
            self._writer = module.SummaryWriter(str(folder))

    def __call__(self, m: Measurement) -> None:
        for tag, value in m.scalars().items():
            self._writer.add_scalar(tag, value, m.step)

    def close(self) -> None:
        """Write what is held."""
        if self._own:
            self._writer.close()
        else:
            self._writer.flush()


class WandB:
    """Metrics ``quantity/layer`` of a Weights & Biases run, over an axis ``normwise/step``.

    The axis of its own keeps them apart from the steps that your own logging counts.

    Args:
        run: what ``wandb.init()`` returned (default: the run that is active).

    Raises:
        ImportError: without wandb.
        ValueError: if no run is given and none is active.
    """

    def __init__(self, run: Any = None) -> None:
        if run is None:
            run = _needed("wandb", "wandb").run
        if run is None:
            raise ValueError("no W&B run is active; call wandb.init() first, or give run=")
        self._run = run
        self._defined: set[str] = set()
        run.define_metric("normwise/step")

    def __call__(self, m: Measurement) -> None:
        scalars = m.scalars()
        for tag in scalars.keys() - self._defined:
            self._run.define_metric(tag, step_metric="normwise/step")
        self._defined |= scalars.keys()
        self._run.log({"normwise/step": m.step, **scalars})


class MLflow:
    """Metrics ``quantity/layer`` of an MLflow run.

    Args:
        run_id: which run (default: the active one, or a new one).
        client: an ``MlflowClient`` (default: that of the tracking URI in force).

    Raises:
        ImportError: without mlflow.
    """

    def __init__(self, run_id: str | None = None, client: Any = None) -> None:
        self._mlflow = _needed("mlflow", "mlflow")
        self._client = client or self._mlflow.MlflowClient()
        if run_id is None:
            run = self._mlflow.active_run() or self._mlflow.start_run()
            run_id = run.info.run_id
        self._run_id = run_id

    def __call__(self, m: Measurement) -> None:
        now = self._mlflow.utils.time.get_current_time_millis()
        metric = self._mlflow.entities.Metric
        metrics = [metric(tag, value, now, m.step) for tag, value in m.scalars().items()]
        for begin in range(0, len(metrics), 1000):  # the most that a batch may have
            self._client.log_batch(self._run_id, metrics=metrics[begin : begin + 1000])


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this writer needs {package}; install it with `pip install normwise[monitor]` or "
            f"`pip install {package}`"
        ) from error
