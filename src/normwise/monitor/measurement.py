"""What was measured at one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.monitor.quantities import Aggregate, Quantity
from normwise.monitor.watched import Layer

__all__ = ["PREDICTIONS", "Measurement", "aggregate"]

PREDICTIONS = (
    "predicted_norm",
    "predicted_angular_update",
    "steps_to_equilibrium",
    "expected_norm",
    "expected_angular_update",
)


@dataclass(frozen=True)
class Measurement:
    """All quantities of all slices at one step, and each layer's aggregate, on the host.

    ``m["norm"]["conv1.weight"]`` is a layer's number; ``m.of_slices("norm", "conv1.weight")`` is a
    tensor with one for each slice.

    Attributes:
        step: counted from 1.
        layers: the layers, in the order of the columns of ``values``.
        names: the quantities, in the order of the rows of ``values``; the last are
            :data:`PREDICTIONS`: norm and angle at equilibrium, and the steps until the norm is
            within 10% of it at the present learning rate; and what is expected at this step: the
            norm that the rates so far lead to from that of the first measurement, and the angle at
            the present norm.
        values: shape ``(names, layers)``, float64.
        slices: shape ``(quantities, slices of all layers)``; the predictions have no rows.
        lrs: the learning rate of each layer.
        first_bad: for each slice, the first step after which it was not finite, or 0; None where
            that was not watched.
    """

    step: int
    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    values: Tensor
    slices: Tensor
    lrs: tuple[float, ...]
    first_bad: Tensor | None = None

    def __getitem__(self, name: str) -> dict[str, float]:
        """A quantity of every layer, by the layer's name."""
        row = self.values[self._row(name)].tolist()
        return {layer.name: value for layer, value in zip(self.layers, row, strict=True)}

    def of_slices(self, name: str, layer: str | None = None) -> Tensor:
        """A quantity of every slice of a layer, or of all layers one after the other.

        Args:
            name: of the quantity.
            layer: whose slices (default: all layers').

        Raises:
            KeyError: for a quantity that has no slices, or an unknown layer.
        """
        row = self._row(name)
        if row >= len(self.slices):
            raise KeyError(f"{name!r} is known of layers, not of slices")
        values = self.slices[row]
        if layer is None:
            return values
        for candidate in self.layers:
            if candidate.name == layer:
                return values[candidate.slices]
        raise KeyError(f"no layer {layer!r} is watched")

    def gradient_shares(self) -> dict[str, float]:
        """The part of the squared gradient norm of all watched weights that is each layer's.

        Returns:
            Shares that add to 1, by the layer's name.

        Raises:
            KeyError: if ``gradient_norm`` is not measured.
        """
        squares = self.of_slices("gradient_norm").double().square()
        squares = torch.where(squares.isfinite(), squares, 0.0)
        total = float(squares.sum()) or 1.0
        return {layer.name: float(squares[layer.slices].sum()) / total for layer in self.layers}

    def rows(self) -> Iterator[tuple[str, str, float]]:
        """Layer, quantity and value, one after the other.

        Returns:
            Triples, layer by layer.
        """
        for name in self.names:
            for layer, value in self[name].items():
                yield layer, name, value

    def scalars(self) -> dict[str, float]:
        """Every finite number by ``"quantity/layer"``, as trackers of experiments want them.

        Returns:
            Numbers by name.
        """
        return {f"{name}/{layer}": v for layer, name, v in self.rows() if math.isfinite(v)}

    def _row(self, name: str) -> int:
        if name not in self.names:
            raise KeyError(f"no quantity {name!r} is measured; there are {', '.join(self.names)}")
        return self.names.index(name)


def aggregate(slices: Tensor, quantities: Sequence[Quantity], layers: Sequence[Layer]) -> Tensor:
    """Each quantity of each layer from those of the slices.

    Args:
        slices: shape ``(quantities, slices)``.
        quantities: in the order of the rows.
        layers: in any order; together they are all slices.

    Returns:
        Shape ``(quantities, layers)``, float64.
    """
    order = sorted(range(len(layers)), key=lambda i: layers[i].slices.start)
    lengths = torch.tensor([len(layers[i]) for i in order])
    values = torch.empty(len(quantities), len(layers), dtype=torch.float64)
    for kind, (into, reduce, back) in _REDUCTIONS.items():
        rows = [row for row, quantity in enumerate(quantities) if quantity.aggregate is kind]
        if rows:
            data = into(slices[rows].double().T.contiguous())
            reduced = torch.segment_reduce(data, reduce, lengths=lengths, axis=0)
            values[rows] = back(reduced).T[:, torch.tensor(order).argsort()]
    return values


_Map = Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


_REDUCTIONS: dict[Aggregate, tuple[_Map, str, _Map]] = {
    Aggregate.MEAN: (_same, "mean", _same),
    Aggregate.RMS: (torch.square, "mean", torch.sqrt),
    Aggregate.GEOMETRIC_MEAN: (torch.log, "mean", torch.exp),
    Aggregate.MIN: (_same, "min", _same),
    Aggregate.MAX: (_same, "max", _same),
}


def as_mapping(m: Measurement) -> Mapping[str, object]:
    """A measurement as one JSON object: numbers that are not finite become null."""
    return {
        "step": m.step,
        **{
            name: {
                layer: value if math.isfinite(value) else None for layer, value in m[name].items()
            }
            for name in m.names
        },
    }
