"""The data-dependent start of weight normalization, and mean-only batch normalization."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from normwise.geometry import at_least_float32
from normwise.reparam.parametrizations import originals, owner, stacks

__all__ = ["MeanOnlyBatchNorm", "data_dependent_start"]

_CHANNELS_LAST = (nn.Linear,)
_CHANNELS_SECOND = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@torch.no_grad()
def data_dependent_start(model: nn.Module, *batch: Any, **options: Any) -> list[str]:
    """Set gains and biases so that every converted layer's output has mean 0 and std 1 on a batch.

    One call of the model, layer by layer (arXiv 1602.07868, section 3): with t the output of a
    layer at gain 1 and bias 0, and m, s its mean and biased std for each channel, g = 1/s and
    b = −m/s; the normalized output feeds the next layer. A layer without a bias keeps its mean. A
    channel whose output is constant keeps gain 1. The paper draws the weights from N(0, 0.05²)
    before; this function leaves their directions as they are.

    Args:
        model: a module whose weights were converted with a gain.
        *batch: what the model is called with. It runs in the mode it is in.
        **options: keyword arguments of that call.

    Returns:
        The names of the modules that were set, in the order in which they ran.

    Raises:
        ValueError: if no linear or convolutional module with a gain was called, or if a layer's
            output is not finite (layers before it are set then).
    """
    done: dict[nn.Module, str] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (*_CHANNELS_LAST, *_CHANNELS_SECOND)) and _gain(module) is not None:
            handles.append(module.register_forward_pre_hook(_Begin(done)))
            handles.append(module.register_forward_hook(_Finish(done, name)))
    try:
        model(*batch, **options)
    finally:
        for handle in handles:
            handle.remove()
    if not done:
        raise ValueError(
            "data_dependent_start finds no linear or convolutional module with a gain that the "
            "model calls; convert it with weight_normalize(model) first"
        )
    return list(done.values())


class _Begin:
    """Gain 1 and bias 0 for a module's first call."""

    def __init__(self, done: dict[nn.Module, str]) -> None:
        self.done = done

    def __call__(self, module: nn.Module, args: Any) -> None:
        gain = _gain(module)
        if module not in self.done and gain is not None:
            gain.fill_(1)
            if isinstance(module.bias, Tensor):
                module.bias.zero_()


class _Finish:
    """Gain 1/s and bias −m/s, and the output that they would have given."""

    def __init__(self, done: dict[nn.Module, str], name: str) -> None:
        self.done, self.name = done, name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        gain = _gain(module)
        if module in self.done or gain is None:
            return None
        self.done[module] = self.name
        if isinstance(module, _CHANNELS_LAST):
            channel = output.ndim - 1
        else:
            channel = output.ndim - len(cast(tuple[int, ...], module.kernel_size)) - 1
        rows = at_least_float32(output).movedim(channel, 0).flatten(1)
        std, mean = torch.std_mean(rows, 1, correction=0)
        if not bool(torch.isfinite(std).all()):
            raise ValueError(f"data_dependent_start: the output of {self.name} is not finite")
        scale = torch.where(std > 0, 1 / std, 1)
        gain.copy_(scale.view_as(gain))
        shift = torch.zeros_like(mean)
        if isinstance(module.bias, Tensor):
            shift = -mean * scale
            module.bias.copy_(shift)
        shape = [1] * output.ndim
        shape[channel] = -1
        return (at_least_float32(output) * scale.view(shape) + shift.view(shape)).to(output.dtype)


def _gain(module: nn.Module) -> Tensor | None:
    """The gain of a module's ``weight``, if that is converted with one."""
    stack = stacks(module).get("weight")
    parametrization = None if stack is None else owner(stack)
    if stack is None or parametrization is None or not parametrization.gain:
        return None
    return originals(stack)[0]


class MeanOnlyBatchNorm(nn.Module):
    """t − mean(t) + b: batch normalization without the division (arXiv 1602.07868, section 2.3).

    Put it after a weight-normalized layer that has no bias of its own.

    Args:
        channels: the size of dimension 1 of the input.
        momentum: the weight of a new batch in the running mean (default: 0.1).
        device, dtype: of the bias and the running mean.
    """

    def __init__(
        self,
        channels: int,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"Invalid momentum: {momentum}; must be from 0 to 1")
        self.channels, self.momentum = channels, momentum
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.running_mean: Tensor
        self.register_buffer("running_mean", torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, t: Tensor) -> Tensor:
        """Of shape ``(batch, channels, ...)``; in training the batch's own mean is taken away."""
        if t.ndim < 2 or t.shape[1] != self.channels:
            raise ValueError(
                f"MeanOnlyBatchNorm({self.channels}) got an input of shape {tuple(t.shape)}; "
                "dimension 1 must be the channels"
            )
        if self.training:
            mean = t.mean([0, *range(2, t.ndim)])
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        else:
            mean = self.running_mean
        return t + (self.bias - mean).view(-1, *[1] * (t.ndim - 2))

    def extra_repr(self) -> str:
        return f"{self.channels}, momentum={self.momentum}"
