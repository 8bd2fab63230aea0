"""Symmetries: slices of weights that can be scaled together without a change of the function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.geometry import View

__all__ = ["Slices", "Symmetry", "Term"]

Digits = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Slices:
    """How the units of a family lie in one weight.

    The indices along ``dims`` are numbered in row-major order. Unit u holds all entries at the
    indices ``start + Σ digit · stride``, where the digits of u are those of ``units``, and the
    digits of ``within`` run over all their values: rows are ``units=((rows, 1),)``; runs of 8 rows
    are ``units=((rows / 8, 8),), within=((8, 1),)``; the rows that a rotary embedding pairs in
    heads of 8 are ``units=((heads, 8), (4, 1)), within=((2, 4),)``.

    Args:
        dims: the dimensions of the weight that the indices run over, in ascending order.
        start: the first index.
        units: ``(count, stride)`` of each digit of the unit's number, the slowest first.
        within: ``(count, stride)`` of the digits that run over the indices of one unit.
    """

    dims: tuple[int, ...]
    start: int = 0
    units: Digits = ()
    within: Digits = ()

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Slices:
        """One unit that holds a whole weight of this shape.

        Args:
            shape: of the weight.
        """
        return cls((0,), 0, (), _digit(shape[0] if shape else 1))

    @classmethod
    def each(cls, dims: tuple[int, ...], count: int, start: int = 0) -> Slices:
        """One unit for each of ``count`` indices from ``start`` on.

        Args:
            dims: the dimensions of the weight that the indices run over.
            count: how many units.
            start: the first index (default: 0).
        """
        return cls(dims, start, _digit(count))

    @classmethod
    def runs(cls, dims: tuple[int, ...], count: int, length: int) -> Slices:
        """``count`` units of ``length`` consecutive indices each.

        Args:
            dims: the dimensions of the weight that the indices run over.
            count: how many units.
            length: how many indices each has.

        Returns:
            The slices.
        """
        if count == 1:
            return cls(dims, 0, (), _digit(length))
        return (
            cls(dims, 0, ((count, length),), _digit(length))
            if length > 1
            else cls.each(dims, count)
        )

    @classmethod
    def of_view(cls, view: View, shape: Sequence[int]) -> Slices:
        """The slices of a view of a weight of this shape.

        Args:
            view: that fits the shape.
            shape: of the weight.
        """
        if view.kind == "layer":
            return cls.whole(shape)
        size = shape[view.dim]
        count = size if view.kind == "channel" else view.count
        return cls.runs((view.dim,), count, size // count)

    @classmethod
    def fitted(cls, dims: tuple[int, ...], indices: Tensor) -> Slices | None:
        """The slices whose :meth:`indices` are these, shape ``(units, per unit)``, or None.

        Args:
            dims: the dimensions of the weight that the indices run over.
            indices: shape ``(units, per unit)``.
        """
        first = indices[:, 0]
        units = _digits(first.tolist())
        within = _digits(indices[0].tolist())
        if units is None or within is None:
            return None
        slices = cls(dims, int(first[0]), units, within)
        return slices if torch.equal(slices.indices(), indices) else None

    @property
    def count(self) -> int:
        """The number of units."""
        return math.prod(count for count, _ in self.units)

    @property
    def per_unit(self) -> int:
        """The number of indices of one unit."""
        return math.prod(count for count, _ in self.within)

    def indices(self) -> Tensor:
        """The indices of each unit, shape ``(units, per unit)``."""
        return self.start + _numbers(self.units).unsqueeze(1) + _numbers(self.within)

    def sum(self, t: Tensor) -> Tensor:
        """The sum of the entries of ``t``, a tensor of the weight's shape, in each unit.

        Args:
            t: a tensor of the weight's shape.
        """
        return by_index(t, self.dims)[self.indices().to(t.device)].sum(1)

    def spread(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor that multiplies each unit of a weight by its value, and the rest by 1.

        Args:
            values: one for each unit.
            shape: the weight's shape.

        Returns:
            A tensor that broadcasts against a weight of this shape.
        """
        sizes = [shape[d] for d in self.dims] if shape else [1]
        factors = values.new_ones(math.prod(sizes))
        at = self.indices().to(values.device)
        factors[at] = values.unsqueeze(1).expand(at.shape)
        if not shape:
            return factors.reshape(())
        return factors.reshape([n if d in self.dims else 1 for d, n in enumerate(shape)])

    def resized(self, old: Sequence[int], new: Sequence[int]) -> list[Slices]:
        """What these slices can be in a weight of another shape: more units, or larger ones.

        One digit takes up the ratio of the sizes, and the strides above it grow alike. Digits of
        small strides come first: where nothing else decides, heads and groups stay as many.

        Args:
            old: the shape of the weight that they are slices of.
            new: that of the other.
        """
        if self == Slices.whole(old):
            return [Slices.whole(new)]
        before, after = (math.prod(shape[d] for d in self.dims) for shape in (old, new))
        if after % before or any(old[d] != new[d] for d in self.dims[:-1]):
            return []
        if after == before:
            return [self]
        ratio = after // before
        found = []
        for stride in sorted({step for _, step in (*self.units, *self.within)}):
            grown = [
                tuple(
                    (
                        count * ratio if step == stride else count,
                        step * ratio if step > stride else step,
                    )
                    for count, step in digits
                )
                for digits in (self.units, self.within)
            ]
            start = self.start * ratio
            if self.start and stride != min(s for _, s in (*self.units, *self.within)):
                continue
            found.append(Slices(self.dims, start, *grown))
        return found

    def view(self, shape: Sequence[int]) -> View | None:
        """The view of a weight of this shape that has these slices, or None.

        Args:
            shape: of the weight.
        """
        if self == Slices.whole(shape) or math.prod(shape) == self.per_unit:
            return View.layer()
        if len(self.dims) == 1:
            (dim,) = self.dims
            size = shape[dim]
            if self == Slices.each(self.dims, size):
                return View.channel(dim)
            if size % self.count == 0 and self == Slices.runs(
                self.dims, self.count, size // self.count
            ):
                return View.layer() if self.count == 1 else View.blocks(self.count, dim)
        return None

    def words(self, shape: Sequence[int]) -> str:
        """What a unit is, for a person: ``rows``, ``columns 8–15``; empty for the whole weight.

        Args:
            shape: of the weight.
        """
        if self.view(shape) == View.layer():
            return ""
        total = math.prod(shape[d] for d in self.dims) if shape else 1
        text = _noun(self.dims, len(shape))
        if len(shape) < 2 and self == Slices.each(self.dims, total):
            return ""
        covered = self.count * self.per_unit
        last = self.start + sum((n - 1) * step for n, step in (*self.units, *self.within))
        if covered < total:
            if covered == 1:
                return f"{text.removesuffix('s').replace('ie', 'y')} {self.start}"
            if last - self.start + 1 == covered:
                text += f" {self.start}–{last}"
            else:
                period = max(step for _, step in (*self.units, *self.within))
                inner = [d for d in (*self.units, *self.within) if d[1] < period]
                length = 1 + sum((n - 1) * step for n, step in inner)
                each = f"{self.start}–{self.start + length - 1}" if length > 1 else f"{self.start}"
                text += f" {each} of every {period}"
        if self.count == 1:
            return text
        if covered == total and not self.within and self != Slices.each(self.dims, total):
            return f"{text} in another order"
        for count, step in self.within:
            text += f", in runs of {count}" if step == 1 else f", {count} at a time {step} apart"
        return text


