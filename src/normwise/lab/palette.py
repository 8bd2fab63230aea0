"""Colours of the optimizers, told apart with any colour vision (after Okabe and Ito)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STYLES", "TOY_STYLES", "Style"]


@dataclass(frozen=True)
class Style:
    """How a line is drawn.

    Args:
        light: colour on a light ground.
        dark: colour on a dark ground.
        dash: lengths of dashes and gaps in units of the line; empty for a solid line.
    """

    light: str
    dark: str
    dash: tuple[float, ...] = ()


# Dashed without the projection and solid with it, so that pairs can be told without colour.
_DASH = (3.0, 1.6)

STYLES: dict[str, Style] = {
    "sgd": Style("#0072b2", "#56b4e9", _DASH),
    "sgdp": Style("#d55e00", "#ff9d57"),
    "adamw": Style("#00795a", "#35c9a0", _DASH),
    "adamp": Style("#a8487f", "#e79ac6"),
}

TOY_STYLES: dict[str, Style] = {
    "gd": Style("#6b7280", "#a3abb8", (1.0, 1.6)),
    "momentum": STYLES["sgd"],
    "projected": STYLES["sgdp"],
}
