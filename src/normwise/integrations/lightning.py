"""For Lightning. Importing this module needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from normwise.monitor.measurement import Measurement
from normwise.monitor.monitor import Monitor

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # the same, under its older name
    except ImportError as error:
        raise ImportError(
            "this callback needs Lightning; install it with `pip install normwise[trackers]` or "
            "`pip install lightning`"
        ) from error

__all__ = ["MonitorCallback", "configured"]


def configured(
    optimizer: Optimizer,
    scheduler: Any = None,
    *,
    interval: Literal["step", "epoch"] = "step",
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for one optimizer and its schedule.

    A schedule counts optimizer steps, not epochs as is Lightning's default: norms and learning
    rates belong to steps. :func:`normwise.groups` makes one optimizer of several, so that automatic
    optimization goes on to work.

    Args:
        optimizer: any torch optimizer.
        scheduler: its learning-rate schedule (default: none).
        interval: what the schedule counts (default: ``"step"``).
    """
    if scheduler is None:
        return {"optimizer": optimizer}
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": interval},
    }


class MonitorCallback(Callback):  # type: ignore[misc]  # untyped where Lightning is not installed
    """Run a :class:`normwise.monitor.Monitor` around a fit, and log to the trainer's loggers.

    Args:
        make: makes the monitor from the module and its optimizer, or the list of them, as
            ``lambda model, optimizer: Monitor(model, optimizer, report, every=100)``
            (default: :class:`Monitor` with its defaults).
        optimizer: which of the module's optimizers, by index (default: all of them).
        log: whether measurements go to the trainer's loggers too (default: True).

    Attributes:
        monitor: the monitor of the latest fit; None before one has begun.
    """

    def __init__(
        self,
        make: Callable[[nn.Module, Any], Monitor] = Monitor,
        *,
        optimizer: int | None = None,
        log: bool = True,
    ) -> None:
        self._make = make
        self._index = optimizer
        self._log = log
        self._state: dict[str, Any] | None = None
        self.monitor: Monitor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the monitor."""
        all_of_them = trainer.optimizers
        one = 0 if len(all_of_them) == 1 else self._index
        self.monitor = self._make(pl_module, all_of_them if one is None else all_of_them[one])
        if self._state is not None:
            self.monitor.load_state_dict(self._state)
        if self._log:

            def log(m: Measurement) -> None:
                for logger in trainer.loggers:
                    logger.log_metrics(m.scalars(), step=m.step)

            self.monitor.writers.append(log)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fetch what is left and detach it."""
        if self.monitor is not None:
            self.monitor.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep what was measured before a failure."""
        if self.monitor is not None:
            self.monitor.__exit__(type(exception), exception, None)

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoints."""
        return self.monitor.state_dict() if self.monitor is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint, before the fit."""
        self._state = state_dict or None
