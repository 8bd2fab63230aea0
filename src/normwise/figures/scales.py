"""Axes: where a value lies, and which values have a tick."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

__all__ = ["AxisScale", "Spacing", "power_text"]


@dataclass(frozen=True)
class AxisScale:
    """An axis.

    Args:
        place: from a value to its place, 0 to 1.
        ticks: values and their texts.
    """

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


def _linear(values: Sequence[float], most: int) -> AxisScale:
    """An even axis around ``values`` with round ticks."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = _round_step((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    bottom, top = first * step, last * step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))

    def text(value: float) -> str:
        if step >= 1e-4 and max(abs(bottom), abs(top)) < 1e6:
            return f"{value:,.{digits}f}".replace("-", "−")
        return f"{value:.6g}".replace("-", "−")

    ticks = tuple((k * step, text(k * step)) for k in range(first, last + 1))
    return AxisScale(lambda v: (v - bottom) / (top - bottom), ticks)


def _tight(values: Sequence[float], most: int) -> AxisScale:
    """An even axis that ends where the values do, for steps and epochs: whole numbers."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = max(1, int(_round_step(span / most)))
    ticks = range(math.ceil(low / step) * step, math.floor(high) + 1, step)
    return AxisScale(lambda v: (v - low) / span, tuple((float(t), f"{t:,}") for t in ticks))


def _round_step(step: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(m for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _logarithmic(values: Sequence[float], most: int) -> AxisScale:
    """A logarithmic axis; a zero is drawn at the least positive value."""
    positive = [v for v in values if v > 0] or [1.0]
    floor = min(positive)
    low, high = math.log10(floor), math.log10(max(positive))
    margin = max(0.03 * (high - low), 0.12 if high - low < 0.3 else 0.0)
    bottom, top = low - margin, high + margin
    marks: tuple[float, ...] = (1,)
    if top - bottom < 2.2:
        marks = (1, 2, 5)
    if top - bottom < 1:
        marks = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    every = max(1, math.ceil((top - bottom) / (most + 2)))
    ticks = [
        m * 10.0**d
        for d in range(math.floor(bottom), math.ceil(top) + 1)
        for m in marks
        if d % every == 0 and bottom <= math.log10(m * 10.0**d) <= top
    ]
    if len(ticks) < 2:
        ticks = [10.0**bottom, 10.0**top]
    if len(ticks) > most + 3:
        ticks = ticks[:: math.ceil(len(ticks) / (most + 3))]
    texts = tuple((t, power_text(t)) for t in ticks)
    return AxisScale(lambda v: (math.log10(v if v > 0 else floor) - bottom) / (top - bottom), texts)


def power_text(value: float) -> str:
    """``0.01`` and ``50`` as they are, ``2×10⁻⁵`` for what is smaller or larger."""
    exponent = math.floor(math.log10(value) + 1e-9)
    if -2 <= exponent <= 3:
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    mantissa = f"{value / 10.0**exponent:.2g}"
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}" if mantissa == "1" else f"{mantissa}×10{digits}"


def _towards_one(values: Sequence[float], most: int) -> AxisScale:
    """Shares from 0 to 1 in percent on −log₁₀(1 − v), stretched where good optimizers differ."""
    # Beyond this the stretch would never end; a perfect score is drawn there.
    best = 0.9999

    def stretch(v: float) -> float:
        return -math.log10(1 - min(max(v, 0.0), best))

    top = max(stretch(max(values)) + 0.15, stretch(0.5))
    marks = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999)
    texts = tuple((m, f"{100 * m:g}") for m in marks if stretch(m) <= top)
    return AxisScale(lambda v: stretch(v) / top, texts)


class Spacing(Enum):
    """How an axis spaces its values.

    ``LINEAR`` ends at round values and ``TIGHT`` at the first and last, which are whole numbers;
    ``LOG`` goes by powers of ten; ``TOWARDS_ONE`` is ever wider towards 1, where accuracies differ.
    """

    LINEAR = "linear"
    TIGHT = "tight"
    LOG = "log"
    TOWARDS_ONE = "towards one"

    def scale(self, values: Sequence[float], most: int = 5) -> AxisScale:
        """An axis that holds the finite ones of ``values``, with about ``most`` ticks.

        Args:
            values: that the axis must hold.
            most: about how many ticks (default: 5).
        """
        finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        return _MAKERS[self](finite, most)


_MAKERS = {
    Spacing.LINEAR: _linear,
    Spacing.TIGHT: _tight,
    Spacing.LOG: _logarithmic,
    Spacing.TOWARDS_ONE: _towards_one,
}
