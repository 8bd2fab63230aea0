"""Layers whose Lipschitz constant is 1 at most: AOL (arXiv 2208.03160) and SLL (arXiv 2303.03169).

[LI] is arXiv 2503.00240, which derives how both shrink a signal at the start;
:func:`normwise.theory.aol_variance` has its closed form.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise.geometry import View, at_least_float32
from normwise.reparam.functional import default_eps
from normwise.reparam.parametrizations import (
    CONVOLUTIONS,
    Divisor,
    WeightParametrization,
    check_eps,
)

__all__ = ["AOL", "SLL", "ContractiveResidual"]

_CONVOLVE: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class AOL(WeightParametrization):
    r"""Almost-orthogonal layers: W' = W·diag(d), of spectral norm 1 at most.

    .. math::
        d_j = \Big(\sum_i |W^\top W|_{ij}\Big)^{-1/2}

    for linear layers, with one d an input channel. Of a convolution WᵀW is the kernel correlated
    with itself over all shifts, summed over them too: then the convolution has norm 1 at most on
    images of any size, padded with zeros, or in a circle so that they do not grow; with any stride.
    Columns that are orthogonal come out of norm 1, so a layer with orthogonal columns of any
    lengths is an isometry.

    The scale of the whole weight cancels, that of a column does not: the weight is scale-invariant
    in ``View.layer()``, although it is columns that are scaled.

    Args:
        view: ``View.layer()``, the slices whose scale cancels (default).
        groups: those of a grouped convolution, each a weight of its own (default: 1).
        eps: guard of the root mean square of a column (default: 1e-8, in float64 1e-12, in float16
            1e-3). The official code adds 1e-6 to the sum instead.

    Raises:
        ValueError: for an invalid ``eps``, or another view.

    Source: arXiv 2208.03160; 2503.00240 for the start.
    """

    divides_by = Divisor.NORM

    def __init__(
        self, view: View | None = None, *, groups: int = 1, eps: float | None = None
    ) -> None:
        super().__init__(View.layer() if view is None else view, groups=groups)
        check_eps(eps)
        if self.view.kind != "layer":
            raise ValueError(f"Invalid view of AOL: {self.view}; must be layer")
        self.eps = eps

    @classmethod
    def slices_of(cls, module: nn.Module) -> tuple[View, int]:
        """The whole weight, or that of each group of a convolution."""
        return View.layer(), module.groups if isinstance(module, CONVOLUTIONS) else 1

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module is not bounded: only linear layers are, and most convolutions."""
        if isinstance(module, CONVOLUTIONS):
            if module.padding_mode == "circular" and _grows(module):
                return "AOL does not bound circular padding that makes an image larger"
            if module.padding_mode not in ("zeros", "circular"):
                return f"AOL does not bound {module.padding_mode} padding"
            return None
        return None if isinstance(module, nn.Linear) else "AOL is of linear layers and convolutions"

    def _effective(self, w: Tensor, gain: Tensor | None) -> Tensor:
        wide = at_least_float32(w)
        eps = default_eps(w.dtype) if self.eps is None else self.eps
        sums = _absolute_correlations(wide) + math.prod(w.shape) / w.shape[1] * eps**2
        shape = [1] * w.ndim
        shape[1] = -1
        return (wide * sums.rsqrt().view(shape)).to(w.dtype)


def _grows(module: Any) -> bool:
    """Whether a convolution of stride 1 would have more outputs than inputs along a dimension."""
    if isinstance(module.padding, str):
        return False
    return any(
        2 * pad > gap * (size - 1)
        for pad, gap, size in zip(module.padding, module.dilation, module.kernel_size, strict=True)
    )


def _absolute_correlations(w: Tensor) -> Tensor:
    """Σ_i |WᵀW|_ij for each input channel j, for a kernel over all shifts; shape ``(in,)``."""
    if w.ndim == 2:
        return (w.T @ w).abs().sum(0)
    kernels = w.transpose(0, 1)
    pads = [size - 1 for size in w.shape[2:]]
    return cast(Tensor, _CONVOLVE[w.ndim](kernels, kernels, padding=pads).abs().flatten(1).sum(1))


class ContractiveResidual(nn.Module):
    r"""y = x − 2·Vᵀ·relu(V·x + b): what an :class:`SLL` layer is once it is folded.

    It is 1-Lipschitz where ‖V‖ ≤ 1.

    Args:
        weight: V, shape ``(inner, features)``, or ``(inner, channels, k, k)`` of a convolution.
        bias: b, shape ``(inner,)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the shape of the input.

        Args:
            x: shape ``(..., features)``, or ``(N, channels, H, W)`` of a convolution.
        """
        return x - 2 * _spread(F.relu(_read(x, self.weight, self.bias)), self.weight)

    def extra_repr(self) -> str:
        return _sizes(self.weight)


