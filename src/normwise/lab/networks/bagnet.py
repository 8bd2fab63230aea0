"""BagNet-18: a ResNet-18 that sees 5×5 pixels, as ReBias has it for what textures give away."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["bagnet18"]


def _conv(fan_in: int, fan_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(fan_in, fan_out, size, stride, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class _Block(nn.Module):
    """A residual block without padding, whose first convolution alone may see neighbours."""

    def __init__(self, fan_in: int, fan_out: int, size: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = _conv(fan_in, fan_out, size, stride), nn.BatchNorm2d(fan_out)
        self.second, self.second_norm = _conv(fan_out, fan_out, 1), nn.BatchNorm2d(fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(
                _conv(fan_in, fan_out, 1, stride), nn.BatchNorm2d(fan_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        # Without padding the branch is narrower; what is beyond it at the right is cut off.
        height, width = y.shape[2:]
        out: Tensor = F.relu(y + self.shortcut(x)[:, :, :height, :width])
        return out


def bagnet18(channels: int, classes: int, width: int) -> nn.Module:
    """Four stages of two blocks (arXiv 1904.00760); ``width`` is 64 as published.

    One convolution of 3×3 before them, and the first of the first stage, are all that sees
    neighbours. The mean over places comes before a linear classifier.
    """
    layers: list[nn.Module] = [
        _conv(channels, width, 1),
        _conv(width, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    fan_in = width
    for stage, stride in enumerate((2, 2, 2, 1)):
        fan_out = width * 2**stage
        layers += [
            _Block(fan_in, fan_out, 3 if stage == 0 else 1, stride),
            _Block(fan_out, fan_out, 1, 1),
        ]
        fan_in = fan_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, classes))
