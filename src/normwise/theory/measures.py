"""Measures of gradients and curvature that do not change when a scale-invariant weight is scaled.

‖∇L‖ is multiplied by 1/c, and the Fisher information by 1/c², when such a weight is multiplied by
c; the plain quantities therefore say as much of the norm as of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from normwise.geometry import View, at_least_float32, cosine, norms

__all__ = ["gradient_cosine", "scaled_fisher_trace", "scaled_gradient_norm"]


def scaled_gradient_norm(weight: Tensor, gradient: Tensor, view: View) -> Tensor:
    """‖w‖·‖∇L‖ of each slice: the norm that the gradient has at weight norm 1, shape ``(slices,)``.

    Args:
        weight: w.
        gradient: ∇L, of the same shape.
        view: how both split into slices.

    Returns:
        In float32 or better.
    """
    with torch.no_grad():
        return norms(weight.detach(), view) * norms(gradient, view)


def gradient_cosine(one: Tensor, other: Tensor, view: View) -> Tensor:
    """The cosine of the gradients of two batches, slice by slice, shape ``(slices,)``.

    Near 1 the batches agree and a larger step pays; near 0 noise rules.

    Args:
        one: the gradient of the first batch.
        other: that of the second, at the same weights.
        view: how both split into slices. A zero slice has cosine 0.

    Returns:
        From −1 to 1; 0 for zero slices.
    """
    return cosine(one, other, view)


def scaled_fisher_trace(
    logits: Callable[[], Tensor],
    views: Mapping[nn.Parameter, View],
    *,
    draws: int = 10,
    generator: torch.Generator | None = None,
) -> dict[nn.Parameter, Tensor]:
    """‖w‖²·tr(F) of each slice of each weight, F the Fisher information of a classifier's output.

    F is that of one example, averaged over the batch. The trace is estimated in Hutchinson's way:
    Σᵢ ∇ log p(yᵢ) with labels yᵢ drawn from the model's own distribution has mean 0 and
    covariance ΣᵢFᵢ, so the mean of its squared norm is the trace. One backward pass a draw gives
    it for all slices. Under batch normalization in training an example's logits depend on the
    whole batch, and F is that of the batch's joint distribution.

    Args:
        logits: a function that runs the model and returns logits, of shape
            ``(batch, ..., classes)``. It is called once.
        views: the weights, and how they split into slices.
        draws: the number of draws; the relative error of a trace is about √(2/draws) or less
            (default: 10).
        generator: for the labels (default: torch's).

    Returns:
        For each weight a tensor of shape ``(slices,)``.

    Raises:
        ValueError: for fewer draws than 1, or logits of one dimension.
    """
    if draws < 1:
        raise ValueError(f"Invalid draws: {draws}; must be 1 or more")
    weights = list(views)
    with torch.enable_grad():
        out = logits()
        if out.ndim < 2:
            raise ValueError(f"logits of shape {tuple(out.shape)}; must be (batch, ..., classes)")
        scores = at_least_float32(out).flatten(0, -2).log_softmax(-1)
    traces = {w: torch.zeros_like(norms(w.detach(), view)) for w, view in views.items()}
    for draw in range(draws):
        labels = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(
            scores.gather(1, labels).sum(),
            weights,
            retain_graph=draw + 1 < draws,
            allow_unused=True,
        )
        for w, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                traces[w] += scaled_gradient_norm(w, gradient, views[w]) ** 2
    return {w: trace / (draws * out.shape[0]) for w, trace in traces.items()}
