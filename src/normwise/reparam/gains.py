"""Gains in front of weights whose norms are fixed: what gives the lost lengths back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normwise.checks import check_model
from normwise.protocols import AnalysisReport, FreedomLedger
from normwise.reparam.parametrizations import originals, stacks

__all__ = ["Gain", "GainKind", "Gains", "add_gains"]

GainKind = Literal["scalar", "row", "column"]

_KINDS = ("scalar", "row", "column")


Wanted = Mapping[Any, GainKind | Sequence[GainKind]] | FreedomLedger | AnalysisReport


class Gain(nn.Module):
    """W' = g·W, with one g for the weight, or one a row or a column of it.

    Row gains after column gains, or the reverse, are those of MD decoupling (arXiv 2606.25971).
    The weight stays the parameter that it was; assigning an effective weight sets W, not g.

    Args:
        kind: ``"scalar"``, ``"row"`` (an entry of dimension 0) or ``"column"`` (of dimension 1).
        weight: what it is for; g is 1 in its dtype and on its device.

    Raises:
        ValueError: for another kind, or rows or columns of a weight without them.
    """

    def __init__(self, kind: GainKind, weight: Tensor) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise ValueError(f"Invalid gain: {kind!r}; must be 'scalar', 'row' or 'column'")
        if kind != "scalar" and weight.ndim < 2:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} has no {kind}s")
        self.kind = kind
        # Never of two dimensions: optimizers take those for matrices.
        count = () if kind == "scalar" else (weight.shape[_KINDS.index(kind) - 1],)
        self.gain = nn.Parameter(torch.ones(count, dtype=weight.dtype, device=weight.device))

        # The host's own parameters in their order before it got the gain; `fold` restores it.
        self.siblings: tuple[str, ...] = ()

    def forward(self, w: Tensor) -> Tensor:
        """The effective weight.

        Args:
            w: the weight W.
        """
        return w * self._broadcast(w)

    def right_inverse(self, w: Tensor) -> Tensor:
        """The weight behind an effective weight, with the gains as they are.

        Args:
            w: the effective weight W'.
        """
        return w / self._broadcast(w).detach()

    def _broadcast(self, w: Tensor) -> Tensor:
        if self.kind == "scalar":
            return self.gain
        shape = [1] * w.ndim
        shape[_KINDS.index(self.kind) - 1] = -1
        return self.gain.view(shape)

    def extra_repr(self) -> str:
        return repr(self.kind)


@dataclass(frozen=True)
class Gains:
    """The gains that :func:`add_gains` has put in; iterating gives them, ``print`` says where.

    Attributes:
        by_name: the gains by the names that they have in the model.
        of: for each of these names the weight's name and the gain's kind.
    """

    by_name: Mapping[str, nn.Parameter]
    of: Mapping[str, tuple[str, GainKind]]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.by_name.values())

    def __len__(self) -> int:
        return len(self.by_name)

    def __str__(self) -> str:
        rows = [f"{weight}: {kind}, {p.numel()} of them" for p, (weight, kind) in self._rows()]
        return "\n".join(rows) or "no gain is needed"

    def _rows(self) -> Iterator[tuple[nn.Parameter, tuple[str, GainKind]]]:
        return ((p, self.of[name]) for name, p in self.by_name.items())


def add_gains(model: nn.Module, gains: Wanted) -> Gains:
    """Put a trainable gain of 1 in front of weights, in place.

    Where norms are fixed, by :func:`normwise.sphere` for example, a network can lose lengths that
    no other weight can stand in for; one gain gives each back. What the network computes does not
    change. The gains are new parameters: make the optimizer afterwards, and give them a learning
    rate of their own. :func:`normwise.fold` bakes them in.

    Args:
        model: any module.
        gains: a mapping from weights, or their names, to ``"scalar"``, ``"row"``, ``"column"``, or
            several of them; or the ledger of a report, ``report.freedom(fixed)``, which says where
            gains are needed; or a report, for the ledger of all its matrices.

    Returns:
        The new parameters.

    Raises:
        ValueError: for a weight that is not one of the model's, that modules share, or that has a
            gain; nothing has been changed then.

    Source: arXiv 2606.25971 (rows and columns).
    """
    check_model(model)
    mapping = gains if isinstance(gains, Mapping) else _needed(gains)
    places = _places(model)
    todo: list[tuple[nn.Module, str, str, Gain]] = []
    by_name = dict(model.named_parameters(remove_duplicate=False))
    names = {p: name for name, p in model.named_parameters()}
    for key, kinds in mapping.items():
        p = by_name.get(key) if isinstance(key, str) else key
        if p is None or p not in places:
            label = repr(key) if isinstance(key, str) else f"of shape {tuple(key.shape)}"
            raise ValueError(f"parameter {label} is not one of the model's")
        name = names[p]
        (module, attribute), *others = places[p]
        if others:
            raise ValueError(f"{name} is shared by {1 + len(others)} modules: a gain is for one")
        stack = stacks(module).get(attribute)
        if stack is not None and any(isinstance(part, Gain) for part in stack):
            raise ValueError(f"{name} has a gain already")
        several: Sequence[GainKind] = [kinds] if isinstance(kinds, str) else kinds
        todo += [(module, attribute, name, Gain(kind, p)) for kind in several]
    for module, attribute, _, gain in todo:
        gain.siblings = tuple(module._parameters)
        parametrize.register_parametrization(module, attribute, gain)
    new = {p: name for name, p in model.named_parameters()}
    return Gains(
        {new[gain.gain]: gain.gain for *_, gain in todo},
        {new[gain.gain]: (name, gain.kind) for _, _, name, gain in todo},
    )


def _needed(source: FreedomLedger | AnalysisReport) -> dict[str, GainKind]:
    """The gains that a ledger asks for, one for each slice whose norm is fixed."""
    if not isinstance(source, FreedomLedger) and not hasattr(source, "freedom"):
        raise TypeError(
            f"Invalid gains: {source!r}; must be a mapping from weights, a ledger, or a report"
        )
    ledger = source if isinstance(source, FreedomLedger) else source.freedom()
    kinds: dict[str, GainKind] = {}
    for name, verdict in ledger.verdicts.items():
        if verdict == "fix with a gain":
            view = ledger.fixed[name]
            if view.kind != "layer" and view.dim > 1:
                raise ValueError(f"{name} needs gains in view {view}; only rows and columns have")
            kinds[name] = "scalar" if view.kind == "layer" else ("row", "column")[view.dim]
    return kinds


_Places = dict[Tensor, list[tuple[nn.Module, str]]]


def _places(model: nn.Module) -> _Places:
    """The modules that use each parameter, and under which attribute."""
    places: _Places = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for name, p in module._parameters.items():
            if p is not None:
                places.setdefault(p, []).append((module, name))
        for name, stack in stacks(module).items():
            for original in originals(stack):
                places.setdefault(original, []).append((module, name))
    return places
