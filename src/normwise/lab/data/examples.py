"""Examples of the user's data sets: by number or one after the other, and made into batches here or
in other processes, so that what they draw depends on a seed alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pickle import PicklingError
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, IterableDataset

from normwise.lab.data.ahead import Ahead
from normwise.lab.data.folders import processes_asked_for
from normwise.lab.errors import UsageError
from normwise.lab.imports import reason

__all__ = ["Examples", "Reading", "checked_parts", "checked_workers"]


def checked_parts(train: Any, test: Any, validation: Any) -> dict[str, Any]:
    """The parts of the data, by name.

    Raises:
        UsageError: for one that has no length, or is empty.
    """
    parts = {"train": train, "test": test}
    parts |= {} if validation is None else {"validation": validation}
    for part, data in parts.items():
        _check_data(part, data)
    return {part: _as_tensors(data) for part, data in parts.items()}


def checked_workers(workers: int | None) -> int:
    """How many processes make batches; what the environment says counts where nothing is given."""
    if workers is None:
        return processes_asked_for() or 0
    if type(workers) is not int or workers < 0:
        raise UsageError(f"workers {workers!r} is not allowed: must be a whole number from 0")
    return workers


def _as_tensors(data: Any) -> Any:
    """A dataset of Hugging Face's whose examples are plain lists gives tensors instead."""
    if hasattr(data, "with_format") and hasattr(data, "features"):
        chosen = getattr(data, "format", None) or {}
        return data.with_format("torch") if chosen.get("type") is None else data
    return data


def _check_data(part: str, data: Any) -> None:
    try:
        size = len(data)
    except TypeError:
        raise UsageError(
            f"the {part} data ({type(data).__name__}) have no length; must have `__len__`"
        ) from None
    if size < 1:
        raise UsageError(f"the {part} data are empty: must have one example or more")


class Examples:
    """Data by number, or one after the other.

    Args:
        name: as errors have it.
        data: a dataset.
        chosen: which of a map-style dataset's (default: all).
    """

    def __init__(self, name: str, data: Any, chosen: Sequence[int] | None = None) -> None:
        self.name, self.data, self.chosen = name, data, chosen
        self.iterable = isinstance(data, IterableDataset) or not hasattr(data, "__getitem__")

    def __len__(self) -> int:
        return len(self.data) if self.chosen is None else len(self.chosen)

    def divided(self, share: float) -> tuple[Examples, Examples]:
        """Two parts, always the same: what is left, and the share that is held out."""
        held = round(share * len(self))
        if self.iterable or not 0 < held < len(self):
            why = "can only be run through" if self.iterable else f"are {len(self)} examples"
            raise UsageError(
                f"no part of the training data can be held out, which {why}: give supervised() "
                "validation data"
            )
        order = torch.randperm(len(self), generator=Generator().manual_seed(0)).tolist()
        return (
            Examples(self.name, self.data, sorted(order[held:])),
            Examples("validation", self.data, sorted(order[:held])),
        )

    def reader(self, start: int) -> Callable[[list[int]], list[Any]]:
        """What gives the examples of these numbers, which of an iterable are the next ones."""
        if self.iterable:
            source = islice(iter(self.data), start, None)
            return lambda numbers: self._following(source, len(numbers))
        return lambda numbers: [self._one(n) for n in numbers]

    def _following(self, source: Iterator[Any], count: int) -> list[Any]:
        found = list(islice(source, count))
        if len(found) < count:
            raise UsageError(
                f"the {self.name} data end before their length, {len(self)}: `__len__` must be the "
                "number of examples"
            )
        return found

    def _one(self, number: int) -> Any:
        place = number if self.chosen is None else self.chosen[number]
        try:
            return self.data[place]
        except Exception as error:
            raise UsageError(f"example {place} of the {self.name} data: {reason(error)}") from error


class Reading(Dataset[Any]):
    """Makes batches on the processor, in this process or another.

    A job is the name of a part, the numbers of its examples, and a seed of what they draw. What
    comes of it is a batch, or the error that says why there is none.

    Args:
        parts: by name.
        collate: makes a batch of examples.
        workers: how many other processes there are to be.
    """

    def __init__(
        self, parts: dict[str, Examples], collate: Callable[[list[Any]], Any], workers: int
    ) -> None:
        self.parts, self.collate, self.workers = parts, collate, workers
        self._ahead: Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}

    def run(self, part: str, jobs: Iterable[tuple[str, list[int], int]]) -> Iterator[Any]:
        """What comes of jobs on one part, in order; that of workers ends an earlier run."""
        if not self.workers or self.parts[part].iterable:
            return self.in_turn(jobs)
        if self._ahead is None:
            self._ahead = Ahead(self, self.workers)
        return self._apart(self._ahead.run(jobs))

    @staticmethod
    def _apart(batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except (AttributeError, TypeError, PicklingError) as error:  # as pickle says it
            raise UsageError(
                f"the data cannot be sent to workers ({reason(error)}): define their class and "
                "collate in a module, or ask for no workers"
            ) from error

    def __getitem__(self, job: tuple[str, list[int], int]) -> Any:
        try:
            return self._made(job, self.parts[job[0]].reader(job[1][0]))
        except UsageError as error:
            return error

    def in_turn(self, jobs: Iterable[tuple[str, list[int], int]]) -> Iterator[Any]:
        """What comes of jobs on one part; an iterable dataset is run through once."""
        read: Callable[[list[int]], list[Any]] | None = None
        for job in jobs:
            read = read or self.parts[job[0]].reader(job[1][0])
            yield self._made(job, read)

    def _made(self, job: tuple[str, list[int], int], read: Callable[[list[int]], list[Any]]) -> Any:
        _, numbers, seed = job
        part = self.parts[job[0]].name
        with _seeded(seed):
            examples = read(numbers)
            try:
                batch = self.collate(examples)
            except Exception as error:
                raise UsageError(
                    f"the {part} data cannot be made a batch ({reason(error)}): give a collate"
                ) from error
        for tensor in _tensors(batch):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UsageError(
                    f"the {part} data hold NaN or infinity, in one of the examples "
                    f"{_some(numbers)}: clean them, or fill the gaps"
                )
        return batch


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, what datasets draw, from whichever usual generator, depends on ``seed`` alone."""
    state = random.getstate()
    random.seed(seed)
    numpy = _numpy()
    before = None if numpy is None else numpy.random.get_state()
    if numpy is not None:
        numpy.random.seed(seed)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(before)


def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:4]))
    return shown if len(numbers) <= 4 else f"{shown}, … ({len(numbers)} in all)"
