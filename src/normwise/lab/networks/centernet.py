"""CenterNet (arXiv 1904.07850) on a ResNet of four blocks, and these blocks with a classifier."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CentreNet", "centernet_body"]


def _conv(fan_in: int, fan_out: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, size, stride, size // 2, bias=False), nn.BatchNorm2d(fan_out)
    )


class _Halving(nn.Module):
    """A residual block that halves the resolution."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(fan_in, fan_out, 3, 2), nn.ReLU(), _conv(fan_out, fan_out, 3)
        )
        self.shortcut = _conv(fan_in, fan_out, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _blocks(widths: list[int]) -> nn.ModuleList:
    return nn.ModuleList(_Halving(a, b) for a, b in itertools.pairwise(widths))


class CentreNet(nn.Module):
    """A ResNet of four blocks, brought back to a quarter of the resolution, and a head.

    Its output has shape ``(N, classes + 4, H / 4, W / 4)``: logits of centres, then width, height
    and the centre's place in its cell, in cells.

    Args:
        classes: how many.
        width: channels of the first block, doubled by each of the next three.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        widths = [3, *(width * 2**stage for stage in range(4))]
        self.blocks = _blocks(widths)
        self.across = nn.ModuleList(_conv(fan_in, 2 * width, 1) for fan_in in widths[2:])
        centres = nn.Conv2d(2 * width, classes + 4, 1)
        # So that a centre is improbable at first (arXiv 1708.02002, section 3.3).
        assert centres.bias is not None
        nn.init.zeros_(centres.bias)
        nn.init.constant_(centres.bias[:classes], -2.19)
        self.head = nn.Sequential(_conv(2 * width, 2 * width, 3), nn.ReLU(), centres)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        merged = self.across[2](maps[3])
        for stage in (2, 1):
            upper = F.interpolate(F.relu(merged), scale_factor=2.0)
            merged = self.across[stage - 1](maps[stage]) + upper
        out: Tensor = self.head(F.relu(merged))
        return out


class _Body(nn.Module):
    """The blocks of :class:`CentreNet` under their names there, a mean over space, a classifier."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        widths = [channels, *(width * 2**stage for stage in range(4))]
        self.blocks = _blocks(widths)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def centernet_body(channels: int, classes: int, width: int) -> nn.Module:
    """What CenterNet may be pretrained as: its blocks, to classify."""
    return _Body(channels, classes, width)
