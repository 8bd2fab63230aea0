"""The folder of a run: files that are whole or absent, and metrics that grow line by line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normwise.lab.errors import UsageError

__all__ = ["METRICS", "RunFolder", "read_metrics", "write_atomically", "write_new"]

METRICS = "metrics.jsonl"


class RunFolder:
    """A folder that one run writes into and no other run has written into.

    Args:
        path: must be absent or an empty folder; it is created with its parents.

    Raises:
        UsageError: if it is a file, is not empty, or cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise UsageError(
                    f"output folder {str(path)!r} is not empty: give one that is absent or empty"
                )
            self._metrics = (path / METRICS).open("x", encoding="utf-8")
        except (FileExistsError, NotADirectoryError):
            raise UsageError(
                f"output folder {str(path)!r} is, or lies under, a file: give a folder that is "
                "absent or empty"
            ) from None
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"cannot write to output folder {str(path)!r}: {reason}; give one that can be "
                "created or is empty"
            ) from None

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to ``metrics.jsonl`` and hand it to the operating system at once."""
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self._metrics.flush()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write ``content`` as a JSON file, whole or not at all."""
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        write_atomically(self.path / name, text.encode())

    def write_text(self, name: str, content: str) -> None:
        """Write a text file in UTF-8, whole or not at all."""
        write_atomically(self.path / name, content.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a binary file, whole or not at all."""
        write_atomically(self.path / name, content)

    def close(self) -> None:
        """Close ``metrics.jsonl``."""
        self._metrics.close()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part.

    Raises:
        OSError: if the folder does not exist or cannot be written to.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; these are for whoever may read the folder.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_new(path: Path, content: bytes) -> None:
    """Write a file where there is none, making its folder if need be.

    Raises:
        UsageError: if something is there already, or it cannot be written.
    """
    if path.exists():
        raise UsageError(f"output file {str(path)!r} exists already: give a new one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, without a last line that was cut off in the writing.

    Args:
        path: the file, or the run's folder.

    Raises:
        ValueError: if any other line is not a JSON object; the message names it.
    """
    file = path / METRICS if path.is_dir() else path
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            # A finished line ends in a newline, so what follows the last newline was cut off.
            if number == len(lines):
                break
            raise ValueError(f"{file}, line {number}: {error}") from None
        records.append(record)
    return records