def _read(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """W·x + b, as a matrix or as a convolution that is padded with zeros."""
    if w.ndim == 2:
        return F.linear(x, w, bias)
    return F.conv2d(x, w, bias, padding=w.shape[-1] // 2)


def _spread(inner: Tensor, w: Tensor) -> Tensor:
    """Wᵀ·inner, the adjoint of what :func:`_read` multiplies by."""
    if w.ndim == 2:
        return F.linear(inner, w.T)
    return F.conv_transpose2d(inner, w, padding=w.shape[-1] // 2)


def _sizes(w: Tensor) -> str:
    kernel = "" if w.ndim == 2 else f", kernel_size={w.shape[-1]}"
    return f"{w.shape[1]}, inner={w.shape[0]}{kernel}"


class SLL(nn.Module):
    r"""An SDP-based 1-Lipschitz residual layer.

    .. math::
        y = x - 2\, W^\top \mathrm{diag}(t)\, \mathrm{relu}(W x + b), \qquad
        t_i = \Big(\sum_j |W W^\top|_{ij}\, q_j / q_i\Big)^{-1}, \quad q = e^{\hat q}

    With ``kernel_size`` W is a convolution of stride 1, padded with zeros, Wᵀ its adjoint, and
    (WWᵀ)ᵢⱼ becomes Σ over all shifts of the correlation of kernels i and j, each by its size: a
    bound for images of any size, since zero padding only leaves out a part of the infinite plane.

    Zero rows of W have t = 0. W, b are scale-invariant together: c·W, c·b gives the same function;
    and t does not change when a constant is added to q̂.

    W starts Xavier-normal, b from U(±1/√features), q̂ from N(0, 1), as in the official code.

    Args:
        features: the size of the last dimension of input and output; of images the channels.
        inner: the number of rows of W (default: ``features``).
        kernel_size: the taps along each side of a convolution over images; 1 or more (default:
            none, a linear layer).
        device: of the parameters.
        dtype: of the parameters.

    Source: arXiv 2303.03169, its theorem on SDP-based layers; 2503.00240 for the start.
    """

    def __init__(
        self,
        features: int,
        inner: int | None = None,
        *,
        kernel_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = features if inner is None else inner
        if features < 1 or inner < 1:
            raise ValueError(f"Invalid sizes: {features} and {inner}; must be 1 or more")
        if kernel_size is not None and kernel_size < 1:
            raise ValueError(f"Invalid kernel_size: {kernel_size}; must be 1 or more")
        taps = () if kernel_size is None else (kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(inner, features, *taps, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(inner, device=device, dtype=dtype))
        self.log_q = nn.Parameter(torch.empty(inner, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W, b and q̂ anew."""
        nn.init.xavier_normal_(self.weight)
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.normal_(self.log_q)

    def scales(self) -> Tensor:
        """The t of the weight, shape ``(inner,)``."""
        gram = _absolute_gram(self.weight)
        # q_j/q_i as one exponential, which does not overflow where each would.
        ratios = (self.log_q - self.log_q.unsqueeze(1)).exp()
        sums = (gram * ratios).sum(1)
        return torch.where(sums > 0, 1 / torch.where(sums > 0, sums, 1), 0)

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the shape of the input.

        Args:
            x: shape ``(..., features)``, or ``(N, channels, H, W)`` of a convolution.
        """
        t = self.scales().view(-1, *[1] * (self.weight.ndim - 2))
        return x - 2 * _spread(t * F.relu(_read(x, self.weight, self.bias)), self.weight)

    @torch.no_grad()
    def folded(self) -> ContractiveResidual:
        """The same layer with V = √t·W and √t·b, which needs no t."""
        root = self.scales().sqrt()
        rows = root.view(-1, *[1] * (self.weight.ndim - 1))
        return ContractiveResidual(rows * self.weight, root * self.bias)

    def extra_repr(self) -> str:
        return _sizes(self.weight)


def _absolute_gram(w: Tensor) -> Tensor:
    """Σ over shifts of |correlation| of rows i and j, ``(inner, inner)``; |WWᵀ| of a matrix."""
    if w.ndim == 2:
        return (w @ w.T).abs()
    return F.conv2d(w, w, padding=w.shape[-1] - 1).abs().sum((2, 3))
