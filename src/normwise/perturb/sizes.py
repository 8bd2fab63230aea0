"""Directions that are given the sizes of weights, wherever the slices of both live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from normwise.geometry import View, at_least_float32, global_norm, norms, unit
from normwise.sharding import Layout, is_sharded, lay_out, sum_over_ranks_

__all__ = ["Located", "sized_as", "sized_together"]


class Located:
    """A weight, its view, and where its slices are.

    Args:
        weight: a parameter, plain or a DTensor.
        view: its slices.

    Raises:
        ValueError: if the view does not fit.
    """

    def __init__(self, weight: Tensor, view: View) -> None:
        view.check(weight.shape)
        self.view: View | None = view
        self.layout: Layout | None = None
        if is_sharded(weight):
            layout = lay_out(weight, view)
            self.view, self.layout = layout.whole, None if layout.whole else layout


def sized_as(
    weights: Sequence[Tensor], directions: Sequence[Tensor], located: Sequence[Located]
) -> list[Tensor]:
    """‖w‖·d/‖d‖ for each slice of each direction d: 0 where d or w is zero, or d not finite.

    Args:
        weights: this rank's shards of weights, or whole weights.
        directions: d, of the same shapes.
        located: where the slices of each are.

    Returns:
        Tensors of the shapes of ``weights``, in float32 or better.
    """
    ratios = _split_ratios(weights, directions, located)
    sized = []
    for w, d, at in zip(weights, directions, located, strict=True):
        if at.view is not None:
            sized.append(_sized(w, d, at.view))
        else:
            assert at.layout is not None
            out = at_least_float32(d).clone()
            slices = at.layout.channels.slices(out)
            factor = at.layout.by_channel(next(ratios)).to(out.dtype)
            factor = factor.view(-1, *(1 for _ in slices.shape[1:]))
            # A product with an entry that is not finite would be NaN even at ratio 0.
            slices.copy_(torch.where(factor > 0, slices, 0) * factor)
            sized.append(out)
    return sized


def sized_together(
    weights: Sequence[Tensor], directions: Sequence[Tensor], located: Sequence[Located]
) -> list[Tensor]:
    """‖w‖·d/‖d‖ with one norm over all weights; 0 where all of d is zero, or d not finite.

    Args:
        weights: as for :func:`sized_as`.
        directions: as for :func:`sized_as`.
        located: where the weights are, in the view ``layer``.
    """
    length = global_norm(_norms_of(weights, located))
    size = global_norm(_norms_of(directions, located))
    usable = (size > 0) & torch.isfinite(size)
    ratio = torch.where(usable, length / size, 0)
    return [
        torch.where(usable.to(d.device), at_least_float32(d), 0) * ratio.to(d.device)
        for d in directions
    ]


def _sized(w: Tensor, direction: Tensor, view: View) -> Tensor:
    d, size = unit(view.slices(at_least_float32(direction)))
    _, length = unit(view.slices(at_least_float32(w)))
    # The optimizer, or a gradient scaler, is to meet what is not finite; the weights are not.
    d = torch.where(torch.isfinite(size), d, 0)
    sized = torch.empty_like(w, dtype=d.dtype)
    view.slices(sized).copy_(length * d)
    return sized


def _split_ratios(
    weights: Sequence[Tensor], directions: Sequence[Tensor], located: Sequence[Located]
) -> Iterator[Tensor]:
    """‖w‖/‖d‖ of the slices that are split over ranks, weight by weight, in one exchange."""
    layouts = [at.layout for at in located if at.layout is not None]
    sums = [
        torch.stack([_squares(w, at.layout), _squares(d, at.layout)], 1)
        for w, d, at in zip(weights, directions, located, strict=True)
        if at.layout is not None
    ]
    sum_over_ranks_(sums, layouts)
    for of_weight in sums:
        of_w, of_d = of_weight.unbind(1)
        usable = (of_d > 0) & torch.isfinite(of_d)
        yield torch.where(usable, (of_w / torch.where(usable, of_d, 1)).sqrt(), 0)


def _squares(t: Tensor, layout: Layout) -> Tensor:
    """Sums of squares over the slices' pieces; in float64 a square of float32 cannot overflow."""
    rows = layout.channels.slices(t).flatten(1).double()
    return layout.by_slice(rows.square().sum(1))


def _norms_of(tensors: Sequence[Tensor], located: Sequence[Located]) -> list[Tensor]:
    """The norm of each whole tensor, of which this rank may have a part."""
    layouts = [at.layout for at in located if at.layout is not None]
    sums = [
        _squares(t, at.layout)
        for t, at in zip(tensors, located, strict=True)
        if at.layout is not None
    ]
    sum_over_ranks_(sums, layouts)
    split = iter(sums)
    return [
        norms(t, View.layer()) if at.view is not None else next(split).sqrt()
        for t, at in zip(tensors, located, strict=True)
    ]
