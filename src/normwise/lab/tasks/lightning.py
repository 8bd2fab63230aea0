"""A Lightning module as a problem: its steps give the loss and the metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwise.lab.data.examples import checked_parts, checked_workers
from normwise.lab.errors import UsageError
from normwise.lab.imports import reason
from normwise.lab.tasks.problem import Evaluation, Metric
from normwise.lab.tasks.supervised import Supervised, TrainingLoss, checked_defaults

__all__ = ["Stepped", "lightning"]

_STEPS = ("training_step", "validation_step")


def lightning(
    make_module: Callable[[], nn.Module],
    train: Any,
    test: Any,
    *,
    metrics: str | Metric | Sequence[str | Metric] = "val_loss",
    batch_size: int = 32,
    collate: Callable[[list[Any]], Any] | None = None,
    schedule: str = "cosine",
    epochs: int = 10,
    warmup: float = 0.0,
    validation: Any = None,
    workers: int | None = None,
    name: str = "",
) -> Supervised:
    """Your Lightning module and its data, to be compared on.

    ``training_step`` gives the loss, and what ``validation_step`` logs is what it is judged by. The
    optimizers are those that are compared; ``configure_optimizers`` is not called, and there is no
    trainer.

    Args:
        make_module: makes the module, with weights drawn from torch's generator.
        train: as of :func:`normwise.lab.supervised`.
        test: likewise, what ``validation_step`` gets.
        metrics: names that ``validation_step`` logs, less being better, or a
            ``normwise.lab.Metric`` that says otherwise; the first judges (default: ``val_loss``).
        batch_size, collate, schedule, epochs, warmup: as of :func:`normwise.lab.supervised`.
        validation, workers, name: likewise.

    Returns:
        The problem, for :func:`normwise.lab.compare`.

    Raises:
        UsageError: for a value that is not allowed.
    """
    wanted = (metrics,) if isinstance(metrics, str | Metric) else tuple(metrics)
    named = tuple(
        Metric(m, m, higher_is_better=False, digits=4) if isinstance(m, str) else m for m in wanted
    )
    defaults = checked_defaults(batch_size, schedule, epochs, warmup)
    problem = Stepped(
        make_module,
        checked_parts(train, test, validation),
        TrainingLoss(_unused, ()),
        (),
        defaults,
        collate=collate,
        target=None,
        workers=checked_workers(workers),
        name=name,
        facts={},
    )
    problem.metrics = named
    return problem


def _unused(*_: Any) -> Tensor:
    raise NotImplementedError


def _forget(*_: Any, **__: Any) -> None:
    """What a module logs to while it trains: the lab keeps the loss itself."""


class Stepped(Supervised):
    """Made by :func:`lightning`."""

    divisible = False

    def fresh(self, device: torch.device, held_out: float = 0.0) -> Supervised:
        new = super().fresh(device, held_out)
        missing = [step for step in _STEPS if not callable(getattr(new.model, step, None))]
        if missing:
            raise UsageError(
                f"the module ({type(new.model).__name__}) has no {missing[0]}: must be a Lightning "
                "module, or use normwise.lab.supervised(…)"
            )
        if getattr(new.model, "automatic_optimization", True) is False:
            raise UsageError(
                f"the module ({type(new.model).__name__}) steps its optimizers itself "
                "(automatic_optimization = False), which those that are compared cannot take over"
            )
        self._log_to(new.model, _forget)
        return new

    @staticmethod
    def _log_to(model: nn.Module, log: Callable[..., None]) -> None:
        # On the object, where they come before the class's, which ask for a trainer.
        def log_dict(named: Mapping[str, Any], *_: Any, **__: Any) -> None:
            for name, value in named.items():
                log(name, value)

        object.__setattr__(model, "log", log)
        object.__setattr__(model, "log_dict", log_dict)

    def _split(self, batch: Any) -> Any:
        return batch

    def _step(self, name: str, batch: Any) -> Any:
        try:
            return getattr(self.model, name)(batch, 0)
        except Exception as error:
            raise UsageError(
                f"{name} of the module ({type(self.model).__name__}) raised {reason(error)}"
            ) from error

    def loss(self, batch: Any) -> Tensor:
        """What ``training_step`` returns."""
        value = self._step("training_step", batch)
        value = value.get("loss") if isinstance(value, Mapping) else value
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError(
                f"training_step returned {type(value).__name__}; must be a scalar tensor, or a "
                "dict with one under 'loss'"
            )
        return value

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The mean over examples of what ``validation_step`` logs; of metrics with a ``compute``,
        what that gives."""
        self.model.eval()
        sums: dict[str, float] = {}
        objects: dict[str, Any] = {}
        count = 0
        for numbers, batch in self._tests():
            count += len(numbers)

            def log(name: str, value: Any, *_: Any, many: int = len(numbers), **__: Any) -> None:
                if hasattr(value, "compute"):
                    objects[name] = value
                else:
                    sums[name] = sums.get(name, 0.0) + float(value) * many

            self._log_to(self.model, log)
            try:
                self._step("validation_step", batch)
            finally:
                self._log_to(self.model, _forget)
        logged = {name: total / count for name, total in sums.items()}
        for name, metric in objects.items():
            logged[name] = float(metric.compute())
            metric.reset()
        found = {}
        for metric in self.metrics:
            if metric.name not in logged:
                raise UsageError(
                    f"validation_step logged no {metric.name!r} but "
                    f"{', '.join(map(repr, logged)) or 'nothing'}: give metrics="
                )
            found[metric.name] = logged[metric.name] if count else math.nan
        return Evaluation(found)
