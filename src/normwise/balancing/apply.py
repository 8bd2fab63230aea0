"""Factors applied to a model: which parameters they mean, and whether the function is the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from normwise.invariance import Report
from normwise.invariance.replica import Replica
from normwise.sharding import is_sharded

__all__ = [
    "after_every",
    "apply_",
    "parameters_of",
    "set_statistics_",
    "tracks_statistics",
    "verified",
]

# The two sides agree to rounding in float64 where a symmetry holds, and in no digit where not.
_TOLERANCE = 1e-6


def parameters_of(model: nn.Module, report: Report) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that the report's symmetries speak of, by name.

    Raises:
        ValueError: if the model is another than the report's, sharded, or the report was made
            without looking for symmetries of several weights.
    """
    if any(row.kind == "not looked for" for row in report):
        raise ValueError(
            "this report knows no symmetries between weights; make it with analyze(joint=True)"
        )
    params = dict(model.named_parameters())
    found: dict[str, nn.Parameter] = {}
    for term in (term for symmetry in report.symmetries for term in symmetry.terms):
        p = params.get(term.parameter)
        if p is None:
            raise ValueError(f"the model has no parameter {term.parameter!r}, the report has")
        if tuple(p.shape) != term.shape:
            raise ValueError(
                f"the model's {term.parameter!r} has shape {tuple(p.shape)}, the report's "
                f"{term.shape}"
            )
        if is_sharded(p):
            raise ValueError(
                f"parameter {term.parameter!r} is sharded (DTensor); balance the whole model "
                "before it is sharded"
            )
        found[term.parameter] = p
    return found


def after_every(
    optimizer: Optimizer, every: int, act: Callable[[Optimizer], object]
) -> RemovableHandle:
    """Do something after every so many steps of an optimizer.

    Raises:
        ValueError: if ``every`` is not positive.
    """
    if every < 1:
        raise ValueError(f"Invalid every: {every}; must be 1 or more")
    steps = itertools.count(1)

    def after_step(stepped: Optimizer, args: Any, kwargs: Any) -> None:
        if next(steps) % every == 0:
            act(stepped)

    return optimizer.register_step_post_hook(after_step)


def apply_(params: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
    """Multiply parameters in place: the product in float64, rounded once."""
    with torch.no_grad():
        for name, factor in factors.items():
            p = params[name]
            p.copy_(p.to(factor.dtype) * factor.to(p.device))


def verified(
    model: nn.Module,
    report: Report,
    batch: Any,
    factors: Mapping[str, Tensor],
    accept: float,
) -> tuple[float, dict[str, Tensor]]:
    """Check on copies in float64 that the factors change nothing that the model computes.

    Args:
        model: only read.
        report: says in which mode the symmetries were found.
        batch: see :func:`normwise.analyze`.
        factors: what to multiply each parameter by.
        accept: the largest difference that epsilons may make.

    Returns:
        The largest difference of an output over the largest output, with the epsilons of the
        normalizations as they are; and the running statistics of batch normalizations whose inputs
        change with the factors, by buffer name.

    Raises:
        ValueError: if the outputs differ by more than rounding when epsilons are shrunk, or by more
            than ``accept`` as they are.
    """
    mode: Literal["train", "eval"] = "eval" if report.mode == "eval" else "train"
    statistics: dict[str, Tensor] = {}
    replica = Replica(model, batch, seed=0, mode=mode)
    with _inputs_of_batch_norms(replica.model) as lengths:
        exact = replica.run()
        plain = replica.run(shrink=1)
        before = dict(lengths)
        with replica.scaled(factors):
            rescaled = replica.run()
            rescaled_plain = replica.run(shrink=1)
            after = dict(lengths)
    difference = _difference(exact, rescaled)
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"rescaling changed the outputs by {difference:.1e} of the largest in {mode} mode; "
            "the report does not fit this model or batch, so nothing was changed"
        )
    seen = _difference(plain, rescaled_plain)
    if not seen <= accept:
        raise ValueError(
            f"the epsilons of normalizations weigh otherwise at the new scales: outputs differ by "
            f"{seen:.1e} of the largest, more than accept={accept:g}; raise it, or rescale less "
            "(invariant='keep'). Nothing was changed"
        )
    if mode == "eval":
        return seen, {}
    for name, module in model.named_modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if name in before and mean is not None and variance is not None:
            ratio = torch.where(before[name] > 0, after[name] / before[name], 1)
            if ((ratio - 1).abs() > _TOLERANCE).any():
                statistics[f"{name}.running_mean"] = mean.double() * ratio
                statistics[f"{name}.running_var"] = variance.double() * ratio.square()
    return seen, statistics


def tracks_statistics(model: nn.Module) -> bool:
    """Whether a normalization of the model keeps running statistics."""
    return any(getattr(m, "running_var", None) is not None for m in model.modules())


def set_statistics_(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Set running statistics, by buffer name."""
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in statistics.items():
            buffers[name].copy_(value)


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        finite = x.isfinite() & y.isfinite()
        if not torch.equal(x.isfinite(), y.isfinite()):
            return float("inf")
        if finite.any():
            scale = x[finite].abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            worst = max(worst, float((x - y)[finite].abs().max() / scale))
    return worst


@contextmanager
def _inputs_of_batch_norms(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, the length of each channel of what enters a module with running statistics."""
    lengths: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:

            def record(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                x = inputs[0].detach().movedim(1, 0).flatten(1)
                lengths[name] = x.double().norm(dim=1)

            handles.append(module.register_forward_pre_hook(record))
    try:
        yield lengths
    finally:
        for handle in handles:
            handle.remove()
