"""Views: how a weight splits into slices, and the geometry of those slices.

A *view* says which entries of a weight share one norm. Everything in normwise that takes a norm,
projects, or measures an angle does it through the functions of this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["View", "cosine", "global_norm", "norms", "radial", "tangential", "unit"]

_SPELLING = re.compile(
    r"(?P<kind>channel|blocks|layer)(?:\((?P<number>\d+)(?:,\s*(?P<dim>\d+))?\))?"
)
_SPELLINGS = "'channel', 'channel(DIM)', 'blocks(COUNT)', 'blocks(COUNT, DIM)' or 'layer'"


@dataclass(frozen=True)
class View:
    """How one weight splits into slices, each with a norm of its own.

    ============================ ============================================== ===================
    view                         slices of a weight of shape ``(C, ...)``       made invariant by
    ============================ ============================================== ===================
    ``View.channel()``           ``C`` rows, one an output channel              BN, IN, WN, WS
    ``View.channel(1)``          the same for transposed convolutions           BN, IN, WN, WS
    ``View.blocks(k)``           ``k`` runs of ``C/k`` consecutive channels     GN(k), QK norm
    ``View.layer()``             the whole tensor                               LN, RMSNorm, GN(1)
    ============================ ============================================== ===================

    Use the constructors in the table. ``str(view)`` is a spelling that :meth:`parse` reads back.

    Args:
        kind: ``"channel"``, ``"blocks"`` or ``"layer"``.
        dim: the dimension that is split (default: 0); not used by ``"layer"``.
        count: the number of blocks (default: 1); used by ``"blocks"`` alone.

    Raises:
        ValueError: for an unknown kind, a negative ``dim`` or a ``count`` below 1.
    """

    kind: Literal["channel", "blocks", "layer"]
    dim: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("channel", "blocks", "layer"):
            raise ValueError(f"Invalid view: {self.kind!r}; must be {_SPELLINGS}")
        if self.dim < 0:
            raise ValueError(f"Invalid dim of a view: {self.dim}; must be 0 or more")
        if self.count < 1:
            raise ValueError(f"Invalid number of blocks: {self.count}; must be 1 or more")

    @classmethod
    def channel(cls, dim: int = 0) -> View:
        """One slice for each index along ``dim`` (default: 0).

        Args:
            dim: along which channels lie (default: 0).
        """
        return cls("channel", dim=dim)

    @classmethod
    def blocks(cls, count: int, dim: int = 0) -> View:
        """``count`` slices, each a run of consecutive channels along ``dim`` (default: 0).

        Args:
            count: how many slices; it divides the number of channels.
            dim: along which channels lie (default: 0).

        Returns:
            The view.
        """
        return cls("blocks", dim=dim, count=count)

    @classmethod
    def layer(cls) -> View:
        """One slice: the whole tensor."""
        return cls("layer")

    @classmethod
    def parse(cls, text: str) -> View:
        """Read the spelling that ``str(view)`` writes, such as ``"channel"`` or ``"blocks(8)"``.

        Args:
            text: of a view.

        Returns:
            The view.

        Raises:
            ValueError: if ``text`` is not such a spelling.
        """
        match = _SPELLING.fullmatch(text.strip())
        kind, number, dim = match.group("kind", "number", "dim") if match else ("", None, None)
        if kind == "layer" and number is None:
            return cls.layer()
        if kind == "channel" and dim is None:
            return cls.channel(int(number or 0))
        if kind == "blocks" and number is not None:
            return cls.blocks(int(number), int(dim or 0))
        raise ValueError(f"Invalid view: {text!r}; must be {_SPELLINGS}")

    def __str__(self) -> str:
        if self.kind == "layer":
            return "layer"
        if self.kind == "channel":
            return f"channel({self.dim})" if self.dim else "channel"
        return f"blocks({self.count}, {self.dim})" if self.dim else f"blocks({self.count})"

    def check(self, shape: Sequence[int]) -> None:
        """Raise ``ValueError`` if a weight of this ``shape`` cannot be split in this view.

        Args:
            shape: of the weight.
        """
        if self.kind == "layer":
            return
        if self.dim >= len(shape):
            raise ValueError(f"view {self} does not fit a weight of shape {tuple(shape)}")
        if shape[self.dim] % self.count:
            raise ValueError(
                f"view {self} does not fit a weight of shape {tuple(shape)}: "
                f"dimension {self.dim} is not a multiple of {self.count}"
            )

    def slices(self, w: Tensor) -> Tensor:
        """An alias of ``w``, of shape ``(slices, ...)``, whose first index runs over the slices.

        No entry is copied, whatever the strides of ``w``, and the remaining indices mean the same
        for every tensor of one shape, whatever its memory format: a weight in ``channels_last``
        and its contiguous gradient can be multiplied entry by entry. The result has two dimensions
        or more.

        Args:
            w: a weight that this view fits.

        Raises:
            ValueError: if the view does not fit the shape of ``w``.
        """
        self.check(w.shape)
        if self.kind == "layer":
            s = w.unsqueeze(0)
        elif self.kind == "channel":
            s = w.movedim(self.dim, 0)
        else:
            s = w.movedim(self.dim, 0)
            s = torch.unflatten(s, 0, (self.count, w.shape[self.dim] // self.count))
        return s if s.ndim > 1 else s.unsqueeze(1)


def slice_norms(slices: Tensor, dim: int = 1) -> Tensor:
    """Norms of the slices of an alias made by :meth:`View.slices`.

    Each slice is scaled by its largest entry before it is squared, so norms from 1e-30 to 1e30
    neither overflow nor underflow in float32.

    Args:
        slices: shape ``(slices, ...)``, or with more leading dimensions.
        dim: the number of leading dimensions that tell the slices apart (default: 1).

    Returns:
        The norms, with every dimension from ``dim`` on reduced to 1.
    """
    inner = tuple(range(dim, slices.ndim))
    if slices.numel() == 0:
        return slices.new_zeros(*slices.shape[:dim], *(1 for _ in inner))
    # The scale cancels in the result, so no gradient need pass through it.
    largest = slices.detach().abs().amax(inner, keepdim=True)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)
    length: Tensor = torch.linalg.vector_norm(slices / scale, dim=inner, keepdim=True)
    return scale * length


def unit(slices: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Directions and norms of slices; the direction of a zero slice is zero.

    Arguments and norms are those of :func:`slice_norms`; directions have the shape of ``slices``.

    Args:
        slices: of any shape.
        dim: from which dimension on a slice's entries lie (default: 1).

    Returns:
        Directions of the shape of ``slices``, and norms with every dimension from ``dim`` on of
        size 1.
    """
    norm = slice_norms(slices, dim)
    return slices / torch.where(norm > 0, norm, 1), norm


