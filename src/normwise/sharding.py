"""Where the slices of a DTensor live: whole on this rank, or in pieces on several.

A slice that lies whole on a rank is handled there, by code that knows nothing of ranks. Of a slice
that is split, each rank sums its piece; :func:`sum_over_ranks_` adds up the pieces of all weights,
in one collective a process group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from normwise.geometry import View

__all__ = ["Layout", "is_sharded", "lay_out", "lay_out_channels", "local", "sum_over_ranks_"]


def is_sharded(t: Any) -> TypeGuard[Any]:
    """Whether ``t`` is a DTensor; what DTensors need is not imported where there is none.

    Args:
        t: anything.

    Returns:
        True or False.
    """
    if type(t) is Tensor or type(t) is torch.nn.Parameter or not isinstance(t, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def local(t: Tensor) -> Tensor:
    """This rank's shard or replica of a DTensor, an alias; any other tensor itself.

    Args:
        t: any tensor.

    Returns:
        A plain tensor.
    """
    if not is_sharded(t):
        return t
    shard: Tensor = t.to_local()
    wait = getattr(shard, "wait", None)  # of one that is still under way
    return shard if wait is None else wait()


@dataclass(frozen=True, eq=False)
class Layout:
    """How the slices of a weight lie on this rank and on its peers.

    What a rank sums are *channels*, the indices along ``dim`` of its shard. A slice, or the piece
    of it that the rank has, is one channel or several.

    Attributes:
        view: the slices, of the whole weight.
        shape: of the whole weight.
        whole: how the shard splits into slices of the weight, if each of them is whole on a rank.
        groups: else the process groups over which sums must be added up, one a mesh dimension.
        dim: the dimension whose indices are the channels.
        count: of how many slices sums are exchanged.
        slots: for each channel of the shard the number of its slice; ascending.
    """

    view: View
    shape: torch.Size
    whole: View | None
    groups: tuple[Any, ...]
    dim: int
    count: int
    slots: Tensor

    @property
    def channels(self) -> View:
        """The view of the shard in which this rank sums."""
        return View.channel(self.dim)

    @property
    def entries(self) -> int:
        """The number of entries of a channel of the whole weight."""
        return self.shape.numel() // self.shape[self.dim]

    @property
    def slices(self) -> int:
        """The number of slices of the whole weight."""
        if self.view.kind == "channel":
            return self.shape[self.view.dim]
        return self.view.count

    def by_slice(self, sums: Tensor) -> Tensor:
        """The sums over slices, shape ``(count, ...)``.

        Args:
            sums: over channels, shape ``(channels, ...)``.
        """
        return torch.segment_reduce(sums, "sum", lengths=self._lengths, initial=0, unsafe=True)

    def by_channel(self, values: Tensor) -> Tensor:
        """The values of each channel's slice, shape ``(channels, ...)``.

        Args:
            values: of slices, shape ``(count, ...)``.
        """
        return values[self.slots]

    @functools.cached_property
    def _lengths(self) -> Tensor:
        # Not torch.bincount, which waits for the device.
        lengths = torch.zeros(self.count, dtype=torch.int64, device=self.slots.device)
        return lengths.index_add_(0, self.slots, torch.ones_like(self.slots))


def lay_out(p: Any, view: View) -> Layout:
    """Find where the slices of a DTensor in a view of the whole of it live.

    Args:
        p: a DTensor.
        view: of the whole of it.

    Returns:
        Which of the slices this rank has, and with whom it shares them.

    Raises:
        ValueError: for a view that does not fit, or a placement that is no shard and no replica.
    """
    view.check(p.shape)
    if p.device_mesh.get_coordinate() is None:  # a rank that has no part in this weight
        return Layout(view, p.shape, view, (), 0, 0, torch.zeros(0, dtype=torch.int64))
    shards = _shards(p)
    dim = 0 if view.kind == "layer" else view.dim
    shape = local(p).shape
    splitting = {mesh_dim for mesh_dim, at in shards.items() if view.kind == "layer" or at != dim}
    whole, count, slots = view, 1, torch.zeros(shape[dim], dtype=torch.int64)
    if view.kind == "channel":
        count, slots = shape[dim], torch.arange(shape[dim])
    elif view.kind == "blocks":
        width = p.shape[dim] // view.count
        pieces, mine = _pieces(p, dim)
        count, slots = view.count, mine // width
        if all(len(rows) == width * len((rows // width).unique()) for rows in pieces):
            count, slots = len(mine) // width, torch.arange(len(mine)) // width
            whole = View.blocks(max(count, 1), dim)
        else:
            splitting |= {mesh_dim for mesh_dim, at in shards.items() if at == dim}
    groups = tuple(p.device_mesh.get_group(i) for i in sorted(splitting))
    return Layout(view, p.shape, None if groups else whole, groups, dim, count, slots.to(p.device))


def lay_out_channels(p: Any, dim: int = 0) -> Layout:
    """The channels of the whole of a DTensor, for sums that every rank must have of all of them.

    Args:
        p: a DTensor.
        dim: along which channels lie (default: 0).

    Returns:
        As :func:`lay_out`.
    """
    groups = tuple(p.device_mesh.get_group(i) for i in sorted(_shards(p)))
    slots = _pieces(p, dim)[1].to(p.device)
    return Layout(View.channel(dim), p.shape, None, groups, dim, p.shape[dim], slots)


def sum_over_ranks_(sums: Sequence[Tensor], layouts: Sequence[Layout]) -> None:
    """Add up, in place, what ranks have of the slices of many weights, one collective a group.

    Weights that are sharded along two dimensions of a mesh are summed along one, then along the
    other, together with those that are sharded along one of them only.

    Args:
        sums: for each weight, of any shape that begins with the layout's ``count``, one dtype.
        layouts: theirs, in the same order on all ranks.
    """
    members: dict[Any, tuple[Any, list[int]]] = {}
    for i, layout in enumerate(layouts):
        for group in layout.groups:
            ranks = tuple(torch.distributed.get_process_group_ranks(group))
            members.setdefault((ranks, sums[i].device), (group, []))[1].append(i)
    for group, indices in members.values():
        _all_reduce_([sums[i] for i in indices], group)


def summed_gradients(pairs: Sequence[tuple[Tensor, Any]]) -> list[Tensor]:
    """Gradients in the placements of their parameters.

    Those of replicas that are sums still to be made, as tensor parallelism leaves them on the
    weights of norms, are added up in one collective a process group, whatever their number.

    Args:
        pairs: parameters and their gradients.
    """
    grads = [g for _, g in pairs]
    groups: dict[Any, tuple[Any, list[int]]] = {}
    for i, (p, g) in enumerate(pairs):
        if not is_sharded(p) or g.placements == p.placements:
            continue
        differ = [k for k, at in enumerate(g.placements) if at != p.placements[k]]
        if all(
            g.placements[k].is_partial("sum") and p.placements[k].is_replicate() for k in differ
        ):
            grads[i] = g.to_local().clone()
            for k in differ:
                group = p.device_mesh.get_group(k)
                ranks = tuple(torch.distributed.get_process_group_ranks(group))
                groups.setdefault((ranks, g.dtype, g.device), (group, []))[1].append(i)
        else:
            grads[i] = g.redistribute(p.device_mesh, p.placements)
    for group, members in groups.values():
        _all_reduce_([grads[i] for i in members], group)
    return grads


def shard_like(t: Tensor, p: Any) -> Tensor:
    """``t`` as a DTensor in the placements of ``p``, or as a plain tensor if ``p`` is one.

    A plain tensor is the whole, on every rank, and is only cut. A DTensor that is not placed as
    ``p`` is gathered, on all ranks at once.
    """
    if not is_sharded(p):
        return cast(Tensor, t.full_tensor()) if is_sharded(t) else t
    if is_sharded(t):
        same = t.placements == p.placements
        return cast(Tensor, t if same else t.redistribute(p.device_mesh, p.placements))
    from torch.distributed.tensor import DTensor

    shard = t.to(p.device)
    for dim in set(_shards(p).values()):
        shard = shard.index_select(dim, _pieces(p, dim)[1].to(p.device))
    return DTensor.from_local(
        shard.contiguous(),
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


def _all_reduce_(tensors: Sequence[Tensor], group: Any) -> None:
    """Add tensors of one dtype up over a process group, in place, in one message."""
    message = torch.cat([t.flatten() for t in tensors])
    torch.distributed.all_reduce(message, group=group)
    parts = torch.split(message, [t.numel() for t in tensors])
    torch._foreach_copy_(
        list(tensors), [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)]
    )


def _shards(p: Any) -> dict[int, int]:
    """The mesh dimensions that shard a DTensor, and which of its dimensions they shard."""
    shards = {}
    for mesh_dim, placement in enumerate(p.placements):
        dim = getattr(placement, "dim", None)
        if dim is None and not placement.is_replicate():
            raise ValueError(
                f"a weight of shape {tuple(p.shape)} has the placements {p.placements}; "
                "must be shards and replicas"
            )
        if dim is not None and p.device_mesh.size(mesh_dim) > 1:
            shards[mesh_dim] = dim
    return shards


def _pieces(p: Any, dim: int) -> tuple[list[Tensor], Tensor]:
    """The indices along a dimension that each part of the mesh has, and those of this rank."""
    order = [mesh_dim for mesh_dim, at in _shards(p).items() if at == dim]
    # FSDP2 shards what tensor parallelism has sharded before, though its mesh dimension is first.
    order.sort(key=lambda i: -i if hasattr(p.placements[i], "split_factor") else -math.inf)
    pieces: dict[tuple[int, ...], Tensor] = {(): torch.arange(p.shape[dim])}
    for mesh_dim in order:
        size = p.device_mesh.size(mesh_dim)
        pieces = {
            (*where, i): rows[i * width : (i + 1) * width]
            for where, rows in pieces.items()
            for width in [-(-len(rows) // size)]
            for i in range(size)
        }
    coordinate = p.device_mesh.get_coordinate()
    mine = pieces[tuple(coordinate[i] for i in order)]
    if len(mine) != local(p).shape[dim]:
        raise ValueError(
            f"cannot tell which of the {p.shape[dim]} indices along dimension {dim} of a weight "
            f"with the placements {p.placements} this rank has"
        )
    return list(pieces.values()), mine
