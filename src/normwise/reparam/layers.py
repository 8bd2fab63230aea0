"""Layers that go with weight normalization: mean-only batch normalization, translated ReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MeanOnlyBatchNorm", "TranslatedReLU"]


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
        """The input without the mean of each channel; in training that of the batch.

        Args:
            t: shape ``(batch, channels, ...)``.
        """
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


class TranslatedReLU(nn.Module):
    r"""max(x − α, 0) + α with a learnable α a channel, for weight normalization without gain.

    A weight-normalized layer without gain and bias ("strictly" normalized, arXiv 1704.03971) cannot
    choose where a ReLU cuts; α can, and at no loss of scale invariance. With a slope a,
    max(x − α, 0) + a·min(x − α, 0) + α, a learnable too: a translated PReLU.

    Args:
        channels: the size of dimension 1 of the input, or 1 for one α for all.
        slope: where a starts (default: None, no slope).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for fewer than one channel.

    Source: arXiv 1704.03971; α starts at 0.
    """

    def __init__(
        self,
        channels: int,
        slope: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"Invalid channels: {channels}; must be 1 or more")
        self.channels = channels
        self.threshold = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.slope: nn.Parameter | None = None
        if slope is not None:
            start = torch.full((channels,), float(slope), device=device, dtype=dtype)
            self.slope = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the shape of the input.

        Args:
            x: shape ``(batch, channels, ...)``.
        """
        if x.ndim < 2 or self.channels not in (1, x.shape[1]):
            raise ValueError(
                f"TranslatedReLU({self.channels}) got an input of shape {tuple(x.shape)}; "
                "dimension 1 must be the channels"
            )
        shape = (-1, *[1] * (x.ndim - 2))
        alpha = self.threshold.view(shape)
        if self.slope is None:
            return torch.maximum(x, alpha)
        above = x - alpha
        return above.clamp_min(0) + self.slope.view(shape) * above.clamp_max(0) + alpha

    def extra_repr(self) -> str:
        return f"{self.channels}" + ("" if self.slope is None else ", with a slope")