def dot(a: Tensor, b: Tensor, dim: int = 1) -> Tensor:
    """Inner products of slices: every dimension from ``dim`` on is summed, and kept with size 1."""
    return (a * b).sum(tuple(range(dim, a.ndim)), keepdim=True)


def norms(w: Tensor, view: View) -> Tensor:
    """The Euclidean norm of each slice of ``w``, shape ``(slices,)``, in float32 or better.

    Args:
        w: a weight.
        view: whose slices.

    Returns:
        Shape ``(slices,)``.
    """
    return slice_norms(view.slices(at_least_float32(w))).flatten()


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all entries of many tensors together, in float32 or better.

    It neither overflows nor underflows, as :func:`slice_norms` does not.

    Args:
        tensors: of any shapes and dtypes; the result is on the device of the first.

    Returns:
        A tensor of no dimension.

    Raises:
        ValueError: if there is no tensor.
    """
    whole = [norms(t, View.layer()) for t in tensors]
    if not whole:
        raise ValueError("global_norm of no tensors; give one or more")
    together = torch.cat(
        [n.to(whole[0].device, torch.promote_types(n.dtype, whole[0].dtype)) for n in whole]
    )
    return slice_norms(together.unsqueeze(0)).squeeze()


def cosine(a: Tensor, b: Tensor, view: View) -> Tensor:
    """The cosine of each slice of ``a`` and of ``b``, shape ``(slices,)``; 0 for zero slices.

    Args:
        a: a tensor.
        b: another of its shape.
        view: whose slices.

    Returns:
        Shape ``(slices,)``, in float32 or better.
    """
    a, b = at_least_float32(a), at_least_float32(b)
    return dot(unit(view.slices(a))[0], unit(view.slices(b))[0]).flatten()


def radial(u: Tensor, w: Tensor, view: View) -> Tensor:
    """The part of each slice of ``u`` that is parallel to the same slice of ``w``: ŵ⟨ŵ, u⟩.

    Args:
        u: a gradient or an update, of the shape of ``w``.
        w: the weight. Where a slice of it is zero, the radial part is zero.
        view: how both split into slices.

    Returns:
        A tensor of the shape of ``u``, in float32 or better.
    """
    u, w = at_least_float32(u), at_least_float32(w)
    part = torch.empty_like(u)
    direction, _ = unit(view.slices(w))
    view.slices(part).copy_(direction * dot(direction, view.slices(u)))
    return part


def tangential(u: Tensor, w: Tensor, view: View) -> Tensor:
    """What is left of ``u`` without its radial part: orthogonal to ``w``, slice by slice.

    Args:
        u: an update of ``w``.
        w: a weight.
        view: whose slices.

    Returns:
        A tensor of the shape of ``u``.
    """
    return at_least_float32(u) - radial(u, w, view)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for float16 and bfloat16, else ``dtype`` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def at_least_float32(t: Tensor) -> Tensor:
    """``t`` itself, or its float32 copy if it is float16 or bfloat16."""
    return t.to(computing_dtype(t.dtype))


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


def lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same entries at the same places of their memory.

    The stride of a dimension of one entry says nothing, and gradients of 1×1 convolutions often
    have another one there than their weights.
    """
    if a.shape != b.shape:
        return False
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.stride() == b.stride() or all(n == 1 or s == t for n, s, t in strides)
