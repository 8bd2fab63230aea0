"""Tensors of a checkpoint, one block of rows at a time, without unpickling anything."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

__all__ = ["CheckpointError", "StoredTensor", "stored_tensors"]

# Entries that are in memory at once.
_BLOCK = 2**22
_INDEX = "model.safetensors.index.json"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: its message is one line, with the path and the reason."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a checkpoint.

    Attributes:
        name: its key.
        shape: its shape.
        dtype: as it is stored.
        read: rows ``[begin, end)`` of its first dimension, or the whole if it has none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    def blocks(self) -> Iterator[Tensor]:
        """Its rows from first to last, some four million entries at a time, in float64.

        Yields:
            Tensors of shape ``(rows, ...)``; of a scalar one of shape ``(1,)``.
        """
        if not self.shape:
            yield self.read(0, 1).reshape(1).double()
            return
        rows = max(1, _BLOCK * self.shape[0] // max(1, torch.Size(self.shape).numel()))
        for begin in range(0, self.shape[0], rows):
            yield self.read(begin, min(begin + rows, self.shape[0])).double()


def stored_tensors(path: Path, prefix: str | None = None) -> list[StoredTensor]:
    """The floating-point tensors of a checkpoint, in the order in which it lists them.

    Args:
        path: a ``.safetensors`` file, the ``.index.json`` of a sharded one, or a folder that holds
            either, or a distributed checkpoint of torch (with its ``.metadata``).
        prefix: only keys that begin with it, which they then lose (default: ``model.`` if a
            distributed checkpoint has such keys beside others, else all).

    Raises:
        CheckpointError: for what is no such file, is damaged, or would have to be unpickled.
    """
    if not path.exists():
        raise CheckpointError(f"{str(path)!r} does not exist")
    if path.is_dir() and (path / ".metadata").exists():
        found = _distributed(path)
        if prefix is None and any(t.name.startswith("model.") for t in found):
            prefix = "model."
    else:
        found = [t for file in _safetensors_files(path) for t in _in_file(file)]
    if prefix:
        found = [
            StoredTensor(t.name.removeprefix(prefix), t.shape, t.dtype, t.read)
            for t in found
            if t.name.startswith(prefix)
        ]
    found = [t for t in found if t.dtype.is_floating_point]
    if not found:
        under = f" under {prefix!r}" if prefix else ""
        raise CheckpointError(f"{str(path)!r} holds no floating-point tensor{under}")
    return found


def _safetensors_files(path: Path) -> Sequence[Path]:
    if path.is_dir():
        if (path / _INDEX).exists():
            return _listed_in(path / _INDEX)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            pickled = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
            hint = f" ({pickled[0]} is a pickle, which is not read)" if pickled else ""
            raise CheckpointError(
                f"{str(path)!r} holds neither .safetensors files nor a distributed checkpoint{hint}"
            )
        return files
    if path.name.endswith(".index.json"):
        return _listed_in(path)
    if path.suffix != ".safetensors":
        pickled_file = path.suffix in _PICKLES or path.open("rb").read(2) in (b"PK", b"\x80\x02")
        reason = "is a pickle, which can run any code and is not read" if pickled_file else ""
        raise CheckpointError(
            f"{str(path)!r} {reason or 'is not a .safetensors file'}; save it with "
            "safetensors.torch.save_file or torch.distributed.checkpoint"
        )
    return [path]


def _listed_in(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(index)!r} is damaged: {_line(error)}") from None
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{str(index)!r} names {file.name!r}, which is not there")
    return files


def _in_file(path: Path) -> Iterator[StoredTensor]:
    try:
        safetensors = importlib.import_module("safetensors")
    except ImportError:
        raise CheckpointError(
            f"reading {str(path)!r} needs safetensors; install it with "
            "`pip install normwise[transformers]`"
        ) from None
    try:
        file = safetensors.safe_open(path, framework="pt")
        names = list(file.keys())
        # The header says the dtype, which a slice does not; its size is in the first 8 bytes.
        with path.open("rb") as raw:
            (size,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(size))
        for name in sorted(names, key=lambda name: header[name]["data_offsets"][0]):
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            yield StoredTensor(name, shape, _dtype(header[name]["dtype"]), _rows(file, name, shape))
    except CheckpointError:
        raise
    except Exception as error:  # safetensors' own error is no subclass of a public one
        raise CheckpointError(f"{str(path)!r} is damaged: {_line(error)}") from None


def _rows(file: Any, name: str, shape: tuple[int, ...]) -> Callable[[int, int], Tensor]:
    def read(begin: int, end: int) -> Tensor:
        if not shape:
            return file.get_tensor(name)  # type: ignore[no-any-return]  # safetensors has no types
        return file.get_slice(name)[begin:end]  # type: ignore[no-any-return]  # safetensors has no types

    return read


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _dtype(name: str) -> torch.dtype:
    return _DTYPES.get(name, torch.int64)


# What the list of a distributed checkpoint's contents is made of.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
}
# Python 3.13 pickles paths by the module that defines them there.
_PATH_MODULES = ("pathlib", "pathlib._local")
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")


class _MetadataUnpickler(pickle.Unpickler):
    """Reads a distributed checkpoint's list of contents, which is a pickle, and nothing else.

    Of all that a pickle can name only plain records of shapes and places are let through.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in _PATH_MODULES and name in _PATHS:
            return PurePosixPath
        if name in _RECORDS.get(module, ()):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs")


