"""Curvature and sensitivity that do not change when a scale-invariant weight is scaled.

H(cw) = H(w)/c² and J(cw) = J(w)/c on such weights, so a run whose norms fall grows "sharper"
without any change of its function. Multiplied by ‖w‖² and ‖w‖, slice by slice, both say what the
function does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from normwise.geometry import View, dot, norms

__all__ = ["scaled_hessian_trace", "scaled_jacobian_norm"]


def scaled_hessian_trace(
    loss: Callable[[], Tensor],
    views: Mapping[nn.Parameter, View],
    *,
    draws: int = 10,
    generator: torch.Generator | None = None,
) -> dict[nn.Parameter, Tensor]:
    r"""‖w‖²·tr H of each slice of each weight, H the Hessian of the loss in that slice.

    Hutchinson's estimate with random signs: E⟨v, Hv⟩ = tr H, and the part of v·Hv in a slice has
    the trace of the slice's own block as its mean. One double backward pass a draw gives it for all
    slices. Without the factor, the sum over slices is the trace of the whole Hessian.

    Args:
        loss: runs the model and returns the loss, one number; called once.
        views: the weights, and how they split into slices.
        draws: the number of draws (default: 10). The estimate is unbiased.
        generator: for the signs (default: torch's).

    Returns:
        For each weight a tensor of shape ``(slices,)``.

    Raises:
        ValueError: for fewer draws than 1, or a loss that is not one number.

    Source: the estimate, Hutchinson 1990; traces along training, arXiv 2310.04415; the factor is
    ours.
    """
    if draws < 1:
        raise ValueError(f"Invalid draws: {draws}; must be 1 or more")
    weights = list(views)
    with torch.enable_grad():
        value = loss()
        if value.numel() != 1:
            raise ValueError(f"loss of shape {tuple(value.shape)}; must be one number")
        grads = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
    traces = {w: torch.zeros_like(norms(w.detach(), view)) for w, view in views.items()}
    reached = [(w, g) for w, g in zip(weights, grads, strict=True) if g is not None]
    if not any(g.requires_grad for _, g in reached):
        return traces  # linear in every weight
    for draw in range(draws):
        signs = [_signs(w, generator) for w, _ in reached]
        products = torch.autograd.grad(
            [g for _, g in reached if g.requires_grad],
            [w for w, _ in reached],
            [v for v, (_, g) in zip(signs, reached, strict=True) if g.requires_grad],
            retain_graph=draw + 1 < draws,
            allow_unused=True,
        )
        for (w, _), v, product in zip(reached, signs, products, strict=True):
            if product is not None:
                slices = views[w].slices
                traces[w] += dot(slices(v), slices(product)).flatten()
    return {w: norms(w.detach(), views[w]) ** 2 * t / draws for w, t in traces.items()}


def scaled_jacobian_norm(
    outputs: Callable[[], Tensor],
    views: Mapping[nn.Parameter, View],
    *,
    draws: int = 10,
    generator: torch.Generator | None = None,
) -> dict[nn.Parameter, Tensor]:
    r"""‖w‖·‖J‖ of each slice of each weight, J the Jacobian of the outputs in that slice.

    ‖J‖ is the Frobenius norm, with its square averaged over the samples of a batch: E‖Jᵀv‖² =
    ‖J‖² for outputs weighted by random signs v. One backward pass a draw gives it for all slices.
    Where samples share statistics (batch normalization in training) J is that of the batch's
    outputs together.

    Args:
        outputs: runs the model and returns outputs, shape ``(samples, ...)``; called once.
        views: the weights, and how they split into slices.
        draws: the number of draws (default: 10). The square is estimated without bias.
        generator: for the signs (default: torch's).

    Returns:
        For each weight a tensor of shape ``(slices,)``.

    Raises:
        ValueError: for fewer draws than 1, or outputs without a dimension.

    Source: arXiv 2310.04415 logs the mean over samples of ‖J‖; the factor, slices and estimate are
    ours.
    """
    if draws < 1:
        raise ValueError(f"Invalid draws: {draws}; must be 1 or more")
    weights = list(views)
    with torch.enable_grad():
        out = outputs()
        if out.ndim < 1:
            raise ValueError("outputs of no dimension; must be (samples, ...)")
    squares = {w: torch.zeros_like(norms(w.detach(), view)) for w, view in views.items()}
    for draw in range(draws):
        grads = torch.autograd.grad(
            out,
            weights,
            _signs(out, generator),
            retain_graph=draw + 1 < draws,
            allow_unused=True,
        )
        for w, g in zip(weights, grads, strict=True):
            if g is not None:
                squares[w] += norms(g, views[w]) ** 2
    samples = draws * len(out)
    return {w: norms(w.detach(), views[w]) * (s / samples).sqrt() for w, s in squares.items()}


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """±1 in the shape of a tensor."""
    device = "cpu" if generator is None else generator.device
    drawn = torch.randint(2, like.shape, generator=generator, device=device)
    return (2 * drawn - 1).to(like)
