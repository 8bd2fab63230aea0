"""The report on a checkpoint: a table, findings in words, JSON."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normwise.checkpoint.examination import (
    Consensus,
    State,
    TensorNorms,
    initial_scales,
    judged,
    measure,
)
from normwise.checkpoint.stored import CheckpointError, stored_tensors
from normwise.figures import Axis, Line, Lines
from normwise.figures.scales import Spacing
from normwise.figures.tables import Column, Row, Table

__all__ = ["CheckpointReport", "examine"]

# Weights that have a sentence each; the rest are counted together.
_SHOWN = 5


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint's weights alone say. ``str(report)`` is for a person.

    Attributes:
        source: where it was read from.
        tensors: in the order of the file.
        consensus: where matrices have come to rest together, None where they have not.
        lr: η that it was trained with, or is to be; NaN where that is not known.
        weight_decay: λ, the same.
        invariant: the scale-invariant weights, of which alone the consensus is; empty if that is
            not known, or there are none.
    """

    source: str
    tensors: tuple[TensorNorms, ...]
    consensus: Consensus | None
    lr: float = math.nan
    weight_decay: float = math.nan
    invariant: frozenset[str] = frozenset()

    @property
    def lr_over_decay(self) -> float:
        """η/λ of AdamW whose equilibrium the settled matrices are at; NaN without any."""
        return math.nan if self.consensus is None else self.consensus.lr_over_decay

    @property
    def implied_lr(self) -> float:
        """η for the λ that was given."""
        return self.lr_over_decay * self.weight_decay

    @property
    def implied_weight_decay(self) -> float:
        """λ for the η that was given."""
        return self.lr / self.lr_over_decay

    def of(self, state: State) -> tuple[TensorNorms, ...]:
        """The tensors whose norms look like ``state``, in the order of the file.

        Args:
            state: which.
        """
        return tuple(t for t in self.tensors if t.state is state)

    def findings(self) -> tuple[str, ...]:
        """What a person should know, the most urgent first, one sentence or two each."""
        return (
            *self._broken(),
            *self._settled(),
            *self._constrained(),
            *self._untrained(),
            *self._dead(),
            *self._near_range(),
            *self._going_on(),
        )

    def table(self) -> Table:
        """Every matrix, one a row; vectors are counted in the findings alone."""
        starts = any(t.initial > 0 for t in self.tensors)
        columns = (
            Column("weight", words=True),
            Column("norms", words=True),
            Column("RMS", "of entries"),
            *((Column("÷ start", "RMS"),) if starts else ()),
            Column("norm", "of a row, median"),
            Column("spread", "of rows, 95% ÷ 5%"),
            Column("shape", words=True),
            Column("dtype", words=True),
        )
        rows = tuple(
            Row(
                (
                    t.name,
                    t.state.value,
                    f"{t.rms:.4g}",
                    *((f"{t.rms / t.initial:.3g}" if t.initial > 0 else "",) if starts else ()),
                    f"{float(t.rows.median()):.4g}",
                    _spread(t.rows),
                    "×".join(map(str, t.shape)),
                    str(t.dtype).removeprefix("torch."),
                )
            )
            for t in self.tensors
            if t.is_matrix
        )
        return Table(columns, rows)

    def chart(self) -> Lines:
        """The RMS of each matrix's entries in the file's order, with nine tenths of its rows."""
        matrices = [t for t in self.tensors if t.is_matrix and not t.not_finite]
        x = tuple(float(k) for k in range(1, len(matrices) + 1))
        per_entry = [t.rows / math.sqrt(t.fan_in) for t in matrices]
        level = None if self.consensus is None else self.consensus.rms
        lines = [
            Line(
                "checkpoint",
                "checkpoint",
                x,
                tuple(t.rms for t in matrices),
                tuple(float(rows.quantile(0.05)) for rows in per_entry),
                tuple(float(rows.quantile(0.95)) for rows in per_entry),
                level=level,
            )
        ]
        if any(t.initial > 0 for t in matrices):
            start = tuple(t.initial for t in matrices)
            lines.append(Line("start", "at the start", x, start, colour="orange", dash=(4, 3)))
        return Lines(
            "RMS of the entries of each matrix",
            "in the order of the checkpoint; the band holds nine tenths of its rows",
            Axis("matrix", text=lambda k: matrices[round(k) - 1].name if matrices else ""),
            Axis("RMS of entries", Spacing.LOG),
            tuple(lines),
        )

    def to_dict(self) -> dict[str, Any]:
        """What the report says, for JSON; numbers that are not known are None."""
        c = self.consensus
        return {
            "source": self.source,
            "findings": list(self.findings()),
            "lr_over_decay": _known(self.lr_over_decay),
            "implied_lr": _known(self.implied_lr),
            "implied_weight_decay": _known(self.implied_weight_decay),
            "consensus": None
            if c is None
            else {
                "rms": c.rms,
                "low": c.low,
                "high": c.high,
                "names": list(c.names),
                "share": c.share,
            },
            "tensors": [
                {
                    "name": t.name,
                    "state": t.state.value,
                    "reason": t.reason,
                    "shape": list(t.shape),
                    "dtype": str(t.dtype).removeprefix("torch."),
                    "rms": t.rms,
                    "initial_rms": _known(t.initial),
                    "largest": t.largest,
                    "median_row_norm": float(t.rows.median()) if len(t.rows) else None,
                    "dead_rows": list(t.dead_rows),
                    "rows_near_range": list(t.rows_near_range),
                    "not_finite": t.not_finite,
                }
                for t in self.tensors
            ],
        }

    def __str__(self) -> str:
        count = sum(t.entries for t in self.tensors)
        head = f"{self.source}: {len(self.tensors)} tensors, {count:,} entries"
        return "\n".join([head, "", *self.findings(), "", str(self.table())])

    def _broken(self) -> Iterator[str]:
        for t in self.of(State.BROKEN):
            yield f"{t.name}: {t.reason}; go back to a checkpoint before it."

    def _settled(self) -> Iterator[str]:
        matrices = [
            t
            for t in self.tensors
            if t.state in (State.SETTLED, State.MOVING)
            and (not self.invariant or t.name in self.invariant)
        ]
        if not matrices:
            return
        kind = "scale-invariant " if self.invariant else ""
        if self.consensus is None:
            yield (
                f"Not settled: the {kind}{_count(len(matrices), 'matrix', 'matrices')} that moved "
                "have no RMS in common, as they would at an equilibrium of AdamW, so that nothing "
                "follows about its learning rate and decay."
            )
            return
        c = self.consensus
        lr, decay = self.lr, self.weight_decay
        text = (
            f"Settled: {len(c.names)} of {len(matrices)} {kind}matrices that moved "
            f"({c.share:.0%} of their entries) have RMS {c.rms:.3g} ({c.low:.3g} to {c.high:.3g}) "
            "whatever their shape, the equilibrium of AdamW at lr/weight_decay = "
            f"{self.lr_over_decay:.3g}"
        )
        if not math.isnan(lr):
            implied = self.implied_weight_decay
            text += (
                f"; at lr {lr:.3g} that is weight_decay {implied:.3g}, lr·weight_decay "
                f"{lr * implied:.3g}, a memory of {1 / (lr * implied):,.0f} steps"
            )
        elif not math.isnan(decay):
            implied = self.implied_lr
            text += (
                f"; at weight_decay {decay:.3g} that is lr {implied:.3g}, lr·weight_decay "
                f"{decay * implied:.3g}, a memory of {1 / (decay * implied):,.0f} steps"
            )
        if not self.invariant:
            text += ". Whether they are scale-invariant, for which alone this is sure, is not known"
        yield text + "."
        rest = tuple(t for t in matrices if t.state is State.MOVING)
        if rest:
            yield f"Not settled: {_named(rest)}."

    def _constrained(self) -> Iterator[str]:
        held = self.of(State.CONSTRAINED)
        if held:
            yield (
                f"Constrained while training: {_named(held)} (of the first, {held[0].reason}); "
                "such norms say nothing about decay."
            )

    def _untrained(self) -> Iterator[str]:
        drawn = self.of(State.DRAWN)
        if drawn:
            yield f"Not trained, or hardly: {_named(drawn)} ({drawn[0].reason})."
        constant = self.of(State.CONSTANT)
        if constant:
            yield f"Never moved: {_named(constant)}; all entries of each are equal."

    def _dead(self) -> Iterator[str]:
        found = [(t, rows) for t in self.tensors if (rows := t.dead_rows)]
        for t, rows in found[:_SHOWN]:
            shown = ", ".join(map(str, rows[:5])) + (" …" if len(rows) > 5 else "")
            yield (
                f"Dead or unused: {len(rows)} of {len(t.rows)} rows of {t.name} (row {shown}) are "
                "zero, or a thousand times shorter than the others."
            )
        if len(found) > _SHOWN:
            yield f"Dead or unused rows in {len(found) - _SHOWN} more: {_named(_only(found))}."

    def _near_range(self) -> Iterator[str]:
        found = [(t, rows) for t in self.tensors if (rows := t.rows_near_range)]
        for t, rows in found[:_SHOWN]:
            yield (
                f"Near the end of {str(t.dtype).removeprefix('torch.')}'s range: "
                f"{len(rows)} rows of {t.name}, the first of norm {float(t.rows[rows[0]]):.3g}."
            )
        if len(found) > _SHOWN:
            yield f"Near its end in {len(found) - _SHOWN} more: {_named(_only(found))}."

    def _going_on(self) -> Iterator[str]:
        if self.consensus is None:
            return
        decay = self.implied_weight_decay if math.isnan(self.weight_decay) else self.weight_decay
        if math.isnan(decay):
            yield (
                "Training on: these norms stay where they are at a learning rate of "
                f"{self.lr_over_decay:.3g} times the weight decay; k times that moves them towards "
                "√k times these, over about 1/(lr·weight_decay) steps."
            )
            return
        rate = decay * self.lr_over_decay
        yield (
            f"Training on with weight_decay {decay:.3g}: warm up to lr {rate:.3g}, at which these "
            "norms stay where they are; k times that moves them towards √k times these, over about "
            f"{1 / (rate * decay):,.0f}/k steps, in which a step turns them further than it will."
        )


