"""One palette for pages, papers and docs, for any colour vision (after Okabe and Ito)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["COLOURS", "DASHED", "HUES", "Colour", "css", "marks", "ramp"]


@dataclass(frozen=True)
class Colour:
    """A colour on a light ground and its counterpart on a dark one, both as ``#rrggbb``.

    Args:
        light: on a light ground.
        dark: on a dark one.
    """

    light: str
    dark: str

    def towards(self, other: Colour, share: float) -> Colour:
        """The colour at this share, 0 to 1, of the way to another.

        Args:
            other: where the way ends.
            share: how far to go, 0 to 1.
        """

        def mixed(a: str, b: str) -> str:
            ends = zip(bytes.fromhex(a[1:]), bytes.fromhex(b[1:]), strict=True)
            return "#" + bytes(round(x + share * (y - x)) for x, y in ends).hex()

        return Colour(mixed(self.light, other.light), mixed(self.dark, other.dark))


HUES: dict[str, Colour] = {
    "blue": Colour("#0072b2", "#56b4e9"),
    "orange": Colour("#d55e00", "#ff9d57"),
    "green": Colour("#00795a", "#35c9a0"),
    "pink": Colour("#a8487f", "#e79ac6"),
    "ochre": Colour("#8a6d00", "#e0c04a"),
    "violet": Colour("#5b5fc7", "#a5a8f5"),
    "brown": Colour("#7a4b2a", "#d0a27c"),
    "red": Colour("#b3123b", "#ff8fa8"),
    "lime": Colour("#3d7a0a", "#9bd35f"),
    "grey": Colour("#5d6472", "#a3abb8"),
}

_STEPS = 12
# From first to last layer, every step readable as a line; and from low to high, as an area.
_ORDER = (
    Colour("#1b2a6b", "#6f97f2"),
    Colour("#11808a", "#3fc9b4"),
    Colour("#c48a12", "#ffe39a"),
)
_HEAT = (
    Colour("#eaf2fa", "#202b3b"),
    Colour("#5f9fd0", "#2f7fb8"),
    Colour("#08305f", "#dcf0ff"),
)


def _steps(stops: tuple[Colour, Colour, Colour]) -> list[Colour]:
    first, middle, last = stops
    shares = [2 * k / (_STEPS - 1) for k in range(_STEPS)]
    return [first.towards(middle, s) if s <= 1 else middle.towards(last, s - 1) for s in shares]


COLOURS: dict[str, Colour] = {
    "ink": Colour("#1d2129", "#e9ebef"),
    "muted": Colour("#5d6472", "#a0a8b5"),
    "line": Colour("#e3e2dc", "#2d333d"),
    "strong-line": Colour("#b9bbc2", "#545d6b"),
    "card": Colour("#ffffff", "#1b1f26"),
    **HUES,
    **{f"order-{k}": colour for k, colour in enumerate(_steps(_ORDER))},
    **{f"heat-{k}": colour for k, colour in enumerate(_steps(_HEAT))},
}
"""Every colour that a chart may name."""

DASHED = (3.0, 1.6)
"""Dashes and gaps, in line widths, of a method that others are compared with."""

# A method has one colour wherever it is drawn.
_METHODS = {
    "sgd": "blue",
    "sgdp": "orange",
    "adamw": "green",
    "adamp": "pink",
    "gd": "grey",
    "momentum": "blue",
    "projected": "orange",
}


def marks(
    names: Iterable[str], baselines: Iterable[str] = ()
) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Each method's colour and dashes: baselines are dashed, and what is compared is solid.

    Args:
        names: of the methods, in a fixed order; those that are not among the library's own
            optimizers take the hues that are left, and beyond ten methods hues with dots.
        baselines: which are compared with (default: none).

    Returns:
        For each name the name of a colour, and dashes and gaps in line widths.
    """
    names, baselines = list(dict.fromkeys(names)), set(baselines)
    free = [hue for hue in HUES if hue not in {_METHODS.get(name) for name in names}]
    found: dict[str, tuple[str, tuple[float, ...]]] = {}
    for name in names:
        colour = _METHODS.get(name) or (free.pop(0) if free else None)
        dash: tuple[float, ...] = DASHED if name in baselines else ()
        if colour is None:
            colour = list(HUES)[len(found) % len(HUES)]
            dash = (*dash, 0.1, 1.8) if dash else (1.0, 1.4)
        found[name] = (colour, dash)
    return found


def ramp(kind: str, share: float) -> str:
    """The name of a colour of the ramp ``"order"`` or ``"heat"``, at a share from 0 to 1.

    Args:
        kind: ``"order"`` or ``"heat"``.
        share: 0 to 1; beyond, the ends.

    Returns:
        A name in :data:`COLOURS`.
    """
    return f"{kind}-{round(min(max(share, 0.0), 1.0) * (_STEPS - 1))}"


def nth_of(place: int, count: int) -> str:
    """The name of the colour of a place, from 0, among things in an order, such as layers.

    Args:
        place: from 0.
        count: how many things there are.

    Returns:
        A name in :data:`COLOURS`.
    """
    return ramp("order", place / max(count - 1, 1))


def css(colours: Mapping[str, Colour] = COLOURS) -> str:
    """Rules that give the classes of drawings (``f-`` fills, ``s-`` strokes) their colours.

    The colours are custom properties, so that a page can change them; they follow the reader's
    system, or ``data-theme`` on the root where that is ``"light"`` or ``"dark"``.

    Args:
        colours: by name (default: all).

    Returns:
        The text of a style sheet.
    """
    light = "".join(f"--{name}:{c.light};" for name, c in colours.items())
    dark = "".join(f"--{name}:{c.dark};" for name, c in colours.items())
    uses = "".join(
        f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}"
        f".c-{name}{{--c:var(--{name})}}"
        for name in colours
    )
    return (
        f":root{{{light}color-scheme:light}}"
        f':root[data-theme="dark"]{{{dark}color-scheme:dark}}'
        "@media (prefers-color-scheme:dark){"
        f':root:not([data-theme="light"]){{{dark}color-scheme:dark}}}}{uses}'
    )
