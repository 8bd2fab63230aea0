"""MATLAB's files of versions 5 to 7, as far as lists of records need it.

scipy's reader takes the sizes in a file at their word: a damaged one can end the whole process with
a segmentation fault. This one looks at nothing beyond what the file holds, and runs nothing of it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from normwise.lab.data.files import DataError, read_bytes

__all__ = ["read_records"]

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
# Types of the elements of a file.
_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
_TEXTS = {1: "latin-1", 2: "latin-1", 16: "utf-8"}
_WIDE_TEXTS = (4, 17)
# Classes of a matrix; those from _FIRST_NUMBER to _LAST_NUMBER are of numbers.
_STRUCT, _CHAR, _FIRST_NUMBER, _LAST_NUMBER = 2, 4, 6, 15

_Element = tuple[int, bytes]


def read_records(path: Path, name: str) -> list[dict[str, Any]]:
    """The records of the array of structs that a variable is.

    Args:
        path: the file.
        name: of the variable.

    Returns:
        For each record its fields: a ``str``; a number where there is one; or a list of them.

    Raises:
        DataError: if it is damaged, of another version, or has no such variable.
    """
    content = read_bytes(path)
    order = {b"IM": "<", b"MI": ">"}.get(content[126:_HEADER])
    if order is None or content[124:126] not in (b"\0\1", b"\1\0"):
        raise DataError(f"{path} is not a MATLAB file of versions 5 to 7")
    try:
        for kind, element in _elements(content[_HEADER:], order):
            if kind == _COMPRESSED:
                ((kind, element),) = _elements(zlib.decompress(element), order)
            if kind == _MATRIX and _parts(element, order)[1] == name:
                found = _value(element, order)
                if isinstance(found, list) and all(isinstance(item, dict) for item in found):
                    return found
                raise ValueError(f"{name!r} is no array of structs")
    except (ValueError, KeyError, struct.error, zlib.error, RecursionError) as error:
        raise DataError(f"{path} is damaged or not such a file as expected: {error!r}") from None
    raise DataError(f"{path} has no variable {name!r}")


def _elements(content: bytes, order: str) -> Iterator[_Element]:
    """The elements of a piece of a file: their types and what they hold."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from(order + "II", content, at)
        if kind >> 16:  # a small one, of up to four bytes beside its type
            kind, size, begin, following = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            begin = at + 8
            following = begin + size + (0 if kind == _COMPRESSED else -size % 8)
        if begin + size > min(following, len(content)):
            raise ValueError(f"an element of {size} bytes is cut off")
        yield kind, content[begin : begin + size]
        at = following


def _parts(matrix: bytes, order: str) -> tuple[int, str, list[_Element]]:
    """A matrix's class, its name, and what comes after its flags, dimensions and name."""
    elements = list(_elements(matrix, order))
    if len(elements) < 3:
        raise ValueError("a matrix is cut off")
    (_, flags), _, (_, name), *rest = elements
    return struct.unpack_from(order + "I", flags)[0] & 0xFF, name.decode("latin-1"), rest


def _value(matrix: bytes, order: str) -> Any:
    """A matrix as text, a number, a list of numbers, or a list of records."""
    if not matrix:
        return []
    kind, _, rest = _parts(matrix, order)
    if kind == _STRUCT:
        return _records(rest, order)
    if not rest:
        raise ValueError("a matrix has no content")
    element, content = rest[0]
    if kind == _CHAR:
        wide = "utf-16-le" if order == "<" else "utf-16-be"
        return content.decode(wide if element in _WIDE_TEXTS else _TEXTS[element])
    if not _FIRST_NUMBER <= kind <= _LAST_NUMBER:
        raise ValueError(f"a matrix of class {kind} cannot be read")
    numbers = np.frombuffer(content, order + _NUMBERS[element]).tolist()
    return numbers[0] if len(numbers) == 1 else numbers


def _records(rest: list[_Element], order: str) -> list[dict[str, Any]]:
    """Records from the length of their fields' names, these names, and all values in turn."""
    if len(rest) < 2:
        raise ValueError("an array of structs is cut off")
    (_, length), (_, names), *values = rest
    (step,) = struct.unpack_from(order + "i", length)
    if step < 1 or not names:
        raise ValueError("an array of structs has no fields")
    starts = range(0, len(names), step)
    fields = [names[i : i + step].partition(b"\0")[0].decode("latin-1") for i in starts]
    if len(values) % len(fields):
        raise ValueError("an array of structs is cut off")
    read = [_value(content, order) for _, content in values]
    return [
        dict(zip(fields, read[i : i + len(fields)], strict=True))
        for i in range(0, len(read), len(fields))
    ]
