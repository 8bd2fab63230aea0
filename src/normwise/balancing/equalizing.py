"""Equal ranges along symmetries, so that fewer bits hold the weights, or the activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normwise.balancing.apply import (
    apply_,
    parameters_of,
    set_statistics_,
    tracks_statistics,
    verified,
)
from normwise.balancing.least_mass import Balanced, converge, mass
from normwise.balancing.rounding import round_weight
from normwise.balancing.sweep import CoordinateDescent, Sizes, largest, least
from normwise.invariance import Report, Symmetry, Term
from normwise.invariance.replica import Replica
from normwise.invariance.scale_maps import sides

__all__ = ["equalize"]

Rule = Literal["smoothquant", "awq"]
# AWQ's code takes twenty values.
_GRID = tuple(k / 20 for k in range(20))
_AFFINE = (nn.Linear, nn.modules.conv._ConvNd)


def equalize(
    model: nn.Module,
    report: Report,
    for_: Any = "weights",
    *,
    batch: Any = None,
    invariant: Literal["keep", "equal"] = "keep",
    rule: Rule = "smoothquant",
    alpha: float | Literal["search"] = 0.5,
    bits: int = 4,
    accept: float = 0.01,
    tolerance: float = 1e-6,
    max_sweeps: int = 1000,
) -> Balanced:
    """Rescale a model in place along its symmetries so that it quantizes better.

    For ``"weights"`` the ranges on both sides of each trade are made equal (cross-layer
    equalization): s = √(r_out/r_in) with r = max|w|, in sweeps until all are still. Only matrices
    have ranges. Where one side has none, such as the gain of a normalization, which is not
    quantized, the slices of the other side take their geometric mean.

    For a calibration batch, scales go from activations into the weights that read them: channel j
    of what a layer reads is divided by s_j, the layer's columns j multiplied by it, with
    s_j = max|x_j|^α / max|w_j|^(1−α) (SmoothQuant), or s_j = mean|x_j|^α over √(max s · min s)
    (AWQ). All readers of one activation are taken together. Families whose readers are no Linear,
    no ungrouped convolution and no module that reads its channels last stay as they are.

    Args:
        model: its parameters are changed in place.
        report: what :func:`normwise.analyze` found for it.
        for_: ``"weights"``, or a calibration batch, see :func:`normwise.analyze`.
        batch: one on which to check that the function is unchanged (default: the calibration
            batch, if there is one).
        invariant: whether slices that grow together ``"keep"`` their scales, or their ranges are
            made ``"equal"`` too, at their geometric mean; running statistics follow, for which
            a batch is needed (default: ``"keep"``).
        rule: of scales by activations (default: ``"smoothquant"``).
        alpha: α, from 0 to 1, or ``"search"``: for each activation the one of 0, 0.05, … 0.95 at
            which its readers' outputs on the calibration batch change least when their weights are
            rounded, as in AWQ's code; activations that others than linear layers and convolutions
            read stay as they are (default: 0.5).
        bits: that a search rounds to, by row (default: 4).
        accept: see :func:`normwise.balance` (default: 0.01).
        tolerance: sweeps end when no factor changes by a larger share (default: 1e-6).
        max_sweeps: the most (default: 1000).

    Returns:
        What was done: factors, sweeps and the difference of outputs.

    Raises:
        ValueError: for a report of another model, or if the outputs change.
        RuntimeError: if the sweeps do not converge. The model is unchanged in both cases.

    Source: 1906.04721, equation 11 (ranges); 2211.10438, equation 4 (SmoothQuant); 2306.00978,
    equation 5 (AWQ).
    """
    if invariant not in ("keep", "equal"):
        raise ValueError(f"Invalid invariant: {invariant!r}; must be 'keep' or 'equal'")
    if rule not in ("smoothquant", "awq"):
        raise ValueError(f"Invalid rule: {rule!r}; must be 'smoothquant' or 'awq'")
    if alpha != "search" and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
        raise ValueError(f"Invalid alpha: {alpha!r}; must be from 0 to 1, or 'search'")
    if isinstance(for_, str) and for_ != "weights":
        raise ValueError(f"Invalid for_: {for_!r}; must be 'weights' or a calibration batch")
    params = parameters_of(model, report)
    batch = for_ if batch is None and not isinstance(for_, str) else batch
    if invariant == "equal" and batch is None and tracks_statistics(model):
        raise ValueError(
            "invariant='equal' rescales what enters normalizations with running statistics; give "
            "`batch=`, on which they are seen and made to follow"
        )
    before = mass(model)
    if isinstance(for_, str):
        families = [s for s in report.symmetries if invariant == "equal" or not s.is_scale]
        ranges = _Ranges(families, params, weigh="largest")
        sweeps = converge(ranges, tolerance, max_sweeps)
        factors, left = ranges.factors(), ranges.without_minimum()
    else:
        sweeps, left = 1, 0
        factors = _smoothing(model, report, params, for_, rule, alpha, bits)
    difference = None
    if batch is not None:
        difference, statistics = verified(model, report, batch, factors, accept)
        set_statistics_(model, statistics)
    apply_(params, factors)
    return Balanced(before, mass(model), sweeps, left, difference, factors)


class _Ranges(CoordinateDescent):
    """Sweeps in which slices that nothing weighs against take their geometric mean."""

    def _best(self, index: int) -> Tensor:
        sizes = [s for s in self.sizes(index) if (s.values > 0).any()]
        if len({s.exponent > 0 for s in sizes}) == 1:
            return _to_their_mean(sizes)
        return least(sizes) if sizes else torch.zeros_like(self.logs[index])

    def without_minimum(self) -> int:
        return 0


def _to_their_mean(sizes: list[Sizes]) -> Tensor:
    """The logarithms of the factors that bring every unit to the geometric mean of all."""
    weighted = torch.stack([s.values for s in sizes]).amax(0)
    exponent = max((s.exponent for s in sizes), key=abs)
    logs = weighted.log()
    known = logs.isfinite()
    mean = torch.where(known, logs, 0).sum() / known.sum().clamp_min(1)
    return torch.where(known, (mean - logs) / (2 * exponent), 0)


def _smoothing(
    model: nn.Module,
    report: Report,
    params: Mapping[str, nn.Parameter],
    batch: Any,
    rule: Rule,
    alpha: float | Literal["search"],
    bits: int,
) -> dict[str, Tensor]:
    """What to multiply each parameter by so that activations are smoothed into the weights."""
    trades = [(s, split[1]) for s in report.symmetries if (split := sides(s)) is not None]
    readers = {term.parameter: term for _, terms in trades for term in terms}
    statistic = _largest_entry if rule == "smoothquant" else _mean_entry
    read = _read(model, batch, readers)
    activations = {name: _over_calls(calls, statistic) for name, calls in read.items()}
    factors: dict[str, Tensor] = {}
    for symmetry, terms in trades:
        if any(t.parameter not in activations or not _reads(t, activations) for t in terms):
            continue
        if len({term.exponent for term in terms}) > 1:
            continue

        def at(
            share: float, symmetry: Symmetry = symmetry, terms: list[Term] = terms
        ) -> dict[str, Tensor]:
            scales = _scales(terms, params, activations, rule, share)
            return symmetry.factors(scales ** (1 / terms[0].exponent))

        if alpha != "search":
            chosen = at(alpha)
        elif all(isinstance(c.module, _AFFINE) for t in terms for c in read[t.parameter]):
            errors = [_rounding_error(terms, params, read, at(share), bits) for share in _GRID]
            chosen = at(_GRID[errors.index(min(errors))])
        else:
            continue
        for name, factor in chosen.items():
            factors[name] = factors[name] * factor if name in factors else factor
    return factors


@torch.no_grad()
def _rounding_error(
    terms: list[Term],
    params: Mapping[str, nn.Parameter],
    read: Mapping[str, list[_Call]],
    factors: Mapping[str, Tensor],
    bits: int,
) -> float:
    """By how much the readers' outputs change when their scaled weights are rounded, squared."""
    error = 0.0
    for term in terms:
        weight = params[term.parameter].detach().double().cpu()
        factor = factors[term.parameter].cpu()
        change = round_weight(weight * factor, bits) / factor - weight
        attribute = term.parameter.rpartition(".")[2]
        # A reader is affine in its weight: the change of it alone gives that of the outputs.
        for call in read[term.parameter]:
            given = {attribute: change.to(call.x.device)}
            with_change = torch.func.functional_call(call.module, given, (call.x,))
            without = torch.func.functional_call(
                call.module, {attribute: torch.zeros_like(given[attribute])}, (call.x,)
            )
            error += float((with_change - without).square().sum())
    return error


