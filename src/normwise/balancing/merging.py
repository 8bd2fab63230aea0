"""Merges of models: of their weights, or of directions where scale is free."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from normwise.balancing.least_mass import balance
from normwise.geometry import View, slice_norms, unit
from normwise.invariance import ParameterReport, Report

__all__ = ["Merge", "Shrink", "expected_shrink", "learn_gamma", "merge"]


@dataclass(frozen=True)
class Shrink:
    """How much shorter a plain average of one parameter is than what it averages.

    Args:
        measured: its norm over the root mean square of the models' norms.
        cosine: the mean cosine of two of the models' weights.
        expected: √((1 + (n − 1)c)/n), which ``measured`` is for equal norms and weights.
        matters: whether the parameter's scale changes the function; where it does not, the shrink
            only raises the effective learning rate, and γ does nothing.
    """

    measured: float
    cosine: float
    expected: float
    matters: bool


@dataclass(frozen=True)
class Merge:
    """A merged model, and what the average did to norms.

    Args:
        model: a new one.
        shrinks: by parameter name, for those with two entries or more.
    """

    model: nn.Module
    shrinks: Mapping[str, Shrink]


def merge(
    models: Sequence[nn.Module],
    report: Report,
    *,
    weights: Sequence[float] | None = None,
    how: Literal["average", "sphere"] = "sphere",
    gamma: float = 1.0,
    align: bool = True,
) -> Merge:
    """Merge models of one architecture into a new one.

    Args:
        models: two or more; only read. Their permutations must agree, as those of models that were
            fine-tuned from one start do.
        report: what :func:`normwise.analyze` found for one of them.
        weights: the share of each model, which sum to 1 (default: all alike).
        how: ``"average"`` averages all weights; ``"sphere"`` averages the directions of slices
            that are scale-invariant by themselves and gives the result the average norm, and
            averages the weights elsewhere (default: ``"sphere"``).
        gamma: the scale γ of FedLAW, by which parameters whose scale matters are multiplied
            (default: 1).
        align: whether to bring all models to least mass along their symmetries first, so that no
            average is taken of weights that differ only in scale (default: yes).

    Returns:
        The merged model, of the first one's class, mode and buffers; buffers that are floating
        point, such as running statistics, are averaged; those of batch norms are better measured
        anew, with ``torch.optim.swa_utils.update_bn``.

    Raises:
        ValueError: for fewer than two models, shares that do not sum to 1, or models whose
            parameters do not fit the report.

    Source: 2302.10911 (γ); the shrink of an average is derived in docs/balance.md.
    """
    if len(models) < 2:
        raise ValueError(f"Invalid models: {len(models)}; must be two or more")
    if how not in ("average", "sphere"):
        raise ValueError(f"Invalid how: {how!r}; must be 'average' or 'sphere'")
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"Invalid gamma: {gamma}; must be positive and finite")
    shares = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(shares) != len(models) or not math.isclose(sum(shares), 1, rel_tol=1e-6):
        raise ValueError(f"Invalid weights: {shares}; must be one for each model and sum to 1")
    models = [copy.deepcopy(model) for model in models]
    if align:
        for model in models:
            balance(model, report)
    merged = models[0]
    sources = [dict(model.named_parameters()) for model in models]
    shrinks = {}
    averages = {}
    with torch.no_grad():
        for row in report:
            stack = torch.stack([source[row.name].double() for source in sources])
            matters = _matters(row)
            if row.entries > 1:
                shrinks[row.name] = _shrink(stack, matters)
            view = row.view if how == "sphere" else None
            value = _average(stack, shares, view)
            averages[row.name] = gamma * value if matters else value
        for name, value in averages.items():
            sources[0][name].copy_(value)
        buffers = [dict(model.named_buffers()) for model in models]
        for name, buffer in buffers[0].items():
            if buffer.is_floating_point():
                stack = torch.stack([b[name].double() for b in buffers])
                buffer.copy_(_average(stack, shares, None))
    return Merge(merged, shrinks)


def learn_gamma(
    model: nn.Module,
    report: Report,
    loss: Callable[[nn.Module], Tensor],
    *,
    steps: int = 100,
    lr: float = 0.01,
) -> float:
    """The scale γ = e^y of a merged model's weights at which a loss is least, learned by Adam on y.

    Only parameters whose scale matters take part: elsewhere ∂L/∂y = ⟨∇L, w⟩ is 0 by Euler's
    theorem.

    Args:
        model: only read, but for its buffers where the loss runs it in training mode.
        report: what :func:`normwise.analyze` found for it.
        loss: of the model on proxy data; called once per step.
        steps: of Adam with betas (0.5, 0.999) (default: 100).
        lr: its learning rate (default: 0.01).

    Returns:
        γ, to be given to :func:`merge`.

    Raises:
        ValueError: if the report knows no parameter whose scale matters, or the loss is not finite.

    Source: 2302.10911, section 4; one γ, the models' shares as they are.
    """
    names = [row.name for row in report if _matters(row)]
    if not names:
        raise ValueError("no parameter's scale matters by this report; there is no γ to learn")
    params = {name: model.get_parameter(name) for name in names}
    original = {name: p.detach().clone() for name, p in params.items()}
    y = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([y], lr=lr, betas=(0.5, 0.999))
    try:
        for _ in range(steps):
            with torch.no_grad():
                for name, p in params.items():
                    p.copy_(original[name] * y.exp())
            value = loss(model)
            if not value.isfinite():
                raise ValueError(f"the loss is {float(value)} at γ = {float(y.exp()):g}")
            grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            slopes = [
                (p * g).sum() for p, g in zip(params.values(), grads, strict=True) if g is not None
            ]
            y.grad = torch.stack(slopes).sum().detach().to(y)
            optimizer.step()
    finally:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(original[name])
    return float(y.detach().exp())


def expected_shrink(cosine: float, count: int) -> float:
    """√((1 + (n − 1)c)/n): the norm of the mean of n vectors of norm 1 and pairwise cosine c.

    Args:
        cosine: c, between any two of the vectors.
        count: n, how many there are.

    Returns:
        The norm, from 0 to 1.
    """
    return math.sqrt(max(0.0, (1 + (count - 1) * cosine) / count))


def _average(stack: Tensor, shares: Sequence[float], view: View | None) -> Tensor:
    """The average of the models' values, shape ``(models, …)``, or that of their directions."""
    share = torch.tensor(shares, dtype=stack.dtype, device=stack.device)
    if view is None:
        average: Tensor = torch.tensordot(share, stack, 1)
        return average
    directions, lengths = zip(*(unit(view.slices(w)) for w in stack), strict=True)
    mean = torch.tensordot(share, torch.stack(directions), 1)
    length = torch.tensordot(share, torch.stack(lengths), 1)
    result = torch.empty_like(stack[0])
    view.slices(result).copy_(unit(mean)[0] * length)
    return result


def _shrink(stack: Tensor, matters: bool) -> Shrink:
    flat = stack.flatten(1)
    directions, lengths = unit(flat)
    count = len(flat)
    gram = directions @ directions.T
    cosine = float((gram.sum() - gram.diagonal().sum()) / (count * (count - 1)))
    size = lengths.square().mean().sqrt()
    mean = slice_norms(flat.mean(0, keepdim=True)).reshape(())
    measured = float(mean / size) if size > 0 else 1.0
    return Shrink(measured, cosine, expected_shrink(cosine, count), matters)


def _matters(row: ParameterReport) -> bool:
    """Whether the scale of a parameter changes the function."""
    return row.kind not in ("invariant", "joint", "no effect", "unused")