@dataclass(frozen=True)
class Term:
    """What one parameter takes part with in a symmetry: its slices, and their exponent.

    Args:
        parameter: its name.
        shape: its shape.
        slices: which entries belong to which unit.
        exponent: the power of the unit's factor by which its entries are multiplied.
        shift: a number that the network adds to the parameter before any other use, as in a gain
            ``1 + weight``. It is the sum that is multiplied (default: 0).
    """

    parameter: str
    shape: tuple[int, ...]
    slices: Slices
    exponent: float
    shift: float = 0.0

    @property
    def view(self) -> View | None:
        """The view whose slices are the units, if there is one."""
        return self.slices.view(self.shape)

    def factors(self, values: Tensor) -> Tensor:
        """What the parameter and its shift are multiplied by where unit u is by ``values[u]``.

        Args:
            values: of the units, shape ``(units,)``.
        """
        return self.slices.spread(values**self.exponent, self.shape)

    def __str__(self) -> str:
        words = self.slices.words(self.shape)
        name = f"({self.shift:g} + {self.parameter})" if self.shift else self.parameter
        text = f"{name} {words}" if words else name
        size = abs(self.exponent)
        return text if size == 1 else f"{text} ^{size:g}"


@dataclass(frozen=True)
class Symmetry:
    """A family of units, in each of which slices can be scaled together, at no change of function.

    In unit u every term's slice is multiplied by c^exponent, with any c > 0 of the unit's own.

    Args:
        terms: the parameters that take part. Each is split into as many slices as there are units.
        units: the number of units.
        unseen: how many of these showed no gradient at the batch given (such as dead ReLU units),
            so that for them the pattern of the others is taken to hold.
        why: the modules that absorb the change, as seen by scaling; empty where none was seen.
    """

    terms: tuple[Term, ...]
    units: int
    unseen: int = 0
    why: str = ""

    @classmethod
    def of_view(cls, parameter: str, shape: tuple[int, ...], view: View) -> Symmetry:
        """A weight's own scale invariance, the symmetry of one term.

        Args:
            parameter: its name.
            shape: its shape.
            view: whose slices are the units.
        """
        slices = Slices.of_view(view, shape)
        return cls((Term(parameter, shape, slices, 1.0),), slices.count)

    @property
    def is_view(self) -> bool:
        """Whether it is one weight's own: scale invariance by itself."""
        return len(self.terms) == 1

    @property
    def is_scale(self) -> bool:
        """Whether all grow together: joint scale invariance, not one weight against another."""
        return all(term.exponent > 0 for term in self.terms)

    @property
    def is_shifted(self) -> bool:
        """Whether a number is added to a parameter that takes part before it is multiplied."""
        return any(term.shift for term in self.terms)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that take part, each once."""
        return tuple(dict.fromkeys(term.parameter for term in self.terms))

    def factors(self, values: Tensor) -> dict[str, Tensor]:
        """What to multiply each parameter by where unit u is scaled by ``values[u]``.

        Args:
            values: positive, one for each unit.
        """
        factors: dict[str, Tensor] = {}
        for term in self.terms:
            factor = term.factors(values)
            known = factors.get(term.parameter)
            factors[term.parameter] = factor if known is None else known * factor
        return factors

    def __str__(self) -> str:
        up = ", ".join(str(term) for term in self.terms if term.exponent > 0)
        down = ", ".join(str(term) for term in self.terms if term.exponent < 0)
        text = f"{up} ↔ {down}" if down else up
        if self.units > 1:
            text += f": {self.units} units"
        if self.unseen:
            text += f", {self.unseen} of them without a gradient at this batch"
        return text


def by_index(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sums of the entries of ``t`` at each index along ``dims``, in row-major order."""
    if t.ndim == 0:
        return t.reshape(1)
    rest = [d for d in range(t.ndim) if d not in dims]
    return (t.sum(rest) if rest else t).flatten()


def _digit(count: int) -> Digits:
    return ((count, 1),) if count > 1 else ()


def _numbers(digits: Digits) -> Tensor:
    numbers = torch.zeros(1, dtype=torch.long)
    for count, stride in digits:
        numbers = (numbers.unsqueeze(1) + stride * torch.arange(count)).flatten()
    return numbers


def _digits(numbers: list[int]) -> Digits | None:
    """The digits that count through these numbers, or None if none do."""
    if len(numbers) == 1:
        return ()
    step = numbers[1] - numbers[0]
    length = 2
    while length < len(numbers) and numbers[length] - numbers[length - 1] == step:
        length += 1
    if len(numbers) % length:
        return None
    outer = _digits(numbers[::length])
    return None if outer is None else (*outer, (length, step))


def _noun(dims: tuple[int, ...], ndim: int) -> str:
    if ndim < 2:
        return "entries"
    if dims == (0,):
        return "rows"
    if dims == (1,):
        return "columns"
    if len(dims) == 1:
        return f"slices along dimension {dims[0]}"
    return f"slices along dimensions {', '.join(map(str, dims[:-1]))} and {dims[-1]}"
