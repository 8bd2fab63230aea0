"""Errors that the command line reports in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

__all__ = ["Damaged", "Unavailable", "UsageError", "nearest", "require_lab"]

# Import names.
_LAB = ("filelock", "jinja2", "matplotlib", "numpy", "rich", "scipy", "sklearn", "yaml")
_PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}


class UsageError(ValueError):
    """Something that the user asked for cannot be done as asked; nothing has been started."""


class Unavailable(Exception):
    """Something that was asked for rightly cannot be had, such as a file of a network."""


class Damaged(UsageError):
    """A file of a run is not what was written.

    Args:
        path: the file.
        reason: how that shows.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} is damaged ({reason}): delete {path.parent} to train this cell anew"
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[Damaged], tuple[Path, str]]:
        return Damaged, (self.path, self.reason)


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
            f"the lab needs {', '.join(_PACKAGES.get(name, name) for name in missing)}, which "
            f'{"is" if len(missing) == 1 else "are"} not installed: pip install "normwise[lab]"'
        )
