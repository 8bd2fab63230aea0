"""Augmentation of whole batches, on the device that holds them.

Every function takes what it draws from a generator on the CPU, so that a batch depends on the seed
and not on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

__all__ = [
    "GEOMETRIC",
    "MIXING",
    "crop",
    "cutmix",
    "cutout",
    "draw_flips",
    "draw_shifts",
    "flip",
    "flipped",
    "mixup",
    "shifted",
]


def flip(x: Tensor, draw: Generator) -> Tensor:
    """Mirror each image of ``x``, shape ``(N, C, H, W)``, with probability ½."""
    return flipped(x, draw_flips(len(x), draw).to(x.device))


def draw_flips(n: int, draw: Generator) -> Tensor:
    """Which of ``n`` images are mirrored."""
    return torch.rand(n, generator=draw) < 0.5


def flipped(x: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen ones of the images ``x``."""
    return torch.where(chosen[:, None, None, None], x.flip(3), x)


def crop(x: Tensor, draw: Generator, padding: int = 4) -> Tensor:
    """Shift each image by up to ``padding`` pixels each way; zeros come in at the edges."""
    return shifted(x, draw_shifts(len(x), draw, padding).to(x.device), padding)


def draw_shifts(n: int, draw: Generator, padding: int = 4) -> Tensor:
    """Where each of ``n`` images begins in its padded one: from the top, and from the left."""
    return torch.randint(0, 2 * padding + 1, (2, n), generator=draw)


def shifted(x: Tensor, shifts: Tensor, padding: int = 4) -> Tensor:
    """The images ``x``, shifted as :func:`draw_shifts` has drawn."""
    n, channels, height, width = x.shape
    top, left = shifts
    padded = torch.nn.functional.pad(x, [padding] * 4)
    rows = (top[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    image = torch.arange(n, device=x.device)[:, None, None, None]
    plane = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[image, plane, rows, columns]


def _boxes(x: Tensor, height: Tensor, width: Tensor, draw: Generator) -> Tensor:
    """For each image, where a box of this size around a random pixel lies: ``(N, 1, H, W)``."""
    n, _, rows, columns = x.shape
    middle_y = torch.randint(rows, (n, 1), generator=draw)
    middle_x = torch.randint(columns, (n, 1), generator=draw)

    def inside(middle: Tensor, size: Tensor, count: int) -> Tensor:
        start = middle - size // 2
        place = torch.arange(count)
        return (place >= start) & (place < start + size)

    y, xs = inside(middle_y, height, rows), inside(middle_x, width, columns)
    return (y[:, None, :, None] & xs[:, None, None, :]).to(x.device)


def cutout(x: Tensor, draw: Generator) -> Tensor:
    """Zero a square of half the side around a random pixel, cut at the edges (1708.04552)."""
    side = torch.tensor(x.shape[2] // 2)
    return x.masked_fill(_boxes(x, side, side, draw), 0.0)


def _beta(draw: Generator) -> float:
    """A draw from Beta(1, 1), which is uniform."""
    return float(torch.rand((), generator=draw))


def mixup(x: Tensor, y: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
    """Mix each image and its target with another's (1710.09412), α = 1.

    Args:
        x: images, shape ``(N, C, H, W)``.
        y: targets as probabilities, shape ``(N, classes)``.
        draw: the source of randomness.
    """
    share = _beta(draw)
    other = torch.randperm(len(x), generator=draw).to(x.device)
    return share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]


def cutmix(x: Tensor, y: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
    """Put a box of another image into each, and its share into the target (1905.04899), α = 1."""
    share = _beta(draw)
    other = torch.randperm(len(x), generator=draw).to(x.device)
    sides = [torch.tensor(round(side * (1 - share) ** 0.5)) for side in x.shape[2:]]
    # One box for the whole batch, as published, so the share of the target is one number.
    box = _boxes(x[:1], sides[0], sides[1], draw)
    kept = 1 - float(box.float().mean())
    return torch.where(box, x[other], x), kept * y + (1 - kept) * y[other]


GEOMETRIC: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "crop": crop,
    "flip": flip,
    "cutout": cutout,
}
MIXING: dict[str, Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]] = {
    "mixup": mixup,
    "cutmix": cutmix,
}
