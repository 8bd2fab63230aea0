"""A callback of transformers' ``Trainer``. Importing this module needs transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normwise.monitor.monitor import Monitor

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "this callback needs transformers; install it with `pip install normwise[transformers]`"
    ) from error

__all__ = ["MonitorCallback"]


class MonitorCallback(TrainerCallback):
    """Run a :class:`normwise.monitor.Monitor` around ``Trainer.train()``.

    Measurements go to the monitor's writers: a ``Trainer`` logs for itself only.

    Args:
        make: makes the monitor from the model and its optimizer, as
            ``lambda model, optimizer: Monitor(model, optimizer, writers=[JsonLines(path)])``
            (default: :class:`Monitor` with its defaults).

    Attributes:
        monitor: the monitor of the latest training; None before one has begun.
    """

    def __init__(self, make: Callable[[nn.Module, Optimizer], Monitor] = Monitor) -> None:
        self._make = make
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the monitor; a run that goes on counts its steps on."""
        # accelerate's wrapper steps the optimizer proper, which is the one that takes hooks.
        optimizer = kwargs["optimizer"]
        if type(optimizer).__name__ == "AcceleratedOptimizer":
            optimizer = optimizer.optimizer
        self.monitor = self._make(kwargs["model"], optimizer)
        self.monitor.step = int(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fetch what is left and detach it."""
        if self.monitor is not None:
            self.monitor.close()
