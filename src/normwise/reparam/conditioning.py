"""Weight conditioning by rows, columns, or both (arXiv 2409.03424, "[WC]").

[WC] divides each row of a weight by its norm in every forward pass, to bring its singular values
closer together, and has no gain. By Van der Sluis's theorem (Numer. Math. 14, 1969) no diagonal
factor gives an n×n matrix a condition number more than √n times below that of the matrix with rows
of equal norm; dividing may still raise it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn

from normwise.geometry import View
from normwise.reparam import functional
from normwise.reparam.convert import Conversion, reparametrize
from normwise.reparam.parametrizations import (
    CONVOLUTIONS,
    Divisor,
    WeightNorm,
    WeightParametrization,
    check_eps,
    input_slices,
    output_slices,
)

__all__ = ["ColumnConditioning", "RowColumnConditioning", "condition_weights"]


class ColumnConditioning(WeightNorm):
    """W' = W·diag(1/‖W_j‖): columns of norm 1, one an input channel, without a gain by default.

    Of a convolution the column of an input channel holds all outputs and taps.
    """

    default_gain = False

    @classmethod
    def slices_of(cls, module: nn.Module) -> tuple[View, int]:
        """One slice an input channel."""
        return input_slices(module)


class RowColumnConditioning(WeightParametrization):
    """Rows, then columns and rows again, ``sweeps`` times: rows of norm 1, columns of nearly equal.

    As Sinkhorn's alternation on the squared entries, it converges to rows and columns of equal
    norms where no entry is zero. The first division takes every row's scale away, whatever the
    number of sweeps, so the weight is scale-invariant along its rows; along columns it is so only
    in the limit.

    Args:
        view: the rows (default: ``View.channel()``); columns run along the other of the first two
            dimensions.
        groups: see :class:`WeightParametrization` (default: 1).
        sweeps: of columns and rows (default: 3).
        eps: as for :class:`WeightNorm`.

    Raises:
        ValueError: for ``sweeps`` below 1, an invalid ``eps``, or a view that is not one channel of
            the first two dimensions a slice.
    """

    divides_by = Divisor.NORM

    def __init__(
        self,
        view: View | None = None,
        *,
        groups: int = 1,
        sweeps: int = 3,
        eps: float | None = None,
    ) -> None:
        super().__init__(view, groups=groups)
        check_eps(eps)
        if sweeps < 1:
            raise ValueError(f"Invalid sweeps: {sweeps}; must be 1 or more")
        if self.view.kind != "channel" or self.view.dim > 1:
            raise ValueError(f"Invalid view of rows: {self.view}; must be channel or channel(1)")
        self.sweeps, self.eps = sweeps, eps
        self._columns = View.channel(1 - self.view.dim)

    @classmethod
    def slices_of(cls, module: nn.Module) -> tuple[View, int]:
        """The rows, one an output channel; of a grouped convolution each group is a weight."""
        view, groups = output_slices(module)
        return view, module.groups if isinstance(module, CONVOLUTIONS) else groups

    def _effective(self, w: Tensor, gain: Tensor | None) -> Tensor:
        w = functional.weight_norm(w, self.view, None, self.eps)
        for _ in range(self.sweeps):
            w = functional.weight_norm(w, self._columns, None, self.eps)
            w = functional.weight_norm(w, self.view, None, self.eps)
        return w

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sweeps={self.sweeps}"


def condition_weights(
    model: nn.Module,
    form: Literal["rows", "columns", "both"] = "rows",
    *,
    only: Iterable[str | nn.Module] | None = None,
    skip: Iterable[str | nn.Module] = (),
    sweeps: int = 3,
    eps: float | None = None,
) -> Conversion:
    """Divide rows, columns or both of each weight by their norms in every forward pass, in place.

    Outputs change: the norms are gone, and nothing replaces them.

    Args:
        model: any module.
        form: ``"rows"``, as the paper does it (default); ``"columns"``, one an input channel; or
            ``"both"``, see :class:`RowColumnConditioning`.
        only: as for :func:`weight_normalize`.
        skip: as for :func:`weight_normalize`.
        sweeps: of the form ``"both"`` (default: 3).
        eps: guard of the root mean square of a slice (default: 1e-8, in float64 1e-12, in float16
            1e-3).

    Returns:
        What was done with each weight; ``print`` it.

    Raises:
        ValueError: for an unknown form, and as :func:`reparametrize`.

    Source: arXiv 2409.03424; the form "both" as an alternation is ours.
    """
    if form == "rows":
        return reparametrize(model, WeightNorm, gain=False, only=only, skip=skip, eps=eps)
    if form == "columns":
        return reparametrize(model, ColumnConditioning, only=only, skip=skip, eps=eps)
    if form == "both":
        return reparametrize(
            model, RowColumnConditioning, only=only, skip=skip, sweeps=sweeps, eps=eps
        )
    raise ValueError(f"Invalid form: {form!r}; must be 'rows', 'columns' or 'both'")
