"""Sweeps over families of slices: unit by unit, the factor at which a sum of powers is least.

With w_s(θ) = e^{a_s θ} w_s, what is minimized over the logarithms θ of all units' factors is

    ½ Σ_s ‖w_s‖² e^{2 a_s θ} − Σ_u p_u θ_u,

convex in θ, as a sum of exponentials of linear forms. In one coordinate its minimum solves

    Σ_{a>0} a m_a e^{2aθ} = Σ_{a<0} |a| m_a e^{2aθ} + p,

with m_a the mass of the slices of exponent a. With one exponent on either side and no pull p that
is e^θ = √(‖out‖/‖in‖) for a = ±1. The pull is 0 for families that trade scale, and positive for
those that grow together, whose mass has no minimum: it holds them where Σ a_s ‖w_s‖² = p.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normwise.invariance import Symmetry, Term
from normwise.invariance.scale_maps import is_vector

__all__ = ["CoordinateDescent", "Sizes", "largest", "least"]

Weighing = Literal["sum", "largest"]

# Near the root each step of Newton's method doubles the digits; until then the bracket halves.
_NEWTON_STEPS = 100


@dataclass(frozen=True)
class Sizes:
    """What the slices of one exponent weigh, for each unit.

    Args:
        exponent: theirs.
        values: shape ``(units,)``, float64.
    """

    exponent: float
    values: Tensor


def least(sizes: Sequence[Sizes], pull: float = 0.0) -> Tensor:
    """The logarithm θ of each unit's factor at which ½ Σ m_a e^{2aθ} − pθ is least.

    Args:
        sizes: the masses m_a, one entry for each exponent a.
        pull: p, for all units (default: 0).

    Returns:
        Shape ``(units,)``. It is 0 in units that have no minimum, since nothing stands against
        what would shrink: one side of the trade is zero.
    """
    up = [s for s in sizes if s.exponent > 0]
    down = [s for s in sizes if s.exponent < 0]
    if not up or not (down or pull):
        return torch.zeros_like(sizes[0].values)
    device = sizes[0].values.device
    a = torch.tensor([[2 * s.exponent] for s in up], dtype=torch.float64, device=device)
    b = torch.tensor([[-2 * s.exponent] for s in down], dtype=torch.float64, device=device)
    rising = torch.stack([(s.exponent * s.values).log() for s in up])
    falling = [(-s.exponent * s.values).log() for s in down]
    if pull:
        b = torch.cat([b, b.new_zeros(1, 1)])
        falling.append(torch.full_like(rising[0], math.log(pull)))
    sinking = torch.stack(falling)
    if len(rising) == 1 and len(sinking) == 1:
        root = (sinking[0] - rising[0]) / (a[0] + b[0])
    else:
        root = _root(a, rising, b, sinking)
    return torch.where(root.isfinite(), root, 0)


def _root(a: Tensor, rising: Tensor, b: Tensor, sinking: Tensor) -> Tensor:
    """Where log Σ e^{aθ + rising} = log Σ e^{−bθ + sinking}, by Newton's method in a bracket.

    The difference of the two rises with a slope from min a + min b to max a + max b.
    """
    theta = torch.zeros_like(rising[0])

    def difference() -> tuple[Tensor, Tensor]:
        u, v = a * theta + rising, sinking - b * theta
        slope = (u.softmax(0) * a).sum(0) + (v.softmax(0) * b).sum(0)
        return u.logsumexp(0) - v.logsumexp(0), slope

    value, slope = difference()
    reach = value.abs() / (a.min() + b.min())
    low, high = -reach, reach
    for _ in range(_NEWTON_STEPS):
        low = torch.where(value < 0, theta, low)
        high = torch.where(value > 0, theta, high)
        step = theta - value / slope
        inside = (step >= low) & (step <= high)
        following = torch.where(inside, step, (low + high) / 2)
        if not ((following - theta).abs() > 4e-16 * (1 + theta.abs())).any():
            return following
        theta = following
        value, slope = difference()
    return theta


class CoordinateDescent:
    """Weights under the factors found so far, as squares, and one coordinate step after another.

    Args:
        symmetries: the families.
        weights: the parameters, by name; only read.
        uncounted: names of parameters that are scaled and do not weigh.
        pulls: p of each family (default: 0 for all); see :func:`least`.
        weigh: a slice by the ``"sum"`` of its squares, or by the ``"largest"`` of them, where only
            matrices count, since vectors are not quantized (default: ``"sum"``).
    """

    def __init__(
        self,
        symmetries: Sequence[Symmetry],
        weights: Mapping[str, Tensor],
        *,
        uncounted: Collection[str] = (),
        pulls: Sequence[float] | None = None,
        weigh: Weighing = "sum",
    ) -> None:
        self.symmetries = list(symmetries)
        self.squares = {
            name: weights[name].detach().to(torch.float64).abs().square()
            for name in dict.fromkeys(n for s in symmetries for n in s.parameters)
        }
        self.pulls = [0.0] * len(self.symmetries) if pulls is None else list(pulls)
        self.logs = [
            torch.zeros(s.units, dtype=torch.float64, device=self.squares[s.parameters[0]].device)
            for s in self.symmetries
        ]
        self._uncounted = frozenset(uncounted)
        self._weigh = weigh
        self._entangled = [_is_entangled(s) for s in self.symmetries]

    def run(self) -> Tensor:
        """One sweep over all families; the largest change of the logarithm of a factor."""
        return torch.stack([self.improve(i) for i in range(len(self.symmetries))]).amax()

    def improve(self, index: int) -> Tensor:
        """Set the factors of one family to their optimum; the largest |θ|."""
        if self._entangled[index]:
            return self._one_by_one(index)
        return self.shift(index, self._best(index))

    def shift(self, index: int, theta: Tensor) -> Tensor:
        """Multiply the units of a family by e^θ; the largest |θ|."""
        self.logs[index] += theta
        for name, factor in self.symmetries[index].factors((2 * theta).exp()).items():
            self.squares[name] *= factor
        return theta.abs().amax()

    def factors(self) -> dict[str, Tensor]:
        """What each parameter is multiplied by, in float64, as tensors that broadcast."""
        found: dict[str, Tensor] = {}
        for symmetry, logs in zip(self.symmetries, self.logs, strict=True):
            for name, log in _logarithms(symmetry, logs).items():
                found[name] = found[name] + log if name in found else log
        return {name: log.exp() for name, log in found.items()}

    def without_minimum(self) -> int:
        """The number of units with a zero on one side of the trade, which are left as they are."""
        count = 0
        for index, symmetry in enumerate(self.symmetries):
            zero = torch.zeros(symmetry.units, dtype=torch.float64)
            up, down = zero.clone(), zero + self.pulls[index]
            for term, size in self._sizes(index):
                side = up if term.exponent > 0 else down
                side += size.cpu()
            count += int(((up == 0) | (down == 0)).sum())
        return count

    def _sizes(self, index: int) -> Iterator[tuple[Term, Tensor]]:
        for term in self.symmetries[index].terms:
            if term.parameter not in self._uncounted:
                yield term, self._size(term)

    def _size(self, term: Term) -> Tensor:
        squares = self.squares[term.parameter]
        if self._weigh == "sum":
            return term.slices.sum(squares)
        if is_vector(term):
            return squares.new_zeros(term.slices.count)
        return largest(term, squares)

    def _joined(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b if self._weigh == "sum" else torch.maximum(a, b)

    def sizes(self, index: int) -> list[Sizes]:
        """What the slices of each exponent of a family weigh at present."""
        by_exponent: dict[float, Tensor] = {}
        for term, size in self._sizes(index):
            known = by_exponent.get(term.exponent)
            by_exponent[term.exponent] = size if known is None else self._joined(known, size)
        return [Sizes(a, m) for a, m in by_exponent.items()]

    def _best(self, index: int) -> Tensor:
        sizes = self.sizes(index)
        return least(sizes, self.pulls[index]) if sizes else torch.zeros_like(self.logs[index])

    def _one_by_one(self, index: int) -> Tensor:
        """Unit after unit, for a family that meets itself: rows and columns of one square weight.

        An entry in row u and in column u has the sum of both exponents, so it is told apart.
        """
        symmetry = self.symmetries[index]
        moved = [self.logs[index].new_zeros(())]
        for u in range(symmetry.units):
            one = torch.zeros_like(self.logs[index])
            one[u] = 1
            by_exponent: dict[float, Tensor] = {}
            for name, exponents in _logarithms(symmetry, one).items():
                if name in self._uncounted:
                    continue
                squares = self.squares[name]
                exponents = exponents.expand_as(squares)
                for a in exponents.unique().tolist():  # type: ignore[no-untyped-call]  # torch has no types here
                    part = squares[exponents == a]
                    size = part.sum() if self._weigh == "sum" else part.amax()
                    known, size = by_exponent.get(a), size.reshape(1)
                    by_exponent[a] = size if known is None else self._joined(known, size)
            sizes = [Sizes(a, m) for a, m in by_exponent.items() if a]
            if sizes:
                moved.append(self.shift(index, one * least(sizes, self.pulls[index])))
        return torch.stack(moved).amax()


def largest(term: Term, values: Tensor) -> Tensor:
    """The largest value in each unit's slice."""
    rest = [d for d in range(values.ndim) if d not in term.slices.dims]
    by_index = values.amax(rest) if rest else values
    return by_index.flatten()[term.slices.indices().to(values.device)].amax(1)


def _logarithms(symmetry: Symmetry, logs: Tensor) -> dict[str, Tensor]:
    """The logarithm of what each parameter is multiplied by; sums do not overflow on the way."""
    found: dict[str, Tensor] = {}
    for term in symmetry.terms:
        # What slices spread is 1 elsewhere, as factors are; the logarithm there is 0.
        log = torch.where(
            _mask(term, symmetry.units).to(logs.device),
            term.slices.spread(term.exponent * logs, term.shape),
            0,
        )
        found[term.parameter] = found[term.parameter] + log if term.parameter in found else log
    return found


def _mask(term: Term, units: int) -> Tensor:
    """Where a unit's slice is, in the shape that :meth:`Slices.spread` gives."""
    return term.slices.spread(torch.zeros(units), term.shape) == 0


def _is_entangled(symmetry: Symmetry) -> bool:
    """Whether an entry of a weight belongs to two units, or twice to one."""
    for name in symmetry.parameters:
        terms = [term for term in symmetry.terms if term.parameter == name]
        if len(terms) > 1:
            counts = sum(_mask(term, symmetry.units).long() for term in terms)
            if int(torch.as_tensor(counts).max()) > 1:
                return True
    return False
