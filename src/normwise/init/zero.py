"""ZerO: a start from identities and Hadamard matrices, nothing random (arXiv 2110.12661)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from normwise.geometry import computing_dtype

__all__ = ["hadamard", "zero_", "zero_init"]

Widening = Literal["hadamard", "identity"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def hadamard(k: int, dtype: torch.dtype | None = None) -> Tensor:
    """Sylvester's Hadamard matrix H_k of ±1: H_0 = 1, H_{k+1} = [[H_k, H_k], [H_k, −H_k]].

    Args:
        k: the logarithm of its size, 0 or more.
        dtype: of the result (default: torch's).

    Returns:
        Shape ``(2**k, 2**k)``, with H·Hᵀ = 2ᵏ·I.

    Raises:
        ValueError: for a negative ``k``.
    """
    if k < 0:
        raise ValueError(f"Invalid k: {k}; must be 0 or more")
    h = torch.ones(1, 1, dtype=dtype)
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=h.dtype)
    for _ in range(k):
        h = torch.kron(block, h)
    return h


@torch.no_grad()
def zero_(w: Tensor, widening: Widening = "hadamard") -> Tensor:
    r"""Fill a weight as ZerO does, in place; of a convolution the centre tap, and 0 elsewhere.

    With I*(r, c) the r×c matrix of ones on the diagonal: I*(out, in) where out ≤ in, else

    .. math::
        2^{-k/2}\, I^*(out, 2^k)\, H_k\, I^*(2^k, in), \qquad k = \lceil \log_2 out \rceil,

    whose rows all have one norm, and whose columns are orthonormal where out is a power of two.
    The paper's text has the factor 2^{−(k−1)/2}, √2 above this; its code has this one.

    Args:
        w: shape ``(out, in)`` or ``(out, in, ...)`` with odd sizes of the kernel.
        widening: ``"identity"`` takes I*(out, in) where out > in too, the paper's partial identity
            (default: ``"hadamard"``).

    Returns:
        ``w``.

    Raises:
        ValueError: for fewer than two dimensions, an even kernel, or an unknown ``widening``.

    Source: arXiv 2110.12661, Algorithm 1.
    """
    if widening not in ("hadamard", "identity"):
        raise ValueError(f"Invalid widening: {widening!r}; must be 'hadamard' or 'identity'")
    if w.ndim < 2:
        raise ValueError(
            f"ZerO of a weight of shape {tuple(w.shape)}; must have 2 dimensions or more"
        )
    if any(size % 2 == 0 for size in w.shape[2:]):
        raise ValueError(f"ZerO of a kernel of shape {tuple(w.shape[2:])}; its sizes must be odd")
    outputs, inputs = w.shape[:2]
    dtype = computing_dtype(w.dtype)
    if outputs <= inputs or widening == "identity":
        matrix = torch.eye(outputs, inputs, dtype=dtype)
    else:
        k = math.ceil(math.log2(outputs))
        matrix = hadamard(k, dtype)[:outputs, :inputs] * 2 ** (-k / 2)
    w.zero_()
    centre = w
    for size in reversed(w.shape[2:]):
        centre = centre[..., size // 2]
    centre.copy_(matrix)
    return w


@torch.no_grad()
def zero_init(
    model: nn.Module, *, widening: Widening = "hadamard", zero: tuple[str, ...] | list[str] = ()
) -> list[str]:
    """Start every linear and convolutional layer as ZerO does: :func:`zero_`, and biases 0.

    Args:
        model: the model; plain layers (fold or start before you convert), groups of 1.
        widening: see :func:`zero_`.
        zero: names of modules whose weight starts at 0, such as the last convolution of each
            residual branch (default: none).

    Returns:
        The names of the layers that were set.

    Raises:
        ValueError: for a grouped or transposed convolution, a kernel of even size, a name in
            ``zero`` that is none of the layers, or a model without layers to set; the model is
            then as it was.

    Source: arXiv 2110.12661, Algorithm 1.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED))
    }
    if not layers:
        raise ValueError("zero_init finds no linear or convolutional layer")
    if unknown := [name for name in zero if name not in layers]:
        raise ValueError(f"zero names {unknown[0]!r}, which is no linear or convolutional layer")
    for name, module in layers.items():
        if isinstance(module, _TRANSPOSED) or getattr(module, "groups", 1) > 1:
            raise ValueError(f"ZerO is not defined for {name}, {module}")
        if not isinstance(module._parameters.get("weight"), Tensor):
            raise ValueError(f"the weight of {name} is computed; start the model before converting")
        zero_(torch.empty_like(module.weight), widening)
    for name, module in layers.items():
        if name in zero:
            module.weight.zero_()
        else:
            zero_(module.weight, widening)
        if isinstance(module.bias, Tensor):
            module.bias.zero_()
    return list(layers)
