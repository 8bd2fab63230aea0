"""Alarms and forecasts: what is about to stall, overflow or die, and what to do about it."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.monitor.measurement import Measurement
from normwise.monitor.watched import Layer
from normwise.theory import norm_range
from normwise.updates import Update, UpdateRule

__all__ = [
    "Alarm",
    "AlarmError",
    "AlarmRule",
    "BelowResolution",
    "DeadSlices",
    "EffectiveLRFell",
    "ExplodingSlices",
    "LargeAngularUpdate",
    "NotFinite",
    "RangeForecast",
    "SuddenChange",
    "UpdateAboveExpected",
    "standard_rules",
]


@dataclass(frozen=True)
class Alarm:
    """Something that a person should see. ``str(alarm)`` is a sentence or two.

    Attributes:
        kind: which rule it is from, as ``"dead slices"``.
        step: at which step it was measured.
        layer: which weight, or None for the whole network.
        slices: which of its slices.
        message: what is the matter.
        advice: what to do.
    """

    kind: str
    step: int
    layer: str | None
    slices: tuple[int, ...]
    message: str
    advice: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.message} {self.advice}"


class AlarmError(RuntimeError):
    """Raised for an alarm, where the user wants that. ``error.alarm`` is the alarm.

    Args:
        alarm: what was wrong.
    """

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(str(alarm))
        self.alarm = alarm


class AlarmRule(ABC):
    """Looks at each measurement in turn and says what is wrong.

    A rule may say the same again: the monitor passes on only the first alarm of a kind of a layer.

    Attributes:
        needs: the quantities that it reads.
    """

    needs: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, m: Measurement, rules: tuple[UpdateRule, ...]) -> Iterator[Alarm]:
        """The alarms of this measurement; ``rules`` are those of the layers."""


def standard_rules(range_of: torch.dtype | None = None) -> tuple[AlarmRule, ...]:
    """New rules with their defaults.

    Args:
        range_of: the dtype whose range counts, such as that of autocast (default: each weight's).

    Returns:
        One of each kind.
    """
    return (
        NotFinite(),
        RangeForecast(range_of=range_of),
        EffectiveLRFell(),
        DeadSlices(),
        ExplodingSlices(),
        LargeAngularUpdate(),
        UpdateAboveExpected(),
        SuddenChange(),
        BelowResolution(),
    )


class NotFinite(AlarmRule):
    """A weight or its gradient is not finite: which slice went first.

    Exactly, where ``check_finite`` of the monitor looked at every step; else among the slices of
    the first measurement with one, and if then all are bad, the one whose norm was the most
    extreme before.
    """

    needs = ("norm", "scaled_gradient")

    def __init__(self) -> None:
        self._before: Tensor | None = None

    def __call__(self, m: Measurement, rules: tuple[UpdateRule, ...]) -> Iterator[Alarm]:
        norms, gradients = m.of_slices("norm"), m.of_slices("scaled_gradient")
        bad = ~(norms.isfinite() & gradients.isfinite())
        step, exact = m.step, False
        if m.first_bad is not None and bool((m.first_bad > 0).any()):
            step = int(m.first_bad[m.first_bad > 0].min())
            bad, exact = m.first_bad == step, True
        if not bad.any():
            self._before = norms
            return
        how = ""
        if bad.all() and len(bad) > 1 and self._before is not None:
            extreme = self._before.log().abs()
            worst = int(extreme.argmax())
            bad = torch.zeros_like(bad)
            bad[worst] = True
            how = (
                " (all of them by then; this one had the most extreme norm before, "
                f"{float(self._before[worst]):.3g})"
            )
        for layer in m.layers:
            if bad[layer.slices].any():
                which = _indices(bad[layer.slices])
                whole = not exact and bool(norms[layer.slices].isfinite().all())
                what = "gradient" if whole else "weights"
                yield Alarm(
                    "not finite",
                    step,
                    None,
                    which,
                    f"the {what} of {_slices(layer, which)} went first to be not finite{how}.",
                    "Go back to a checkpoint before it and lower the learning rate, clip the "
                    "gradient, or compute in a wider dtype.",
                )
                return


class RangeForecast(AlarmRule):
    """The norm of a slice is about to leave the range of its dtype, at the rate of late.

    A line is fitted to the logarithm of the norm over the last ``window`` measurements.

    Args:
        horizon: how far to believe the line, in multiples of the steps that it was fitted to: alarm
            if the norm leaves within those (default: 5, so 2000 steps of measurements every 100).
        window: how many measurements to fit (default: 5).
        range_of: the dtype whose range counts, such as that of autocast (default: the weight's).
    """

    needs = ("norm",)

    def __init__(
        self, horizon: float = 5.0, window: int = 5, range_of: torch.dtype | None = None
    ) -> None:
        if window < 3:
            raise ValueError(f"Invalid window: {window}; a line through fewer than 3 says nothing")
        self.horizon = horizon
        self.range_of = range_of
        self._past: deque[tuple[int, Tensor]] = deque(maxlen=window)

    def __call__(self, m: Measurement, rules: tuple[UpdateRule, ...]) -> Iterator[Alarm]:
        norms = m.of_slices("norm").double()
        self._past.append((m.step, norms.log()))
        low, high = torch.empty_like(norms), torch.empty_like(norms)
        for layer in m.layers:
            smallest, largest = norm_range(self.range_of or layer.dtype)
            low[layer.slices], high[layer.slices] = math.log(smallest), math.log(largest)
        now = norms.log()
        steps = torch.full_like(norms, math.inf)
        if len(self._past) == self._past.maxlen:
            slope = self._slope()
            target = torch.where(slope < 0, low, high)
            ahead = (target - now) / slope
            steps = torch.where(ahead > 0, ahead, steps)
        outside = (now <= low) | (now >= high)
        steps = torch.where(outside, 0, steps)
        believed = self.horizon * (m.step - self._past[0][0])
        for layer in m.layers:
            mine = steps[layer.slices]
            worst = int(mine.argmin())
            if not float(mine[worst]) <= believed:
                continue
            dtype = str(self.range_of or layer.dtype).removeprefix("torch.")
            index = layer.slices.start + worst
            norm = float(norms[index])
            small = float(now[index]) < float(low[index] + high[index]) / 2
            gauge = "1/‖w‖" if small else "‖w‖"
            where = _slices(layer, (worst,))
            if float(mine[worst]) == 0:
                message = f"{gauge} of {where} is beyond {dtype}'s range."
            else:
                message = (
                    f"at this rate {gauge} of {where} passes {dtype}'s range in about "
                    f"{float(mine[worst]):.0f} steps (‖w‖ is {norm:.3g})."
                )
            yield Alarm(
                "range",
                m.step,
                layer.name,
                (worst,),
                message,
                "Lower the weight decay of this weight, or shift it (EpsilonShiftedL2)."
                if small
                else "Add weight decay to it, or remove the radial part of its steps (tangential).",
            )

    def _slope(self) -> Tensor:
        """The change of log norm per step; 0 where a line does not explain 4/5 of its variance."""
        t = torch.tensor([float(step) for step, _ in self._past], dtype=torch.float64)
        y = torch.stack([logs for _, logs in self._past])
        t = (t - t.mean())[:, None]
        y = y - y.mean(0)
        slope = (t * y).sum(0) / t.square().sum()
        explained = slope.square() * t.square().sum() >= 0.8 * y.square().sum(0)
        return torch.where(explained, slope, 0.0)


class EffectiveLRFell(AlarmRule):
    """Norms alone took most of the learning rate of many weights away.

    Args:
        factor: by which the effective learning rate must have fallen, through the norm alone, since
            its highest (default: 10).
        share: of the entries of all weights that are watched (default: 0.5).
    """

    needs = ("norm",)

    def __init__(self, factor: float = 10.0, share: float = 0.5) -> None:
        self.factor, self.share = factor, share
        self._least: Tensor | None = None
        self._when: Tensor
        self._lrs: dict[int, float] = {}

    def __call__(self, m: Measurement, rules: tuple[UpdateRule, ...]) -> Iterator[Alarm]:
        logs = m.of_slices("norm").double().log()
        if self._least is None:
            self._least = torch.full_like(logs, math.inf)
            self._when = torch.zeros(logs.shape, dtype=torch.int64)
        lower = (logs < self._least) & logs.isfinite()  # a zero slice has no rate to lose yet
        self._when = torch.where(lower, m.step, self._when)
        self._least = least = torch.where(lower, logs, self._least)
        weights, power = torch.empty_like(logs), torch.empty_like(logs)
        for layer, rule in zip(m.layers, rules, strict=True):
            weights[layer.slices] = layer.entries
            power[layer.slices] = rule.update.exponent
        self._lrs[m.step] = sum(m.lrs) / len(m.lrs)
        if len(self._lrs) > 1000:
            wanted = {m.step, *self._when.tolist()}
            self._lrs = {step: lr for step, lr in self._lrs.items() if step in wanted}
        fell = power * (logs - least) >= math.log(self.factor)
        share = float(weights[fell].sum() / weights.sum())
        if share < self.share:
            return
        since = int(self._when[fell].median())
        worst = max(m.layers, key=lambda la: float((logs - least)[la.slices].mean()))
        yield Alarm(
            "effective learning rate",
            m.step,
            None,
            (),
            f"the effective learning rate of {share:.0%} of the weights fell {self.factor:g}× or "
            f"more since step {since} because their norms grew, most in {worst.name}, while the "
            f"learning rate went from {self._lrs.get(since, math.nan):.3g} to "
            f"{self._lrs[m.step]:.3g}.",
            "Add weight decay to these weights, or remove the radial part of their steps (SGDP, "
            "AdamP, tangential).",
        )


class DeadSlices(AlarmRule):
    """Slices whose gradient is exactly zero, time and again.

    Args:
        measurements: how many in a row (default: 3).
    """

    needs = ("scaled_gradient", "norm")

    def __init__(self, measurements: int = 3) -> None:
        self.measurements = measurements
        self._zero: Tensor | None = None

    def __call__(self, m: Measurement, rules: tuple[UpdateRule, ...]) -> Iterator[Alarm]:
        zero = (m.of_slices("scaled_gradient") == 0) & (m.of_slices("norm") > 0)
        count = torch.where(zero, 1 if self._zero is None else self._zero + 1, 0)
        self._zero = count
        for layer in m.layers:
            which = _indices(count[layer.slices] >= self.measurements)
            if which:
                yield Alarm(
                    "dead slices",
                    m.step,
                    layer.name,
                    which,
                    f"{_slices(layer, which)} had no gradient in {self.measurements} measurements "
                    "in a row: dead, and only decay moves it.",
                    "Look at the activation behind it, lower the learning rate, or prune it; if it "
                    "is meant to be unused, take it out of the optimizer.",
                )


class ExplodingSlices(AlarmRule):
    """Slices whose norm has grown many times over.

    Args:
        factor: how many, since the first measurement at which it was not zero (default: 100).
    """

    needs = ("norm",)

    def __init__(self, factor: float = 100.0) -> None:
        self.factor = factor
        self._start: Tensor | None = None

    def __call__(self, m: Measurement, rules: tuple[UpdateRule, ...]) -> Iterator[Alarm]:
        norms = m.of_slices("norm")
        if self._start is None:
            self._start = torch.zeros_like(norms)
        self._start = torch.where(self._start > 0, self._start, norms)
        for layer in m.layers:
            growth = norms[layer.slices] / self._start[layer.slices]
            which = _indices((growth > self.factor) & norms[layer.slices].isfinite())
            if which:
                most = float(growth[list(which)].max())
                yield Alarm(
                    "exploding slices",
                    m.step,
                    layer.name,
                    which,
                    f"the norm of {_slices(layer, which)} has grown {most:.0f}× since the start.",
                    "Lower the learning rate, clip the gradient, or add weight decay.",
                )


class LargeAngularUpdate(AlarmRule):
    """Weights that turn so far in a step that they cannot keep what they learn.

    Args:
        angle: the RMS angle per step of a layer, in radians (default: 0.5).
        measurements: how many in a row (default: 5).
    """

    needs = ("angular_update",)

    def __init__(self, angle: float = 0.5, measurements: int = 5) -> None:
        self.angle, self.measurements = angle, measurements
        self._count: dict[str, int] = {}

    def __call__(self, m: Measurement, rules: tuple[UpdateRule, ...]) -> Iterator[Alarm]:
        for name, angle in m["angular_update"].items():
            self._count[name] = self._count.get(name, 0) + 1 if angle > self.angle else 0
            if self._count[name] >= self.measurements:
                yield Alarm(
                    "large angular update",
                    m.step,
                    name,
                    (),
                    f"{name} turns by {angle:.2g} rad per step, so it forgets what it learned "
                    f"within {max(1, round(1 / angle**2))} steps.",
                    "Lower lr·weight_decay, which sets the angle at equilibrium, or the learning "
                    "rate.",
                )


class UpdateAboveExpected(AlarmRule):
    """A step far longer than theory expects of this optimizer at this norm: a bad batch, a jump.

    Compared is the RMS angle of a layer with that of :func:`normwise.theory.angle_at`, and that of
    SGD and its kin at the mean gradient of late. Both must be known of a layer; the ratio settles
    in the first measurements, and its median until then is what the layer is compared with too,
    since gradients that are not all noise make steps longer than theory says.

    Args:
        factor: of how many times is too long (default: 2; Adam's own normalization keeps the step
            of a batch whose gradient is 30 times too large to 2.4).
        warm_up: measurements before the first alarm, 3 or more (default: 10).
    """

    needs = ("angular_update",)

    def __init__(self, factor: float = 2.0, warm_up: int = 10) -> None:
        if not factor > 1:
            raise ValueError(f"Invalid factor: {factor}; must be above 1")
        if warm_up < 3:
            raise ValueError(f"Invalid warm_up: {warm_up}; must be 3 or more")
        self.factor = factor
        self._past: dict[str, deque[float]] = {}
        self._warm_up = warm_up

    def __call__(self, m: Measurement, rules: tuple[UpdateRule, ...]) -> Iterator[Alarm]:
        if "expected_angular_update" not in m.names:
            return
        angles, expected = m["angular_update"], m["expected_angular_update"]
        for name, angle in angles.items():
            ratio = angle / expected[name] if expected[name] > 0 else math.nan
            if not 0 < ratio < math.inf:
                continue
            past = self._past.setdefault(name, deque(maxlen=self._warm_up))
            usual = max(1.0, statistics.median(past)) if past else math.nan
            if len(past) == past.maxlen and ratio > self.factor * usual:
                yield Alarm(
                    "update above expected",
                    m.step,
                    name,
                    (),
                    f"the step turned {name} by {angle:.3g} rad, {ratio / usual:.1f} times what "
                    "its learning rate, norm and past steps lead to expect.",
                    "Look at this batch and at what changed just before: the learning rate, the "
                    "loss scale, the data, the weight itself; clip the gradient.",
                )
            else:
                past.append(ratio)


class SuddenChange(AlarmRule):
    """A norm that changed between two measurements as no step explains, or a jump of η.

    A norm is compared with the expected one, which follows the rates so far: a weight overwritten,
    corrupted in memory or loaded from elsewhere does not. η is compared with that of the last
    measurement, where it goes beyond its largest so far, as a warm restart does not.

    Args:
        factor: by which a norm may differ more than at the last measurement (default: 1.5).
        rate: by which η may grow beyond its largest so far at once (default: 3).
        warm_up: measurements before η is looked at, since warm-ups begin near zero (default: 10).
    """

    needs = ("norm",)

    def __init__(self, factor: float = 1.5, rate: float = 3.0, warm_up: int = 10) -> None:
        for name, value in (("factor", factor), ("rate", rate)):
            if not value > 1:
                raise ValueError(f"Invalid {name}: {value}; must be above 1")
        self.factor, self.rate, self.warm_up = factor, rate, warm_up
        self._past: dict[str, tuple[float, float]] = {}  # the last norm, and that expected
        self._lrs: dict[str, tuple[float, float]] = {}  # the last, and the largest
        self._count = 0

    def __call__(self, m: Measurement, rules: tuple[UpdateRule, ...]) -> Iterator[Alarm]:
        yield from self._norms(m)
        self._count += 1
        jumped = []
        for layer, lr in zip(m.layers, m.lrs, strict=True):
            last, largest = self._lrs.get(layer.name, (lr, lr))
            if self._count > self.warm_up and lr > largest and lr > self.rate * last > 0:
                jumped.append((layer.name, lr / last))
            self._lrs[layer.name] = (lr, max(largest, lr))
        if jumped:
            name, times = jumped[0]
            others = f" and {len(jumped) - 1} more" if len(jumped) > 1 else ""
            yield Alarm(
                "learning rate jumped",
                m.step,
                None,
                (),
                f"the learning rate of {name}{others} is {times:.1f} times that of the last "
                "measurement, and the largest so far.",
                "Look at the schedule, and at whether its state was loaded with the checkpoint.",
            )

    def _norms(self, m: Measurement) -> Iterator[Alarm]:
        if "expected_norm" not in m.names:
            return
        norms, expected = m["norm"], m["expected_norm"]
        for name, norm in norms.items():
            before, then = self._past.get(name, (math.nan, math.nan))
            self._past[name] = (norm, expected[name])
            change = norm / before if before > 0 else math.nan
            due = expected[name] / then if then > 0 else math.nan
            # Both the change itself and what of it is not due: an expectation may be at fault too.
            least = min(abs(_log(change)), abs(_log(change / due) if due > 0 else math.nan))
            if least > math.log(self.factor):
                yield Alarm(
                    "norm jumped",
                    m.step,
                    name,
                    (),
                    f"the norm of {name} is {change:.2g} times that of the last measurement, "
                    "beyond what its steps lead to expect.",
                    "Look for what else writes to this weight: a checkpoint, a callback, memory.",
                )


class BelowResolution(AlarmRule):
    """Decay, or a whole update, that rounding to the weight's dtype makes nothing of.

    A factor 1 − ηλ changes no entry where ηλ is under a quarter of the dtype's epsilon: the result
    rounds back. So does an update under that share of an entry, of whose typical size η over the
    RMS of the entries tells where updates are normalized. Weights that an optimizer rounds at
    random (``stochastic_rounding``) are left out, since there it works on average; so is the end of
    a schedule, where η is under a tenth of its largest.
    """

    needs = ("norm",)

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}

    def __call__(self, m: Measurement, rules: tuple[UpdateRule, ...]) -> Iterator[Alarm]:
        norms = m["norm"]
        for layer, rule in zip(m.layers, rules, strict=True):
            lr = float(rule.lr)
            largest = self._largest[layer.name] = max(lr, self._largest.get(layer.name, 0.0))
            if rule.rounds_at_random or lr < largest / 10:
                continue
            least = torch.finfo(layer.dtype).eps / 4
            dtype = str(layer.dtype).removeprefix("torch.")
            decay = float(rule.shrink)
            if 0 < decay < least:
                yield Alarm(
                    "decay below resolution",
                    m.step,
                    layer.name,
                    (),
                    f"lr·weight_decay of {layer.name} is {decay:.1e}, below what {dtype} resolves "
                    f"({least:.1e}): a factor 1 − lr·weight_decay leaves every entry as it is.",
                    "Keep float32 weights for the optimizer, round at random "
                    "(stochastic_rounding=True), or raise the weight decay.",
                )
            share = lr * rule.scale / (norms[layer.name] / math.sqrt(layer.entries))
            if rule.update is Update.NORMALIZED and 0 < share < least:
                yield Alarm(
                    "update below resolution",
                    m.step,
                    layer.name,
                    (),
                    f"an update of {layer.name} is {share:.1e} of its entries, below what {dtype} "
                    f"resolves ({least:.1e}): most entries stay as they are.",
                    "Keep float32 weights for the optimizer, round at random "
                    "(stochastic_rounding=True), or raise the learning rate.",
                )


def _log(x: float) -> float:
    return math.log(x) if x > 0 else math.nan


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


def _slices(layer: Layer, which: tuple[int, ...]) -> str:
    """A few slices in words: ``conv1.weight, channels 3, 7 and 2 more``."""
    if len(layer) == 1:
        return layer.name
    if len(which) == len(layer):
        return f"{layer.name}, all {len(layer)} slices"
    noun = "channel" if layer.view.kind == "channel" else "block"
    shown = ", ".join(map(str, which[:5]))
    more = f" and {len(which) - 5} more" if len(which) > 5 else ""
    return f"{layer.name}, {noun}{'s' if len(which) > 1 else ''} {shown}{more}"
