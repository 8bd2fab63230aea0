"""Errors that the command line reports in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec

__all__ = ["UsageError", "nearest", "require_lab"]

# Import names.
_LAB = ("jinja2", "matplotlib", "numpy", "rich", "scipy", "sklearn")


class UsageError(ValueError):
    """Something that the user asked for cannot be done as asked; nothing has been started."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the names that are allowed, the likeliest first."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}(choose from {', '.join(known)})"


def require_lab() -> None:
    """Raise ``UsageError`` if a package of the ``lab`` extra is not installed."""
    missing = [name for name in _LAB if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the lab needs {', '.join(missing).replace('sklearn', 'scikit-learn')}, which "
            f'{"is" if len(missing) == 1 else "are"} not installed: pip install "normwise[lab]"'
        )
