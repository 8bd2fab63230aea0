"""Convolutional networks for small images and spectra.

Convolutions feed a BatchNorm each and have no bias; weights are drawn from N(0, 2/fan_out)
(He et al., 2015) but in :func:`convnet`, and every network ends in a mean over space and a linear
classifier.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "convnet",
    "harmonic",
    "mobilenet",
    "resnet",
    "resnext29",
    "se_resnext29",
    "shufflenet",
    "wide_resnet",
]

Network = Callable[[int, int, int], nn.Module]


def _conv(
    fan_in: int, fan_out: int, size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(fan_in, fan_out, size, stride, size // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, nn.BatchNorm2d(fan_out)


def _shortcut(fan_in: int, fan_out: int, stride: int) -> nn.Module:
    if stride == 1 and fan_in == fan_out:
        return nn.Identity()
    return nn.Sequential(*_conv(fan_in, fan_out, 1, stride))


def _head(features: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


def convnet(channels: int, classes: int, width: int) -> nn.Module:
    """Four 3×3 convolutions with torch's own initial weights, the last two twice as wide."""
    layers: dict[str, nn.Module] = {}  # named, for pages that show them layer by layer
    fan_in = channels
    for k, fan_out in enumerate((width, width, 2 * width, 2 * width), 1):
        layers[f"conv{k}"] = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
        layers[f"norm{k}"] = nn.BatchNorm2d(fan_out)
        layers[f"relu{k}"] = nn.ReLU()
        if k == 2:
            layers["pool"] = nn.MaxPool2d(2)
        fan_in = fan_out
    layers |= dict(zip(("mean", "flat", "head"), _head(fan_in, classes), strict=True))
    return nn.Sequential(OrderedDict(layers))


