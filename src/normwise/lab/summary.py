"""From metrics to the numbers that are reported: means, spreads, curves, findings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from statistics import fmean, median, stdev
from typing import Any

from scipy.special import nctdtr
from scipy.stats import t as student_t

__all__ = [
    "MethodEnd",
    "ProjectionFinding",
    "Spread",
    "Verdict",
    "example_half_width",
    "findings",
    "headline",
    "listed",
    "power",
    "rows",
    "seed_half_width",
    "seeds_needed",
    "summarize",
]

Record = Mapping[str, Any]
MethodEntry = Mapping[str, Any]  # name, label, baseline: an entry of run.json's "methods"

# Two norms that differ by less than this factor are called equal in words.
_SAME_NORM = 1.05


@dataclass(frozen=True)
class Spread:
    """Values over seeds: their mean and standard deviation (n − 1); none for one value."""

    mean: float
    sd: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Mean and standard deviation of one or more values."""
        sd = stdev(values) if len(values) > 1 else None
        return cls(fmean(values), sd, tuple(values))


@dataclass(frozen=True)
class MethodEnd:
    """The end of one optimizer's runs.

    The numbers are those after the last epoch of the finished seeds. Where no seed has finished
    but some were interrupted, they are those after the last epoch that all of these reached.

    Args:
        name: the optimizer.
        label: as a reader sees it.
        epoch: the epoch that the numbers are from.
        finished: seeds that trained to the end.
        unfinished: seeds that were interrupted.
        failed: seeds whose training diverged, with the reason.
        numbers: a :class:`Spread` for each quantity; empty if there is nothing to show.
        step_ms: median over epochs and seeds of a whole step's time, in milliseconds.
        optimizer_ms: the same of the optimizer's part.
    """

    name: str
    label: str
    epoch: int
    finished: tuple[int, ...]
    unfinished: tuple[int, ...]
    failed: dict[int, str]
    numbers: dict[str, Spread]
    step_ms: float | None
    optimizer_ms: float | None


_QUANTITIES = (
    "test_accuracy",
    "train_loss",
    "norm_growth",
    "effective_lr",
    "relative_effective_lr",
    "angular_update",
)


def rows(records: Sequence[Record], methods: Sequence[MethodEntry], epochs: int) -> list[MethodEnd]:
    """One row for each method, in the order given."""
    return [_row(records, method, epochs) for method in methods]


def _row(records: Sequence[Record], method: MethodEntry, epochs: int) -> MethodEnd:
    name = method["name"]
    own = [r for r in records if r["optimizer"] == name]
    failed = {r["seed"]: r["error"] for r in own if r["status"] == "failed"}
    seeds = _shown(own, epochs)
    last = {seed: max(r["epoch"] for r in own if r["seed"] == seed) for seed in seeds}
    epoch = min(last.values(), default=0)
    end = [r for r in own if r["seed"] in seeds and r["epoch"] == epoch]
    numbers = {}
    for quantity in _QUANTITIES:
        values = [r[quantity] for r in end if r[quantity] is not None]
        if values:
            numbers[quantity] = Spread.of(values)

    def typical(key: str) -> float | None:
        times = [r[key] for r in own if r["status"] == "ok" and r[key] is not None]
        return median(times) if times else None

    started = {r["seed"] for r in own}
    finished = {r["seed"] for r in own if r["status"] == "ok" and r["epoch"] == epochs}
    return MethodEnd(
        name=name,
        label=method["label"],
        epoch=epoch,
        finished=tuple(sorted(finished)),
        unfinished=tuple(sorted(started - finished - failed.keys())),
        failed=failed,
        numbers=numbers,
        step_ms=typical("step_ms"),
        optimizer_ms=typical("optimizer_ms"),
    )


def _shown(own: Sequence[Record], epochs: int) -> list[int]:
    """The seeds of one optimizer whose numbers count: the finished, or else the interrupted."""
    failed = {r["seed"] for r in own if r["status"] == "failed"}
    finished = {r["seed"] for r in own if r["status"] == "ok" and r["epoch"] == epochs}
    return sorted(finished or {r["seed"] for r in own} - failed)


class Verdict(Enum):
    """What the seeds and the test examples allow to say about a difference."""

    BETTER = "better"
    WORSE = "worse"
    WITHIN_CHANCE = "within chance"
    NO_DIFFERENCE = "no difference"
    CANNOT_TELL = "cannot tell at this size"
    ONE_SEED = "one seed"

    @classmethod
    def of(
        cls,
        difference: float,
        half_width: float | None,
        higher_is_better: bool = True,
        claimed: float | None = None,
    ) -> Verdict:
        """Better or worse only where the 95% interval of the difference leaves out zero.

        Where it does not, and it is known which difference is claimed: no difference if the whole
        interval lies nearer to zero than that, and otherwise there is no telling.
        """
        if half_width is None:
            return cls.ONE_SEED
        if abs(difference) > half_width and difference != 0:
            return cls.BETTER if (difference > 0) == higher_is_better else cls.WORSE
        if not claimed:
            return cls.WITHIN_CHANCE
        nearer = abs(difference) + half_width < abs(claimed)
        return cls.NO_DIFFERENCE if nearer else cls.CANNOT_TELL


