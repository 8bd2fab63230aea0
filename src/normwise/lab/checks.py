"""Settings: ranges, whose errors show the value and what is allowed, and what a config says."""

from __future__ import annotations

import math
from dataclasses import field, fields
from typing import Any

from normwise.lab.errors import UsageError

__all__ = ["later", "said", "within"]

_LATER = "later"


def later(default: Any) -> Any:
    """A field of settings that came after results had been written.

    At its default it stays out of a cell's config, so that those results stay valid.

    Args:
        default: its default, which cannot be changed in place.
    """
    return field(default=default, metadata={_LATER: True})


def said(settings: Any) -> dict[str, Any]:
    """The fields of settings by name, but for those of :func:`later` at their defaults."""
    return {
        f.name: value
        for f in fields(settings)
        if (value := getattr(settings, f.name)) != f.default or _LATER not in f.metadata
    }


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
