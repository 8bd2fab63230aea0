"""Biases that take up the mean of what rounding weights did to each layer's output."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from normwise.invariance.replica import as_forward

__all__ = ["correct_biases"]


@torch.no_grad()
def correct_biases(quantized: nn.Module, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Shift biases of a model with rounded weights so that every layer's mean output is as before.

    With rounded weights W̃ and inputs x̃, channel j's output is off by E[W̃x̃]_j − E[Wx]_j, which
    is taken off its bias; layer by layer in the order in which they run, each with those before it
    corrected. The mean is over the batch and, of a convolution, over positions, both networks in
    evaluation mode. Linear layers and convolutions that have a bias and run once are corrected.

    Args:
        quantized: its biases are changed in place.
        model: the same network before rounding; only read.
        batch: of calibration, see :func:`normwise.analyze`.

    Returns:
        What was added to the bias of each corrected layer, by the layer's name, in order.

    Raises:
        ValueError: if no layer can be corrected.

    Source: 1906.04721, section 4.2; the means are measured, not derived from normalizations.
    """
    forward = as_forward(batch)
    before, after = (copy.deepcopy(m).double().eval() for m in (model, quantized))
    expected: dict[str, Tensor] = {}
    runs: Counter[str] = Counter()
    shifts: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            runs[name] += 1
            expected[name] = _channel_mean(module, output)

        module.register_forward_hook(hook)

    def correct(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            mean = _channel_mean(module, output)
            shifts[name] = expected[name] - mean
            return output + shifts[name].reshape(-1, *[1] * _positions(module))

        module.register_forward_hook(hook)

    for name, module in before.named_modules():
        if _has_bias(module):
            record(name, module)
    forward(before)
    for name, module in after.named_modules():
        if _has_bias(module) and runs[name] == 1:
            correct(name, module)
    forward(after)
    if not shifts:
        raise ValueError(
            f"{type(quantized).__name__} has no linear layer or convolution with a bias that runs "
            "once, so there is nothing to correct"
        )
    for name, shift in shifts.items():
        bias = quantized.get_parameter(f"{name}.bias")
        bias.copy_(bias.double() + shift.to(bias.device))
    return shifts


def _has_bias(module: nn.Module) -> bool:
    affine = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    return affine and isinstance(module.bias, nn.Parameter)


def _positions(module: nn.Module) -> int:
    """How many dimensions of an output come after its channels."""
    return len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 0


def _channel_mean(module: nn.Module, output: Tensor) -> Tensor:
    channels = output.ndim - 1 - _positions(module)
    return output.movedim(channels, -1).flatten(0, -2).mean(0) if output.ndim > 1 else output
