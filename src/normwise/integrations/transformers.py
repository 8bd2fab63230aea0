"""For transformers' ``Trainer`` and what is built on it, such as TRL's trainers.

Importing this module needs transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normwise.integrations.accelerate import unwrapped
from normwise.invariance import Report, analyze
from normwise.monitor.measurement import Measurement
from normwise.monitor.monitor import Monitor

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "this module needs transformers; install it with `pip install normwise[transformers]`"
    ) from error

__all__ = ["MonitorCallback", "OptimizerFactory"]


class OptimizerFactory:
    """Makes any optimizer of or with normwise, for a ``Trainer``'s ``optimizer_cls_and_kwargs``.

    ``Trainer(..., optimizer_cls_and_kwargs=(OptimizerFactory, {"make": make, "batch": batch}))``,
    where ``make(model, report)`` is what one would write without a trainer::

        def make(model, report):
            optimizer = nw.groups(report, matrices=Muon, others=AdamW, model=model)
            nw.decay.Corrected(...).attach(optimizer)
            return optimizer
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        make: Callable[[nn.Module, Report], Optimizer],
        batch: Any = None,
        report: Report | None = None,
    ) -> Optimizer:
        """Analyze the model, if that has not been done, and make its optimizer.

        Args:
            model: the trainer's, on its device.
            make: makes the optimizer from the model and its report.
            batch: what :func:`normwise.analyze` is to run the model on.
            report: of this network, from an earlier analysis, instead of ``batch``.

        Raises:
            ValueError: unless one of ``batch`` and ``report`` is given.
            TypeError: if ``make`` makes something else.
        """
        if (batch is None) == (report is None):
            raise ValueError("optimizer_cls_and_kwargs needs one of batch= and report=")
        optimizer = make(model, analyze(model, batch) if report is None else report)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"make returned {type(optimizer).__name__}; must be a torch optimizer")
        return optimizer


class MonitorCallback(TrainerCallback):
    """Run a :class:`normwise.monitor.Monitor` around ``Trainer.train()``.

    Measurements go to the monitor's writers, and to the trainer's log where it is given.

    Args:
        make: makes the monitor from the model and its optimizer, as
            ``lambda model, optimizer: Monitor(model, optimizer, writers=[JsonLines(path)])``
            (default: :class:`Monitor` with its defaults).
        log: takes what is measured, by ``"quantity/layer"``, with ``"monitored_step"``, since
            measurements come later than they are made; ``trainer.add_callback(MonitorCallback(
            log=trainer.log))`` brings them to all that the trainer reports to (default: none).

    Attributes:
        monitor: the monitor of the latest training; None before one has begun.
    """

    def __init__(
        self,
        make: Callable[[nn.Module, Optimizer], Monitor] = Monitor,
        *,
        log: Callable[[dict[str, float]], object] | None = None,
    ) -> None:
        self._make = make
        self._log = log
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the monitor; a run that goes on counts its steps on."""
        self.monitor = self._make(kwargs["model"], unwrapped(kwargs["optimizer"]))
        self.monitor.step = int(state.global_step)
        if self._log is not None:
            self.monitor.writers.append(self._write)

    def _write(self, m: Measurement) -> None:
        if self._log is not None:
            self._log({**m.scalars(), "monitored_step": m.step})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fetch what is left and detach it."""
        if self.monitor is not None:
            self.monitor.close()
