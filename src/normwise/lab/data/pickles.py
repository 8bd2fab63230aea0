"""Reading data sets that were published as pickles, without running what a pickle may contain.

A pickle is a program: unpickling one calls whatever function it names. The published ones need four
names, all of them numpy's or the codec of byte strings; any other is refused before it is looked
up.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from normwise.lab.data.files import DataError, read_bytes

__all__ = ["read_pickle"]

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"): ("numpy", "ndarray"),
    ("numpy", "dtype"): ("numpy", "dtype"),
    ("_codecs", "encode"): ("_codecs", "encode"),
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            module, name = _ALLOWED[module, name]
        except KeyError:
            raise DataError(f"names {module}.{name}, which no published data set does") from None
        if np.lib.NumpyVersion(np.__version__) < "2.0.0":
            module = module.replace("numpy._core", "numpy.core")
        return super().find_class(module, name)


def read_pickle(path: Path) -> Any:
    """What a pickle of numbers, strings, containers and numpy arrays holds; strings are bytes.

    Raises:
        DataError: if it names anything else (it is not run), or is truncated or corrupt.
    """
    content = read_bytes(path)
    try:
        return _Restricted(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path} refused and not run: it {error}") from None
    except Exception as error:
        # Bytes that are no pickle raise nearly anything.
        raise DataError(
            f"{path} is a truncated or corrupt pickle: {type(error).__name__}: {error}"
        ) from None
