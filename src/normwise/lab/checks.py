"""Ranges of settings, whose errors show the value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

from normwise.lab.errors import UsageError

__all__ = ["within"]


def within(
    settings: Any,
    name: str,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Refuse a setting that is outside of a range, or not a number; None passes.

    Args:
        settings: whose attribute it is.
        name: of the setting.
        low: the least that is allowed.
        high: the greatest (default: any finite number).
        above: whether ``low`` itself is not allowed (default: it is).
        below: whether ``high`` itself is not allowed (default: it is).

    Raises:
        UsageError: if it is.
    """
    value = getattr(settings, name)
    if value is None:
        return
    fits = math.isfinite(value) and low <= value <= high
    if fits and not (above and value == low) and not (below and value == high):
        return
    allowed = f"above {low:g}" if above else f"{low:g} or more"
    if high < math.inf:
        allowed += f" and below {high:g}" if below else f", {high:g} at most"
    raise UsageError(f"{name} {value} is not allowed: must be finite, {allowed}")
