"""What is known of one parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from normwise.geometry import View
from normwise.invariance.roles import Role

__all__ = ["KINDS", "Kind", "ParameterReport"]

Kind = Literal["invariant", "joint", "balanced", "none", "not looked for", "no effect", "unused"]

KINDS: dict[Kind, str] = {
    "invariant": "scale-invariant by itself",
    "joint": "scale-invariant together with others",
    "balanced": "its scale can be traded against others'",
    "none": "its scale matters",
    "not looked for": "not invariant by itself; symmetries with others were not looked for",
    "no effect": "zero gradient: its value changes nothing",
    "unused": "not used by the forward: no evidence",
}


@dataclass(frozen=True)
class ParameterReport:
    """What is known of one parameter.

    Args:
        name: its name in the model.
        shape: its shape.
        kind: ``"invariant"`` (in ``view``), ``"joint"`` (only together with others, all scaled
            alike), ``"balanced"`` (only against others, scaled by inverse powers), ``"none"``,
            ``"no effect"`` (its gradient is zero, so it says nothing of scale), or ``"unused"``.
        view: the finest view in which it is scale-invariant by itself, else None.
        residual: the largest |⟨w, g⟩| / Σ|w g| over draws and slices in float64, epsilons shrunk.
        residual_with_eps: the same at the model's own weights and epsilons: how far the invariance
            holds as things are. NaN without a view.
        chance: a bound on the odds that a weight without this invariance passes, 1 without a view.
        why: what makes it so, as seen by scaling it; empty where nothing was seen.
        frozen: whether it does not require a gradient.
        aliases: its other names, if it is tied.
        role: what it is for, as seen from what the network does with it.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    view: View | None
    residual: float
    residual_with_eps: float
    chance: float
    why: str
    frozen: bool = False
    aliases: tuple[str, ...] = ()
    role: Role = field(default_factory=lambda: Role("other", ""))

    @property
    def entries(self) -> int:
        """The number of entries."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def is_vector(self) -> bool:
        """Whether it is a gain or a bias, or at most one of its dimensions is larger than 1."""
        return self.role.kind in ("gain", "bias") or sum(size > 1 for size in self.shape) < 2

    @property
    def verdict(self) -> str:
        """The view, or the kind where there is none."""
        return self.kind if self.view is None else str(self.view)
