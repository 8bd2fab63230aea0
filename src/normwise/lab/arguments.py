"""Types of command-line arguments, whose errors say what is allowed."""

from __future__ import annotations

import argparse
import math
import re

from normwise.lab.recipes.schema import MOST_SEEDS

__all__ = ["count", "duration", "numbers", "positive", "positives", "seconds", "seeds", "whole"]


def whole(text: str, most: int = 2**53) -> int:
    """A whole number, 1 or more."""
    value = int(text) if re.fullmatch(r"\d{1,18}", text) else 0
    if not 1 <= value <= most:
        allowed = "1 or more" if most == 2**53 else f"from 1 to {most}"
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: must be a whole number, {allowed}"
        )
    return value


def seeds(text: str) -> int:
    """A number of seeds."""
    return whole(text, MOST_SEEDS)


def positive(text: str) -> float:
    """A finite number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: must be a finite number greater than 0"
        )
    return value


def positives(text: str) -> tuple[float, ...]:
    """Finite numbers greater than 0, with commas between them."""
    return tuple(positive(part.strip()) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Finite numbers, 0 or more, with commas between them."""
    return tuple(seconds(part.strip()) for part in text.split(","))


def seconds(text: str) -> float:
    """A finite number of seconds, 0 or more."""
    return 0.0 if text in ("0", "0.0") else positive(text)


def count(text: str) -> int:
    """A whole number, 0 or more."""
    return 0 if text == "0" else whole(text)


def duration(text: str) -> float:
    """A time such as ``90s``, ``30m`` or ``1.5h``, in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)", text.strip())
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: must be a time such as 90s, 30m or 2h"
        )
    return float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found[2]]
