"""Scale maps: which layers' outputs can be scaled, and which layers' inputs take it back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from normwise.invariance.symmetry import Symmetry, Term

__all__ = ["ScaleMap", "is_vector", "scale_maps", "sides"]


@dataclass(frozen=True)
class ScaleMap:
    """Modules whose outputs can be divided by scales that others multiply their inputs by.

    Args:
        smooth_layers: the names of the modules that produce the activations: a norm, a projection;
            several where their outputs are summed or share a scale. Where one module holds several
            matrices (stacks of experts), the name of the parameter.
        balance_layers: likewise of all that read them.
        scales: the number of scales that can be chosen: the channels, or fewer where channels
            share one, as with grouped query heads.
    """

    smooth_layers: tuple[str, ...]
    balance_layers: tuple[str, ...]
    scales: int

    def as_mapping(self) -> dict[str, str | list[str]]:
        """The entry of an AWQ configuration: ``smooth_layer`` and ``balance_layers``.

        Raises:
            ValueError: if several layers produce the activations, which that format cannot say.
        """
        if len(self.smooth_layers) > 1:
            raise ValueError(
                f"{', '.join(self.smooth_layers)} share their scales; the format takes one layer"
            )
        return {"smooth_layer": self.smooth_layers[0], "balance_layers": [*self.balance_layers]}


def scale_maps(symmetries: Iterable[Symmetry]) -> tuple[ScaleMap, ...]:
    """The scale maps among symmetries: those that trade what is produced with what reads it."""
    families = [symmetry for symmetry in symmetries if symmetry.units > 1]
    matrices = defaultdict(set)
    for term in (term for family in families for term in family.terms):
        if not is_vector(term):
            matrices[_module(term)].add(term.parameter)
    found = []
    for family in families:
        split = sides(family)
        if split is not None:
            smooth, balance = (
                tuple(
                    dict.fromkeys(
                        term.parameter if len(matrices[_module(term)]) > 1 else _module(term)
                        for term in side
                    )
                )
                for side in split
            )
            found.append(ScaleMap(smooth, balance, family.units))
    return tuple(found)


def sides(symmetry: Symmetry) -> tuple[list[Term], list[Term]] | None:
    """The producing and the reading terms of a trade; None if they are not these.

    Vectors, which are biases and gains, scale with what a layer puts out. Where neither side has
    one, the rows of matrices produce and their columns read; of stacks, and of matrices that are
    stored with their inputs first, those produce that are used first. What is traded along one
    dimension on both sides, such as queries against keys, neither reads the other.
    """
    up = [term for term in symmetry.terms if term.exponent > 0]
    down = [term for term in symmetry.terms if term.exponent < 0]
    along = [{term.slices.dims for term in side if not is_vector(term)} for side in (up, down)]
    if not up or not down or along[0] & along[1]:
        return None
    sided = [(up, down), (down, up)]
    for producers, readers in sided:
        if any(_adds_to_output(term) for term in readers):
            continue
        if any(_adds_to_output(term) for term in producers) or (
            all(term.slices.dims[0] == 0 for term in producers)
            and all(0 not in term.slices.dims for term in readers)
        ):
            return producers, readers
    if any(_adds_to_output(term) for term in symmetry.terms):
        return None
    return sided[0] if symmetry.terms[0] in up else sided[1]


def _adds_to_output(term: Term) -> bool:
    """Whether it is a bias or a gain; a matrix of one row that is read along is none."""
    return is_vector(term) and term.slices.dims != (1,)


def _module(term: Term) -> str:
    return term.parameter.rpartition(".")[0]


def is_vector(term: Term) -> bool:
    """Whether at most one dimension of a term's weight is larger than 1: a bias, a gain."""
    return sum(size > 1 for size in term.shape) < 2
