"""Euler products ⟨w, g⟩ over slices, and the finest view in which they all vanish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normwise.geometry import View
from normwise.invariance.replica import TOLERANCE
from normwise.invariance.symmetry import by_index

__all__ = ["Evidence", "Finding", "chance_of_error", "index_sets"]

# More indices along two or three dimensions at once would cost more than all the rest.
_MOST_INDICES = 1_048_576


# A residual below this share of what chance gives, in every draw, is no accident.
_NEAR = 3e-3


@dataclass(frozen=True)
class Finding:
    """The finest view found in one parameter.

    Args:
        view: the view, or None where there is none.
        residual: the largest |⟨w, g⟩| / Σ|w g| over draws and slices, in ``view`` or, without one,
            over draws for the whole tensor.
        dead: the number of channels along dimension 0 whose gradient is zero up to rounding.
        has_gradient: whether any channel has one.
        entries: the number of entries of a slice.
        part: the channels, along a dimension, that are invariant in blocks where the rest is not:
            ``(dim, block length, channels)``, or None.
    """

    view: View | None
    residual: float
    dead: int
    has_gradient: bool
    entries: int
    part: tuple[int, int, list[int]] | None = None


@dataclass
class Evidence:
    """What the draws said about one parameter: sums over indices, never the gradients.

    For each of its index ``sets`` (see :func:`index_sets`), ``sums[dims]`` and ``sizes[dims]``
    collect a draw's Σ w·g and Σ |w·g| at every index, and ``noise[dims]`` the rounding of
    Σ |w·g|: its change when the upstream gradient is multiplied by a number that is no power of 2
    and the gradient divided by it again. A weight that is only used after a number was added to it
    (``1 + w``) has that number as its ``shift``, and the products are those of the sum.
    """

    shape: torch.Size
    sets: tuple[tuple[int, ...], ...]
    shift: float = 0.0
    sums: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    sizes: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    noise: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def add(self, products: Tensor) -> None:
        """Add the products w·g of one draw."""
        sizes = products.abs()
        for dims in self.sets:
            self.sums.setdefault(dims, []).append(by_index(products, dims).cpu())
            self.sizes.setdefault(dims, []).append(by_index(sizes, dims).cpu())

    def add_noise(self, difference: Tensor) -> None:
        """Add the rounding of the products: the difference of two that should be equal."""
        for dims in self.sets:
            self.noise[dims] = by_index(difference.abs(), dims).cpu()

    def find(self) -> Finding:
        """The finest view in which every slice with a gradient passes in every draw."""
        if not self.sums:
            return Finding(None, 0.0, self.shape[0] if self.shape else 1, False, self.shape.numel())
        # Views run along the first or the second dimension.
        live = {dim: self.live((dim,)) for dim in (0, 1) if (dim,) in self.sets}
        dead = int((~live[0]).sum())
        if not live[0].any():
            return Finding(None, 0.0, dead, False, self.shape.numel())
        found: tuple[int, Finding] | None = None
        part = None
        for dim in live:
            channels = len(live[dim])
            per_channel = self.shape.numel() // channels
            for count in _divisors_downward(channels):
                entries = per_channel * channels // count
                # A slice of one entry has no direction: a zero product is a zero gradient.
                if entries < 2 or (found and count <= found[0]):
                    continue
                residuals = self._residuals(dim, count, live[dim])
                passing = residuals <= TOLERANCE
                if passing.all() and not self.shift:
                    view = _view(dim, count, channels)
                    found = count, Finding(view, float(residuals.max()), dead, True, entries)
                    break
                evident = passing & (residuals >= 0)
                if part is None and count > 1 and evident.any():
                    length = channels // count
                    at = torch.arange(channels).reshape(count, length)[evident].flatten()
                    part = dim, length, at.tolist()
        if found:
            return found[1]
        whole = float(self._residuals(0, 1, live[0]).max())
        return Finding(None, whole, dead, True, self.shape.numel(), part)

    def residual_in(self, view: View) -> float:
        """The largest |⟨w, g⟩| / Σ|w g| over draws and slices; NaN without a gradient."""
        dim = view.dim
        if not self.sums:
            return math.nan
        live = self.sizes[(dim,)][0] > 0
        channels = len(live)
        count = {"layer": 1, "channel": channels}.get(view.kind, view.count)
        return float(self._residuals(dim, count, live).max()) if live.any() else math.nan

    def near_miss(self) -> tuple[View, float] | None:
        """The finest view that passes nearly: far nearer to zero than chance, and not zero.

        By chance a slice of n entries has residuals of 1/√n; see :func:`chance_of_error`.
        """
        if not self.sums or self.shift:
            return None
        for dim in (d for d in (0, 1) if (d,) in self.sets):
            live = self.live((dim,))
            for count in _divisors_downward(len(live)):
                entries = self.shape.numel() // count
                if entries < 2 or not live.any():
                    continue
                residual = float(self._residuals(dim, count, live).max())
                if TOLERANCE < residual <= _NEAR / math.sqrt(entries):
                    return _view(dim, count, len(live)), residual
        return None

    def live(self, dims: tuple[int, ...]) -> Tensor:
        """The indices whose gradient is more than rounding."""
        size = self.sizes[dims][0]
        return (size > 0) & (self.noise[dims] <= TOLERANCE * size)

    def noisy(self, dims: tuple[int, ...]) -> Tensor:
        """The indices whose gradient is nothing but rounding.

        Rounding may repeat itself by chance, or cancel in the one draw that is repeated; then it is
        told by its size beside the others'.
        """
        sizes = torch.stack(self.sizes[dims])
        large = (sizes > 2.0**-43 * sizes.amax(1, keepdim=True)).any(0)
        return ((sizes[0] > 0) & (self.noise[dims] > TOLERANCE * sizes[0])) | ~large

    def seen(self, dims: tuple[int, ...]) -> Tensor:
        """The indices that had a gradient in any draw: an activation may open at one point only."""
        return ~self.noisy(dims)

    def _residuals(self, dim: int, count: int, live: Tensor) -> Tensor:
        """For each of ``count`` blocks the largest |Σ w·g| / Σ |w·g|; −1 without a live channel."""
        sums = torch.stack(self.sums[(dim,)]) * live
        sizes = torch.stack(self.sizes[(dim,)]) * live
        sums = sums.view(len(sums), count, -1).sum(2)
        sizes = sizes.view(len(sizes), count, -1).sum(2)
        # A draw in which a live block happens to have no gradient is no evidence.
        ratio = torch.where(sizes > 0, sums.abs() / sizes, 0).amax(0)
        return torch.where(live.view(count, -1).any(1), ratio, -1.0)


def chance_of_error(entries: int, draws: int) -> float:
    """A bound on the odds that a slice without any symmetry passes every draw: (τ√n)^draws.

    With independent entries, Σ w·g is spread as √Σ(w·g)², which is at least Σ|w·g|/√n, so that it
    falls below τ·Σ|w·g| with a chance below τ√n. Points and upstream gradients are drawn
    independently.
    """
    return float(min(1.0, TOLERANCE * math.sqrt(entries)) ** draws)


def index_sets(shape: Sequence[int], groups: int | None = None) -> tuple[tuple[int, ...], ...]:
    """The dimensions whose indices may be units.

    They are the first two and, in stacks of matrices (experts), the rest and the leading ones with
    each of the last two.

    Args:
        shape: of the parameter.
        groups: of the convolution of which it is the kernel, None if it is none. With groups, an
            input channel is an index along both of the first dimensions.
    """
    if len(shape) < 2:
        return ((0,),)
    stacks: list[tuple[int, ...]] = []
    if groups is not None:
        stacks = [(0, 1)] if groups > 1 else []
    elif len(shape) == 3:
        stacks = [(2,), (0, 1), (0, 2)]
    elif len(shape) == 4:
        stacks = [(2,), (3,), (0, 1, 2), (0, 1, 3)]
    sets: list[tuple[int, ...]] = [(0,), (1,)]
    for dims in stacks:
        sizes = [shape[d] for d in dims]
        if min(sizes) > 1 and math.prod(sizes) <= min(_MOST_INDICES, math.prod(shape) // 2):
            sets.append(dims)
    return tuple(sets)


def _view(dim: int, count: int, channels: int) -> View:
    if count == 1:
        return View.layer()
    return View.channel(dim) if count == channels else View.blocks(count, dim)


def _divisors_downward(n: int) -> list[int]:
    return [k for k in range(n, 0, -1) if n % k == 0]