def examine(
    path: str | Path,
    *,
    initial: nn.Module | Mapping[str, Tensor] | None = None,
    invariant: Collection[str] = (),
    lr: float | None = None,
    weight_decay: float | None = None,
    prefix: str | None = None,
) -> CheckpointReport:
    """Say what a checkpoint's weights alone tell; in memory are a few million entries at a time.

    At the equilibrium of AdamW the entries of all scale-invariant weights have RMS √(η/(2λ))
    whatever their shapes, while what was drawn at random goes with the shape. So weights of
    different shapes with one RMS have settled, and that RMS says η/λ, averaged over about the last
    1/(ηλ) steps. Weights whose scale matters, and other optimizers, settle elsewhere.

    Args:
        path: a ``.safetensors`` file, a sharded one's folder or index, or the folder of a
            distributed checkpoint of torch. Nothing is unpickled but that one's list of contents,
            by a reader that lets only shapes and places through.
        initial: the network at initialization, or its tensors by name, to compare norms with
            (default: the usual laws of initialization, by the shapes).
        invariant: the names of the scale-invariant weights, such as those of
            ``report.parameter_views(model)``; only they are asked for an equilibrium (default: not
            known, all are).
        lr: η that it was trained with, at its end (default: not known).
        weight_decay: λ (default: not known).
        prefix: only the keys that begin with it (default: ``model.`` if a distributed checkpoint
            has such keys, else all).

    Returns:
        A :class:`CheckpointReport`.

    Raises:
        CheckpointError: a ``ValueError`` of one line for what cannot be read, or is damaged.
        ValueError: for a number that is not positive.

    Source: arXiv 2305.17212 (the equilibrium).
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"Invalid {name}: {value}; must be positive")
    tensors = initial.state_dict() if isinstance(initial, nn.Module) else initial or {}
    start = initial_scales(tensors)
    measured = [measure(t, start.get(t.name, math.nan)) for t in stored_tensors(Path(path), prefix)]
    if start and all(math.isnan(t.initial) for t in measured):
        raise CheckpointError(
            f"{str(path)!r} and the network have no tensor name in common: "
            f"{measured[0].name!r} and {next(iter(start))!r}, for example"
        )
    known = frozenset(invariant)
    found, agreed = judged(measured, known)
    return CheckpointReport(
        str(path),
        tuple(found),
        agreed,
        math.nan if lr is None else lr,
        math.nan if weight_decay is None else weight_decay,
        known,
    )


def _only(found: list[tuple[TensorNorms, tuple[int, ...]]]) -> tuple[TensorNorms, ...]:
    return tuple(t for t, _ in found[_SHOWN:])


def _spread(rows: Tensor) -> str:
    low, high = float(rows.quantile(0.05)), float(rows.quantile(0.95))
    return f"{high / low:.2f}" if low > 0 else "∞" if high > 0 else ""


def _named(tensors: tuple[TensorNorms, ...]) -> str:
    names = ", ".join(t.name for t in tensors[:4])
    return f"{names} and {len(tensors) - 4} more" if len(tensors) > 4 else names


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
