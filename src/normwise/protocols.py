"""What other rooms read of an analysis, so that none of them imports :mod:`normwise.invariance`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from normwise.geometry import View

__all__ = ["AnalysisReport", "FreedomLedger", "ReportRow", "RowRole", "Views"]


class RowRole(Protocol):
    """What a parameter is for: :class:`normwise.invariance.roles.Role`."""

    @property
    def kind(self) -> str:
        """Such as ``"hidden"`` or ``"embedding"``."""

    @property
    def evidence(self) -> str:
        """What the network does with it, in words."""

    @property
    def heads(self) -> int | None:
        """The number of attention heads that it is made of, if that was seen."""


class ReportRow(Protocol):
    """What is known of one parameter: :class:`normwise.ParameterReport`."""

    @property
    def name(self) -> str:
        """Its name in the model."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Its other names, if it is tied."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def view(self) -> View | None:
        """The view in which it is scale-invariant by itself, else None."""

    @property
    def is_vector(self) -> bool:
        """Whether at most one dimension is larger than 1."""

    @property
    def role(self) -> RowRole:
        """What it is for."""


@runtime_checkable
class FreedomLedger(Protocol):
    """What it costs to fix a set of norms: :class:`normwise.invariance.freedom.Freedom`."""

    @property
    def fixed(self) -> Mapping[str, View]:
        """The view in which each parameter's norms are fixed, by name."""

    @property
    def verdicts(self) -> Mapping[str, str]:
        """``"fix"``, ``"fix with a gain"`` or ``"leave"``, by name."""


class AnalysisReport(Protocol):
    """What :func:`normwise.analyze` returns: :class:`normwise.Report`."""

    @property
    def symmetries(self) -> Sequence[Any]:
        """Families of slices that can be scaled together."""

    def __iter__(self) -> Iterator[ReportRow]: ...

    def __getitem__(self, name: str, /) -> ReportRow: ...

    def parameters(self, model: nn.Module | None = None) -> Mapping[str, nn.Parameter]:
        """The parameters by name.

        Args:
            model: whose parameters to take (default: those of the model analyzed).
        """

    def parameter_views(self, model: nn.Module | None = None) -> Mapping[nn.Parameter, View]:
        """The view of each parameter that is scale-invariant by itself.

        Args:
            model: whose parameters to take (default: those of the model analyzed).
        """

    def freedom(self) -> FreedomLedger:
        """What it costs to fix the norms of all matrices."""


Views = View | str | Mapping[Any, View | str] | AnalysisReport
"""A view for all weights, one for each (by parameter or by name), or a report that knows them."""
