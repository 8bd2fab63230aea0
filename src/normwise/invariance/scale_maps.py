"""Scale maps: which layers' outputs can be scaled, and which layers' inputs take it back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from normwise.invariance.symmetry import Symmetry, Term

__all__ = ["ScaleMap", "is_vector", "scale_maps", "sides"]


@dataclass(frozen=True)
class ScaleMap:
    """Modules whose outputs can be divided by scales that others multiply their inputs by.

    Args:
        smooth_layers: the names of the modules that produce the activations: a norm, a projection;
            several where their outputs are summed or share a scale.
        balance_layers: the names of all modules that read them.
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
    found = []
    for symmetry in symmetries:
        split = sides(symmetry)
        if split is not None:
            smooth, balance = (
                tuple(dict.fromkeys(term.parameter.rpartition(".")[0] for term in side))
                for side in split
            )
            found.append(ScaleMap(smooth, balance, symmetry.units))
    return tuple(found)


def sides(symmetry: Symmetry) -> tuple[list[Term], list[Term]] | None:
    """The producing and the reading terms of a trade; None if they are not these.

    Vectors, which are biases and gains, scale with what a layer puts out. Where neither side has
    one, the rows of matrices produce and their columns read.
    """
    up = [term for term in symmetry.terms if term.exponent > 0]
    down = [term for term in symmetry.terms if term.exponent < 0]
    if not up or not down:
        return None
    for producers, readers in ((up, down), (down, up)):
        if any(is_vector(term) for term in readers):
            continue
        if any(is_vector(term) for term in producers) or (
            all(term.slices.dims[0] == 0 for term in producers)
            and all(0 not in term.slices.dims for term in readers)
        ):
            return producers, readers
    return None


def is_vector(term: Term) -> bool:
    """Whether at most one dimension of a term's weight is larger than 1: a bias, a gain."""
    return sum(size > 1 for size in term.shape) < 2
