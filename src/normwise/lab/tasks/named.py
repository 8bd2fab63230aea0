"""A network by its name, on data by theirs: ``normwise compare NETWORK --data DATA``."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from normwise.lab.data.own import BYTES, OwnData, open_data
from normwise.lab.errors import UsageError
from normwise.lab.imports import reason
from normwise.lab.tasks.supervised import MEASURES, Measure, Supervised, supervised

__all__ = ["named"]

_HINTS = ("inputs", "outputs", "size")


def named(
    network: str,
    data: str,
    size: int | None,
    settings: Mapping[str, Any],
    factory: Callable[..., Any] | None,
) -> Supervised:
    """The problem.

    Args:
        network: ``hf:MODEL``, ``timm:NAME``, ``torchvision:NAME``, ``mlp:64x64``, or what a
            factory is called.
        data: as :func:`normwise.lab.data.own.open_data` reads it.
        size: pixels a side, or tokens a sequence (default: the data's).
        settings: arguments of the network, or fields of its configuration.
        factory: of the user's, which makes a network; it may take ``inputs``, ``outputs`` and
            ``size`` (default: the name says what is made).

    Raises:
        UsageError: if the two do not go together, or the data are not what they are said to be.
    """
    source = open_data(data, size, _tokenizer(network, data))
    make = _of_factory(network, factory, source) if factory else _maker(network, source, settings)
    return supervised(
        make,
        source.train,
        source.test,
        loss=source.loss,
        metrics=[_in_units(name, source.unit) for name in ("rmse", "mae")]
        if source.loss == "mse"
        else None,
        name=f"{network} on {data}",
        facts=source.facts,
    )


def _in_units(name: str, unit: float) -> Measure:
    """A measure of errors, in the unit of the file instead of standard deviations."""
    measure = MEASURES[name]
    return replace(measure, finish=lambda mean: unit * measure.finish(mean))


def _of_factory(name: str, factory: Callable[..., Any], source: OwnData) -> Callable[[], nn.Module]:
    if not callable(factory):
        raise UsageError(f"{name!r} is of type {type(factory).__name__}; must be a function")
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]  # of a builtin that does not say
    given = {p.name: getattr(source, p.name) for p in parameters if p.name in _HINTS}
    for p in parameters:
        variable = p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.name not in given and p.default is p.empty and not variable:
            raise UsageError(
                f"{name!r} takes {p.name!r}, which data do not say: may take inputs, outputs and "
                "size"
            )

    def make() -> nn.Module:
        made = factory(**given)
        if isinstance(made, Supervised):
            raise UsageError(f"{name!r} makes a problem with data of its own: leave out --data")
        return made  # type: ignore[no-any-return]  # what it is, is checked by who called

    return make


def _maker(network: str, source: OwnData, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    kind, _, name = network.partition(":")
    if kind == "mlp":
        if source.kind != "csv":
            raise UsageError(
                f"{network!r} goes with csv:FILE:TARGET; for {source.kind} name a network, such as "
                + ("hf:gpt2" if source.kind == "text" else "hf:resnet")
            )
        return partial(_mlp, _widths(name), source.inputs, source.outputs)
    if source.kind == "csv":
        raise UsageError(f"{network!r} is no network for csv: give mlp:64x64, or MODULE:FACTORY")
    if kind in ("timm", "torchvision"):
        if source.kind != "folder":
            raise UsageError(f"{network!r} is a network for images: give --data folder:PATH")
        given = {"num_classes": source.outputs, **settings}
    else:
        given = {**_narrow(name, source), **settings}

    def make() -> nn.Module:
        from normwise.invariance.sources import load

        try:
            return load(network, given)[0]
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{network!r} cannot be built: {reason(error)}") from error

    return make


def _widths(name: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", name):
        raise UsageError(f"'mlp:{name}' is no network: must be widths such as mlp:64x64")
    return [int(width) for width in name.split("x")]


def _mlp(widths: list[int], inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in zip([inputs, *widths], widths, strict=False):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def _tokenizer(network: str, data: str) -> Path | None:
    """The file that cuts a text, of a folder with a model's configuration."""
    kind, _, name = network.partition(":")
    file = Path(name) / "tokenizer.json"
    return file if kind == "hf" and data.startswith("text:") and file.is_file() else None


def _narrow(name: str, source: OwnData) -> dict[str, Any]:
    """Fields of a configuration of transformers that make the network fit the data.

    Of a model type that is named, and is no file of the user's, those too that make it small: two
    layers of 64, or stages of 16, 32, 64 … with one block each.
    """
    try:
        import transformers
    except Exception as error:
        raise UsageError(
            f'hf:{name} needs transformers ({reason(error)}): pip install "normwise[transformers]"'
        ) from None
    path = Path(name)
    if path.exists():
        file = path / "config.json" if path.is_dir() else path
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} is no configuration: {reason(error)}") from None
        return _fitting(known, source)
    if name not in transformers.CONFIG_MAPPING:
        raise UsageError(
            f"'hf:{name}' is no model type of transformers and no file; nothing is downloaded"
        )
    config = transformers.CONFIG_MAPPING[name]()
    known = {**config.to_dict(), **{k: getattr(config, k) for k in config.attribute_map}}
    stages = known.get("depths") or []
    if stages:
        small: dict[str, Any] = {
            "depths": [1] * len(stages),
            "hidden_sizes": [16 * 2**i for i in range(len(stages))],
            "embedding_size": 16,
        }
    else:
        small = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "intermediate_size": 256,
            "ffn_dim": 256,
            "word_embed_proj_dim": 64,
            "pooler_output_size": 64,
            "layer_types": known.get("layer_types") and known["layer_types"][:2],
        }
    fitting = _fitting({**known, "vocab_size": known.get("vocab_size") and 0}, source)
    return {k: v for k, v in small.items() if known.get(k) is not None} | fitting


def _fitting(known: Mapping[str, Any], source: OwnData) -> dict[str, Any]:
    """The fields that the data decide."""
    if source.kind == "folder":
        given: dict[str, Any] = {"num_labels": source.outputs}
        if "image_size" in known:
            given["image_size"] = source.size
        if isinstance(known.get("patch_size"), int):
            given["patch_size"] = math.gcd(source.size, max(1, source.size // 8))
        return given
    vocabulary = known.get("vocab_size")
    given = {"is_decoder": True} if "is_decoder" in known else {}
    if vocabulary is not None and vocabulary < source.inputs:
        if vocabulary:
            raise UsageError(
                f"the configuration has a vocabulary of {vocabulary}, and the text one of "
                f"{source.inputs}{' bytes' if source.inputs == BYTES else ''}: give --set "
                f"vocab_size={source.inputs}"
            )
        given["vocab_size"] = source.inputs
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if isinstance(known.get(token), int) and known[token] >= source.inputs:
                given[token] = None
    positions = known.get("max_position_embeddings")
    if positions is not None and positions < source.size:
        given["max_position_embeddings"] = source.size
    return given