def _distributed(folder: Path) -> list[StoredTensor]:
    try:
        raw = (folder / ".metadata").read_bytes()
        metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
        places = {(index.fqn, index.offset): i for index, i in metadata.storage_data.items()}
        found = []
        for name, entry in metadata.state_dict_metadata.items():
            if hasattr(entry, "chunks"):
                chunks = [
                    (tuple(c.offsets), tuple(c.sizes), places[name, c.offsets])
                    for c in entry.chunks
                ]
                for _, _, place in chunks:
                    _check_place(folder, place)
                shape = tuple(entry.size)
                read = _chunk_rows(folder, name, chunks, shape, entry.properties.dtype)
                found.append(StoredTensor(name, shape, entry.properties.dtype, read))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged pickle leads to
        raise CheckpointError(f"{str(folder / '.metadata')!r} is damaged: {_line(error)}") from None
    return found


def _check_place(folder: Path, place: Any) -> None:
    file = folder / place.relative_path
    if file.parent.resolve() != folder.resolve():
        raise CheckpointError(f"{str(folder)!r} names {place.relative_path!r}, outside of it")
    if not file.exists() or file.stat().st_size < place.offset + place.length:
        state = "is cut short" if file.exists() else "is missing"
        raise CheckpointError(f"{str(file)!r} {state}")


def _chunk_rows(
    folder: Path, name: str, chunks: Sequence[Any], shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[int, int], Tensor]:
    def read(begin: int, end: int) -> Tensor:
        rows = torch.full((end - begin, *shape[1:]), torch.nan, dtype=dtype)
        for offsets, sizes, place in chunks:
            first, last = (offsets[0], offsets[0] + sizes[0]) if shape else (0, 1)
            low, high = max(first, begin), min(last, end)
            if low < high:
                piece = _saved(folder / place.relative_path, place, name)
                target = rows[low - begin : high - begin]
                for dim, (offset, size) in enumerate(zip(offsets[1:], sizes[1:], strict=True), 1):
                    target = target.narrow(dim, offset, size)
                target.copy_(
                    piece.reshape(1)[:1] if not shape else piece[low - first : high - first]
                )
        return rows

    return read


def _saved(path: Path, place: Any, name: str) -> Tensor:
    with path.open("rb") as file:
        file.seek(place.offset)
        content = io.BytesIO(file.read(place.length))
    try:
        loaded: Tensor = torch.load(content, map_location="cpu", weights_only=True)
        return loaded.detach()
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{str(path)!r} is damaged at {name!r}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
