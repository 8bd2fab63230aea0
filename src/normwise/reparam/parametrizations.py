"""Weight normalization, centered and not, and weight standardization as torch parametrizations."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normwise.checks import check_number, check_switch
from normwise.geometry import View
from normwise.reparam import functional

__all__ = [
    "CenteredWeightNorm",
    "DividedWeight",
    "Divisor",
    "WeightNorm",
    "WeightParametrization",
    "WeightStandardization",
]


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Divisor(str, Enum):
    """What a parametrization divides each slice by; regularizers read it."""

    NORM = "norm"
    STD = "std"


class WeightParametrization(nn.Module):
    """Base of the parametrizations of this library; not for direct use.

    An instance says of itself what others need to know, so that nobody guesses it from a shape:
    ``view`` and ``groups`` (the slices), ``divides_by`` (a :class:`Divisor` where the forward pass
    divides each slice, so that its scale is lost), and ``normalized`` (which of the originals is
    the weight).

    Args:
        view: the slices (default: ``View.channel()``, one an entry of dimension 0). The output
            channels of a transposed convolution are ``View.channel(1)``.
        groups: of how many weights, stacked along dimension 0, the weight is made; the view splits
            each of them (default: 1).

    Raises:
        ValueError: for ``groups`` below 1.
    """

    divides_by: ClassVar[Divisor | None] = None

    def __init__(self, view: View | None = None, *, groups: int = 1) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"Invalid groups: {groups}; must be 1 or more")
        self.view = View.channel() if view is None else view
        self.groups = groups
        self.gain = False
        # The effective weight while `computed_once` holds it.
        self.held: Tensor | None = None
        # The host's own parameters in their order before it was converted; `fold` restores it.
        self.siblings: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside of `computed_once` is not in the context, and holds nothing.
        return {**self.__dict__, "held": None}

    @classmethod
    def slices_of(cls, module: nn.Module) -> tuple[View, int]:
        """The view and the groups that this method takes of a module's weight.

        Args:
            module: that has the weight.
        """
        return output_slices(module)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why the method does not apply to a module, or ``None`` if it does.

        Args:
            module: that has the weight.
        """
        return None

    @property
    def normalized(self) -> str:
        """The name, in the ``ParametrizationList``, of the weight among the originals."""
        return "original1" if self.gain else "original"

    def forward(self, *originals: Tensor) -> Tensor:
        """The effective weight, from ``(weight,)`` or ``(gain, weight)``.

        Args:
            *originals: the tensors that the parametrization is of.
        """
        if self.held is not None:
            return self.held
        *gains, w = originals
        gain = gains[0] if gains else None
        if self.groups == 1:
            return self._effective(w, gain)
        pieces = w.chunk(self.groups)
        piece_gains = [None] * self.groups if gain is None else gain.chunk(self.groups)
        return torch.cat([self._effective(p, g) for p, g in zip(pieces, piece_gains, strict=True)])

    def right_inverse(self, w: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The originals of an effective weight, or of the nearest that can be expressed.

        Args:
            w: the effective weight.

        Raises:
            ValueError: if the groups or the view do not fit.
        """
        self._pieces(w)
        return w

    def _pieces(self, w: Tensor) -> tuple[Tensor, ...]:
        pieces = w.chunk(self.groups)
        if len(pieces) != self.groups or w.shape[0] % self.groups:
            raise ValueError(f"{self.groups} groups do not fit a weight of shape {tuple(w.shape)}")
        self.view.check(pieces[0].shape)
        return pieces

    def _effective(self, w: Tensor, gain: Tensor | None) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"view={str(self.view)!r}{groups}"


class DividedWeight(WeightParametrization):
    """Base of the methods that divide each slice by its own size; not for direct use.

    Args:
        view: see :class:`WeightParametrization`.
        groups: for a grouped transposed convolution, whose weight of shape
            ``(in, out/groups, ...)`` is ``groups`` weights stacked along dimension 0 (default: 1).
            All other layers leave it at 1, a grouped convolution too: its weight has one row an
            output channel.
        gain: whether each slice has a learnable gain (default: as the class says). With it the
            originals are the gain, in the shape of a broadcastable weight, and the weight.
        eps: guard of the root mean square of a slice
            (default: 1e-8, in float64 1e-12, in float16 1e-3).

    Raises:
        ValueError: for ``eps`` that is negative or not finite, or ``groups`` below 1.
    """

    divides_by: ClassVar[Divisor]
    centered: ClassVar[bool]
    default_gain: ClassVar[bool] = True

    def __init__(
        self,
        view: View | None = None,
        *,
        groups: int = 1,
        gain: bool | None = None,
        eps: float | None = None,
    ) -> None:
        super().__init__(view, groups=groups)
        check_eps(eps)
        if gain is not None:
            check_switch("gain", gain)
        self.gain = self.default_gain if gain is None else gain
        self.eps = eps

    def right_inverse(self, w: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The originals of an effective weight: itself, or its slices' lengths and itself.

        Exact for weight normalization with a gain. Otherwise the effective weight that comes out
        is the nearest that the parametrization can express in the same direction: without its
        mean, without its scale, or both.

        Raises:
            ValueError: if a slice has too few entries, or the view does not fit.
        """
        pieces = self._pieces(w)
        entries = math.prod(self.view.slices(pieces[0]).shape[1:])
        if entries < 1 + self.centered:
            raise ValueError(
                f"{type(self).__name__} of a weight of shape {tuple(w.shape)} in view {self.view}: "
                f"{entries} entries a slice are too few"
            )
        if not self.gain:
            return w
        scale = math.sqrt(entries) if self.divides_by is Divisor.NORM else 1.0
        return torch.cat([self._gain_of(p, scale) for p in pieces]), w

    def _gain_of(self, piece: Tensor, scale: float) -> Tensor:
        scales = functional.slice_scales(piece, self.view, self.eps, centered=self.centered)
        shape = [1] * piece.ndim
        if self.view.kind != "layer":
            shape[self.view.dim] = scales.numel()
        return (scale * scales).view(shape).to(piece.dtype)

    def extra_repr(self) -> str:
        eps = "" if self.eps is None else f", eps={self.eps}"
        return f"{super().extra_repr()}, gain={self.gain}{eps}"


class WeightNorm(DividedWeight):
    """W' = g·W/‖W‖ (arXiv 1602.07868), with a gain by default.

    Without the gain it is weight conditioning (arXiv 2409.03424): rows of norm 1.
    """

    divides_by = Divisor.NORM
    centered = False

    def _effective(self, w: Tensor, gain: Tensor | None) -> Tensor:
        return functional.weight_norm(w, self.view, gain, self.eps)


class CenteredWeightNorm(DividedWeight):
    """W' = g·(W − W̄)/‖W − W̄‖ (Huang et al., ICCV 2017), with a gain by default."""

    divides_by = Divisor.NORM
    centered = True

    def _effective(self, w: Tensor, gain: Tensor | None) -> Tensor:
        return functional.centered_weight_norm(w, self.view, gain, self.eps)


class WeightStandardization(DividedWeight):
    """W' = (W − W̄)/std(W) (arXiv 1903.10520), biased std, without a gain by default."""

    divides_by = Divisor.STD
    centered = True
    default_gain = False

    def _effective(self, w: Tensor, gain: Tensor | None) -> Tensor:
        return functional.weight_standardization(w, self.view, gain, self.eps)


def check_eps(eps: float | None) -> None:
    """Raise ``ValueError`` for a guard that is negative or not finite."""
    if eps is not None:
        check_number("eps", eps)


def output_slices(module: nn.Module) -> tuple[View, int]:
    """One slice an output channel: the view, and the groups of a transposed convolution."""
    if isinstance(module, TRANSPOSED):
        return View.channel(1), module.groups
    return View.channel(), 1


def input_slices(module: nn.Module) -> tuple[View, int]:
    """One slice an input channel: the view, and the groups of a convolution."""
    if isinstance(module, TRANSPOSED):
        return View.channel(), 1
    return View.channel(1), module.groups if isinstance(module, CONVOLUTIONS) else 1


def stacks(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrizations that a module has on its own tensors, by the tensors' names."""
    if not parametrize.is_parametrized(module):
        return {}
    lists = cast(nn.ModuleDict, module.parametrizations)
    return {name: cast(parametrize.ParametrizationList, stack) for name, stack in lists.items()}


def owner(stack: parametrize.ParametrizationList) -> WeightParametrization | None:
    """The parametrization of this library that a stack begins with, if it does."""
    first = stack[0]
    return first if isinstance(first, WeightParametrization) else None


def originals(stack: parametrize.ParametrizationList) -> list[Tensor]:
    """The tensors that a stack computes from; with one of ours the weight is the last."""
    if stack.is_tensor:
        return [stack.original]
    return [cast(Tensor, getattr(stack, f"original{i}")) for i in range(stack.ntensors)]