def _scales(
    terms: list[Term],
    params: Mapping[str, nn.Parameter],
    activations: Mapping[str, Tensor],
    rule: Rule,
    alpha: float,
) -> Tensor:
    """s for each unit: what the columns of its readers are multiplied by; 1 where x or w is 0."""
    x = torch.stack([activations[t.parameter][t.slices.indices()].amax(1) for t in terms]).amax(0)
    if rule == "awq":
        scales = x**alpha
        known = x > 0
        if not known.any():
            return torch.ones_like(scales)
        middle = (scales[known].max() * scales[known].min()).sqrt()
        return torch.where(known, scales / middle, 1)
    w = torch.stack(
        [largest(t, params[t.parameter].detach().double().abs()).cpu() for t in terms]
    ).amax(0)
    return torch.where((x > 0) & (w > 0), x**alpha / w ** (1 - alpha), 1)


def _reads(term: Term, activations: Mapping[str, Tensor]) -> bool:
    """Whether the indices of a term's slices are channels of what its module was given."""
    (size, *others) = (term.shape[d] for d in term.slices.dims)
    return not others and len(activations[term.parameter]) == size


def _largest_entry(x: Tensor) -> Tensor:
    return x.amax(0)


def _mean_entry(x: Tensor) -> Tensor:
    return x.mean(0)


@dataclass(frozen=True)
class _Call:
    """A module and what it read once."""

    module: nn.Module
    x: Tensor

    def by_channel(self) -> Tensor:
        """|x|, shape ``(entries, channels)``."""
        channels = 1 if isinstance(self.module, nn.modules.conv._ConvNd) else -1
        return self.x.abs().movedim(channels, -1).flatten(0, -2)


def _over_calls(calls: list[_Call], statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic of each channel, the largest over the calls."""
    return torch.stack([statistic(call.by_channel()).cpu() for call in calls]).amax(0)


def _read(model: nn.Module, batch: Any, readers: Mapping[str, Term]) -> dict[str, list[_Call]]:
    """By parameter, what the module that owns it reads, in evaluation and float64."""
    found: dict[str, list[_Call]] = {}
    handles = []
    replica = Replica(model, batch, seed=0, mode="eval")
    for name in readers:
        owner = replica.model.get_submodule(name.rpartition(".")[0])
        if getattr(owner, "groups", 1) != 1:
            continue

        def record(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            if not inputs or not isinstance(inputs[0], Tensor):
                return
            found.setdefault(name, []).append(_Call(module, inputs[0].detach().double()))

        handles.append(owner.register_forward_pre_hook(record))
    replica.run(shrink=1)
    for handle in handles:
        handle.remove()
    return found
