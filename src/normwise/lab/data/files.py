"""Finding a data set's files and checking them before they are believed."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from normwise.lab.errors import UsageError

__all__ = ["DataError", "checksum", "data_root", "locate", "read_bytes"]

_VARIABLE = "NORMWISE_DATA"


class DataError(UsageError):
    """A data set is missing, or a file of it is not what its makers published."""


def data_root() -> Path:
    """The folder that holds the data sets: the environment variable ``NORMWISE_DATA``, or ``data``
    in the working directory."""
    return Path(os.environ.get(_VARIABLE) or "data")


def locate(root: Path, name: str, folders: Iterable[str], probe: str) -> Path:
    """The first of ``folders`` under ``root`` that holds ``probe``.

    Args:
        root: where the data sets are.
        name: the data set, as ``normwise data fetch`` knows it.
        folders: candidates, relative to ``root``; ``"."`` is the root itself.
        probe: a file or folder, or a pattern of :meth:`pathlib.Path.glob`, that must be there.

    Raises:
        DataError: if none does; the message says where it looked and what to do.
    """
    folders = list(folders)
    for folder in folders:
        if any((root / folder).glob(probe)):
            return root / folder
    places = ", ".join(str(root / folder / probe) for folder in folders)
    raise DataError(
        f"data set {name!r} not found; looked for {places}. Let {_VARIABLE} name the folder that "
        f"holds your data sets; `normwise data fetch {name}` gets this one, or says where to put it"
    )


def checksum(path: Path, algorithm: str) -> str:
    """The hexadecimal digest of a file; ``algorithm`` is a name of :mod:`hashlib`."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where it is gzip (told by its first bytes, not its name).

    Raises:
        DataError: if it cannot be read, or is a truncated or corrupt gzip.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a truncated or corrupt gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
