"""The representative of least mass among all sets of weights that compute one function."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
from normwise.balancing.sweep import CoordinateDescent
from normwise.invariance import Report, Symmetry
from normwise.invariance.scale_maps import is_vector

__all__ = ["Balanced", "Convention", "balance"]

Convention = Literal["keep", "unit"]

# e^300 is far beyond every ratio of weights in float32, and its square is within float64.
_BOUNDLESS = 300


@dataclass(frozen=True)
class Balanced:
    """What a rescaling did.

    Args:
        before: the sum of the squares of all entries of all parameters.
        after: the same afterwards.
        sweeps: how many were made.
        left: the number of units without a minimum, since one side of the trade is zero; they were
            left as they were.
        difference: the largest difference of an output over the largest output, in float64; None
            without a batch.
        factors: what each parameter was multiplied by, by name, as tensors that broadcast.
    """

    before: float
    after: float
    sweeps: int
    left: int
    difference: float | None
    factors: Mapping[str, Tensor]

    def __str__(self) -> str:
        text = f"mass {self.before:.6g} → {self.after:.6g} in {self.sweeps} sweeps"
        if self.left:
            text += f"; {self.left} units have a zero side and were left as they were"
        if self.difference is not None:
            text += f"; outputs differ by {self.difference:.1e}"
        return text


def balance(
    model: nn.Module,
    report: Report,
    *,
    batch: Any = None,
    invariant: Convention = "keep",
    uncounted: Collection[str] = (),
    accept: float = 0.01,
    tolerance: float = 1e-12,
    max_sweeps: int = 10_000,
) -> Balanced:
    """Rescale a model in place to the weights of least Σ‖w‖² that compute the same function.

    Families that trade scale are swept in turn, each unit's factor set to its exact optimum with
    the others as they are, λ = √(‖out‖/‖in‖) where both exponents are 1. The problem is convex in
    log λ, so the sweeps converge, and the result does not depend on where along the symmetries the
    model starts. A trade through a normalization, such as a tied embedding's, holds up to its
    epsilon; ``batch`` tells how well. Slices that grow together, such as a scale-invariant row,
    have no least mass, as none is too small; ``invariant`` says what becomes of them.

    Args:
        model: its parameters are changed in place, in their own precision.
        report: what :func:`normwise.analyze` found for it.
        batch: one on which to check, in float64, that the function is unchanged; see
            :func:`normwise.analyze` (default: no check).
        invariant: ``"keep"`` leaves the slices that grow together at the scale they have;
            ``"unit"`` holds invariant slices at norm 1, and sets of several weights, such as all
            that writes to a normalized stream, where their rows have norm 1 in the root mean
            square. Epsilons of normalizations then weigh otherwise; running statistics follow
            (default: ``"keep"``).
        uncounted: names of parameters that are scaled but have no part in the mass, such as biases
            in the convention of 2310.08287 (default: none).
        accept: the largest difference of an output on ``batch``, over the largest output, that
            epsilons of normalizations may make (default: 0.01).
        tolerance: sweeps end when no factor changes by a larger share (default: 1e-12).
        max_sweeps: the most (default: 10 000).

    Returns:
        What was done: the mass before and after, sweeps and the difference of outputs.

    Raises:
        ValueError: for a report of another model; if the outputs change; or if ``"unit"`` needs a
            batch, to see which running statistics must follow.
        RuntimeError: if the sweeps do not converge. The model is unchanged in all these cases.

    Source: the problem of 2310.08287; the closed form of one step is that of ENorm (ICLR 2019).
    """
    if invariant not in ("keep", "unit"):
        raise ValueError(f"Invalid invariant: {invariant!r}; must be 'keep' or 'unit'")
    params = parameters_of(model, report)
    if unknown := set(uncounted) - {row.name for row in report}:
        raise ValueError(f"Invalid uncounted: the report has no parameter {min(unknown)!r}")
    if invariant == "unit" and batch is None and tracks_statistics(model):
        raise ValueError(
            "invariant='unit' rescales what enters normalizations with running statistics; give "
            "`batch=`, on which they are seen and made to follow"
        )
    families = [s for s in report.symmetries if not s.is_scale]
    if invariant == "unit":
        families = list(dict.fromkeys((*report.invariances(), *report.symmetries)))
    before = mass(model)
    descent = CoordinateDescent(
        families,
        params,
        uncounted=uncounted,
        pulls=[_pull(s) for s in families],
    )
    sweeps = converge(descent, tolerance, max_sweeps)
    factors = descent.factors()
    difference = None
    if batch is not None:
        difference, statistics = verified(model, report, batch, factors, accept)
        set_statistics_(model, statistics)
    apply_(params, factors)
    return Balanced(before, mass(model), sweeps, descent.without_minimum(), difference, factors)


def converge(descent: CoordinateDescent, tolerance: float, max_sweeps: int) -> int:
    """Sweep until no factor changes by more than ``tolerance``; the number of sweeps.

    Raises:
        RuntimeError: if ``max_sweeps`` are not enough.
    """
    if not descent.symmetries:
        return 0
    moved = torch.tensor(torch.inf)
    for count in range(1, max_sweeps + 1):
        moved = descent.run()
        if not moved > tolerance:
            return count
        if any(bool((logs.abs() > _BOUNDLESS).any()) for logs in descent.logs):
            raise RuntimeError(
                "factors grow without bound: along these families together the mass has no "
                "minimum; with invariant='unit' some scale-invariant weights trade scale with one "
                "another, and cannot all have norm 1, so use invariant='keep'"
            )
    raise RuntimeError(
        f"after {max_sweeps} sweeps a factor still changes by {float(moved):.1e}, more than "
        f"tolerance={tolerance:g}; raise either, or see whether a unit's mass has no minimum"
    )


def _pull(symmetry: Symmetry) -> float:
    """Where Σ a‖w‖² of a unit is held that has no least mass; 0 for trades, which have one."""
    if not symmetry.is_scale:
        return 0.0
    if symmetry.is_view:
        return 1.0
    rows = sum(term.shape[0] for term in symmetry.terms if not is_vector(term))
    return max(1.0, rows / symmetry.units)


def mass(model: nn.Module) -> float:
    """Σ‖w‖² over all parameters of a model, in float64."""
    return float(sum(p.detach().double().square().sum() for p in model.parameters()))
