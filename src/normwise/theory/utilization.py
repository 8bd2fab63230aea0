"""The rank of a weight that its data use (arXiv 2407.04797, "[UR]")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise.geometry import at_least_float32

__all__ = ["Utilization", "utilization", "utilized_ranks"]


@dataclass(frozen=True)
class Utilization:
    """What share of a weight's rank the data use ([UR]).

    Attributes:
        inputs: k_S, the number of leading directions of the inputs.
        outputs: k_T, of the outputs.
        rank: r, the smaller of both.
        share: r over the smaller dimension of the weight.
        projected: W' = P_T·W·P_S, of the weight's shape.
        factors: A, B with A·B = W', of r columns and rows, if they have fewer entries than the
            weight; else ``None``.
    """

    inputs: int
    outputs: int
    rank: int
    share: float
    projected: Tensor
    factors: tuple[Tensor, Tensor] | None


def utilization(
    w: Tensor, covariance: Tensor, *, inputs: float = 0.99, outputs: float = 0.99
) -> Utilization:
    r"""The rank of a weight that its inputs and outputs use, and the weight cut to it ([UR]).

    With C = Σ x·xᵀ over inputs x of y = Wx, k_S is the number of leading eigenvalues of C whose sum
    is the share ``inputs`` of all, P_S the projection on their eigenvectors; k_T and P_T are the
    same of W·C·Wᵀ; and W' = P_T·W·P_S. The result for c·W is the same, for scaled rows it is not.

    Args:
        w: W, shape ``(out, in)``. A convolution's is its kernel flattened, of unfolded patches.
        covariance: C, shape ``(in, in)``, accumulated over batches; not centered.
        inputs: the share e_S, above 0 and at most 1 (default: 0.99). [UR] searches it per layer.
        outputs: the share e_T (default: 0.99).

    Returns:
        The directions and the rank that are used, and the weight cut to them.

    Raises:
        ValueError: for shapes that do not fit, or shares outside of (0, 1].

    Source: arXiv 2407.04797.
    """
    if w.ndim != 2 or covariance.shape != (w.shape[1], w.shape[1]):
        raise ValueError(
            f"Invalid shapes: weight {tuple(w.shape)} and covariance {tuple(covariance.shape)}; "
            "must be (out, in) and (in, in)"
        )
    for name, share in (("inputs", inputs), ("outputs", outputs)):
        if not 0 < share <= 1:
            raise ValueError(f"Invalid {name}: {share}; must be above 0 and at most 1")
    wide = at_least_float32(w.detach()).double()
    c = covariance.detach().double()
    k_s, source = _leading(c, inputs)
    k_t, target = _leading(wide @ c @ wide.T, outputs)
    projected = target @ (target.T @ wide @ source) @ source.T
    rank = min(k_s, k_t)
    factors = None
    if rank * sum(w.shape) < w.numel():
        u, s, vh = torch.linalg.svd(projected, full_matrices=False)
        factors = ((u[:, :rank] * s[:rank]).to(w.dtype), vh[:rank].to(w.dtype))
    return Utilization(k_s, k_t, rank, rank / min(w.shape), projected.to(w.dtype), factors)


def _leading(c: Tensor, share: float) -> tuple[int, Tensor]:
    """How many leading eigenvalues have this share of the sum, and their eigenvectors."""
    values, vectors = torch.linalg.eigh((c + c.T) / 2)
    values = values.flip(0).clamp_min(0)
    # What is rounding of the largest is no direction, so that a share of 1 finds the rank.
    values = torch.where(values > len(values) * torch.finfo(c.dtype).eps * values[0], values, 0)
    reached = values.cumsum(0) >= share * values.sum() * (1 - 1e-12)
    k = max(1, int(reached.int().argmax()) + 1)
    return k, vectors.flip(1)[:, :k]


@torch.no_grad()
def utilized_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    inputs: float = 0.99,
    outputs: float = 0.99,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Utilization]:
    """:func:`utilization` of every linear layer and convolution of a model that the batches reach.

    Hooks accumulate C = Σ x·xᵀ over the inputs of each layer, of a convolution over its patches:
    one matrix of the size of a layer's inputs squared. The mean of ``share`` over layers is
    [UR]'s MLU. The model runs in the mode that it is in; give it in evaluation.

    Args:
        model: the model.
        batches: what it is called with, one after another.
        inputs: as for :func:`utilization`.
        outputs: as for :func:`utilization`.
        call: calls the model with a batch (default: ``model(batch)``).

    Returns:
        By the name of each layer; ``projected`` has the shape (out, in·taps). Grouped convolutions,
        and those of one or three dimensions, are left out.

    Raises:
        ValueError: if no such layer is called, and as :func:`utilization`.
    """
    layers = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    sums: dict[nn.Module, Tensor] = {}

    def accumulate(module: nn.Module, args: Any) -> None:
        x = _rows(module, args[0]).double()
        c = x.T @ x
        sums[module] = sums[module] + c if module in sums else c

    handles = [module.register_forward_pre_hook(accumulate) for module in layers]
    try:
        for batch in batches:
            if call is None:
                model(batch)
            else:
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise ValueError("utilized_ranks finds no linear layer or convolution that is called")
    return {
        name: utilization(module.weight.flatten(1), sums[module], inputs=inputs, outputs=outputs)
        for module, name in layers.items()
        if module in sums
    }


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """The inputs of a layer, one a row; of a convolution its patches."""
    wide = at_least_float32(x.detach())
    if not isinstance(module, nn.Conv2d):
        return wide.flatten(0, -2)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        # Padded as the layer does it, by torch's own list of pads.
        pads = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        wide, padding = F.pad(wide, pads, mode=mode), (0, 0)
    else:
        padding = cast("tuple[int, int]", module.padding)
    size, gap, stride = module.kernel_size, module.dilation, module.stride
    patches = F.unfold(wide, size, gap, padding, stride)
    return patches.transpose(1, 2).flatten(0, 1)
