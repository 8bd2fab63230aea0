"""Which of the user's modules a recipe may run code of, and what that code was."""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path

from normwise.lab.errors import UsageError

__all__ = ["GIVEN", "check_trusted", "is_code", "is_library", "source_hash", "trusting"]

# What stands before the colon of a network's name and is no module of the user's.
LIBRARIES = ("hf", "timm", "torchvision", "mlp")
# What stands there of a problem that is an object of this process.
GIVEN = "given"
_trusted: ContextVar[frozenset[str]] = ContextVar("trusted", default=frozenset())


@contextmanager
def trusting(modules: Iterable[str]) -> Iterator[None]:
    """Inside, names such as ``MODULE:FACTORY`` may run code of these modules."""
    token = _trusted.set(_trusted.get() | frozenset(modules))
    try:
        yield
    finally:
        _trusted.reset(token)


def is_library(name: str) -> bool:
    """Whether a name is that of a network which a library makes, ``hf:MODEL`` for one."""
    library, colon, network = name.partition(":")
    return bool(colon and network) and library in LIBRARIES


def is_code(name: str) -> bool:
    """Whether a name in a recipe is ``MODULE:FACTORY``."""
    module, colon, factory = name.partition(":")
    return bool(colon and factory) and module not in (*LIBRARIES, GIVEN)


def check_trusted(name: str) -> None:
    """Refuse ``MODULE:FACTORY`` unless the module is trusted; nothing is imported.

    Raises:
        UsageError: if it is not.
    """
    module = name.partition(":")[0]
    if module not in _trusted.get():
        raise UsageError(
            f"{name!r} would run code of the module {module!r}, which a recipe may not decide: if "
            f"you trust it, add --trust {module}"
        )


def source_hash(name: str) -> str:
    """The SHA-256 of the source of ``MODULE:FACTORY``, with what it imports from beside it.

    Raises:
        UsageError: if the module is not trusted, or there is none.
    """
    check_trusted(name)
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    module = name.partition(":")[0]
    try:
        spec = find_spec(module)  # of a package's module it imports the package, which is trusted
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UsageError(f"{name!r}: there is no module {module!r} with a source")
    file = Path(spec.origin)
    root = file.parents[module.count(".") + (file.name == "__init__.py")]
    installed = root in {
        Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")
    }
    scope = root / module.partition(".")[0] if installed else root
    digest = hashlib.sha256()
    try:
        files = sorted(_imported(file, root, scope, set()))
    except SyntaxError as error:
        raise UsageError(f"{name!r}: {error.filename}, line {error.lineno}: {error.msg}") from None
    for path in files:
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _imported(file: Path, root: Path, scope: Path, found: set[Path]) -> set[Path]:
    """A file with all files of ``scope`` that it imports from ``root``, and those import."""
    if file in found:
        return found
    found.add(file)
    names: set[tuple[Path, str]] = set()
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            names |= {(root, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1] if node.level else root
            start = f"{node.module}." if node.module else ""
            names |= {(base, f"{start}{alias.name}") for alias in node.names}
    for base, name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            stem = base.joinpath(*parts[:length])
            for path in (stem.with_suffix(".py"), stem / "__init__.py"):
                if path.is_file() and path.is_relative_to(scope):
                    _imported(path, root, scope, found)
    return found
