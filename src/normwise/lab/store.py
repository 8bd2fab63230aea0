"""The folder of a run: files that are whole or absent, and metrics that grow line by line."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from normwise.lab.errors import Damaged, UsageError

__all__ = [
    "METRICS",
    "RunFolder",
    "append",
    "locked",
    "named",
    "read_metrics",
    "read_sealed",
    "read_sealed_json",
    "seal",
    "seal_json",
    "write_atomically",
    "write_new",
]

METRICS = "metrics.jsonl"
_DIGEST = 32  # bytes of a SHA-256


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
        with named(self.path / METRICS):
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
        with named(path), os.fdopen(handle, "wb") as file:
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


def append(path: Path, content: bytes) -> None:
    """Add to a file, on the disk when this returns."""
    with named(path), path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Inside, an ``OSError`` that does not say which file it is of, such as a full disk's, does."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out while inside; the lock goes when the process does, however it does.

    Raises:
        UsageError: if another process is inside.
    """
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise UsageError(f"another process is running {path.parent}") from None


def seal(content: bytes) -> bytes:
    """``content`` with its SHA-256 behind it, which a reader of zip files passes over."""
    return content + hashlib.sha256(content).digest()


def read_sealed(path: Path) -> bytes:
    """What was sealed.

    Raises:
        Damaged: if it is not what was written.
    """
    content, digest = (whole := path.read_bytes())[:-_DIGEST], whole[-_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise Damaged(path, "its checksum differs")
    return content


def seal_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the SHA-256 of the rest of it as its key ``sha256``."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, allow_nan=False)
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_sealed_json(path: Path) -> dict[str, Any]:
    """A JSON object that was sealed.

    Raises:
        Damaged: if it is not what was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        intact = seal_json(content)["sha256"] == content["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(path, f"{type(error).__name__}: {error}") from None
    if not intact:
        raise Damaged(path, "its checksum differs")
    return dict(content)


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
