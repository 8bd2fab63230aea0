"""How weights lie in memory, and what their slices are for: shared by all kernels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from normwise.geometry import View, memory_layout
from normwise.optim.projection import ViewOption

__all__ = ["Mode", "memory_layout", "mode", "slicing"]

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
