"""The data-dependent start of weight normalization (arXiv 1602.07868, section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from normwise.geometry import at_least_float32

__all__ = ["data_dependent_init"]

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
def data_dependent_init(
    model: nn.Module,
    *batch: Any,
    init_scale: float | Mapping[str, float] = 1.0,
    eps: float = 0.0,
    **options: Any,
) -> list[str]:
    """Set gains and biases so that converted layers give mean 0 and std ``init_scale``.

    One call of the model, layer by layer: with t the output of a layer at gain 1 and bias 0, and
    m, s² its mean and biased variance for each channel, g = init_scale/√(s² + eps) and b = −m·g;
    the normalized output feeds the next layer. A layer without a bias keeps its mean. A channel
    whose output is constant keeps gain 1. The paper draws the weights from N(0, 0.05²) before; this
    function leaves their directions as they are.

    Args:
        model: a module whose weights were converted with a gain.
        *batch: what the model is called with. It runs in the mode it is in.
        init_scale: the std of outputs (default: 1); or by name of a module or pattern of names,
            others having 1, the first that matches counting. The official code has 0.1 for the
            second convolution of its gated residual blocks.
        eps: added to the variance (default: 0). The official code has 1e-10, and 1e-8 for
            convolutions.
        **options: keyword arguments of the model's call.

    Returns:
        The names of the modules that were set, in the order in which they ran.

    Raises:
        ValueError: for a scale that is not positive and finite, a pattern that matches no module
            to set, or a negative ``eps``; if no linear or convolutional module with a gain was
            called; or if a layer's output is not finite (layers before it are set then).

    Source: arXiv 1602.07868, section 3; the scale is its code's.
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"Invalid eps: {eps}; must be finite and 0 or more")
    found = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, (*_CHANNELS_LAST, *_CHANNELS_SECOND)) and _gain(module) is not None
    }
    scales = _scales(init_scale, list(found.values()))
    done: dict[nn.Module, str] = {}
    handles = []
    for module, name in found.items():
        handles.append(module.register_forward_pre_hook(_Begin(done)))
        handles.append(module.register_forward_hook(_Finish(done, name, scales[name], eps)))
    try:
        model(*batch, **options)
    finally:
        for handle in handles:
            handle.remove()
    if not done:
        raise ValueError(
            "data_dependent_init finds no linear or convolutional module with a gain that the "
            "model calls; convert it with weight_normalize(model) first"
        )
    return list(done.values())


def _scales(init_scale: float | Mapping[str, float], names: list[str]) -> dict[str, float]:
    """The scale of each module that is to be set."""
    by_pattern = init_scale if isinstance(init_scale, Mapping) else {"*": init_scale}
    for pattern, scale in by_pattern.items():
        if not 0 < scale < math.inf:
            raise ValueError(f"Invalid init_scale: {scale}; must be positive and finite")
        if isinstance(init_scale, Mapping) and not any(fnmatchcase(n, pattern) for n in names):
            raise ValueError(f"init_scale names {pattern!r}, which matches no module with a gain")
    return {
        name: next((s for pattern, s in by_pattern.items() if fnmatchcase(name, pattern)), 1.0)
        for name in names
    }


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
    """The gain and the bias of a module, and the output that they would have given."""

    def __init__(self, done: dict[nn.Module, str], name: str, scale: float, eps: float) -> None:
        self.done, self.name, self.scale, self.eps = done, name, scale, eps

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
            raise ValueError(f"data_dependent_init: the output of {self.name} is not finite")
        # hypot squares without overflow.
        guarded = torch.hypot(std, torch.full_like(std, math.sqrt(self.eps)))
        scale = torch.where(std > 0, self.scale / guarded, 1)
        gain.copy_(scale.view_as(gain))
        shift = torch.zeros_like(mean)
        if isinstance(module.bias, Tensor):
            shift = -mean * scale
            module.bias.copy_(shift)
        shape = [1] * output.ndim
        shape[channel] = -1
        return (at_least_float32(output) * scale.view(shape) + shift.view(shape)).to(output.dtype)


def _gain(module: nn.Module) -> Tensor | None:
    """The gain of a module's ``weight``, if its parametrization says that it has one."""
    if not is_parametrized(module, "weight"):
        return None
    stack = cast(ParametrizationList, cast(nn.ModuleDict, module.parametrizations)["weight"])
    return cast(Tensor, stack.original0) if getattr(stack[0], "gain", False) is True else None
