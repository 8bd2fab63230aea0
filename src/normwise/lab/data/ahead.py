"""Batches that processes of their own make ahead of need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from normwise.lab.errors import UsageError

__all__ = ["Ahead"]


class _Jobs:
    """The jobs at hand, as the loader's sampler; it takes them in the training's process."""

    def __init__(self) -> None:
        self.jobs: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.jobs)


class Ahead:
    """Does jobs in processes of its own, which start with the first and stay.

    Each process is at most two jobs ahead, so that memory is bounded. The processes are fresh ones,
    not forks: a fork would hold the lock of a cell that was killed, and cannot use CUDA.

    Args:
        work: whose item at a job is what comes of it, or an error, which is returned and not
            raised: what is raised in another process arrives with a traceback in its text.
        processes: how many; 0 works where it is asked.
    """

    def __init__(self, work: Dataset[Any], processes: int) -> None:
        self._jobs = _Jobs()
        self._loader: DataLoader[Any] = DataLoader(
            work,
            batch_size=None,  # a job is a batch already
            sampler=self._jobs,
            num_workers=processes,
            multiprocessing_context="spawn" if processes else None,
            persistent_workers=processes > 0,
            # It draws seeds for the workers, which must not come from the global generator.
            generator=torch.Generator(),
        )
        self._run = 0

    def run(self, jobs: Iterable[Any]) -> Iterator[Any]:
        """What comes of each job, in order.

        Jobs are taken ahead of need. A run ends when another begins.

        Raises:
            UsageError: that of a job, when its turn comes.
            RuntimeError: if another run has begun.
        """
        self._run += 1
        own = self._run
        self._jobs.jobs = jobs
        done = iter(self._loader)
        while True:
            if self._run != own:
                raise RuntimeError("another run has begun, which ended this one")
            result = next(done, None)
            if result is None:
                return
            if isinstance(result, UsageError):
                raise result
            yield result
