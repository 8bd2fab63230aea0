"""A network and data of the user's own, learned from examples with a target."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from normwise.lab.data.examples import Examples, Reading, checked_parts, checked_workers
from normwise.lab.errors import UsageError, nearest
from normwise.lab.imports import reason
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["LOSSES", "MEASURES", "Measure", "Supervised", "supervised"]

_TARGETS = ("labels", "label", "target", "targets", "y")
_SCHEDULES = ("constant", "steps", "cosine")


@dataclass(frozen=True)
class Measure:
    """A number that a network is judged by on the test data: a mean over examples.

    Args:
        metric: its name, unit and direction.
        of: from outputs and targets of a batch to a value for each example or position, or to their
            mean.
        finish: what is done to the mean over the whole test set (default: nothing).
    """

    metric: Metric
    of: Callable[[Any, Any], Tensor]
    finish: Callable[[float], float] = float


def _classes_last(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of shape ``(n, classes)`` and targets of shape ``(n,)``, of sequences too."""
    if target.ndim == output.ndim - 1 and output.ndim > 2 and output.shape[:-1] == target.shape:
        return output.flatten(0, -2), target.flatten()
    return output, target


def _cross_entropy(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(*_classes_last(output, target), reduction=reduction)


def _same_shape(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one shape; one output for an example may stand without a dimension of its own."""
    if output.ndim == target.ndim + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    if output.shape != target.shape:
        raise ValueError(
            f"outputs of shape {tuple(output.shape)} and targets of shape {tuple(target.shape)}"
        )
    return output, target.to(output.dtype)


def _elementwise(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def of(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return loss(*_same_shape(output, target), reduction=reduction)

    return of


def _hits(output: Tensor, target: Tensor) -> Tensor:
    """1 where the largest logit is the target's, of a single logit where its sign says it."""
    if output.ndim == target.ndim or output.shape[-1] == 1:
        logits, wanted = _same_shape(output, target)
        return ((logits > 0) == (wanted > 0.5)).double()
    logits, wanted = _classes_last(output, target)
    kept = wanted != -100
    return (logits.argmax(1) == wanted)[kept].double()


def _nats(output: Tensor, target: Tensor) -> Tensor:
    logits, wanted = _classes_last(output, target)
    return F.cross_entropy(logits, wanted, reduction="none")[wanted != -100]


def _lower(name: str, title: str, unit: str = "", digits: int = 4) -> Metric:
    return Metric(name, title, unit, higher_is_better=False, digits=digits)


_MSE, _L1 = _elementwise(F.mse_loss), _elementwise(F.l1_loss)
MEASURES: dict[str, Measure] = {
    "accuracy": Measure(Metric("accuracy", "test accuracy", "%", 100.0), _hits),
    "cross-entropy": Measure(_lower("cross-entropy", "test cross-entropy", "nats"), _nats),
    "perplexity": Measure(_lower("perplexity", "test perplexity", digits=2), _nats, math.exp),
    "mse": Measure(
        _lower("mse", "test mean squared error"), lambda o, t: _MSE(o, t, reduction="none")
    ),
    "rmse": Measure(
        _lower("rmse", "test root mean squared error"),
        lambda o, t: _MSE(o, t, reduction="none"),
        math.sqrt,
    ),
    "mae": Measure(
        _lower("mae", "test mean absolute error"), lambda o, t: _L1(o, t, reduction="none")
    ),
}


@dataclass(frozen=True)
class TrainingLoss:
    """A loss by name.

    Args:
        of: from outputs and targets to a scalar, the mean over the batch.
        measures: what a network is judged by with it, unless others are asked for.
        shifted: whether a sequence is its own target, one place on.
    """

    of: Callable[[Any, Any], Tensor]
    measures: tuple[str, ...]
    shifted: bool = False


LOSSES: dict[str, TrainingLoss] = {
    "cross-entropy": TrainingLoss(_cross_entropy, ("accuracy", "cross-entropy")),
    "binary-cross-entropy": TrainingLoss(
        _elementwise(F.binary_cross_entropy_with_logits), ("accuracy",)
    ),
    "mse": TrainingLoss(_MSE, ("rmse", "mae")),
    "l1": TrainingLoss(_L1, ("mae", "rmse")),
    "huber": TrainingLoss(_elementwise(F.huber_loss), ("mae", "rmse")),
    "next-token": TrainingLoss(_cross_entropy, ("perplexity", "accuracy"), shifted=True),
}

LossLike = str | Callable[[Any, Any], Tensor]
MeasureLike = str | Measure


def supervised(
    make_model: Callable[[], nn.Module],
    train: Any,
    test: Any,
    *,
    loss: LossLike = "cross-entropy",
    metrics: MeasureLike | Sequence[MeasureLike] | None = None,
    batch_size: int = 32,
    collate: Callable[[list[Any]], Any] | None = None,
    schedule: str = "cosine",
    epochs: int = 10,
    warmup: float = 0.0,
    target: str | None = None,
    validation: Any = None,
    workers: int | None = None,
    name: str = "",
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Supervised:
    """Your network and your data, to be compared on.

    Examples are tensors, arrays or numbers in tuples, of which the last is the target, or in dicts,
    of which one entry is; the rest are the network's arguments, those of a dict by name as far as
    the network takes them. Of a network's output that has ``logits``, these count.

    Args:
        make_model: makes the network, with weights drawn from torch's generator.
        train: what to learn from: a map-style dataset, one of Hugging Face's ``datasets``, or an
            iterable one with a length, whose own order is kept. Examples are made when they are
            needed, and nothing is copied.
        test: what to test on.
        loss: ``"cross-entropy"``, ``"binary-cross-entropy"``, ``"mse"``, ``"l1"``, ``"huber"``;
            ``"next-token"`` for language, where examples are sequences of token ids; or a function
            of outputs and targets (default: cross-entropy).
        metrics: of ``"accuracy"``, ``"cross-entropy"``, ``"perplexity"``, ``"mse"``, ``"rmse"``,
            ``"mae"``, or a :class:`Measure`; the first judges (default: the loss's).
        batch_size: examples per step; an incomplete last batch is left out (default: 32).
        collate: makes a batch of a list of examples (default: torch's).
        schedule: of the learning rate: constant, steps or cosine (default: cosine).
        epochs: passes over the training data (default: 10).
        warmup: the share of the steps in which the learning rate rises from 0 (default: 0).
        target: which entry of a dict is the target (default: labels, label, target, targets or y).
        validation: what settings are chosen by (default: a tenth of ``train``).
        workers: processes that make batches of map-style data ahead of need, to the same bits; the
            data must be such that they can be sent to one (default: the environment's
            ``NORMWISE_WORKERS``, or none).
        name: as a reader sees it (default: that of the network's class).
        facts: what a reader should know of the data (default: nothing).

    Returns:
        A problem, for :func:`normwise.lab.compare` and recipes.

    Raises:
        UsageError: for a value that is not allowed.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise UsageError(f"unknown loss {loss!r}: {nearest(loss, LOSSES)}")
    if not callable(make_model) or isinstance(make_model, nn.Module):
        raise UsageError(
            f"make_model is of type {type(make_model).__name__}; must be a function that makes a "
            "network, so that every method and seed starts from one of its own"
        )
    if isinstance(loss, str):
        how, default = LOSSES[loss], LOSSES[loss].measures
    else:
        how, default = TrainingLoss(loss, ()), ()
    wanted = default if metrics is None else metrics
    wanted = (wanted,) if isinstance(wanted, str | Measure) else tuple(wanted)
    for measure in wanted:
        if isinstance(measure, str) and measure not in MEASURES:
            raise UsageError(f"unknown metric {measure!r}: {nearest(measure, MEASURES)}")
    measures = [MEASURES[m] if isinstance(m, str) else m for m in wanted]
    if not measures:
        measures = [Measure(_lower("loss", "test loss"), how.of)]
    return Supervised(
        make_model,
        checked_parts(train, test, validation),
        how,
        tuple(measures),
        checked_defaults(batch_size, schedule, epochs, warmup),
        collate=collate,
        target=target,
        workers=checked_workers(workers),
        name=name,
        facts=facts,
    )


def checked_defaults(batch_size: int, schedule: str, epochs: int, warmup: float) -> dict[str, Any]:
    """The settings of a training, by name.

    Raises:
        UsageError: for a value that is not allowed.
    """
    for option, value in (("batch_size", batch_size), ("epochs", epochs)):
        if type(value) is not int or value < 1:
            raise UsageError(f"{option} {value!r} is not allowed: must be a whole number above 0")
    if schedule not in _SCHEDULES:
        raise UsageError(f"unknown schedule {schedule!r}: {nearest(str(schedule), _SCHEDULES)}")
    return {"batch_size": batch_size, "schedule": schedule, "epochs": epochs, "warmup": warmup}


class Supervised(Problem):
    """Made by :func:`supervised`; has a network only after :meth:`fresh`.

    Attributes:
        defaults: the settings of a training that the user gave with it.
        metrics: what it is judged by, the first above all.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        parts: Mapping[str, Any],
        loss: TrainingLoss,
        measures: tuple[Measure, ...],
        defaults: Mapping[str, Any],
        *,
        collate: Callable[[list[Any]], Any] | None,
        target: str | None,
        workers: int,
        name: str,
        facts: Mapping[str, Any],
    ) -> None:
        self.make_model, self.parts, self._loss, self.measures = make_model, parts, loss, measures
        self._collate, self._target, self.name = collate or default_collate, target, name
        self._workers, self._facts = workers, dict(facts)
        self._takes: frozenset[str] | None = None
        self.defaults = dict(defaults)
        self.metrics = tuple(measure.metric for measure in measures)
        self.device = torch.device("cpu")
        self.baseline = {}
        # By the share that is held out: workers are started once, whatever the number of networks.
        self._readings: dict[float, Reading] = {}
        self._divide(0.0)

    def _divide(self, held_out: float) -> None:
        """Learn from one part of the data, and test on another."""
        if held_out not in self._readings:
            train, test = (
                Examples("train", self.parts["train"]),
                Examples("test", self.parts["test"]),
            )
            if held_out and "validation" in self.parts:
                test = Examples("validation", self.parts["validation"])
            elif held_out:
                train, test = train.divided(held_out)
            parts = {"train": train, "test": test}
            self._readings[held_out] = Reading(parts, self._collate, self._workers)
        self._reading = self._readings[held_out]
        self.examples = len(self._reading.parts["train"])
        self.facts = {
            "train_examples": self.examples,
            "test_examples": len(self._reading.parts["test"]),
            **self._facts,
        }

    def fresh(self, device: torch.device, held_out: float = 0.0) -> Supervised:
        """The same data, and a network that is drawn now.

        Args:
            device: where to compute.
            held_out: the share of the training data that is tested on instead of the test data, if
                there are no validation data (default: 0, nothing).

        Raises:
            UsageError: if no network comes of it, it has no weights that train, or no part can be
                held out.
        """
        new = copy.copy(self)
        try:
            model = self.make_model()
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"make_model raised {reason(error)}") from error
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"make_model returned an object of type {type(model).__name__}; must be an "
                "nn.Module"
            )
        if not any(p.requires_grad and p.numel() for p in model.parameters()):
            raise UsageError(f"the network ({type(model).__name__}) has no parameters to train")
        new.model, new.device = model.to(device), device
        new._takes = _argument_names(model)
        new._divide(held_out)
        return new

    def batches(self, size: int, draw: Generator) -> Tensor:
        """The examples of each step; those of an iterable dataset stay in their order."""
        if not self._reading.parts["train"].iterable:
            return super().batches(size, draw)
        steps = self.examples // size
        return torch.arange(steps * size).view(steps, size)

    def batch(self, chosen: Tensor, draw: Generator) -> Any:
        """Arguments of the network, and targets."""
        return next(self.stream(chosen[None], [draw]))

    def stream(self, steps: Tensor, draws: Iterable[Generator]) -> Iterator[Any]:
        """The batch of each step; an iterable dataset is run through up to the first."""
        return self._batches("train", map(Tensor.tolist, steps), draws)

    def _tests(self) -> Iterator[tuple[list[int], Any]]:
        """The numbers of the test examples, and their batches."""
        size, count = self.defaults["batch_size"], len(self._reading.parts["test"])
        numbers = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
        draws = (Generator().manual_seed(some[0]) for some in numbers)
        return zip(numbers, self._batches("test", numbers, draws), strict=True)

    def _batches(
        self, part: str, numbers: Iterable[list[int]], draws: Iterable[Generator]
    ) -> Iterator[Any]:
        """Batches of these examples on the device, split into arguments and target."""
        jobs = (
            (part, some, int(torch.randint(2**31, (), generator=draw)))
            for some, draw in zip(numbers, draws, strict=True)
        )
        for batch in self._reading.run(part, jobs):
            yield self._split(_moved(batch, self.device))

    def _split(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Positional and named arguments of the network, and the target."""
        if isinstance(batch, Mapping):
            key = self._target or next((k for k in _TARGETS if k in batch), None)
            named = {k: v for k, v in batch.items() if k != key and self._takes_named(k)}
            if self._loss.shifted and "input_ids" in batch:
                return (), *_shifted(named, batch["input_ids"], batch.get(key))
            if key is not None and key in batch:
                return (), named, batch[key]
            keys = ", ".join(map(str, batch))
            raise UsageError(
                f"no target {(self._target or 'labels')!r} among the examples' entries {keys}: "
                "give target="
            )
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            return tuple(batch[:-1]), {}, batch[-1]
        ids = batch[0] if isinstance(batch, (tuple, list)) else batch
        if self._loss.shifted and isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] > 1:
            return (ids[:, :-1],), {}, ids[:, 1:]
        raise UsageError(
            "an example is one value, and no target: must be a tuple (input, target) or a dict"
        )

    def _takes_named(self, name: str) -> bool:
        return self._takes is None or name in self._takes

    def _output(self, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            out = self.model(*args, **named)
        except UsageError:
            raise
        except Exception as error:
            shapes = ", ".join(_shape(value) for value in (*args, *named.values()))
            raise UsageError(
                f"the network ({type(self.model).__name__}) fails on a batch of {shapes}: "
                f"{reason(error)}"
            ) from error
        if isinstance(out, Mapping) and "logits" in out:
            return out["logits"]
        return getattr(out, "logits", out)

    def _applied(self, function: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
        """A loss or a measure of outputs and targets, or why they do not fit it."""
        self._check_labels(output, target)
        try:
            return function(output, target)
        except Exception as error:
            raise UsageError(
                f"the network's output ({_shape(output)}) does not fit the loss or metric with "
                f"targets ({_shape(target)}): {reason(error)}"
            ) from error

    def _check_labels(self, output: Any, target: Any) -> None:
        if self._loss.of is not _cross_entropy or not isinstance(output, Tensor):
            return
        if not isinstance(target, Tensor) or output.ndim < 2:
            return
        if target.is_floating_point() and target.shape != output.shape:
            raise UsageError(
                f"targets are {_shape(target)}, and cross-entropy needs whole numbers: give "
                'loss="mse", or labels of type long'
            )
        if target.is_floating_point() or target.device.type != "cpu" or not target.numel():
            return  # elsewhere the device itself refuses them, without a wait at every step
        classes = output.shape[-1 if output.shape[:-1] == target.shape else 1]
        valid = target[target != -100]
        if valid.numel() and not 0 <= int(valid.min()) <= int(valid.max()) < classes:
            raise UsageError(
                f"labels go from {int(valid.min())} to {int(valid.max())}, and the network has "
                f"{classes} outputs: must be from 0 to {classes - 1}"
            )

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of the batch."""
        args, named, target = batch
        value = self._applied(self._loss.of, self._output(args, named), target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError(f"the loss returned {_shape(value)}; must be a scalar tensor")
        return value

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Every measure on the test data, and which examples are classified wrongly."""
        self.model.eval()
        totals, counts = [0.0] * len(self.measures), [0] * len(self.measures)
        wrong: list[int] | None = []
        for numbers, (args, named, target) in self._tests():
            output = self._output(args, named)
            for i, measure in enumerate(self.measures):
                values = self._applied(measure.of, output, target)
                weight = values.numel() if values.ndim else len(numbers)
                totals[i] += float(values.double().sum()) * (1 if values.ndim else weight)
                counts[i] += weight
                if measure is MEASURES["accuracy"] and wrong is not None:
                    one_each = values.shape == (len(numbers),)
                    missed = [n for n, v in zip(numbers, values.tolist(), strict=False) if v == 0]
                    wrong = [*wrong, *missed] if one_each else None
        metrics = {}
        for measure, total, count in zip(self.measures, totals, counts, strict=True):
            mean = total / count if count else math.nan
            try:
                metrics[measure.metric.name] = measure.finish(mean)
            except OverflowError:
                metrics[measure.metric.name] = math.inf
        judged = self.measures[0] is MEASURES["accuracy"]
        return Evaluation(metrics, wrong if judged else None)


def _argument_names(model: nn.Module) -> frozenset[str] | None:
    """What a network can be given by name; None if it takes anything."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def _shifted(
    named: dict[str, Any], ids: Tensor, labels: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """Arguments without the last place of each sequence, and what stands one place on.

    Where ``attention_mask`` is 0 nothing is predicted.
    """
    wanted = ids if labels is None else labels
    mask = named.get("attention_mask")
    if mask is not None:
        wanted = wanted.masked_fill(mask == 0, -100)
    cut = {
        k: v[:, :-1] if isinstance(v, Tensor) and v.shape == ids.shape else v
        for k, v in named.items()
    }
    return cut, wanted[:, 1:]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if value.dtype == torch.float64:  # numpy's numbers, where networks have float32
            value = value.float()
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_moved(item, device) for item in value)
    return value


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
