"""Find the families of slices that can be scaled together.

If f is unchanged when the slices s of a unit are multiplied by c^aₛ, for all c > 0, then
Σ aₛ⟨wₛ, gₛ⟩ = 0 for every upstream gradient g (Euler). A family repeats one pattern of exponents
over many units, so that one backward pass, read index by index, gives an equation for each unit:
the exponents are the null space of the matrix (draws × units, slices). Only what has one unit, such
as a residual stream, takes a draw for each parameter.

The search goes from the finest slices to the coarsest, and passes over what is in a family already:

1. indices of one dimension against the same indices of others (rows, columns, gains, biases), and
   against equal parts of a longer dimension (fused projections, concatenations);
2. single indices, and sums of a few at equal distances, against any other that is proportional to
   them (grouped heads, rotary pairs, flattened maps, shuffled channels, stacks of experts);
3. runs of indices, for each number of runs (groups, heads);
4. whole parameters, or the parts into which the families have cut them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.invariance.euler import Evidence, Finding
from normwise.invariance.nullspace import RowSpace, null_space, pivots, sparse_basis
from normwise.invariance.replica import TOLERANCE, Replica
from normwise.invariance.symmetry import Slices, Symmetry, Term, by_index

__all__ = ["find_families"]

Key = tuple[str, tuple[int, ...]]

# Draws taken at one point before the next, if the outputs have as many entries.
_PER_POINT = 16
# The most draws for slices finer than whole parameters. A search that would take more is left out.
_MOST_DRAWS = 128
# The most parts of a longer dimension that are tried one by one, and the most indices at equal
# distances that are summed.
_PARTS = 4
_FOLD = 16
# The most indices of a stack that are searched one by one.
_MOST_SEARCHED = 8192
# Beside the largest product of a draw, no more than this is rounding, where rounding was seen.
_ROUNDING = 2.0**-36
# How near two directions of products must be to be compared: far above rounding, far below chance.
_NEAR = 1e-9


@dataclass
class Strip:
    """The indices of one parameter along some dimensions, and what is known of them.

    Args:
        name: the parameter.
        shape: its shape.
        dims: the dimensions that the indices run over.
        live: which indices have a gradient.
        open: which may still be in a family: not invariant by themselves, and in none so far.
        sample: of how many of a stack's matrices, the first ones, the indices are searched; what is
            found is taken to go on in the others. None for all.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    live: Tensor
    open: Tensor
    sample: int | None = None

    @property
    def size(self) -> int:
        return len(self.live)

    def continued(self, slices: Slices) -> Slices | None:
        """Slices of the sample, as those of the whole stack; None where they do not fill it."""
        if self.sample is None:
            return slices
        each = self.size // self.shape[self.dims[0]]
        if not slices.units:
            return None
        (count, stride), *rest = slices.units
        if count * stride != self.sample * each:
            return None
        count = count // self.sample * self.shape[self.dims[0]]
        return replace(slices, units=((count, stride), *rest))

    def searched(self, indices: Tensor) -> bool:
        """Whether all these indices are open, and one of them has a gradient."""
        return bool(self.open[indices].all()) and bool(self.live[indices].any())


@dataclass(frozen=True)
class EulerColumn:
    """Slices of one or two parameters, and their products: shape ``(draws, units)``."""

    strips: tuple[Strip, ...]
    slices: Slices
    products: Tensor


class Draws:
    """Euler products of one draw after another, at every index, taken as they are asked for.

    Args:
        replica: the model.
        evidence: of the first draws, each at a point of its own.
        names: the parameters that have a gradient.
    """

    def __init__(
        self, replica: Replica, evidence: Mapping[str, Evidence], names: list[str]
    ) -> None:
        self._replica = replica
        self._names = names
        self._evidence = evidence
        self._rows: dict[Key, list[Tensor]] = {
            (name, dims): list(evidence[name].sums[dims])
            for name in names
            for dims in evidence[name].sets
        }
        self.count = len(next(iter(self._rows.values()))) if names else 0
        self.points = self.count
        self._more = self._drawn()

    def take(self, count: int) -> None:
        """Draw until there are ``count`` draws, or as many as the search affords."""
        while self.count < min(count, _MOST_DRAWS):
            for name, g in zip(self._names, next(self._more), strict=True):
                if g is None:
                    g = torch.zeros_like(self._replica.params[name])
                products = self._replica.products(name, g)
                for dims in self._evidence[name].sets:
                    self._rows[name, dims].append(by_index(products, dims).cpu())
            self.count += 1

    def of(self, strip: Strip) -> Tensor:
        """The products of a strip, shape ``(draws, indices)``; 0 where they are rounding."""
        noisy = self._evidence[strip.name].noisy(strip.dims)
        products = torch.stack(self._rows[strip.name, strip.dims])
        # A unit that was closed in the draws that tell rounding may open at a later point.
        size = products.abs()
        return products * ~(noisy & (size <= _ROUNDING * size.amax(1, keepdim=True)))

    def _drawn(self) -> Iterator[Sequence[Tensor | None]]:
        while True:
            self._replica.move(self.points)
            outputs = self._replica.run(graph=True)
            count = min(_PER_POINT, sum(output.numel() for output in outputs))
            for draw in range(count):
                cotangents = self._replica.cotangents(outputs, 100_000 * self.points + draw)
                yield self._replica.gradients(outputs, cotangents, self._names, retain=True)
            self.points += 1


