"""How weights lie in memory, and what their slices are for: shared by all kernels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from normwise.geometry import View
from normwise.optim.projection import ViewOption

Mode = Literal["free", "explicit", "fixed", "auto"]


def slicing(w: Tensor, view: ViewOption) -> View:
    """The view whose slices a kernel sums over for a weight."""
    if w.ndim < 2 or view is None:
        return View.layer()
    return view if isinstance(view, View) else View.channel()


def mode(w: Tensor, view: ViewOption, norm: str) -> Mode:
    """What is done to the slices of a weight."""
    if w.ndim < 2 or view is None:
        return "free"
    if view == "auto":
        return "auto"
    return "fixed" if norm == "fixed" else "explicit"


def memory_layout(w: Tensor, view: View) -> tuple[int, int, int] | None:
    """The shape (outer, slices, inner) that ``w`` has in memory order, if it is dense."""
    dims = sorted((d for d in range(w.ndim) if w.shape[d] != 1), key=w.stride, reverse=True)
    outer, slices, inner = 1, 1, 1
    for d in reversed(dims):
        if w.stride(d) != outer * slices * inner:
            return None
        if view.kind != "layer" and d == view.dim:
            slices = view.count if view.kind == "blocks" else w.shape[d]
            inner *= w.shape[d] // slices
        elif slices == 1:
            inner *= w.shape[d]
        else:
            outer *= w.shape[d]
    return outer, slices, inner
