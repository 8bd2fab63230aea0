"""How long decayed weights remember an update: 1/(ηλ), in steps, in tokens, as a share of the run.

Decoupled decay makes a weight an exponential moving average of its updates, w ← (1 − ηλ)w + ηλ·x
with x = −u/λ, whose timescale is 1/(ηλ) steps (Wang and Aitchison, arXiv 2405.13698, equation 3).
On a sphere nothing decays, but a step that turns a weight by θ, which is across it, leaves cos θ of
what was there: w ← cos θ·w + sin θ·R·t̂. So the timescale is 1/(1 − cos θ), 2/θ² to first order.
That is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from normwise.figures.tables import Column, Table
from normwise.theory import equilibrium_of
from normwise.updates import UpdateRule, describe

__all__ = ["TIMES", "Timescale", "Timescales", "timescale", "timescales"]

TIMES = (
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
        steps: 1/(ηλ) at the present η, or 1/share where a step leaves another share of a weight
            than 1 − ηλ.
        half_life: steps after which half of an update is left, ln ½ / ln(1 − share).
        tokens: ``steps`` in tokens, or whatever the batch is counted in; NaN if not given.
        share: ``steps`` as a share of the run; NaN if not given. τ of arXiv 2505.13738, equation 2.
    """

    name: str
    steps: float
    half_life: float
    tokens: float = math.nan
    share: float = math.nan

    def cells(self) -> tuple[str, ...]:
        """What a table says of it, under :data:`TIMES`."""
        if not math.isfinite(self.steps):
            return "everything" if math.isinf(self.steps) else "not known", *"–––"
        tokens = "–" if math.isnan(self.tokens) else f"{self.tokens:,.0f}"
        share = f"{self.share:.3g}" if self.share < 100 else f"{self.share:,.0f}"
        if math.isnan(self.share):
            share = "–"
        return f"{self.steps:,.0f}", f"{self.half_life:,.0f}", tokens, share


class Timescales(tuple[Timescale, ...]):
    """One for each group of an optimizer; ``str()`` is a table."""

    def __str__(self) -> str:
        return str(Table.of(("group", *TIMES), ((t.name, *t.cells()) for t in self)))


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
    shrink = _forgets(rule)
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


def _forgets(rule: UpdateRule) -> float:
    """The share of what was there that one step takes away."""
    if rule.norm == "fixed":
        angle = equilibrium_of(rule.converted(float)).angle
        return 2 * math.sin(angle / 2) ** 2
    return float(rule.shrink)


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