def find_families(
    replica: Replica, evidence: Mapping[str, Evidence], findings: Mapping[str, Finding]
) -> list[Symmetry]:
    """The symmetries of two terms or more, and those of a part of one weight.

    Args:
        replica: the model.
        evidence: of some draws, each at a point of its own.
        findings: the views found from it, by parameter.

    Returns:
        Families from the finest to the coarsest, independent of one another and of the views.
    """
    names = replica.in_order_of_use([n for n, finding in findings.items() if finding.has_gradient])
    if not names:
        return []
    search = _Search(replica, evidence, findings, names)
    search.partial_views()
    search.sample_stacks()
    search.stacks()
    search.equal_indices()
    search.proportional_indices()
    search.runs()
    search.found = _merged(search.found)
    return [*search.found, *search.whole_parameters()]


class _Search:
    def __init__(
        self,
        replica: Replica,
        evidence: Mapping[str, Evidence],
        findings: Mapping[str, Finding],
        names: list[str],
    ) -> None:
        self.replica, self.evidence, self.findings = replica, evidence, findings
        self.names = names
        self.draws = Draws(replica, evidence, names)
        self.draws.take(self.draws.count + 2)
        self.generator = torch.Generator().manual_seed(replica.seed)
        self.found: list[Symmetry] = []
        self.strips: dict[Key, Strip] = {}
        for name in names:
            shape = tuple(evidence[name].shape)
            for dims in self.evidence[name].sets:
                live = evidence[name].seen(dims)
                if len(live) == 1 and len(shape) > 1 and dims != (0,):
                    continue
                strip = Strip(name, shape, dims, live, torch.ones_like(live))
                strip.open &= ~(self._vanishing(strip) & live)
                self.strips[name, dims] = strip

    def _vanishing(self, strip: Strip) -> Tensor:
        """The indices that are invariant by themselves."""
        sums = torch.stack(self.evidence[strip.name].sums[strip.dims])
        sizes = torch.stack(self.evidence[strip.name].sizes[strip.dims])
        return (sums.abs() <= TOLERANCE * sizes).all(0)

    def partial_views(self) -> None:
        """Slices of one weight of which others are not invariant: no view of the whole."""
        for name, finding in self.findings.items():
            if finding.part is None:
                continue
            dim, length, channels = finding.part
            indices = torch.tensor(channels).view(-1, length)
            slices = Slices.fitted((dim,), indices)
            if slices is not None:
                self._claim([(self.strips[name, (dim,)], slices, 1.0)])
        for strip in self.strips.values():
            if (len(strip.dims) == 1 and strip.dims[0] < 2) or self.findings[strip.name].view:
                continue
            indices = (~strip.open & strip.live).nonzero()
            one_entry = len(indices) and math.prod(strip.shape) == strip.size
            if len(indices) and not one_entry:
                slices = Slices.fitted(strip.dims, indices)
                if slices is not None:
                    self._claim([(strip, slices, 1.0)])

    def sample_stacks(self) -> None:
        """Search large stacks in their first two matrices only."""
        for strip in self.strips.values():
            if len(strip.dims) > 1 and strip.size > _MOST_SEARCHED:
                strip.sample = 2
                strip.open[2 * strip.size // strip.shape[strip.dims[0]] :] = False

    def equal_indices(self) -> None:
        """Families whose units are indices of one dimension of each parameter."""
        sizes = {strip.size for strip in self.strips.values() if len(strip.dims) == 1}
        stacks = [strip.size for strip in self.strips.values() if len(strip.dims) > 1]
        sizes |= {size for size in stacks if stacks.count(size) > 1}
        for units in sorted(sizes - {1}, reverse=True):
            places = []
            for strip in self.strips.values():
                starts = range(0, strip.size - units + 1, units)
                if strip.size % units:
                    starts = range(strip.size % units, strip.size - units + 1, units)
                if strip.size > (_PARTS if len(strip.dims) == 1 else 1) * units:
                    continue
                for start in starts:
                    indices = torch.arange(start, start + units)
                    if strip.searched(indices):
                        places.append(((strip,), Slices.each(strip.dims, units, start)))
            self._null_space(places, units)

    def runs(self) -> None:
        """Families whose units are runs of indices."""
        counts = {
            count
            for strip in self.strips.values()
            if strip.open.any() and len(strip.dims) == 1
            for count in range(2, strip.size + 1)
            if strip.size % count == 0
        }
        for units in sorted(counts, reverse=True):
            places = [
                ((strip,), Slices.runs(strip.dims, units, strip.size // units))
                for strip in self.strips.values()
                if strip.size % units == 0
                and len(strip.dims) == 1
                and strip.searched(torch.arange(strip.size))
            ]
            if any(slices.within for _, slices in places):
                self._null_space(places, units)

    def _column(self, strips: tuple[Strip, ...], slices: Slices) -> EulerColumn:
        indices = slices.indices()
        products = sum(
            (self.draws.of(strip)[:, indices].sum(2) for strip in strips), torch.zeros(())
        )
        return EulerColumn(strips, slices, products)

    def _null_space(self, places: Sequence[tuple[tuple[Strip, ...], Slices]], units: int) -> None:
        """Claim the families of these slices, of which each has as many units."""
        if len(places) < 2:
            return
        needed = 2 + math.ceil((len(places) + 4) / units)
        while True:
            if needed > _MOST_DRAWS:
                return
            self.draws.take(needed)
            columns = [self._column(*place) for place in places]
            # Slices that vanish alone are no family; a column of them would hide the others.
            columns = [c for c in columns if not self._vanishes(c)]
            if len(columns) < 2:
                return
            relations, true = self._relations(columns)
            if true or needed == _MOST_DRAWS:
                break
            needed = min(2 * needed, _MOST_DRAWS)
        for relation in relations:
            self._claim(
                [
                    (strip, column.slices, float(a))
                    for column, a in zip(columns, relation, strict=True)
                    if a
                    for strip in column.strips
                ]
            )

    def _vanishes(self, column: EulerColumn) -> bool:
        indices = column.slices.indices()
        sizes = sum(
            (self.draws.of(strip)[:, indices].abs().sum(2) for strip in column.strips),
            torch.zeros(()),
        )
        return bool((column.products.abs() <= TOLERANCE * sizes).all())

    def _relations(self, columns: list[EulerColumn]) -> tuple[list[Tensor], bool]:
        """Relations that hold in every draw, and whether none had to be refused."""
        stacked = torch.stack([column.products for column in columns], 2)
        # The first draw is kept apart: what holds there too is not owed to too few equations.
        rows = stacked[1:].flatten(0, 1)
        largest = rows.abs().amax(1)
        rows = rows[largest > 0] / largest[largest > 0].unsqueeze(1)
        if len(rows) < len(columns):
            return [], False
        if len(rows) > 2 * len(columns) + 32:
            mixing = torch.randn(
                2 * len(columns) + 16, len(rows), generator=self.generator, dtype=rows.dtype
            )
            rows = mixing @ rows
        null = null_space(rows)
        if 3 * null.shape[1] > 2 * len(columns) and len(columns) > 3:
            return [], False
        basis = sparse_basis(rows, null, [], self.generator)
        kept = []
        for relation in basis:
            terms = stacked * relation
            size = terms.abs().sum(2)
            if bool((terms.sum(2).abs() <= 16 * TOLERANCE * size).all()):
                kept.append(relation)
        return kept, len(kept) == null.shape[1]

    def _claim(self, parts: list[tuple[Strip, Slices, float]]) -> None:
        """Add a family, and close its indices to others."""
        continued = [(strip, strip.continued(slices), power) for strip, slices, power in parts]
        parts = [(strip, slices, power) for strip, slices, power in continued if slices is not None]
        if len(parts) < len(continued) or len({slices.count for _, slices, _ in parts}) > 1:
            return
        terms = self._ordered(
            Term(strip.name, strip.shape, slices, exponent, self.evidence[strip.name].shift)
            for strip, slices, exponent in parts
        )
        seen = torch.zeros(parts[0][1].count, dtype=torch.bool)
        for strip, slices, _ in parts:
            indices = slices.indices()
            seen |= strip.live[indices].any(1)
            strip.open[indices.flatten()] = False
            self._close_within(strip, slices)
        self.found.append(Symmetry(terms, len(seen), int((~seen).sum())))

    def _close_within(self, stack: Strip, slices: Slices) -> None:
        """Close the indices of one dimension that consist of units of a family of a stack."""
        if len(stack.dims) == 1:
            return
        sizes = [stack.shape[d] for d in stack.dims]
        closed = ~stack.open.view(sizes)
        for i, d in enumerate(stack.dims):
            along = slices.indices() // math.prod(sizes[i + 1 :]) % sizes[i]
            strip = self.strips.get((stack.name, (d,)))
            if strip is not None and bool((along == along[:, :1]).all()):
                strip.open &= ~closed.movedim(i, 0).flatten(1).all(1)

    def _ordered(self, terms: Iterable[Term]) -> tuple[Term, ...]:
        """In the order of their use, the first with a positive exponent."""
        order = {name: i for i, name in enumerate(self.names)}
        listed = sorted(terms, key=lambda term: (order[term.parameter], term.slices.start))
        sign = 1.0 if listed[0].exponent > 0 else -1.0
        return tuple(replace(term, exponent=sign * term.exponent) for term in listed)

    def _compounds(self) -> list[tuple[Strip, ...]]:
        """A weight with the bias of the same module, or a gain with it: they scale as one."""
        owners: dict[str, list[Strip]] = defaultdict(list)
        for strip in self.strips.values():
            owner = strip.name.partition(".parametrizations.")[0] + "."
            if ".parametrizations." not in strip.name:
                owner = strip.name.rpartition(".")[0] + "."
            owners[owner].append(strip)
        pairs: list[tuple[Strip, ...]] = []
        for strips in owners.values():
            for b in strips:
                if math.prod(b.shape) != b.size:
                    continue
                for a in strips:
                    larger = len(a.shape) > len(b.shape)
                    first = len(a.shape) == len(b.shape) and self._comes_before(a, b)
                    if a.size == b.size and a.name != b.name and (larger or first):
                        pairs.append((a, b))
        return pairs

    def _comes_before(self, a: Strip, b: Strip) -> bool:
        return math.prod(a.shape) == a.size and self.names.index(a.name) < self.names.index(b.name)

    def stacks(self) -> None:
        """Families of stacks of matrices and of grouped kernels, which have two dimensions a unit.

        Before all others, of which some would be sums over the stack of what is found here.
        """

        def stacked(strips: Iterable[Strip]) -> bool:
            return max(len(strip.dims) for strip in strips) > 1

        if any(len(strip.dims) > 1 for strip in self.strips.values()):
            # What pairs index by index needs no sums, of which there are many.
            self._proportional(stacked, singly=True)
            self._proportional(stacked)

    def proportional_indices(self) -> None:
        """Families of pairs of slices whose products are proportional in every draw.

        In what is left a pattern may fill only a part of a fused projection.
        """
        self._proportional(lambda strips: True)
        left = {
            (strip.name, strip.dims)
            for strip in self.strips.values()
            if len(strip.dims) == 1 and len(strip.shape) > 1 and bool(strip.open.any())
        }
        if left:
            self._proportional(
                lambda strips: all((strip.name, strip.dims) in left for strip in strips),
                ragged=True,
            )

    def _proportional(
        self,
        wanted: Callable[[Iterable[Strip]], bool],
        *,
        ragged: bool = False,
        singly: bool = False,
    ) -> None:
        """Claim pairs of proportional slices, if their strips are wanted.

        Args:
            wanted: whether to sum indices of these strips, and to claim a family of them.
            ragged: whether patterns may fill a part of a run of open indices.
            singly: whether to pair indices one by one only, and to claim only families that hold
                half of what has a gradient on each side, or more.
        """
        self.draws.take(6)
        groups: list[tuple[Strip, ...]] = [(strip,) for strip in self.strips.values()]
        groups += self._compounds()
        products = [sum((self.draws.of(s) for s in strips), torch.zeros(())) for strips in groups]
        sizes = {strip.size for strip in self.strips.values()}
        invariant = {name for name, finding in self.findings.items() if finding.view}
        invariant |= {family.terms[0].parameter for family in self.found if family.is_view}
        vectors = _Vectors(groups, invariant)
        for at, strips in enumerate(groups):
            size = strips[0].size
            vectors.add(at, Pattern(1, 1), torch.arange(size), products[at])
            if singly or not wanted(strips):
                continue
            for length in _divisors(size):
                for apart in _divisors(length):
                    count = length // apart
                    few = count <= _FOLD or (apart == 1 and size // count in sizes)
                    if few and 1 < count < size and not _is_one_dimension(strips, count, apart):
                        starts = torch.arange(0, size, length)
                        vectors.add(at, Pattern(count, apart), starts, products[at])
                        # An interleaved rotary embedding turns neighbours, in several heads.
                        if apart % 2 == 0 and apart > 2 and len(strips) == len(strips[0].dims):
                            vectors.add(at, Pattern(count, apart, 2), starts, products[at])
            if ragged:
                for pattern, starts in _within_runs(strips[0]):
                    vectors.add(at, pattern, starts, products[at])
        for parts in vectors.families():
            if wanted(strip for strip, _, _ in parts) and not (
                singly and any(_is_minor(strip, slices) for strip, slices, _ in parts)
            ):
                self._claim(parts)

    def whole_parameters(self) -> list[Symmetry]:
        """Symmetries of one unit: whole parameters, or parts that the families cut."""
        pieces = self._pieces()
        known = self._known(pieces)
        shapes = {name: tuple(self.evidence[name].shape) for name in self.names}

        def products_of(grads: Sequence[Tensor | None]) -> Tensor:
            values = []
            gradients = dict(zip(self.names, grads, strict=True))
            for name, slices in pieces:
                g = gradients[name]
                if g is None:
                    values.append(0.0)
                    continue
                values.append(float(slices.sum(self.replica.products(name, g)).sum()))
            return torch.tensor(values, dtype=torch.float64)

        if len(pieces) < 2:
            return []
        known = [relation for relation in known if relation.any()]
        used = set(pivots(known))
        left = [i for i in range(len(pieces)) if i not in used]
        if len(left) < 2:
            return []
        first = [
            torch.stack(
                [
                    self.draws.of(self.strips[name, slices.dims])[k][slices.indices()].sum()
                    for name, slices in pieces
                ]
            )
            for k in range(self.draws.count)
        ]
        space = RowSpace(torch.stack(first)[:, left])
        rows = list(first)
        point, news = self.draws.points + 1, True
        # A draw that is a combination of those before tells that its point has shown all it can;
        # the first draw of a point, that no point would show more.
        while news:
            news = False
            self.replica.move(point)
            outputs = self.replica.run(graph=True)
            draw = 0
            while True:
                cotangents = self.replica.cotangents(outputs, 100_000 * point + draw)
                row = products_of(
                    self.replica.gradients(outputs, cotangents, self.names, retain=True)
                )
                if not space.add(row[left]):
                    break
                rows.append(row)
                news, draw = True, draw + 1
            point += 1
        products = torch.stack(rows)
        found = null_space(products[:, left])
        null = torch.zeros(len(pieces), found.shape[1], dtype=torch.float64)
        null[left] = found
        basis = sparse_basis(products, null, known, self.generator)
        result = []
        for relation in basis:
            terms = [
                Term(name, shapes[name], slices, float(a), self.evidence[name].shift)
                for (name, slices), a in zip(pieces, relation, strict=True)
                if a
            ]
            result.append(Symmetry(self._ordered(_joined(terms, pieces)), 1))
        return result

    def _pieces(self) -> list[tuple[str, Slices]]:
        """Each parameter that is not invariant, or the parts in which families differ."""
        pieces: list[tuple[str, Slices]] = []
        for name in self.names:
            if self.findings[name].view is not None:
                continue
            shape = tuple(self.evidence[name].shape)
            parts: list[Slices] | None = None
            for dims in self.evidence[name].sets:
                if (name, dims) not in self.strips:
                    continue
                labels = self._labels(name, dims)
                values = sorted(set(labels.tolist()))
                if len(values) < 2:
                    continue
                cut = [Slices.fitted(dims, (labels == v).nonzero().view(1, -1)) for v in values]
                if all(slices is not None for slices in cut):
                    parts = [slices for slices in cut if slices is not None]
                    break
            pieces += [(name, slices) for slices in parts or [Slices.whole(shape)]]
        live = []
        for name, slices in pieces:
            strip = self.strips[name, slices.dims]
            indices = slices.indices()
            products = self.draws.of(strip)[:, indices]
            sizes = torch.stack(self.evidence[name].sizes[slices.dims])[:, indices]
            vanishing = (
                products[: len(sizes)].sum((1, 2)).abs() <= TOLERANCE * sizes.sum((1, 2))
            ).all()
            if strip.live[indices].any() and not vanishing:
                live.append((name, slices))
        return live

    def _labels(self, name: str, dims: tuple[int, ...]) -> Tensor:
        """For each index the number of the set of families that it is in."""
        strip = self.strips[name, dims]
        labels = torch.zeros(strip.size, dtype=torch.long)
        for number, family in enumerate(self.found, 1):
            for term in family.terms:
                if term.parameter == name and term.slices.dims == dims:
                    labels[term.slices.indices().flatten()] += 1_000_003 * number % 999_983 + number
        return labels

    def _known(self, pieces: list[tuple[str, Slices]]) -> list[Tensor]:
        """The families, all units alike, as exponents of the pieces, where they have such."""
        relations = []
        for family in self.found:
            relation = torch.zeros(len(pieces), dtype=torch.float64)
            whole = True
            for term in family.terms:
                covered = set(term.slices.indices().flatten().tolist())
                for i, (name, slices) in enumerate(pieces):
                    if name != term.parameter:
                        continue
                    if slices.dims != term.slices.dims:
                        whole &= len(covered) == self.strips[name, term.slices.dims].size
                        relation[i] += term.exponent
                        continue
                    mine = set(slices.indices().flatten().tolist())
                    if mine <= covered:
                        relation[i] += term.exponent
                    else:
                        # Indices without a gradient may be in a piece and in no family.
                        alive = self.strips[name, slices.dims].live
                        rest = [k for k in mine - covered if alive[k]]
                        if mine & covered:
                            whole &= not rest
                            relation[i] += term.exponent
            if whole:
                relations.append(relation)
        return relations


def _joined(terms: list[Term], pieces: list[tuple[str, Slices]]) -> tuple[Term, ...]:
    """The terms, with all parts of one parameter that have one exponent put together."""
    joined: list[Term] = []
    for term in terms:
        mine = [t for t in terms if t.parameter == term.parameter]
        parts = sum(name == term.parameter for name, _ in pieces)
        if len(mine) == parts and len({t.exponent for t in mine}) == 1:
            whole = replace(term, slices=Slices.whole(term.shape))
            if whole not in joined:
                joined.append(whole)
        else:
            joined.append(term)
    return tuple(joined)


def _merged(families: list[Symmetry]) -> list[Symmetry]:
    """The families, with those put together that are one pattern over more units."""
    alike: dict[object, list[Symmetry]] = {}
    for family in map(_with_parts_joined, families):
        signature = tuple(
            (t.parameter, t.slices.dims, t.exponent, t.slices.per_unit) for t in family.terms
        )
        alike.setdefault(signature, []).append(family)
    merged = []
    for group in alike.values():
        group.sort(key=lambda family: family.terms[0].slices.start)
        terms = [
            _term_over([family.terms[i] for family in group], dim=0)
            for i in range(len(group[0].terms))
        ]
        made = tuple(term for term in terms if term is not None)
        if len(made) < len(terms):
            merged += group
            continue
        units, unseen = (sum(getattr(f, key) for f in group) for key in ("units", "unseen"))
        merged.append(Symmetry(made, units, unseen))
    return merged


def _with_parts_joined(family: Symmetry) -> Symmetry:
    """The family, with the terms of one parameter and exponent as one."""
    alike: dict[object, list[Term]] = {}
    for term in family.terms:
        alike.setdefault((term.parameter, term.slices.dims, term.exponent), []).append(term)
    terms: list[Term] = []
    for group in alike.values():
        joined = _term_over(group, dim=1)
        terms += group if joined is None else [joined]
    return replace(family, terms=tuple(terms))


def _term_over(terms: list[Term], dim: int) -> Term | None:
    """One term for the units (dim 0) or the indices of each unit (dim 1) of all of these."""
    indices = [term.slices.indices() for term in terms]
    slices = Slices.fitted(terms[0].slices.dims, torch.cat(indices, dim))
    return None if slices is None else replace(terms[0], slices=slices)


class Pattern(NamedTuple):
    """The indices of a unit: ``many`` times ``inner`` neighbours, ``apart`` from one another."""

    many: int
    apart: int
    inner: int = 1

    @property
    def size(self) -> int:
        return self.many * self.inner

    def indices(self, first: Tensor) -> Tensor:
        """The indices that are summed with each first one, in rows."""
        rest = (self.apart * torch.arange(self.many)).unsqueeze(1) + torch.arange(self.inner)
        return first.unsqueeze(1) + rest.flatten()


class _Vectors:
    """Directions of the products of slices over the draws, to find those that are proportional."""

    def __init__(self, groups: list[tuple[Strip, ...]], invariant: set[str]) -> None:
        self.groups, self.invariant = groups, invariant
        self._meta: list[Tensor] = []  # rows of (group, count, apart, inner, first index)
        self._values: list[Tensor] = []

    def add(self, at: int, pattern: Pattern, starts: Tensor, products: Tensor) -> None:
        """Add the sums over the units of a pattern, where all indices are open.

        Args:
            at: the group.
            pattern: of the units.
            starts: the first index of each block of ``apart / inner`` units.
            products: of the group, shape ``(draws, indices)``.
        """
        first = starts.unsqueeze(1) + torch.arange(0, pattern.apart, pattern.inner)
        first = first.flatten()
        indices = pattern.indices(first)
        there = self._open(at, indices)
        first, indices = first[there], indices[there]
        folded = products[:, indices]
        values, sizes = folded.sum(2), folded.abs().sum(2)
        norms = torch.linalg.vector_norm(values, dim=0)
        there = norms > math.sqrt(TOLERANCE) * 1e-2 * torch.linalg.vector_norm(sizes, dim=0)
        if not there.any():
            return
        first, values = first[there], values[:, there]
        meta = torch.tensor([at, *pattern]).expand(len(first), 4)
        self._meta.append(torch.cat([meta, first.unsqueeze(1)], 1))
        self._values.append(values.T)

    def _open(self, at: int, indices: Tensor) -> Tensor:
        """Which slices, rows of ``indices``, are open and have a gradient."""
        there = torch.ones(len(indices), dtype=torch.bool)
        for strip in self.groups[at]:
            there &= strip.open[indices].all(1) & strip.live[indices].any(1)
        return there

    def families(self) -> Iterator[list[tuple[Strip, Slices, float]]]:
        """Families of pairs: every two slices that are proportional, put together by strips.

        The finest come first. Of the others those are left out of which a slice has been claimed
        meanwhile, since sums of proportional slices are proportional too.
        """
        if not self._meta:
            return
        meta, values = torch.cat(self._meta), torch.cat(self._values)
        norms = torch.linalg.vector_norm(values, dim=1)
        units = values / norms.unsqueeze(1)
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(units.shape[1], 2, generator=generator, dtype=units.dtype)
        keys = units @ probes
        signs = keys[:, 0].sign()
        keys = keys[:, 1] * signs
        order = keys.argsort()
        near = (keys[order].diff() <= _NEAR).tolist()
        found: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        clusters = [c for near in _chains(near, order) for c in self._close(near, units, signs)]
        # Where an index has no gradient, sums with it and without are alike: then the pattern that
        # most units have is meant.
        often: Counter[tuple[int, ...]] = Counter()
        for cluster in clusters:
            kinds = {tuple(kind) for kind in meta[cluster, :4].tolist()}
            if len({kind[0] for kind in kinds}) > 1:
                often.update(kinds)
        for cluster in clusters:
            chosen = self._disjoint(cluster, meta, often)
            if len(chosen) > 1:
                self._pair(chosen, meta, norms, signs, found)

        def sizes(key: tuple[int, ...]) -> list[int]:
            return sorted((Pattern(*key[1:4]).size, Pattern(*key[5:8]).size), reverse=True)

        for key in sorted(found, key=sizes):
            a, b, ratio = key[0], key[4], key[8]
            of_a, of_b = Pattern(*key[1:4]), Pattern(*key[5:8])
            pairs = torch.tensor(sorted(found[key]))
            there = self._open(a, of_a.indices(pairs[:, 0]))
            there &= self._open(b, of_b.indices(pairs[:, 1]))
            pairs = self._with_unseen(pairs[there], (a, of_a), (b, of_b))
            for part in _fitting(pairs):
                slices_a = Slices.fitted((0,), of_a.indices(part[:, 0]))
                slices_b = Slices.fitted((0,), of_b.indices(part[:, 1]))
                if slices_a is None or slices_b is None:
                    continue
                sides = ((a, slices_a, 1.0), (b, slices_b, ratio / 1000))
                yield [
                    (strip, replace(slices, dims=strip.dims), power)
                    for group, slices, power in sides
                    for strip in self.groups[group]
                ]

    def _with_unseen(
        self, pairs: Tensor, side_a: tuple[int, Pattern], side_b: tuple[int, Pattern]
    ) -> Tensor:
        """The pairs, and those between and beyond that have no gradient on either side."""
        if len(pairs) < 3:
            return pairs
        steps = pairs.diff(dim=0)
        often, times = Counter(map(tuple, steps.tolist())).most_common(1)[0]
        step = torch.tensor(often)
        skewed = steps[:, 0] * step[1] != steps[:, 1] * step[0]
        if times < 2 or step[0] < 1 or bool(skewed.any()):
            return pairs
        if (steps % step.where(step != 0, torch.ones_like(step)) != 0).any():
            return pairs
        found = {tuple(pair) for pair in pairs.tolist()}
        size = self.groups[side_a[0]][0].size
        along = torch.arange(-int(pairs[0, 0] // step[0]), size)
        filled: list[Tensor] = []
        for pair in pairs[0] + along.unsqueeze(1) * step:
            if tuple(pair.tolist()) in found or all(
                self._unseen(at, pattern.indices(pair[side : side + 1]))
                for side, (at, pattern) in enumerate((side_a, side_b))
            ):
                filled.append(pair)
            elif pair[0] < pairs[0, 0]:
                filled.clear()
            elif pair[0] > pairs[-1, 0]:
                break
            else:
                return pairs
        return torch.stack(filled)

    def _unseen(self, at: int, indices: Tensor) -> bool:
        """Whether these are open indices of which none has a gradient."""
        return all(
            bool(((indices >= 0) & (indices < strip.size)).all())
            and bool((strip.open[indices] & ~strip.live[indices]).all())
            for strip in self.groups[at]
        )

    def _pair(
        self,
        cluster: list[int],
        meta: Tensor,
        norms: Tensor,
        signs: Tensor,
        found: dict[tuple[int, ...], list[tuple[int, int]]],
    ) -> None:
        """Pair all of a cluster with the one that most others grow against."""
        opposite = [sum(bool(signs[i] != signs[j]) for j in cluster) for i in cluster]
        anchor = max(range(len(cluster)), key=lambda i: (opposite[i], i))
        b = cluster[anchor]
        for a in cluster:
            if a == b or self._same(meta[a], meta[b]):
                continue
            # a's products = ratio · b's: exponents (1, −ratio), or as whole numbers.
            ratio = float(norms[a] / norms[b] * signs[a] * signs[b])
            exponent = -ratio
            if exponent > 0 and self._share(meta[a], meta[b]):
                # Parts of what only a larger unit holds together, such as a weight with its bias.
                continue
            key_a, key_b = meta[a].tolist(), meta[b].tolist()
            if abs(exponent) < 1 - 1e-6:
                key_a, key_b, exponent = key_b, key_a, 1 / exponent
            elif abs(exponent) < 1 + 1e-6 and key_a > key_b:
                key_a, key_b = key_b, key_a
            rounded = round(1000 * exponent)
            if abs(1000 * exponent - rounded) > 1e-4:
                continue
            kinds = (*key_a[:4], *key_b[:4], rounded)
            found[kinds].append((key_a[4], key_b[4]))

    def _close(self, chain: list[int], units: Tensor, signs: Tensor) -> list[list[int]]:
        """The slices of a chain of near keys whose directions are near too, cluster by cluster."""
        clusters = []
        while len(chain) > 1:
            directions = units[chain] * signs[chain].unsqueeze(1)
            near = ((directions - directions[0]).abs().amax(1) <= 100 * _NEAR).tolist()
            cluster = [at for at, is_near in zip(chain, near, strict=True) if is_near]
            if len(cluster) > 1:
                clusters.append(cluster)
            chain = [at for at, is_near in zip(chain, near, strict=True) if not is_near]
        return clusters

    def _disjoint(
        self, cluster: list[int], meta: Tensor, often: Mapping[tuple[int, ...], int]
    ) -> list[int]:
        """Of slices that share an index one, in the pattern that is found most often."""

        def rank(at: int) -> tuple[int, list[int]]:
            kind = meta[at].tolist()
            return -often.get(tuple(kind[:4]), 0), [kind[1] * kind[3], *kind]

        kept: list[int] = []
        covered: set[tuple[str, tuple[int, ...], int]] = set()
        for at in sorted(cluster, key=rank):
            group, *pattern, first = meta[at].tolist()
            mine = {
                (strip.name, strip.dims, index)
                for strip in self.groups[group]
                for index in Pattern(*pattern).indices(torch.tensor([first])).flatten().tolist()
            }
            if not mine & covered:
                covered |= mine
                kept.append(at)
        return kept

    def _share(self, a: Tensor, b: Tensor) -> bool:
        """Whether the two have a parameter in common."""
        names = ({strip.name for strip in self.groups[int(meta[0])]} for meta in (a, b))
        return bool(set.intersection(*names))

    def _same(self, a: Tensor, b: Tensor) -> bool:
        """Whether the two are of one parameter in different index sets, or share an index."""
        (i, *of_a, first_a), (j, *of_b, first_b) = a.tolist(), b.tolist()
        names = {strip.name for strip in self.groups[i]} & {s.name for s in self.groups[j]}
        if not names:
            return False
        if {s.dims for s in self.groups[i]} != {s.dims for s in self.groups[j]}:
            return True
        # Where a slice is invariant, any part of it is proportional to the rest.
        if names & self.invariant:
            return True
        mine, others = (
            set(Pattern(*pattern).indices(torch.tensor([first])).flatten().tolist())
            for pattern, first in ((of_a, first_a), (of_b, first_b))
        )
        return bool(mine & others)


def _fitting(pairs: Tensor) -> list[Tensor]:
    """Pairs of first indices, as few lists as digits can count through."""
    if not len(pairs):
        return []
    zero = torch.zeros(len(pairs), 1, dtype=torch.long)
    if all(Slices.fitted((0,), pairs[:, k : k + 1] + zero) is not None for k in (0, 1)):
        return [pairs]
    steps = pairs.diff(dim=0)
    parts, start = [], 0
    for i in range(1, len(pairs)):
        if i - start > 1 and not torch.equal(steps[i - 1], steps[start]):
            parts.append(pairs[start:i])
            start = i
    return [*parts, pairs[start:]]


def _chains(near: list[bool], order: Tensor) -> Iterator[list[int]]:
    """Runs of ``order`` of which each is near the next."""
    start = 0
    for i in (i for i, is_near in enumerate(near) if is_near):
        if i > start and not near[i - 1]:
            start = i
        if i + 1 == len(near) or not near[i + 1]:
            yield order[start : i + 2].tolist()
            start = i + 2


def _is_one_dimension(strips: tuple[Strip, ...], count: int, apart: int) -> bool:
    """Whether such sums along several dimensions are those of fewer, which are tried as such."""
    for strip in strips:
        if len(strip.dims) > 1:
            last, first = strip.shape[strip.dims[-1]], strip.shape[strip.dims[0]]
            if (apart == 1 and count % last == 0) or (
                count == first and apart * first == strip.size
            ):
                return True
    return False


def _is_minor(strip: Strip, slices: Slices) -> bool:
    """Whether the slices hold less than half of the open indices that have a gradient."""
    return 2 * slices.count * slices.per_unit < int((strip.open & strip.live).sum())


def _within_runs(strip: Strip) -> Iterator[tuple[Pattern, Tensor]]:
    """Patterns that fill the start or the end of a run of open indices, and the starts of these."""
    edges = torch.nn.functional.pad(strip.open.long(), (1, 1)).diff()
    runs = list(zip((edges > 0).nonzero().flatten(), (edges < 0).nonzero().flatten(), strict=True))
    lengths = {int(end - start) for start, end in runs}
    for apart in _divisors(strip.size):
        for count in range(2, _FOLD + 1):
            length = count * apart
            if all(run < length or run % length == 0 for run in lengths):
                continue
            starts = {
                int(at)
                for start, end in runs
                for first, last in ((start, end - (end - start) % length),)
                for offset in (0, int((end - start) % length))
                for at in range(int(first) + offset, int(last) + offset, length)
            }
            if starts:
                yield Pattern(count, apart), torch.tensor(sorted(starts))


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
