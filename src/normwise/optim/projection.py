"""The cosine gate and the projection of AdamP and SGDP (arXiv 2006.08217, Algorithms 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from normwise.geometry import View, dot, slice_norms, unit

ViewOption = View | Literal["auto"] | None

_CHANNEL = View.channel()
# Weights beyond this many entries are large enough to be handled alone, without a copy.
BATCHED_ENTRIES = 1 << 18


def project_(
    updates: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    views: Sequence[ViewOption],
    *,
    delta: float,
    eps: float,
) -> list[Tensor | bool]:
    """Remove, in place, the radial part of each update that its view asks for.

    Small tensors that share a view and a shape are handled in one batch, and no value is read back
    to the host: the gate of ``"auto"`` stays a tensor.

    Args:
        updates: the steps about to be taken, real, in float32 or better.
        weights: the weights, of the same shapes and dtypes.
        grads: the raw gradients, likewise; only ``"auto"`` looks at them.
        views: for each weight ``"auto"``, a :class:`View`, or ``None`` (left alone).
        delta: the gate's threshold, see :func:`gated_radial`.
        eps: the guard of the official implementation; used by ``"auto"`` alone.

    Returns:
        For each weight whether it was projected: a bool, or in ``"auto"`` a 0-dim bool tensor.
    """
    projected: list[Tensor | bool] = [view is not None for view in views]
    if _is_hidden(weights, views):
        _remove_radial_(list(updates), list(weights), _spelled(views))
        return projected
    for view, members in _buckets(views, weights):
        slicing = view if isinstance(view, View) else _CHANNEL
        u, w = (batch(tensors, members, slicing) for tensors in (updates, weights))
        if isinstance(view, View):
            direction, _ = unit(w, 2)
            radial = dot(direction, u, 2)
        else:
            g = batch(grads, members, slicing)
            direction, radial, open_ = gated_radial(u, w, g, delta=delta, eps=eps)
            for i, gate in zip(members, open_.unbind(), strict=True):
                projected[i] = gate
        if is_alias(members):
            u.addcmul_(direction, radial, value=-1)
        else:
            unbatch_(updates, members, slicing, u - direction * radial)
    return projected


def norms_by_slice(weights: Sequence[Tensor], views: Sequence[ViewOption]) -> list[Tensor]:
    """The norms of the slices of weights that have a :class:`View`, for :func:`retract_`."""
    if _is_hidden(weights, views):
        return [cast(Tensor, _norms_by_slice(list(weights), _spelled(views)))]
    return _norms_of_buckets(weights, views)


def _norms_of_buckets(weights: Sequence[Tensor], views: Sequence[ViewOption]) -> list[Tensor]:
    return [
        slice_norms(batch(weights, members, view), 2)
        for view, members in _buckets(views, weights)
        if isinstance(view, View)
    ]


def retract_(
    weights: Sequence[Tensor], views: Sequence[ViewOption], norms: Sequence[Tensor]
) -> None:
    """Put each slice on a norm: those of :func:`norms_by_slice`, or radii of their shapes.

    A slice whose norm is or is to be 0 is set to 0.
    """
    if _is_hidden(weights, views):
        _retract_(list(weights), _spelled(views), norms[0])
        return
    remaining = iter(norms)
    for view, members in _buckets(views, weights):
        if isinstance(view, View):
            w = batch(weights, members, view)
            norm = slice_norms(w, 2)
            unbatch_(weights, members, view, w * retraction(next(remaining), norm))


def retraction(radius: Tensor, norm: Tensor) -> Tensor:
    """The factor that puts a slice of a norm on its radius: exactly 1 where nothing has changed."""
    return radius / torch.where(norm > 0, norm, 1)


def _buckets(
    views: Sequence[ViewOption], weights: Sequence[Tensor]
) -> Iterator[tuple[View | Literal["auto"], list[int]]]:
    """The indices of weights to handle together: one view and shape each, in a fixed order."""
    buckets: dict[tuple[View | Literal["auto"], torch.Size, int], list[int]] = {}
    for i, (view, w) in enumerate(zip(views, weights, strict=True)):
        if view is not None and w.numel() > 0:
            alone = i if w.numel() > BATCHED_ENTRIES else -1
            buckets.setdefault((view, w.shape, alone), []).append(i)
    for (view, _, _), members in buckets.items():
        yield view, members


def is_alias(members: list[int]) -> bool:
    """Whether a batch of these is an alias: of one member, changed in place.

    Outside autograd, whose saved tensors must not change.
    """
    return len(members) == 1 and not torch.is_grad_enabled()


def _is_hidden(weights: Sequence[Tensor], views: Sequence[ViewOption]) -> bool:
    """Whether torch.compile is to see the work on slices as operators, and not what is in them.

    On the CPU its code generator fails on such reductions (pytorch#196570).
    """
    return (
        torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(w.device.type == "cpu" for w in weights)
        and any(isinstance(view, View) for view in views)
        and "auto" not in views
    )


def _spelled(views: Sequence[ViewOption]) -> list[str]:
    return ["" if view is None else str(view) for view in views]


def _parsed(spellings: Sequence[str]) -> list[ViewOption]:
    return [View.parse(spelling) if spelling else None for spelling in spellings]


@torch.library.custom_op(
    "normwise::remove_radial_",
    mutates_args=("updates",),
    schema="(Tensor(a!)[] updates, Tensor[] weights, str[] views) -> ()",
)
def _remove_radial_(updates: list[Tensor], weights: list[Tensor], views: list[str]) -> None:
    project_(updates, weights, (), _parsed(views), delta=0.0, eps=0.0)


@torch.library.custom_op(
    "normwise::norms_by_slice",
    mutates_args=(),
    schema="(Tensor[] weights, str[] views) -> Tensor",
)
def _norms_by_slice(weights: list[Tensor], views: list[str]) -> Tensor:
    return torch.cat([n.flatten() for n in _norms_of_buckets(weights, _parsed(views))])


@_norms_by_slice.register_fake
def _(weights: list[Tensor], views: list[str]) -> Tensor:
    return torch.cat([n.flatten() for n in _norms_of_buckets(weights, _parsed(views))])


@torch.library.custom_op(
    "normwise::retract_",
    mutates_args=("weights",),
    schema="(Tensor(a!)[] weights, str[] views, Tensor norms) -> ()",
)
def _retract_(weights: list[Tensor], views: list[str], norms: Tensor) -> None:
    shaped = _norms_of_buckets(weights, _parsed(views))
    parts = torch.split(norms, [n.numel() for n in shaped])
    retract_(weights, _parsed(views), [n.view(s.shape) for n, s in zip(parts, shaped, strict=True)])


def batch(tensors: Sequence[Tensor], members: list[int], view: View) -> Tensor:
    """Slices of some tensors: an alias (1, slices, ...), or a copy (members, slices, entries)."""
    if is_alias(members):
        return view.slices(tensors[members[0]]).unsqueeze(0)
    return torch.stack([view.slices(tensors[i]) for i in members]).flatten(2)


def unbatch_(tensors: Sequence[Tensor], members: list[int], view: View, batch: Tensor) -> None:
    """Copy a batch into the tensors that it was made of."""
    for i, result in zip(members, batch.unbind(), strict=True):
        slices = view.slices(tensors[i])
        slices.copy_(result.view(slices.shape))


def gated_radial(
    u: Tensor, w: Tensor, g: Tensor, *, delta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The radial part that the papers' cosine gate lets AdamP and SGDP remove.

    The gate compares the raw gradient with the weight, slice by slice: it opens for the channel
    view if max |cos(g, w)| < delta/√(entries of a channel), else for the layer view if
    |cos(g, w)| < delta/√(entries of the weight). It stays shut where the gradient is zero
    everywhere, which is evidence of nothing; a zero slice among others is passed over.

    ``eps`` stands where the official code has it, max(‖·‖, eps) in the cosines and ‖w‖ + eps in the
    projection, so that the results are the official ones to rounding.

    Args:
        u, w, g: updates, weights, gradients in the channel view, shape (weights, channels, ...).
        delta: the threshold of the gate, a cosine times √entries.
        eps: the guard against zero norms.

    Returns:
        The directions of the slices of ``w``; how much of each to subtract from ``u``, zero where
        the gate is shut; and whether it is open, of shape (weights,).
    """
    direction, w_norm = unit(w, 2)
    g_norm = slice_norms(g, 2)
    g_radial, u_radial = dot(direction, g, 2), dot(direction, u, 2)

    # The layer's values come from the channels': norms of norms, and inner products with
    # w/‖w‖ = (channel directions) · (channel norms)/‖w‖.
    share, w_total = unit(w_norm)
    g_total = slice_norms(g_norm)

    channel_cosine = _guarded_cosine(g_radial, w_norm, g_norm, eps)
    layer_cosine = _guarded_cosine(dot(share, g_radial), w_total, g_total, eps)
    entries = math.prod(w.shape[2:])
    evidence = g_total > 0
    channel_open = evidence & (channel_cosine.amax(1, keepdim=True) < delta / math.sqrt(entries))
    layer_open = evidence & (layer_cosine < delta / math.sqrt(entries * w.shape[1]))

    by_channel = u_radial * _shrinkage(w_norm, eps)
    by_layer = dot(share, u_radial) * share * _shrinkage(w_total, eps)
    coefficient = torch.where(channel_open, by_channel, torch.where(layer_open, by_layer, 0))
    return direction, coefficient, (channel_open | layer_open).flatten()


def _guarded_cosine(radial: Tensor, w_norm: Tensor, g_norm: Tensor, eps: float) -> Tensor:
    """|⟨g, w⟩| / (max(‖w‖, eps)·max(‖g‖, eps)) from ⟨g, ŵ⟩; 0 where a norm is."""
    guard = max(eps, torch.finfo(w_norm.dtype).tiny)
    return (radial / g_norm.clamp_min(guard) * (w_norm / w_norm.clamp_min(guard))).abs()


def _shrinkage(norm: Tensor, eps: float) -> Tensor:
    """What the official ‖w‖ + eps leaves of a projection: (‖w‖/(‖w‖ + eps))²."""
    return (norm / (norm + eps).clamp_min(torch.finfo(norm.dtype).tiny)).square()