def seed_half_width(differences: Sequence[float]) -> float | None:
    """Half of the 95% interval (Student's t) of the mean of ``differences``, one a seed."""
    n = len(differences)
    if n < 2:
        return None
    return float(student_t.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)


# What is asked of an experiment: the chance of seeing a difference that is there.
_POWER, _LEVEL = 0.8, 0.05
_MOST_SEEDS = 10_000


def power(effect: float, seeds: int) -> float:
    """The chance that a two-sided paired t test at 5% sees a difference.

    Args:
        effect: the difference over the standard deviation of its values, one a seed.
        seeds: 2 or more.
    """
    df, shift = seeds - 1, abs(effect) * math.sqrt(seeds)
    critical = float(student_t.ppf(1 - _LEVEL / 2, df))
    return float(1 - nctdtr(df, shift, critical) + nctdtr(df, shift, -critical))


def seeds_needed(difference: float, sd: float) -> int | None:
    """How many seeds see ``difference`` with a chance of 80%; none if 10,000 do not suffice.

    Chance in the test examples, which seeds share, is left out.

    Args:
        difference: that is looked for.
        sd: the standard deviation of paired differences, one a seed.
    """
    if difference == 0:
        return None
    if sd == 0:
        return 2
    # The normal distribution's answer, which is below Student's, and far from it only for a few.
    seeds = max(2, math.floor(((1.96 + 0.8416) * sd / difference) ** 2))
    while seeds <= _MOST_SEEDS and power(difference / sd, seeds) < _POWER:
        seeds += 1
    return seeds if seeds <= _MOST_SEEDS else None


def example_half_width(
    errors: Sequence[Iterable[int]], baseline_errors: Sequence[Iterable[int]], examples: int
) -> float:
    """Half of the 95% interval of a difference in accuracy, as far as the test examples decide it.

    For each example, the share of seeds that classify it wrongly without the projection, minus
    the share that does with it; the interval is that of the mean of these differences, taking the
    examples as drawn at random.

    Args:
        errors: for each seed, which examples are classified wrongly with the projection.
        baseline_errors: the same without.
        examples: how many there are in the test set.
    """
    total: Counter[int] = Counter()
    for mine, theirs in zip(errors, baseline_errors, strict=True):
        total.update(theirs)
        total.subtract(mine)
    seeds = len(errors)
    mean = sum(total.values()) / seeds / examples
    square = sum((d / seeds) ** 2 for d in total.values()) / examples
    return 1.96 * math.sqrt(max(square - mean**2, 0.0) / max(examples - 1, 1))


@dataclass(frozen=True)
class ProjectionFinding:
    """What the projection changed, between two optimizers that differ in nothing else.

    Args:
        projected: label of the optimizer with the projection.
        baseline: label of the one without.
        growth: factor on the norm, with the projection.
        baseline_growth: without.
        slowdown: factor on the effective learning rate, schedule aside, with the projection.
        baseline_slowdown: without.
        accuracy: mean test accuracy with the projection, from 0 to 1.
        baseline_accuracy: without.
        difference: mean over common seeds of accuracy with minus without.
        half_width: of the 95% interval of ``difference`` over seeds and test examples, the
            variances of both added; none for one seed.
        seeds: the number of common seeds.
    """

    projected: str
    baseline: str
    growth: float
    baseline_growth: float
    slowdown: float
    baseline_slowdown: float
    accuracy: float
    baseline_accuracy: float
    difference: float
    half_width: float | None
    seeds: int

    @property
    def verdict(self) -> Verdict:
        """What chance allows to say about the accuracies."""
        return Verdict.of(self.difference, self.half_width)

    @property
    def norms_kept_smaller(self) -> bool | None:
        """Whether the projection left smaller norms; none where they are about equal."""
        ratio = self.baseline_growth / self.growth
        if 1 / _SAME_NORM < ratio < _SAME_NORM:
            return None
        return ratio > 1

    def sentences(self) -> str:
        """The finding in plain words."""
        p, b = self.projected, self.baseline
        norms = (
            f"The norm of the scale-invariant weights was multiplied by {self.baseline_growth:.2f} "
            f"under {b} and by {self.growth:.2f} under {p}. Leaving the schedule aside, that alone "
            f"multiplied the effective learning rate by {self.baseline_slowdown:.2f} under {b} and "
            f"by {self.slowdown:.2f} under {p}."
        )
        accuracy = (
            f"Test accuracy: {p} {100 * self.accuracy:.2f}%, {b} "
            f"{100 * self.baseline_accuracy:.2f}%, a difference of {_points(self.difference)} "
            "percentage points"
        )
        if self.half_width is None:
            return f"{norms} {accuracy}; with one seed there is no telling whether it is chance."
        low, high = self.difference - self.half_width, self.difference + self.half_width
        interval = f"95% interval {_points(low)} to {_points(high)}, {self.seeds} paired seeds"
        meaning = {
            Verdict.BETTER: f"{p} is better than {b} by more than chance explains.",
            Verdict.WORSE: f"{p} is worse than {b} by more than chance explains.",
        }.get(self.verdict, "chance in the seeds and in the test images can explain that.")
        return f"{norms} {accuracy} ({interval}): {meaning}"


