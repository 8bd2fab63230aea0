"""What named rules make of the η and λ of a run for another batch, horizon or width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from normwise.figures.tables import Column, Table, paragraph
from normwise.plan.settings import Settings
from normwise.plan.timescales import TIMES, Timescale
from normwise.plan.transfer import TRANSFERS, Run, carry_by, carry_by_each, named

__all__ = ["Change", "RuleRow", "Rules", "carried", "rules"]

_COLUMNS = (
    "rule",
    "of another",
    "changes",
    Column("η"),
    Column("λ"),
    *TIMES,
    "source",
)


@dataclass(frozen=True)
class Change:
    """From which run settings come, and to which they go.

    Args:
        tokens: of the old run and of the new; or samples, or steps.
        batch: of them in a step, likewise (default: one, and not told).
        width: of the network, likewise (default: not known).
        parameters: of the network, likewise (default: not known).
    """

    tokens: tuple[float, float]
    batch: tuple[float, float] | None = None
    width: tuple[int, int] | None = None
    parameters: tuple[float, float] | None = None

    @property
    def _pairs(self) -> dict[str, tuple[float, float] | None]:
        return {
            "batch": self.batch or (1.0, 1.0),
            "tokens": self.tokens,
            "width": self.width,
            "parameters": self.parameters,
        }

    def run(self, settings: Settings) -> Run:
        """The old run.

        Args:
            settings: by which it was trained.
        """
        old: Any = {name: None if pair is None else pair[0] for name, pair in self._pairs.items()}
        return Run(settings.lr, settings.weight_decay, **old)

    @property
    def new(self) -> dict[str, Any]:
        """What is known of the new run, by name."""
        return {name: pair[1] for name, pair in self._pairs.items() if pair is not None}

    @property
    def names(self) -> frozenset[str]:
        """What changes."""
        return frozenset(
            name for name, pair in self._pairs.items() if pair is not None and pair[0] != pair[1]
        )


@dataclass(frozen=True)
class RuleRow:
    """What one rule says.

    Attributes:
        rule: its name.
        of: what it carries over, such as ``"batch and horizon"``.
        weights: whose η and λ it changes.
        lr: η.
        weight_decay: λ.
        timescale: how long weights remember then.
        words: what it does.
        where: what its paper found it for.
        source: the paper.
    """

    rule: str
    of: str
    weights: str
    lr: float
    weight_decay: float
    timescale: Timescale
    words: str
    where: str
    source: str


class Rules(tuple[RuleRow, ...]):
    """One row for each rule; ``str()`` is a table, and what each rule is for."""

    def __str__(self) -> str:
        def cells(row: RuleRow) -> tuple[str, ...]:
            return (
                row.rule,
                row.of,
                row.weights,
                f"{row.lr:.3g}",
                f"{row.weight_decay:.3g}",
                *row.timescale.cells(),
                row.source,
            )

        notes = {row.rule: f"{row.rule}: {row.words}. {row.where}" for row in self}
        return "\n".join(
            [str(Table.of(_COLUMNS, map(cells, self))), "", *map(paragraph, notes.values())]
        )


def rules(settings: Settings, change: Change) -> Rules:
    """What each rule by itself makes of the settings of a run.

    Args:
        settings: of hidden matrices, good in the old run, with the steps of the new.
        change: from which run to which.

    Returns:
        A row for each rule that speaks of any change, and of that alone; ``print`` them.
    """
    old = change.run(settings)
    norms: Literal["free", "fixed"] = "fixed" if settings.optimizer == "sphere" else "free"
    rows = []
    for run in carry_by_each(old, norms, **change.new):
        transfer = TRANSFERS[run.rules[-1]]
        there = replace(settings, lr=run.lr, weight_decay=run.weight_decay)
        rows.append(
            RuleRow(
                transfer.name,
                named(change.names & transfer.changes),
                "hidden matrices" if transfer.roles == {"hidden"} else "all that decay",
                run.lr,
                run.weight_decay,
                there.remembers(None if change.batch is None else change.batch[1]),
                transfer.words,
                transfer.where,
                transfer.source,
            )
        )
    return Rules(rows)


def carried(
    settings: Settings, others: Settings, names: Sequence[str], change: Change
) -> tuple[Settings, Settings]:
    """The settings of another run, by rules taken one after the other.

    Args:
        settings: of hidden matrices, good in the old run, with the steps of the new.
        others: of all other weights; rules for hidden matrices alone leave them.
        names: of the rules.
        change: from which run to which.

    Returns:
        The two, in the new run.

    Raises:
        ValueError: as :func:`normwise.plan.carry_by`.
    """
    hidden = carry_by(change.run(settings), names, **change.new)
    of_all = [name for name in names if TRANSFERS[name].roles != {"hidden"}]
    spoken = frozenset().union(*(TRANSFERS[name].changes for name in of_all))
    rest = carry_by(
        change.run(others), of_all, **{k: v for k, v in change.new.items() if k in spoken}
    )
    return (
        replace(settings, lr=hidden.lr, weight_decay=hidden.weight_decay),
        replace(others, lr=rest.lr, weight_decay=rest.weight_decay),
    )
