"""Slices of DTensors: each rank sums what it has of them, and one exchange adds the sums up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.geometry import View
from normwise.monitor.quantities import SteppedSlices
from normwise.sharding import lay_out_channels, local, sum_over_ranks_, summed_gradients

__all__ = ["ShardedWeight", "exchange", "local_gradients", "slices_from_sums"]


class ShardedWeight:
    """One DTensor that is watched, as a :class:`normwise.monitor.watched.Bucket` of one weight.

    All numbers are of the slices of the whole weight, the same on every rank, in float64.

    Args:
        p: the weight.
        view: how the whole of it splits.
        layer: its index among all that are watched.
        owner: the index of the optimizer that steps it.
    """

    def __init__(self, p: Any, view: View, layer: int, owner: int) -> None:
        self.params = [p]
        self.owner = owner
        self.device = p.device
        self.dtype = torch.float64
        self.rows = slice_count(view, p.shape)
        self.entries = p.shape.numel() // self.rows
        self.layer_index = torch.full((self.rows,), layer, device=p.device)
        self._dim = 0 if view.kind == "layer" else view.dim
        self._layout = lay_out_channels(p, self._dim)

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """As of a bucket: all rows are of the one weight."""
        yield 0, self.rows

    def gather(self, tensors: Sequence[Any]) -> Tensor:
        """A copy of this rank's shard."""
        return self.read(tensors).clone()

    def read(self, tensors: Sequence[Any]) -> Tensor:
        """This rank's shard, an alias."""
        return local(tensors[0].detach())

    def sums(self, before: Tensor, after: Tensor, gradient: Tensor | None) -> Tensor:
        """What this rank has of the sums of every channel of the whole weight.

        Args:
            before: this rank's shard before the step.
            after: the same after it.
            gradient: its gradient, or None.

        Returns:
            Shape ``(channels, 6)``.
        """
        channels = View.channel(self._dim)
        w, new = (channels.slices(t).flatten(1).double() for t in (before, after))
        update = new - w
        if gradient is None:
            g = torch.zeros_like(w)
        else:
            g = channels.slices(gradient).flatten(1).double()
        pairs = [(w, w), (new, new), (g, g), (w, update), (w, g), (update, update)]
        mine = torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs], 1)
        return self._placed(mine)

    def count_bad(self, after: Tensor) -> Tensor:
        """How many entries of each channel are not finite here, shape ``(channels, 1)``."""
        rows = View.channel(self._dim).slices(after).flatten(1)
        return self._placed((~rows.isfinite()).sum(1, keepdim=True).double())

    def by_slice(self, of_channels: Tensor) -> Tensor:
        """Sums over the channels of the whole weight to sums over its slices."""
        width = len(of_channels) // self.rows
        return of_channels.reshape(self.rows, width, -1).sum(1)

    def _placed(self, mine: Tensor) -> Tensor:
        whole = mine.new_zeros(self._layout.count, mine.shape[1])
        return whole.index_add_(0, self._layout.slots.to(mine.device), mine)


def slice_count(view: View, shape: Sequence[int]) -> int:
    """The number of slices of a weight of this shape."""
    if view.kind == "channel":
        return shape[view.dim]
    return 1 if view.kind == "layer" else view.count


def exchange(weights: Sequence[ShardedWeight], sums: Sequence[Tensor]) -> list[Tensor]:
    """Add sums up over the ranks, in one collective a process group, and over each slice.

    Args:
        weights: in the same order on all ranks.
        sums: of each, shape ``(channels, …)``.
    """
    sum_over_ranks_(sums, [weight._layout for weight in weights])
    return [weight.by_slice(s) for weight, s in zip(weights, sums, strict=True)]


def local_gradients(weights: Sequence[ShardedWeight]) -> list[Tensor | None]:
    """This rank's shard of each gradient; sums still to be made are made first."""
    pairs = [(w.params[0], w.params[0].grad) for w in weights if w.params[0].grad is not None]
    found = iter(summed_gradients(pairs))
    return [None if w.params[0].grad is None else local(next(found).detach()) for w in weights]


def slices_from_sums(sums: Tensor, lr: Tensor, decay: Tensor, exponent: Tensor) -> SteppedSlices:
    """What is measured of slices whose entries lie on several ranks, from their sums.

    ‖Δ‖² − ⟨ŵ, Δ⟩² is the square of the tangential part: exact to float64's rounding of ‖Δ‖², so
    an update that is radial but for one part in 10⁷ is where its digits end.

    Args:
        sums: shape ``(slices, 6)``.
        lr: as of :class:`SteppedSlices`, as are the others.
        decay: likewise.
        exponent: likewise.
    """
    ww, aa, gg, wd, wg, dd = sums.unbind(1)
    entries = torch.empty(len(sums), 0, device="meta")  # a quantity that reads them fails
    s = SteppedSlices(entries, entries, entries, lr, decay, exponent)
    norm = ww.sqrt()
    safe = torch.where(norm > 0, norm, 1)
    radial = wd / safe
    vars(s).update(
        norm_before=norm,
        norm=aa.sqrt(),
        gradient_norm=gg.sqrt(),
        radial=radial,
        gradient_radial=wg / safe,
        tangential_norm=(dd - radial.square()).clamp(min=0).sqrt(),
    )
    return s
