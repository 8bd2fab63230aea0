"""How long decayed weights remember an update: 1/(ηλ), in steps, in tokens, as a share of the run.

Decoupled decay makes a weight an exponential moving average of its updates, w ← (1 − ηλ)w + ηλ·x
with x = −u/λ, whose timescale is 1/(ηλ) steps (Wang and Aitchison, arXiv 2405.13698, equation 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from normwise.figures.tables import Column, Table
from normwise.updates import UpdateRule, describe

__all__ = ["Timescale", "Timescales", "timescale", "timescales"]

_COLUMNS = (
    "group",
    Column("remembers", "steps"),
    Column("half-life", "steps"),
    Column("tokens"),
    Column("of the run"),
)


@dataclass(frozen=True)
class Timescale:
    """How long the weights of a group remember; infinite without decay, NaN where not known.

    Attributes:
        name: of the group, or of the optimizer.
        steps: 1/(ηλ) at the present η, or 1/share where decay shortens weights by another share.
        half_life: steps after which half of an update is left, ln ½ / ln(1 − share).
        tokens: ``steps`` in tokens, or whatever the batch is counted in; NaN if not given.
        share: ``steps`` as a share of the run; NaN if not given. τ of arXiv 2505.13738, equation 2.
    """

    name: str
    steps: float
    half_life: float
    tokens: float = math.nan
    share: float = math.nan


class Timescales(tuple[Timescale, ...]):
    """One for each group of an optimizer; ``str()`` is a table."""

    def __str__(self) -> str:
        def cells(t: Timescale) -> tuple[str, ...]:
            if not math.isfinite(t.steps):
                return t.name, "everything" if math.isinf(t.steps) else "not known", *"–––"
            tokens = "–" if math.isnan(t.tokens) else f"{t.tokens:,.0f}"
            share = f"{t.share:.3g}" if t.share < 100 else f"{t.share:,.0f}"
            if math.isnan(t.share):
                share = "–"
            return t.name, f"{t.steps:,.0f}", f"{t.half_life:,.0f}", tokens, share

        return str(Table.of(_COLUMNS, map(cells, self)))


def timescale(
    rule: UpdateRule,
    *,
    steps: int | None = None,
    batch: float | None = None,
    name: str | None = None,
) -> Timescale:
    """How long the weights of a rule remember an update.

    Args:
        rule: of :func:`normwise.describe`.
        steps: of the run (default: not known).
        batch: tokens, or samples, of a step (default: not known).
        name: of the weights (default: the optimizer's).

    Returns:
        The timescale.
    """
    shrink = float(rule.shrink)
    length = math.inf if shrink == 0 else 1 / shrink
    half = math.inf if shrink == 0 else math.nan
    if 0 < shrink < 1:
        half = math.log(0.5) / math.log1p(-shrink)
    return Timescale(
        name or rule.name,
        length,
        half,
        math.nan if batch is None else length * batch,
        math.nan if steps is None else length / steps,
    )


def timescales(
    optimizer: Optimizer | Any, *, steps: int | None = None, batch: float | None = None
) -> Timescales:
    """How long each group of an optimizer remembers, at its present learning rate.

    Args:
        optimizer: any that :func:`normwise.describe` knows.
        steps: of the run (default: not known).
        batch: tokens, or samples, of a step (default: not known).

    Returns:
        One each; ``print`` them for a table.

    Raises:
        ValueError: for steps or a batch that is not positive.
    """
    for what, value in (("steps", steps), ("batch", batch)):
        if value is not None and not value > 0:
            raise ValueError(f"Invalid {what}: {value}; must be positive")
    inner = optimizer
    while not isinstance(inner, Optimizer):
        inner = inner.optimizer
    return Timescales(
        timescale(rule, steps=steps, batch=batch, name=group.get("name", f"group {i}"))
        for i, (rule, group) in enumerate(zip(describe(optimizer), inner.param_groups, strict=True))
    )
