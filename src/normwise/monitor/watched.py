"""Weights laid out so that all slices of one length are measured together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normwise.geometry import View, computing_dtype
from normwise.monitor.sharded import ShardedWeight
from normwise.sharding import is_sharded

__all__ = ["Bucket", "Layer", "WatchedWeights"]

# Entries; a MiB in float32, of which a measurement holds a few at a time.
_CACHED = 2**18


@dataclass(frozen=True)
class Layer:
    """One weight that is watched.

    Attributes:
        name: of the parameter in the model.
        view: how it splits into slices.
        dtype: of the parameter.
        group: the index of its parameter group.
        entries: of each slice.
        shape: of the parameter.
        slices: where its slices are among those of all layers.
    """

    name: str
    view: View
    dtype: torch.dtype
    group: int
    entries: int
    shape: tuple[int, ...]
    slices: slice

    def __len__(self) -> int:
        """The number of slices."""
        return int(self.slices.stop - self.slices.start)


class Bucket:
    """Weights whose slices have one length, on one device, computed with in one dtype.

    On a CPU each weight has a bucket of its own.

    Args:
        params: the weights.
        views: how each splits.
        layers: the index of each weight among all that are watched.
        owner: the index of the optimizer that steps them.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        views: Sequence[View],
        layers: Sequence[int],
        owner: int,
    ) -> None:
        self.params = list(params)
        self.owner = owner
        self.device = params[0].device
        self.dtype = computing_dtype(_real(params[0]).dtype)
        self._views = list(views)
        self._shapes = [view.slices(_real(p)).shape for p, view in zip(params, views, strict=True)]
        counts = [shape[0] for shape in self._shapes]
        self.entries = math.prod(self._shapes[0][1:])
        self.rows = sum(counts)
        self.layer_index = torch.repeat_interleave(
            torch.tensor(layers), torch.tensor(counts), output_size=self.rows
        ).to(self.device)

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """The first row of each weight, and the one after its last."""
        begin = 0
        for shape in self._shapes:
            yield begin, begin + shape[0]
            begin += shape[0]

    @property
    def chunks(self) -> Iterator[slice]:
        """Runs of rows to compute with at a time: all of them, and on a CPU what its cache holds.

        Temporaries that stay in the cache make a measurement several times faster there.
        """
        rows = self.rows if self.device.type != "cpu" else max(1, _CACHED // self.entries)
        for begin in range(0, self.rows, rows):
            yield slice(begin, min(begin + rows, self.rows))

    def gather(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """A copy of the slices of tensors shaped as the weights, zeros for None.

        Returns:
            Shape ``(rows, entries)``.
        """
        if len(tensors) == 1 and tensors[0] is not None:
            return self.read(tensors).clone()
        rows = torch.empty(self.rows, self.entries, dtype=self.dtype, device=self.device)
        if any(t is None for t in tensors):
            rows.zero_()
        to, source = [], []
        for t, view, shape, (begin, end) in zip(
            tensors, self._views, self._shapes, self.spans, strict=True
        ):
            if t is not None:
                to.append(rows[begin:end].view(shape))
                source.append(view.slices(_real(t.detach())))
        if to:
            torch._foreach_copy_(to, source)
        return rows

    def read(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """As :meth:`gather`, but without a copy where the bucket has one weight, and its type."""
        if len(tensors) > 1 or tensors[0] is None:
            return self.gather(tensors)
        slices = self._views[0].slices(_real(tensors[0].detach()))
        return slices.reshape(self.rows, self.entries).to(self.dtype)

    def gradients(self) -> list[Tensor | None]:
        """The gradients of the weights, dense."""
        return [
            p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad
            for p in self.params
        ]


class WatchedWeights:
    """All weights that are watched, in buckets.

    Args:
        views: the view of each parameter.
        names: the name of each parameter.
        groups: the index of each parameter's group.
        owners: the index of the optimizer that steps each parameter.

    Attributes:
        buckets: the slices of all buckets, one bucket after the other, are those of all layers.
        layers: in the order of ``views``.
        params: the parameters, in the same order.
        index: the number of each parameter in that order.
    """

    def __init__(
        self,
        views: Mapping[nn.Parameter, View],
        names: Mapping[nn.Parameter, str],
        groups: Mapping[nn.Parameter, int],
        owners: Mapping[nn.Parameter, int],
    ) -> None:
        by_length: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for p, view in views.items():
            view.check(p.shape)
            key: tuple[Any, ...] = (p,)
            # On a CPU a launch costs little, and copying weights together much.
            if p.device.type != "cpu" and not is_sharded(p):
                real = _real(p)
                entries = math.prod(view.slices(real).shape[1:])
                key = (p.device, computing_dtype(real.dtype), entries, owners[p])
            by_length.setdefault(key, []).append(p)
        self.index: dict[Tensor, int] = {p: i for i, p in enumerate(views)}
        order = self.index
        self.params = list(views)
        self.buckets: list[Bucket | ShardedWeight] = [
            ShardedWeight(params[0], views[params[0]], order[params[0]], owners[params[0]])
            if is_sharded(params[0])
            else Bucket(
                params, [views[p] for p in params], [order[p] for p in params], owners[params[0]]
            )
            for params in by_length.values()
        ]
        placed: dict[nn.Parameter, Layer] = {}
        offset = 0
        for bucket, params in zip(self.buckets, by_length.values(), strict=True):
            for p, (begin, end) in zip(params, bucket.spans, strict=True):
                placed[p] = Layer(
                    names[p],
                    views[p],
                    p.dtype,
                    groups[p],
                    bucket.entries,
                    tuple(p.shape),
                    slice(offset + begin, offset + end),
                )
            offset += bucket.rows
        self.layers = tuple(placed[p] for p in views)
        self.rows = offset


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t