class _Residual(nn.Module):
    """ReLU(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _basic(fan_in: int, fan_out: int, stride: int) -> nn.Module:
    body = nn.Sequential(*_conv(fan_in, fan_out, 3, stride), nn.ReLU(), *_conv(fan_out, fan_out, 3))
    return _Residual(body, _shortcut(fan_in, fan_out, stride))


def resnet(depth: int) -> Network:
    """The CIFAR ResNet of 6n + 2 layers (arXiv 1512.03385, section 4.2), projection shortcuts."""

    def build(channels: int, classes: int, width: int) -> nn.Module:
        layers: list[nn.Module] = [*_conv(channels, width, 3), nn.ReLU()]
        fan_in = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_basic(fan_in, width * 2**stage, stride))
                fan_in = width * 2**stage
        return nn.Sequential(*layers, *_head(fan_in, classes))

    return build


class _PreActivation(nn.Module):
    """A block of the wide ResNet: BatchNorm and ReLU stand before each convolution."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(fan_in)
        self.first, self.second_norm = _conv(fan_in, fan_out, 3, stride)
        self.second, _ = _conv(fan_out, fan_out, 3)
        self.shortcut = (
            None
            if stride == 1 and fan_in == fan_out
            else nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        out: Tensor = self.second(F.relu(self.second_norm(self.first(y)))) + shortcut
        return out


def wide_resnet(depth: int) -> Network:
    """The wide ResNet of 6n + 4 layers (arXiv 1605.07146); ``width`` is 16 times its factor k."""

    def build(channels: int, classes: int, width: int) -> nn.Module:
        stem, _ = _conv(channels, 16, 3)
        layers: list[nn.Module] = [stem]
        fan_in = 16
        for stage in range(3):
            for block in range((depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_PreActivation(fan_in, width * 2**stage, stride))
                fan_in = width * 2**stage
        return nn.Sequential(*layers, nn.BatchNorm2d(fan_in), nn.ReLU(), *_head(fan_in, classes))

    return build


class _SqueezeExcite(nn.Module):
    """Channels scaled by what their means say (arXiv 1709.01507), reduction 16."""

    def __init__(self, features: int) -> None:
        super().__init__()
        hidden = max(features // 16, 4)
        self.squeeze = nn.Linear(features, hidden)
        self.excite = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * scale[:, :, None, None]


def _resnext(excite: bool) -> Network:
    """ResNeXt-29, 16 groups (arXiv 1611.05431): ``width`` channels a group at first, 64 in full."""
    groups = 16

    def build(channels: int, classes: int, width: int) -> nn.Module:
        layers: list[nn.Module] = [*_conv(channels, 64, 3), nn.ReLU()]
        fan_in = 64
        for stage in range(3):
            inner, fan_out = groups * width * 2**stage, 256 * 2**stage
            for block in range(3):
                stride = 2 if stage > 0 and block == 0 else 1
                body = [
                    *_conv(fan_in, inner, 1),
                    nn.ReLU(),
                    *_conv(inner, inner, 3, stride, groups),
                    nn.ReLU(),
                    *_conv(inner, fan_out, 1),
                ]
                if excite:
                    body.append(_SqueezeExcite(fan_out))
                shortcut = _shortcut(fan_in, fan_out, stride)
                layers.append(_Residual(nn.Sequential(*body), shortcut))
                fan_in = fan_out
        return nn.Sequential(*layers, *_head(fan_in, classes))

    return build


resnext29 = _resnext(excite=False)
se_resnext29 = _resnext(excite=True)


class _Inverted(nn.Module):
    """Widen, filter each channel, narrow (MobileNetV2, arXiv 1801.04381)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        inner = 4 * fan_in
        self.body = nn.Sequential(
            *_conv(fan_in, inner, 1),
            nn.ReLU6(),
            *_conv(inner, inner, 3, stride, groups=inner),
            nn.ReLU6(),
            *_conv(inner, fan_out, 1),
        )
        self.skip = stride == 1 and fan_in == fan_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.skip else y


def mobilenet(channels: int, classes: int, width: int) -> nn.Module:
    """A small MobileNetV2: three stages of two inverted residuals, expansion 4."""
    layers: list[nn.Module] = [*_conv(channels, width, 3), nn.ReLU6()]
    fan_in = width
    for stage in range(3):
        for block in range(2):
            fan_out = width * 2**stage
            layers.append(_Inverted(fan_in, fan_out, 2 if stage > 0 and block == 0 else 1))
            fan_in = fan_out
    last = 4 * fan_in
    return nn.Sequential(*layers, *_conv(fan_in, last, 1), nn.ReLU6(), *_head(last, classes))


class _Shuffled(nn.Module):
    """One half passes, the other is filtered; then channels are shuffled (arXiv 1807.11164)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        half = fan_out // 2
        start = fan_in if stride == 2 else half
        self.stride = stride
        self.branch = nn.Sequential(
            *_conv(start, half, 1),
            nn.ReLU(),
            *_conv(half, half, 3, stride, groups=half),
            *_conv(half, half, 1),
            nn.ReLU(),
        )
        self.passing = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(
                *_conv(fan_in, fan_in, 3, 2, groups=fan_in), *_conv(fan_in, half, 1), nn.ReLU()
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.stride == 1 else (x, x)
        both = torch.stack([self.passing(left), self.branch(right)], dim=2)
        return both.flatten(1, 2)


def shufflenet(channels: int, classes: int, width: int) -> nn.Module:
    """A small ShuffleNetV2: a stem and two stages of three units; ``width`` must be even."""
    layers: list[nn.Module] = [*_conv(channels, width, 3), nn.ReLU()]
    fan_in = width
    for stage in (1, 2):
        for block in range(3):
            layers.append(_Shuffled(fan_in, 2**stage * width, 2 if block == 0 else 1))
            fan_in = 2**stage * width
    last = 2 * fan_in
    return nn.Sequential(*layers, *_conv(fan_in, last, 1), nn.ReLU(), *_head(last, classes))


class _Harmonics(nn.Module):
    """A mel spectrum beside copies of itself shifted down by whole multiples of a frequency.

    Band b of channel h is the band at (h + 1) times the frequency of band b, as the harmonic
    filters of Won et al. (ICASSP 2020) stack them; here the shift is made on the mel spectrum, and
    nothing of it is learnt.

    Args:
        bands: of the spectrum, evenly spaced on the HTK mel scale up to ``top``.
        top: the highest frequency in Hz.
        count: how many multiples, the first being 1.
    """

    index: Tensor
    inside: Tensor

    def __init__(self, bands: int, top: float, count: int) -> None:
        super().__init__()
        most = 2595 * math.log10(1 + top / 700)
        mels = torch.linspace(0, most, bands, dtype=torch.float64)
        frequency = 700 * (10 ** (mels / 2595) - 1)
        multiple = torch.arange(1, count + 1)[:, None] * frequency
        place = 2595 * torch.log10(1 + multiple / 700) / most * (bands - 1)
        self.register_buffer("index", place.round().long().clamp(max=bands - 1))
        # The top band itself, whose filter has no right side, counts as outside.
        self.register_buffer("inside", multiple < top * (1 - 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        stacked = x[:, 0][:, self.index]
        return torch.where(self.inside[:, :, None], stacked, stacked.new_zeros(()))


def harmonic(bands: int, top: float) -> Network:
    """A harmonic-style CNN for log-mel spectra of shape ``(1, bands, frames)``: four multiples,
    then three convolutions with BatchNorm, ReLU and pooling.

    Args:
        bands: of the spectra.
        top: their highest frequency, in Hz.
    """

    def make(channels: int, classes: int, width: int) -> nn.Module:
        if channels != 1:
            raise ValueError(f"Invalid channels: {channels}; a spectrum has 1")
        layers: list[nn.Module] = [_Harmonics(bands, top, 4)]
        fan_in = 4
        for stage in range(3):
            layers += [*_conv(fan_in, width * 2**stage, 3), nn.ReLU(), nn.MaxPool2d(2)]
            fan_in = width * 2**stage
        return nn.Sequential(*layers, *_head(fan_in, classes))

    return make
