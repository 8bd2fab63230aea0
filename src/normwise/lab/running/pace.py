"""How long trainings take, found out by a few steps of them; and what fits into a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch

from normwise.lab.errors import UsageError
from normwise.lab.parallel import ALONE
from normwise.lab.recipes.schema import RecipeCell
from normwise.lab.running.cell import one_thread
from normwise.lab.running.trainer import Diverged, Trainer
from normwise.lab.trust import trusting

__all__ = ["Pace", "fitted", "pace", "spelled"]

_STEPS, _SECONDS = 8, 6.0


@dataclass(frozen=True)
class Pace:
    """What takes how long, in seconds.

    Args:
        start: to make the network and find its invariant weights.
        step: one step.
        test: one test.
        steps: of an epoch.
    """

    start: float
    step: float
    test: float
    steps: int

    def seconds(self, epochs: int) -> float:
        """Of one training, which is tested before the first epoch and after each."""
        return self.start + epochs * self.steps * self.step + (epochs + 1) * self.test


def pace(cells: Iterable[RecipeCell], root: Path, device: str, trust: Iterable[str]) -> Pace:
    """How fast these trainings are, the mean over as many as can be tried in a few seconds.

    Nothing is written.

    Args:
        cells: one for each method.
        root: where the data sets are.
        device: where to compute.
        trust: the modules of the user's whose code they may run.
    """
    begin = time.monotonic()
    found = []
    with trusting(trust), one_thread(), torch.random.fork_rng():
        for cell in cells:
            found.append(_pace(cell, root, torch.device(device)))
            if time.monotonic() - begin > _SECONDS:
                break
    return Pace(
        fmean(p.start for p in found),
        fmean(p.step for p in found),
        fmean(p.test for p in found),
        found[0].steps,
    )


def _pace(cell: RecipeCell, root: Path, device: torch.device) -> Pace:
    begin = time.perf_counter()
    trainer = Trainer(cell, Path(), root, device, ALONE)
    made = time.perf_counter()
    batches = trainer.stream()
    try:
        for _ in range(min(_STEPS, trainer.steps)):
            trainer.take(batches)
    except Diverged:
        pass  # the training itself will say so
    finally:
        if trainer.monitor is not None:
            trainer.monitor.close()
    stepped = time.perf_counter()
    trainer.problem.evaluate()
    # Of the first step alone if there is no other: what it sets up is not typical.
    times = trainer.times.steps[1:] or trainer.times.steps
    test = time.perf_counter() - stepped
    return Pace(made - begin, median(times), test, trainer.steps)


def fitted(
    budget: float, seeds: int, epochs: int, cost: Callable[[int, int], float]
) -> tuple[int, int]:
    """Seeds and epochs that fit into a time, as many as can be.

    First epochs go, down to half of them; then seeds, down to two; then epochs, and last the second
    seed, without which chance cannot be told.

    Args:
        budget: in seconds.
        seeds: that were asked for.
        epochs: that were asked for.
        cost: of seeds and epochs, in seconds.

    Raises:
        UsageError: if one epoch with one seed takes longer.
    """
    least = (epochs + 1) // 2
    few = min(2, seeds)
    plans = [
        *((seeds, e) for e in range(epochs, least - 1, -1)),
        *((s, least) for s in range(seeds - 1, few - 1, -1)),
        *((few, e) for e in range(least - 1, 0, -1)),
        *((1, e) for e in range(least, 0, -1)),
    ]
    for plan in plans:
        if cost(*plan) <= budget:
            return plan
    raise UsageError(
        f"a budget of {spelled(budget)} is too little: one epoch with one seed takes "
        f"{spelled(cost(1, 1))}; give more, or fewer optimizers and learning rates"
    )


def spelled(seconds: float) -> str:
    """A duration for a person: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
