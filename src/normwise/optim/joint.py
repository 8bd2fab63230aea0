r"""Steps along symmetries of several weights: slices that scale together, each by its own power.

In unit u of a family every slice wₛ may be multiplied by c^(aₛ), c > 0, and the network computes
the same. So every loss has Σ aₛ⟨wₛ, gₛ⟩ = 0 (Euler), and the part of a displacement d along the
generator v = (aₛwₛ)ₛ changes nothing that the network computes, to first order.

*Removed.* Of all units together the part in the span of their generators goes: d ← d − Σ xᵤvᵤ with
G x = (⟨vᵤ, d⟩)ᵤ and G the Gram matrix ⟨vᵤ, vᵤ'⟩, see :mod:`normwise.optim.gram`. Units that share
no entry make G diagonal, and x = Σ aₛ⟨wₛ, dₛ⟩ / Σ aₛ²‖wₛ‖². Units of different families that share
entries, such as rows and columns of one weight, have ⟨vᵤ, vᵤ'⟩ = a a'·(the sum of squares of what
they share).

*Fixed.* Where all slices of a unit scale alike they are one slice that happens to lie in several
weights; its norm √Σ‖wₛ‖² may be fixed as that of any other. Where some grow as others shrink, no
norm can be: what gradient flow conserves is Σ aₛ‖wₛ‖², whose level sets are not bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from normwise.geometry import View
from normwise.invariance.symmetry import Slices, Symmetry, by_index
from normwise.optim.displaced import Displaced, Message, gradient
from normwise.optim.gram import solve
from normwise.optim.step import for_computing, scalar_dtype
from normwise.sharding import Layout, is_sharded, lay_out_channels, local, sum_over_ranks_

__all__ = [
    "Family",
    "Joint",
    "Moves",
    "Removal",
    "Symmetries",
    "check_fixable",
    "families_of",
    "with_views",
]


class _Report(Protocol):
    @property
    def symmetries(self) -> Sequence[Symmetry]: ...

    def parameters(self) -> Mapping[str, Tensor]: ...


Symmetries = Iterable[Symmetry] | _Report


@dataclass(frozen=True, eq=False)
class Member:
    """What one weight takes part with in a family: its slices, one a unit, and their exponent."""

    p: Tensor
    slices: Slices
    exponent: float


@dataclass(frozen=True, eq=False)
class Family:
    """A :class:`normwise.invariance.symmetry.Symmetry` of weights at hand.

    Attributes:
        members: its terms.
        units: how many there are of it.
        name: of it, for errors.
    """

    members: tuple[Member, ...]
    units: int
    name: str

    @classmethod
    def of_view(cls, p: Tensor, view: View) -> Family:
        """The slices of one weight, each a unit."""
        slices = Slices.of_view(view, tuple(p.shape))
        name = f"a weight of shape {tuple(p.shape)}, by {view}"
        return cls((Member(p, slices, 1.0),), slices.count, name)

    @property
    def params(self) -> list[Tensor]:
        """The weights that take part, each once."""
        return list(dict.fromkeys(member.p for member in self.members))


def families_of(
    symmetries: Symmetries, names: Mapping[Tensor, str], params: Sequence[Tensor], wrapper: str
) -> list[Family]:
    """The families of an optimizer's weights.

    Args:
        symmetries: a report, of which those families count whose weights are all the optimizer's;
            or symmetries, whose weights must be, by name.
        names: of the optimizer's weights, as far as it knows them.
        params: the optimizer's weights.
        wrapper: who asks, for errors.

    Raises:
        ValueError: for weights that are not the optimizer's, of another shape, or if there is no
            family.
    """
    known = set(params)
    if hasattr(symmetries, "symmetries"):
        report = cast(_Report, symmetries)
        by_name = dict(report.parameters())
        chosen = [
            s
            for s in report.symmetries
            if all(by_name[term.parameter] in known for term in s.terms)
        ]
    else:
        by_name = {name: p for p, name in names.items()}
        chosen = list(symmetries)
    families = []
    for symmetry in chosen:
        for term in symmetry.terms:
            p = by_name.get(term.parameter)
            if p is None:
                hint = "" if by_name else "; make it from model.named_parameters() to use names"
                raise ValueError(
                    f"parameter {term.parameter!r} of a symmetry is not one of the "
                    f"optimizer's{hint}"
                )
            if tuple(p.shape) != tuple(term.shape):
                raise ValueError(
                    f"a symmetry has {term.parameter!r} in shape {tuple(term.shape)}, but it has "
                    f"{tuple(p.shape)}; analyze the model that is trained"
                )
            if p.is_complex():
                raise ValueError(
                    f"{term.parameter!r} is complex, of which symmetries are not known; give it a "
                    "view"
                )
        members = [Member(by_name[t.parameter], t.slices, t.exponent) for t in symmetry.terms]
        devices = {member.p.device for member in members}
        if len(devices) > 1:
            raise ValueError(
                f"the weights of {symmetry} are on {' and '.join(map(str, devices))}; leave it out"
            )
        families.append(Family(tuple(members), symmetry.units, str(symmetry)))
    if not families:
        raise ValueError(f"no symmetry of weights that the optimizer steps: nothing for {wrapper}")
    return families


def with_views(
    families: Sequence[Family], views: Mapping[Tensor, View]
) -> tuple[list[Family], dict[Tensor, View]]:
    """Families with the views of their weights among them, and the views of other weights.

    A family that is a view of one weight, and shares it with no other, is such a view.
    """
    views = dict(views)
    shared: dict[Tensor, int] = {}
    for family in families:
        for p in family.params:
            shared[p] = shared.get(p, 0) + 1
    joint = []
    for family in families:
        member = family.members[0]
        alone = len(family.members) == 1 and shared[member.p] == 1 and member.p.ndim > 1
        view = member.slices.view(tuple(member.p.shape)) if alone else None
        if view is not None and member.p not in views:
            views[member.p] = view
        if view is None or views[member.p] != view:
            joint.append(family)
    within = {p for family in joint for p in family.params}
    for p in [p for p in views if p in within]:
        own = Family.of_view(p, views.pop(p))
        slices = own.members[0].slices
        known = [f.members[0] for f in joint if len(f.members) == 1]
        if not any(member.p is p and member.slices == slices for member in known):
            joint.append(own)
    return joint, views


def check_fixable(families: Sequence[Family], wrapper: str) -> None:
    """Raise ValueError unless each family has a norm to be fixed, and no two share an entry."""
    for family in families:
        if len({member.exponent for member in family.members}) > 1:
            raise ValueError(
                f"{wrapper} cannot fix norms along {family.name}: its slices do not all scale "
                "alike, so no norm of theirs is bounded; leave it out ([s for s in "
                "report.symmetries if s.is_scale]), or give each weight a view"
            )
    plan = _Plan(families)
    for first, second in plan.shared:
        raise ValueError(
            f"{wrapper} cannot fix two norms of the same entries: {families[first].name} and "
            f"{families[second].name}; leave one out"
        )


class Joint:
    """What belongs to families of one optimizer, found once.

    Args:
        families: of it.
    """

    def __init__(self, families: Sequence[Family]) -> None:
        self.families = list(families)
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def taking(self, stepped: Callable[[Tensor], bool]) -> list[int]:
        """Which families have all their weights stepped; the others are left alone."""
        return [i for i, f in enumerate(self.families) if all(map(stepped, f.params))]

    def plan(self, members: Sequence[int]) -> _Plan:
        """What is known of these families together."""
        key = tuple(members)
        if key not in self._plans:
            self._plans[key] = _Plan([self.families[i] for i in members])
        return self._plans[key]


class _Plan:
    """Which families share entries, and how the units of each lie on this rank.

    Args:
        families: to be handled together.
    """

    def __init__(self, families: Sequence[Family]) -> None:
        self.families = families
        self.pieces = [[_Piece.of(m, f.units) for m in f.members] for f in families]
        self.params = list(dict.fromkeys(p for f in families for p in f.params))
        # For each weight the pairs of families, with their pieces, that share entries of it.
        self.overlaps: dict[Tensor, list[tuple[int, _Piece, int, _Piece]]] = {}
        for p in self.params:
            of_p = [
                (i, piece) for i, own in enumerate(self.pieces) for piece in own if piece.p is p
            ]
            self.overlaps[p] = [
                (i, a, j, b) for (i, a), (j, b) in combinations(of_p, 2) if a.meets(b)
            ]

    @property
    def shared(self) -> set[tuple[int, int]]:
        """The pairs of families that share entries; a family may do so with itself."""
        return {(i, j) for pairs in self.overlaps.values() for i, _, j, _ in pairs}


@dataclass(frozen=True, eq=False)
class _Piece:
    """The slices of a member on this rank.

    Attributes:
        p: the weight.
        exponent: of the slices.
        units: of the family.
        dims: the dimensions whose indices tell units apart.
        sizes: of these on this rank.
        unit: the unit of each index along them, row-major; ``units`` for what is in none.
        whole: the same of the whole weight.
        layout: over which ranks sums are to be added up.
    """

    p: Tensor
    exponent: float
    units: int
    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    unit: Tensor
    whole: Tensor
    layout: Layout

    @classmethod
    def of(cls, member: Member, units: int) -> _Piece:
        p, slices = member.p, member.slices
        dims = slices.dims if p.ndim else ()
        shape = [p.shape[d] for d in dims]
        whole = torch.full((_product(shape),), units)
        indices = slices.indices()
        whole[indices] = torch.arange(units).unsqueeze(1).expand(indices.shape)
        whole = whole.view(shape)
        unit, layout = whole, Layout(View.layer(), p.shape, View.layer(), (), 0, 1, whole)
        if is_sharded(p) and p.ndim:
            layout = lay_out_channels(p, 0)
            for k, d in enumerate(dims):
                unit = unit.index_select(k, lay_out_channels(p, d).slots.cpu())
        sizes = tuple(unit.shape)
        return cls(
            p, member.exponent, units, dims, sizes, unit.flatten().to(p.device), whole, layout
        )

    def meets(self, other: _Piece) -> bool:
        """Whether an entry of the weight is in a unit of both."""
        if not set(self.dims) & set(other.dims):
            return True
        a, b = (
            _spread(piece.whole < piece.units, piece.dims, (*piece.p.shape,))
            for piece in (self, other)
        )
        return bool((a & b).any())

    def sums(self, products: Tensor) -> Tensor:
        """Sums of entries of the shard in each unit, shape ``(units,)``."""
        found = products.new_zeros(self.units + 1)
        return found.index_add_(0, self.unit, by_index(products, self.dims))[:-1]

    def shared_sums(self, other: _Piece, products: Tensor) -> Tensor:
        """Sums of the entries that a unit of each has in common, shape ``(units, units)``."""
        dims = tuple(sorted({*self.dims, *other.dims}))
        shape = tuple(products.shape)
        a, b = (_spread(piece.unit.view(piece.sizes), piece.dims, shape) for piece in (self, other))
        width = other.units + 1
        code = (a * width + b).expand([n if d in dims else 1 for d, n in enumerate(shape)])
        found = products.new_zeros((self.units + 1) * width)
        found.index_add_(0, code.flatten(), by_index(products, dims))
        return found.view(-1, width)[:-1, :-1]

    def field(self, values: Tensor, outside: float) -> Tensor:
        """Values of units as a tensor that broadcasts against the shard."""
        padded = torch.cat([values, values.new_full((1,), outside)])
        shape = tuple(local(self.p).shape)
        return _spread(padded[self.unit].view(self.sizes), self.dims, shape)


class Removal:
    """Removes the part of displacements along all units of some families.

    Args:
        plan: of the families.
        displaced: their weights.
        keep: 1 − ηλρ, what decay leaves of the weights of a group.
        stochastic_rounding: of half-precision weights.
    """

    def __init__(
        self,
        plan: _Plan,
        displaced: Mapping[Tensor, Displaced],
        keep: Callable[[Mapping[str, Any]], float | Tensor],
        *,
        stochastic_rounding: bool = False,
    ) -> None:
        self._plan = plan
        self._displaced = displaced
        self._keep = keep
        self._stochastic_rounding = stochastic_rounding
        self._sums: dict[Tensor, Tensor] = {}

    def messages(self, first: int) -> list[Message]:
        """Of each weight the sums that its pieces of all units make."""
        found: list[Message] = []
        for number, p in enumerate(self._plan.params):
            w, d = _displacement(self._displaced[p])
            squares, products = w * w, w * d
            parts = [piece.sums(of) for piece in self._pieces(p) for of in (squares, products)]
            parts += [a.shared_sums(b, squares).flatten() for _, a, _, b in self._plan.overlaps[p]]
            self._sums[p] = torch.cat(parts)
            found.append((first + number, self._sums[p], self._pieces(p)[0].layout))
        return found

    def finish_(self) -> None:
        """Remove it, and let decay take its part of the weights."""
        multiples = self._multiples()
        for p in self._plan.params:
            of = self._displaced[p]
            w = for_computing(of.before)
            factor = torch.as_tensor(self._keep(of.group) - 1)
            for pieces, x in zip(self._plan.pieces, multiples, strict=True):
                for piece in pieces:
                    if piece.p is p:
                        factor = factor - piece.exponent * piece.field(x, 0.0)
            of.write_(w + (factor.to(w) * w + of.displacement), self._stochastic_rounding)

    def _pieces(self, p: Tensor) -> list[_Piece]:
        return [piece for pieces in self._plan.pieces for piece in pieces if piece.p is p]

    def _multiples(self) -> list[Tensor]:
        """x of each family: the multiples of the generators to take away."""
        plan = self._plan
        read = {p: _Reader(sums) for p, sums in self._sums.items()}
        squares, products = [], []
        for family, pieces in zip(plan.families, plan.pieces, strict=True):
            like = self._sums[pieces[0].p]
            g, b = like.new_zeros(family.units), like.new_zeros(family.units)
            for piece in pieces:
                g += piece.exponent**2 * read[piece.p].take((family.units,))
                b += piece.exponent * read[piece.p].take((family.units,))
            squares.append(g)
            products.append(b)
        blocks: dict[tuple[int, int], Tensor] = {}
        # In the order in which messages() has written them.
        for p in plan.params:
            for i, first, j, second in plan.overlaps[p]:
                block = read[p].take((first.units, second.units))
                block = block * first.exponent * second.exponent
                if i == j:
                    block = block + block.T
                blocks[i, j] = blocks[i, j] + block if (i, j) in blocks else block
        return solve(squares, products, blocks, [family.name for family in plan.families])


class Moves:
    """Moves the slices of units, each of them one slice that lies in several weights.

    Args:
        plan: of families that scale alike, and share no entry.
        displaced: their weights.
        coefficients: gives a and b of a·w + b·d for a family, of its number and its sums, shape
            ``(units, 4)``.
        with_gradients: whether ⟨w, g⟩ is the last of these; else it is 0.
        stochastic_rounding: of half-precision weights.
    """

    def __init__(
        self,
        plan: _Plan,
        displaced: Mapping[Tensor, Displaced],
        coefficients: Callable[[int, Tensor], tuple[Tensor, Tensor]],
        *,
        with_gradients: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        self._plan = plan
        self._displaced = displaced
        self._coefficients = coefficients
        self._with_gradients = with_gradients
        self._stochastic_rounding = stochastic_rounding
        self._sums: dict[_Piece, Tensor] = {}

    def messages(self, first: int) -> list[Message]:
        """Of each piece its sums."""
        found: list[Message] = []
        for pieces in self._plan.pieces:
            for piece in pieces:
                of = self._displaced[piece.p]
                w, d = _displacement(of)
                products = [w * w, w * d, d * d]
                if self._with_gradients:
                    products.append(w * _wide(gradient(of)))
                self._sums[piece] = torch.stack([piece.sums(t) for t in products], 1)
                found.append((first + len(found), self._sums[piece], piece.layout))
        return found

    def finish_(self) -> None:
        """Put every unit where its displacement leads."""
        factors: dict[Tensor, tuple[float | Tensor, float | Tensor]] = {}  # a − 1 and b
        for number, pieces in enumerate(self._plan.pieces):
            sums = torch.stack([self._sums[piece] for piece in pieces]).sum(0)
            a, b = self._coefficients(number, sums)
            for piece in pieces:
                before, after = factors.get(piece.p, (0.0, 1.0))
                factors[piece.p] = (
                    before + piece.field(a - 1, 0.0),
                    after + piece.field(b - 1, 0.0),
                )
        for p, factors_of_p in factors.items():
            of = self._displaced[p]
            w = for_computing(of.before)
            a, b = (torch.as_tensor(factor).to(w) for factor in factors_of_p)
            of.write_(w + (a * w + b * of.displacement), self._stochastic_rounding)


def norms_of(families: Sequence[Family]) -> list[Tensor]:
    """The norm √Σ‖wₛ‖² of each unit of each family, on all ranks."""
    plan = _Plan(families)
    sums = {
        piece: piece.sums(_wide(local(piece.p)).square())
        for pieces in plan.pieces
        for piece in pieces
    }
    sum_over_ranks_(list(sums.values()), [piece.layout for piece in sums])
    return [torch.stack([sums[piece] for piece in own]).sum(0).sqrt() for own in plan.pieces]


class _Reader:
    """Takes parts of a message in the order in which they were written."""

    def __init__(self, message: Tensor) -> None:
        self._message = message
        self._at = 0

    def take(self, shape: tuple[int, ...]) -> Tensor:
        start, self._at = self._at, self._at + _product(shape)
        return self._message[start : self._at].view(shape)


def _displacement(of: Displaced) -> tuple[Tensor, Tensor]:
    """w and d of a shard in float64."""
    w, after = _wide(of.before), _wide(of.after)
    return w, after if of.from_zero else after - w


def _wide(t: Tensor) -> Tensor:
    return t.to(scalar_dtype(t.device))


def _spread(values: Tensor, dims: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A tensor over some dimensions as one that broadcasts against a weight of a shape."""
    return values.reshape([n if d in dims else 1 for d, n in enumerate(shape)])


def _product(sizes: Sequence[int]) -> int:
    n = 1
    for size in sizes:
        n *= size
    return n
