"""Networks of the lab, which say of themselves which of their weights are scale-invariant."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from normwise.geometry import View

__all__ = ["ConvNet", "InvariantWeight", "LabModel"]


@dataclass(frozen=True)
class InvariantWeight:
    """A weight whose slices can each be scaled without changing what the network computes."""

    name: str
    weight: Tensor
    view: View


class LabModel(nn.Module, ABC):
    """A network whose scale-invariant weights are known by construction."""

    @abstractmethod
    def invariant_weights(self) -> list[InvariantWeight]:
        """The weights that feed a normalization layer, each with the view that it implies."""


class ConvNet(LabModel):
    """Four 3×3 convolutions, each followed by BatchNorm and ReLU, and a linear classifier.

    Args:
        in_channels: channels of the images, which must have 4×4 pixels or more.
        classes: the number of classes.
        width: channels of the first two convolutions, half those of the last two (default: 16).
    """

    def __init__(self, in_channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        channels = [in_channels, width, width, 2 * width, 2 * width]
        self.convs = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
            for fan_in, fan_out in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(count) for count in channels[1:])
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape ``(N, classes)`` for images of shape ``(N, in_channels, H, W)``."""
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = nn.functional.relu(norm(conv(x)))
            if index == 1:
                x = nn.functional.max_pool2d(x, 2)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits

    def invariant_weights(self) -> list[InvariantWeight]:
        """Every convolution feeds a BatchNorm, so each of its output channels is invariant."""
        return [
            InvariantWeight(f"convs.{index}.weight", conv.weight, View.channel())
            for index, conv in enumerate(self.convs)
            if isinstance(conv, nn.Conv2d)
        ]
