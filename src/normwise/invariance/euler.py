"""Euler products ⟨w, g⟩ over slices, and the finest view in which they all vanish."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normwise.geometry import View
from normwise.invariance.specimen import TOLERANCE

__all__ = ["Evidence", "Finding"]


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
    """What the draws said about one parameter: sums over channels, never the gradients.

    For the first two dimensions of a weight, or the only one, ``sums[dim]`` and ``sizes[dim]``
    collect a draw's Σ w·g and Σ |w·g| over every channel, and ``noise[dim]`` the rounding of
    Σ |w·g|: its change when the upstream gradient is multiplied by a number that is no power of 2
    and the gradient divided by it again.
    """

    shape: torch.Size
    sums: dict[int, list[Tensor]] = field(default_factory=dict)
    sizes: dict[int, list[Tensor]] = field(default_factory=dict)
    noise: dict[int, Tensor] = field(default_factory=dict)
    totals: list[float] = field(default_factory=list)

    def add(self, w: Tensor, g: Tensor) -> None:
        """Add the gradient of one draw."""
        products = euler_products(w, g)
        for dim in _dims(self.shape):
            by_channel = _by_channel(products, dim)
            self.sums.setdefault(dim, []).append(by_channel.sum(1).cpu())
            self.sizes.setdefault(dim, []).append(by_channel.abs().sum(1).cpu())
        self.totals.append(float(products.sum()))

    def add_noise(self, w: Tensor, difference: Tensor) -> None:
        """Add the rounding of a gradient: the difference of two that should be equal."""
        products = euler_products(w, difference).abs()
        for dim in _dims(self.shape):
            self.noise[dim] = _by_channel(products, dim).sum(1).cpu()

    def find(self) -> Finding:
        """The finest view in which every slice with a gradient passes in every draw."""
        if not self.sums:
            return Finding(None, 0.0, self.shape[0] if self.shape else 1, False, self.shape.numel())
        live = {dim: self._live(dim) for dim in self.sums}
        dead = int((~live[0]).sum())
        if not live[0].any():
            return Finding(None, 0.0, dead, False, self.shape.numel())
        found: tuple[int, Finding] | None = None
        part = None
        for dim in self.sums:
            channels = len(live[dim])
            per_channel = self.shape.numel() // channels
            for count in _divisors_downward(channels):
                entries = per_channel * channels // count
                # A slice of one entry has no direction: a zero product is a zero gradient.
                if entries < 2 or (found and count <= found[0]):
                    continue
                residuals = self._residuals(dim, count, live[dim])
                passing = residuals <= TOLERANCE
                if passing.all():
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
        live = self.sizes[dim][0] > 0
        channels = len(live)
        count = {"layer": 1, "channel": channels}.get(view.kind, view.count)
        return float(self._residuals(dim, count, live).max()) if live.any() else math.nan

    def _live(self, dim: int) -> Tensor:
        """The channels whose gradient is more than rounding."""
        size = self.sizes[dim][0]
        return (size > 0) & (self.noise[dim] <= TOLERANCE * size)

    def _residuals(self, dim: int, count: int, live: Tensor) -> Tensor:
        """For each of ``count`` blocks the largest |Σ w·g| / Σ |w·g|; −1 without a live channel."""
        sums = torch.stack(self.sums[dim]) * live
        sizes = torch.stack(self.sizes[dim]) * live
        sums = sums.view(len(sums), count, -1).sum(2)
        sizes = sizes.view(len(sizes), count, -1).sum(2)
        # A draw in which a live block happens to have no gradient is no evidence.
        ratio = torch.where(sizes > 0, sums.abs() / sizes, 0).amax(0)
        return torch.where(live.view(count, -1).any(1), ratio, -1.0)


def euler_products(w: Tensor, g: Tensor) -> Tensor:
    """w·g entry by entry; the real part of w̄·g for complex weights."""
    w = w.detach()
    return (w.conj() * g).real if w.is_complex() else w * g


def chance_of_error(entries: int, draws: int) -> float:
    """A bound on the odds that a slice without any symmetry passes every draw: (τ√n)^draws.

    With independent entries, Σ w·g is spread as √Σ(w·g)², which is at least Σ|w·g|/√n, so that it
    falls below τ·Σ|w·g| with a chance below τ√n. Points and upstream gradients are drawn
    independently.
    """
    return float(min(1.0, TOLERANCE * math.sqrt(entries)) ** draws)


def _dims(shape: torch.Size) -> range:
    return range(min(len(shape), 2) or 1)


def _by_channel(products: Tensor, dim: int) -> Tensor:
    if products.ndim == 0:
        return products.reshape(1, 1)
    return products.movedim(dim, 0).flatten(1) if products.ndim > 1 else products.unsqueeze(1)


def _view(dim: int, count: int, channels: int) -> View:
    if count == 1:
        return View.layer()
    return View.channel(dim) if count == channels else View.blocks(count, dim)


def _divisors_downward(n: int) -> list[int]:
    return [k for k in range(n, 0, -1) if n % k == 0]
