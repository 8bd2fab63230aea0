"""Objects of the user's by their names, ``MODULE:NAME``."""

from __future__ import annotations

import re
from typing import Any

from normwise.invariance.sources import module_of
from normwise.lab.errors import UsageError, nearest

__all__ = ["attribute", "place", "reason"]


def place(text: str) -> str:
    """``MODULE:NAME`` from what a user writes, which may be the path of a file, ``FILE.py:NAME``.

    Raises:
        UsageError: if it is neither.
    """
    module, colon, name = text.rpartition(":")
    if module.endswith(".py"):
        module = module.removesuffix(".py").removeprefix("./").replace("/", ".")
    if not colon or not re.fullmatch(r"\w+(\.\w+)*", module) or not name.isidentifier():
        raise UsageError(
            f"{text!r} is no MODULE:FACTORY: must be a module, or a .py file at or below the "
            "current folder, a colon, and a name in it"
        )
    return f"{module}:{name}"


def attribute(source: str) -> Any:
    """What ``MODULE:NAME`` names; modules of the current folder are found too.

    Raises:
        UsageError: if there is no such module or name, or the module fails while it is imported.
    """
    try:
        module, name = module_of(source)
    except ValueError as error:
        raise UsageError(str(error)) from error.__cause__
    if not hasattr(module, name):
        known = [key for key in vars(module) if not key.startswith("_")]
        raise UsageError(f"{source!r}: {module.__name__} has no {name!r}: {nearest(name, known)}")
    return getattr(module, name)


def reason(error: BaseException) -> str:
    """An error in one line: its type, and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
