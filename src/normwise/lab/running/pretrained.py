"""Weights to begin with from a file of the user's: by name, by shape, and without unpickling."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normwise.lab.data.files import checksum
from normwise.lab.errors import UsageError
from normwise.lab.imports import reason
from normwise.lab.recipes.schema import Training

__all__ = ["load_pretrained", "read_weights", "weights_hash"]

# Where files of torch have the weights, if they hold more.
_KEYS = ("model", "state_dict", "model_state_dict")
# Names that an error shows of each kind.
_SHOWN = 5


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Args:
        path: a ``.safetensors`` file, or one of ``torch.save``: a dict of tensors, or one that has
            such a dict under ``model``, ``state_dict`` or ``model_state_dict``, as the
            ``checkpoint.pt`` of a cell has. It is read with ``weights_only``.

    Raises:
        UsageError: if it is not there, is damaged, or holds anything else.
    """
    if not path.is_file():
        raise UsageError(
            f"pretrained weights {str(path)!r} are not there: put the file below NORMWISE_DATA"
        )
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file, or a refused pickle, raises nearly anything
        raise UsageError(
            f"pretrained weights {str(path)!r} are damaged or hold more than tensors, and nothing "
            f"is unpickled ({reason(error)}): save model.state_dict()"
        ) from None
    for key in _KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise UsageError(
            f"pretrained weights {str(path)!r} hold a {type(content).__name__}; must be a dict of "
            "tensors by name"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UsageError(
                f"pretrained weights {str(path)!r} have {name!r} of type {type(value).__name__}; "
                "must be a tensor"
            )
    return dict(content)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        load: Any = importlib.import_module("safetensors.torch").load_file
    except ImportError:
        raise UsageError(
            f"reading {str(path)!r} needs safetensors: pip install normwise[transformers]"
        ) from None
    try:
        weights: dict[str, Tensor] = load(path)
    except Exception as error:  # safetensors' own error is no subclass of a public one
        raise UsageError(f"pretrained weights {str(path)!r} are damaged: {reason(error)}") from None
    return weights


def weights_hash(training: Training, root: Path) -> str | None:
    """The SHA-256 of the file that a training begins with; none without one.

    Args:
        training: whose ``pretrained`` names it.
        root: the folder below which it lies.

    Raises:
        UsageError: if it is not there.
    """
    if training.pretrained is None:
        return None
    path = root / training.pretrained
    if not path.is_file():
        read_weights(path)  # says so
    return checksum(path, "sha256")


def load_pretrained(model: nn.Module, training: Training, root: Path) -> None:
    """Put the weights of a file into a network; nothing is done where none is named.

    Every parameter and buffer of ``training.pretrained_into`` must be in the file under its name
    there and with its shape, and the file must hold no other, but for those that
    ``training.pretrained_skip`` matches, which stay as they were drawn. Numbers are converted to
    the network's dtypes.

    Args:
        model: the network, not yet normalized.
        training: what to load, where, and what to leave out.
        root: the folder below which the file lies.

    Raises:
        UsageError: with what is missing, unexpected or of another shape.
    """
    if training.pretrained is None:
        return
    path = root / training.pretrained
    try:
        into = model.get_submodule(training.pretrained_into)
    except AttributeError:
        raise UsageError(
            f"pretrained_into {training.pretrained_into!r} is no module of the network; its own "
            f"are {_some(name for name, _ in model.named_children())}"
        ) from None
    skip = training.pretrained_skip
    own = into.state_dict(keep_vars=True)
    given = read_weights(path)
    for pattern in skip:
        if not any(_matches(name, pattern) for name in (*own, *given)):
            raise UsageError(
                f"pretrained_skip names {pattern!r}, which is neither in the network nor in {path}"
            )
    kept = {k: v for k, v in own.items() if not any(_matches(k, s) for s in skip)}
    taken = {k: v for k, v in given.items() if not any(_matches(k, s) for s in skip)}
    wrong = {
        "missing in the file": [k for k in kept if k not in taken],
        "unexpected": [k for k in taken if k not in kept],
        "of another shape": [
            f"{k} {tuple(taken[k].shape)} for {tuple(v.shape)}"
            for k, v in kept.items()
            if k in taken and taken[k].shape != v.shape
        ],
    }
    faults = [f"{what}: {_some(names)}" for what, names in wrong.items() if names]
    if faults:
        raise UsageError(
            f"pretrained weights {str(path)!r} do not fit the network: {'; '.join(faults)}. Leave "
            "out what differs with pretrained_skip, or say where they go with pretrained_into"
        )
    with torch.no_grad():
        for name, target in kept.items():
            target.copy_(taken[name])


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern stands for a tensor, or for a module that it is in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    rest = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
