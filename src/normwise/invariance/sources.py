"""Networks for ``normwise inspect``, by name: from a function, or from another library's list."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["batch_for", "load", "module_of"]

# A copy in float64 and a few gradients of more would not fit in an ordinary machine's memory.
_MOST_ENTRIES = 500_000_000


def load(source: str, settings: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """Build the network that ``source`` names, at random weights.

    Args:
        source: ``MODULE:FACTORY`` (a function that returns a model, or a model and a batch),
            ``hf:CONFIG`` (a model type of transformers, or the path of a ``config.json``),
            ``timm:NAME`` or ``torchvision:NAME``.
        settings: keyword arguments of the factory, or fields of the configuration.

    Returns:
        The model, and a batch if the factory gave one, else None.

    Raises:
        ValueError: if ``source`` names nothing.
        ImportError: if the library that it needs is missing.
    """
    kind, colon, name = source.partition(":")
    if not colon or not name:
        raise ValueError(
            f"Invalid source: {source!r}; must be MODULE:FACTORY, hf:CONFIG, timm:NAME or "
            "torchvision:NAME"
        )
    if kind == "hf":
        return _from_transformers(name, settings), None
    if kind == "timm":
        timm = _optional("timm")
        return _built(lambda: timm.create_model(name, pretrained=False, **settings), source), None
    if kind == "torchvision":
        models = _optional("torchvision").models
        return _built(lambda: models.get_model(name, weights=None, **settings), source), None
    function = _function(source)
    try:
        made = function(**settings)
    except Exception as error:  # whatever the user's code raises, said with its place
        text = (str(error).strip() or "no message").splitlines()[0]
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{source} raised {type(error).__name__}: {text} "
            f"({frame.filename}, line {frame.lineno})"
        ) from error
    model, batch = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{source} returned {type(model).__name__}; must return an nn.Module")
    return model, batch


def batch_for(model: nn.Module, text: str | None, *, seed: int = 0) -> Any:
    """A random batch for ``model``.

    Args:
        model: the network.
        text: sizes such as ``2x3x64x64`` for normal numbers, or ``tokens:2x16`` for token ids, or
            ``MODULE:FACTORY`` for a function that returns a batch. None: what a model of
            transformers says of its input, 2 images or 2 sequences of 16 tokens.
        seed: of the numbers (default: 0).

    Raises:
        ValueError: if ``text`` is none of these, or is needed and missing.
    """
    generator = torch.Generator().manual_seed(seed)
    name = getattr(model, "main_input_name", None)
    if text is None:
        config = getattr(model, "config", None)
        if name == "pixel_values":
            size = getattr(config, "image_size", None) or 64
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            channels = getattr(config, "num_channels", 3)
            return {name: torch.randn(2, channels, height, width, generator=generator)}
        if name == "input_ids":
            return {name: _tokens(model, (2, 16), generator)}
        raise ValueError("give --batch, such as 2x3x64x64, tokens:2x16 or MODULE:FACTORY")
    kind, colon, rest = text.rpartition(":")
    if colon and kind != "tokens":
        return _function(text)()
    try:
        sizes = tuple(int(size) for size in rest.split("x"))
    except ValueError:
        raise ValueError(
            f"Invalid batch: {text!r}; must be sizes such as 2x3x64x64, tokens:2x16 or "
            "MODULE:FACTORY"
        ) from None
    if kind == "tokens":
        batch = _tokens(model, sizes, generator)
    else:
        batch = torch.randn(sizes, generator=generator)
    return batch if name is None else {name: batch}


def _tokens(model: nn.Module, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # Below the size of every table, that of the positions included, an index is in range.
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return torch.randint(min(tables, default=2), sizes, generator=generator)


def _from_transformers(name: str, settings: Mapping[str, Any]) -> nn.Module:
    transformers = _optional("transformers")
    path = Path(name)
    if path.exists():
        text = (path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8")
        fields = json.loads(text)
    else:
        fields = {"model_type": name}
    kind = fields.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"Invalid configuration: {name!r} is no model type of transformers and no file; "
            "nothing is downloaded"
        )
    config = transformers.CONFIG_MAPPING[kind](**{**fields, **settings})
    build = _builder(transformers, config, name)
    with torch.device("meta"):
        entries = sum(p.numel() for p in build().parameters())
    if entries > _MOST_ENTRIES:
        sizes = _narrow(transformers.CONFIG_MAPPING[kind](**{**fields, **settings}))
        narrow = " ".join(f"--set {key}={value}" for key, value in sizes.items())
        raise ValueError(
            f"hf:{name} has {entries / 1e9:.1f} billion parameters; make it narrow, with as many "
            f"heads and groups, and the verdicts are the same: {narrow}"
        )
    return build()


def _narrow(config: Any) -> dict[str, int]:
    """Fields of a configuration that make its network small, its heads and groups as many."""
    heads = next(
        (n for key in ("num_attention_heads", "n_head") if (n := getattr(config, key, None))), 8
    )
    sizes = dict.fromkeys(("hidden_size", "n_embd", "d_model"), 4 * heads)
    sizes |= dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size"), 6 * heads)
    sizes |= dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 2)
    sizes |= {"head_dim": 4, "vocab_size": 256}
    found = {}
    for key, size in sizes.items():
        value = getattr(config, key, None)
        if key not in getattr(config, "attribute_map", {}) and type(value) is int and value > size:
            found[key] = size
    return found


def _builder(transformers: Any, config: Any, name: str) -> Callable[[], nn.Module]:
    """What builds the network of a configuration."""
    architectures = getattr(config, "architectures", None) or []
    for architecture in architectures:
        if hasattr(transformers, architecture):
            return lambda: _module(getattr(transformers, architecture)(config))
    # The heads whose names say what the network was made for, before the bare network.
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageClassification,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModel,
    ):
        if type(config) in auto._model_mapping:
            return partial(_from_config, auto, config)
    raise ValueError(f"transformers has no network for the configuration {name!r}")


def _from_config(auto: Any, config: Any) -> nn.Module:
    return _module(auto.from_config(config))


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _built(build: Any, source: str) -> nn.Module:
    try:
        return _module(build())
    except (RuntimeError, ValueError, KeyError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source} cannot be built: {text}") from error


def _optional(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImportError(
            f"{library} cannot be imported ({text}); install it with "
            f"`pip install normwise[{_EXTRAS[library]}]`"
        ) from error


_EXTRAS = {"transformers": "transformers", "timm": "vision", "torchvision": "vision"}


def module_of(source: str) -> tuple[ModuleType, str]:
    """The module of ``MODULE:NAME``, and the name; modules of the working directory are found too.

    Args:
        source: what a user gave.

    Returns:
        The module, imported, and the name, which it may lack.

    Raises:
        ValueError: if there is no such module, or it fails while it is imported.
    """
    module_name, _, name = source.rpartition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name), name
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Invalid source: {source!r}; there is no module {error.name!r}, neither installed nor "
            f"in {here}"
        ) from error
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(
            f"Invalid source: {source!r}; the module fails: {type(error).__name__}: {text}"
        ) from error


def _function(source: str) -> Any:
    """The network or function that MODULE:NAME names."""
    module, name = module_of(source)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"Invalid source: {source!r}; {module.__name__} has no function {name!r}")
    if inspect.isclass(found) and not issubclass(found, nn.Module):
        raise ValueError(f"Invalid source: {source!r}; {name} is not a network")
    return found