def _points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.2f}".replace("-", "−")


def findings(
    records: Sequence[Record], methods: Sequence[MethodEntry], epochs: int, test_examples: int
) -> list[ProjectionFinding]:
    """A finding for every pair, with and without the projection, that finished a common seed."""
    end = {
        (r["optimizer"], r["seed"]): r
        for r in records
        if r["status"] == "ok" and r["epoch"] == epochs
    }
    labels = {method["name"]: method["label"] for method in methods}
    found = []
    for name, baseline in ((method["name"], method["baseline"]) for method in methods):
        if baseline not in labels:
            continue
        seeds = sorted(s for o, s in end if o == name and (baseline, s) in end)
        if not seeds:
            continue
        mine, theirs = [end[name, s] for s in seeds], [end[baseline, s] for s in seeds]
        differences = [
            a["test_accuracy"] - b["test_accuracy"] for a, b in zip(mine, theirs, strict=True)
        ]
        by_seed = seed_half_width(differences)
        by_example = example_half_width(
            [r["test_errors"] for r in mine], [r["test_errors"] for r in theirs], test_examples
        )
        found.append(
            ProjectionFinding(
                projected=labels[name],
                baseline=labels[baseline],
                growth=fmean(r["norm_growth"] for r in mine),
                baseline_growth=fmean(r["norm_growth"] for r in theirs),
                slowdown=fmean(r["relative_effective_lr"] for r in mine),
                baseline_slowdown=fmean(r["relative_effective_lr"] for r in theirs),
                accuracy=fmean(r["test_accuracy"] for r in mine),
                baseline_accuracy=fmean(r["test_accuracy"] for r in theirs),
                difference=fmean(differences),
                half_width=None if by_seed is None else math.hypot(by_seed, by_example),
                seeds=len(seeds),
            )
        )
    return found


def headline(found: Sequence[ProjectionFinding], table: Sequence[MethodEnd]) -> str:
    """The comparison in one sentence, as good or bad as the data make it."""
    if not found:
        ends = [
            f"×{row.numbers['norm_growth'].mean:.2f} under {row.label}"
            for row in table
            if "norm_growth" in row.numbers and row.epoch > 0
        ]
        if not ends:
            return "No run came far enough to say anything"
        return f"The norm of the scale-invariant weights changed by {listed(ends)}"
    return f"{_norm_clause(found)}; {_accuracy_clause(found)}"


def _norm_clause(found: Sequence[ProjectionFinding]) -> str:
    kept = [f for f in found if f.norms_kept_smaller is True]
    grown = [f for f in found if f.norms_kept_smaller is False]
    same = [f for f in found if f.norms_kept_smaller is None]
    parts = []
    if kept:
        parts.append(
            f"{listed([f.projected for f in kept])} kept the norms smaller than "
            f"{listed([f.baseline for f in kept])}"
        )
    if grown:
        parts.append(
            f"{listed([f.projected for f in grown])} left larger norms than "
            f"{listed([f.baseline for f in grown])}"
        )
    if same:
        pairs = listed([f"{f.projected} and {f.baseline}" for f in same])
        parts.append(f"norms ended about equal under {pairs}")
    text = ", ".join(parts)
    return text[0].upper() + text[1:]


def _accuracy_clause(found: Sequence[ProjectionFinding]) -> str:
    said: dict[Verdict, list[str]] = {}
    for f in found:
        said.setdefault(f.verdict, []).append(f.projected)
    if set(said) == {Verdict.WITHIN_CHANCE}:
        return "test accuracies differ by no more than chance explains"
    parts = []
    if Verdict.BETTER in said:
        parts.append(f"{listed(said[Verdict.BETTER])} ended more accurate")
    if Verdict.WORSE in said:
        parts.append(f"{listed(said[Verdict.WORSE])} ended less accurate")
    if Verdict.WITHIN_CHANCE in said:
        parts.append(f"{listed(said[Verdict.WITHIN_CHANCE])} within chance")
    if Verdict.ONE_SEED in said:
        parts.append("one seed is too few to compare accuracies")
    return ", ".join(parts)


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, or ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def summarize(
    records: Sequence[Record], methods: Sequence[MethodEntry], epochs: int, test_examples: int
) -> dict[str, Any]:
    """What ``summary.json`` holds beside the run's identity: rows, findings and the headline."""
    table = rows(records, methods, epochs)
    found = findings(records, methods, epochs, test_examples)
    return {
        "headline": headline(found, table),
        "optimizers": [
            {
                **asdict(row),
                "failed": [{"seed": s, "error": error} for s, error in sorted(row.failed.items())],
            }
            for row in table
        ],
        "findings": [
            {**asdict(f), "verdict": f.verdict.value, "text": f.sentences()} for f in found
        ],
    }
