"""From records of metrics to charts: which runs count, their mean and range, one line a method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from normwise.figures import Axis, Line, Lines, Spacing, marks
from normwise.lab.summary import listed

__all__ = [
    "EPOCH",
    "QUANTITIES",
    "Comparison",
    "DrawnQuantity",
    "over_seeds",
]

Record = Mapping[str, Any]
EPOCH = Axis("epoch", Spacing.TIGHT)


@dataclass(frozen=True)
class DrawnQuantity:
    """A quantity of the metrics and how it is drawn.

    Args:
        key: its name in the records.
        title: over the chart.
        axis: the vertical one.
        note: what to look for.
        factor: from the recorded to the shown value.
    """

    key: str
    title: str
    axis: Axis
    note: str = ""
    factor: float = 1.0


QUANTITIES: dict[str, DrawnQuantity] = {
    q.key: q
    for q in (
        DrawnQuantity(
            "norm_growth",
            "Norm of the scale-invariant weights",
            Axis("norm ÷ norm at the start", holds=(1.0,), text=lambda v: f"×{v:.3f}"),
            "Look for how fast the dashed lines leave 1, and how much of that the solid line of "
            "the same pair avoids. None of this growth changes what the network computes.",
        ),
        DrawnQuantity(
            "relative_effective_lr",
            "The hidden slowdown",
            Axis("effective lr without schedule ÷ start", holds=(0.0,), text=lambda v: f"×{v:.3f}"),
            "What the norms alone do to the learning rate, relative to the start: {formulas}. At "
            "0.5 the weights turn half as fast as the chosen learning rate would have them.",
        ),
        DrawnQuantity(
            "effective_lr",
            "Effective learning rate",
            Axis("η/‖w‖² or η/‖w‖, log scale", Spacing.LOG),
            "Schedule and norms together. The drops are the schedule; the distance between the two "
            "lines of a pair is the norms' doing. Compare only methods with the same unit: "
            "{formulas}, times η.",
        ),
        DrawnQuantity(
            "angular_update",
            "Angle per step",
            Axis("radians, log scale", Spacing.LOG, text=lambda v: f"{v:.3g} rad"),
            "All that training can do to a scale-invariant weight is to turn it. This is the speed "
            "as measured, every fifth step; where it falls, the weights come to rest.",
        ),
        DrawnQuantity(
            "test_accuracy",
            "Test accuracy",
            Axis(
                "percent, axis stretched towards 100",
                Spacing.TOWARDS_ONE,
                text=lambda v: f"{100 * v:.2f}%",
            ),
            "Before the first drop a large effective learning rate may look worse, because it "
            "keeps the weights moving; what counts is the end. Where the bands overlap, the seeds "
            "matter as much as the method.",
        ),
        DrawnQuantity(
            "train_loss",
            "Training loss",
            Axis("cross-entropy in nats, log scale", Spacing.LOG, text=lambda v: f"{v:.4g}"),
            "The mean over the steps of an epoch. A lower loss is no aim in itself: compare it "
            "with the test accuracy.",
        ),
    )
}


def over_seeds(line: Line, runs: Iterable[Sequence[Record]], quantity: DrawnQuantity) -> Line:
    """The line with a quantity's mean and range over the epochs that all runs have reached.

    An epoch that only some have reached would make the mean jump.
    """
    own = list(runs)
    by_epoch: dict[int, list[float]] = {}
    for records in own:
        for record in records:
            value = record.get(quantity.key)
            if value is not None:
                by_epoch.setdefault(record["epoch"], []).append(quantity.factor * value)
    reached = sorted(epoch for epoch, values in by_epoch.items() if len(values) == len(own))
    values = [by_epoch[epoch] for epoch in reached]
    band = values if len(own) > 1 else []
    return replace(
        line,
        x=tuple(map(float, reached)),
        y=tuple(map(fmean, values)),
        low=tuple(map(min, band)),
        high=tuple(map(max, band)),
    )


@dataclass(frozen=True)
class Comparison:
    """The content of a comparison's ``run.json`` and ``metrics.jsonl``."""

    run: Mapping[str, Any]
    records: Sequence[Record]

    @cached_property
    def methods(self) -> list[dict[str, Any]]:
        """Its methods: name, label, update and baseline."""
        return list(self.run["methods"])

    @cached_property
    def marks(self) -> dict[str, tuple[str, tuple[float, ...]]]:
        """Colour and dashes of each method."""
        return marks((m["name"] for m in self.methods), {m["baseline"] for m in self.methods})

    @property
    def dashed(self) -> str:
        """What dashes mean; empty without dashes."""
        named = [m["label"] for m in self.methods if self.marks[m["name"]][1]]
        return f"Dashed: {listed(named)}, with which others are compared. " if named else ""

    @property
    def formulas(self) -> str:
        """What the effective learning rate is, without η, for each kind of update."""
        labels: dict[str, list[str]] = {}
        for m in self.methods:
            power = "1/‖w‖²" if m["update"] == "gradient" else "1/‖w‖"
            labels.setdefault(power, []).append(m["label"])
        return ", ".join(f"{power} for {listed(names)}" for power, names in labels.items())

    def runs(self, name: str) -> list[list[Record]]:
        """The records of the runs of a method that count: finished, or else interrupted."""
        own = [r for r in self.records if r["optimizer"] == name]
        failed = {r["seed"] for r in own if r["status"] == "failed"}
        fine = [r for r in own if r["status"] == "ok" and r["seed"] not in failed]
        last = self.run["settings"]["epochs"]
        finished = {r["seed"] for r in fine if r["epoch"] == last}
        seeds = sorted(finished or {r["seed"] for r in fine})
        return [[r for r in fine if r["seed"] == seed] for seed in seeds]

    def chart(self, key: str) -> Lines:
        """The curves of a quantity, one line a method."""
        quantity = QUANTITIES[key]
        lines = []
        for m in self.methods:
            colour, dash = self.marks[m["name"]]
            line = Line(m["name"], m["label"], colour=colour, dash=dash)
            lines.append(over_seeds(line, self.runs(m["name"]), quantity))
        drops = tuple(map(float, self.run["settings"].get("drop_epochs", ())))
        note = quantity.note.format(formulas=self.formulas)
        return Lines(quantity.title, note, EPOCH, quantity.axis, tuple(lines), drops)
