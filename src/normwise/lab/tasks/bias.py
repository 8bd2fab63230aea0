"""Robustness to bias: digits whose background nearly always tells the class, and ReBias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.lab.checks import later, within
from normwise.lab.dependence import rebias_loss
from normwise.lab.errors import UsageError
from normwise.lab.tasks.classification import divided, load, part
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["COLOURS", "Bias", "BiasOptions", "coloured", "colours"]

METRICS = (
    Metric("unbiased_accuracy", "unbiased test accuracy", "%", 100.0),
    Metric("biased_accuracy", "biased test accuracy", "%", 100.0),
)
CLASSES = 10
# Red, green and blue of each digit's background, as published with ReBias.
COLOURS = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (225, 225, 0),
    (225, 0, 225),
    (0, 255, 255),
    (255, 128, 0),
    (255, 0, 128),
    (128, 0, 255),
    (128, 128, 128),
)


@dataclass(frozen=True)
class BiasOptions:
    """What a recipe may set.

    Args:
        correlation: ρ, the share of each digit's training images that have its colour; 0.1 is no
            bias (default: 0.99).
        penalty: λ of the dependence between the two networks (default: 1; 0 for none, and then
            without the second network).
        width: channels of both networks' first convolution, doubled by each of the next three
            (default: 16).
        shrink: the factor by which images get smaller, a divisor of 28 (default: 1).
        train_examples: how many are used (default: all 60,000).
        test_examples: the same for testing (default: all 10,000).
        held_out: share of the training images that is tested on instead of the test images, drawn
            once and for all, by which settings are chosen (default: 0).
    """

    correlation: float = 0.99
    penalty: float = 1.0
    width: int = 16
    shrink: int = 1
    train_examples: int | None = None
    test_examples: int | None = None
    held_out: float = later(0.0)

    def __post_init__(self) -> None:
        within(self, "correlation", 0, 1)
        within(self, "held_out", 0, 1, below=True)
        within(self, "penalty", 0)
        for name in ("width", "train_examples", "test_examples"):
            within(self, name, 1)
        if self.shrink < 1 or 28 % self.shrink:
            raise UsageError(f"shrink {self.shrink} is not allowed: must divide 28")


def colours(labels: Tensor, correlation: float, draw: Generator) -> Tensor:
    """Which digit's colour each image gets, shape ``(N,)`` (Biased-MNIST, arXiv 1910.02806, 5.1).

    Of each digit's n images, ⌊ρn⌋ get its own colour, and the others' are shared out evenly.

    Args:
        labels: digits, shape ``(N,)``.
        correlation: ρ.
        draw: the source of randomness.
    """
    given = labels.clone()
    for digit in range(CLASSES):
        own = (labels == digit).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=draw)]
        # A product such as 0.29 · 100 may be a little less than the number that it stands for.
        biased = math.floor(correlation * len(own) + 1e-9)
        others = own[biased:]
        step = 1 + torch.randperm(CLASSES - 1, generator=draw)
        given[others] = (digit + step[torch.arange(len(others)) % (CLASSES - 1)]) % CLASSES
    return given


def coloured(images: Tensor, colour: Tensor, shrink: int = 1) -> Tensor:
    """White digits on backgrounds of these colours; all that is not black counts as white.

    Args:
        images: shape ``(N, 1, H, W)``, uint8.
        colour: a digit for each image, whose entry of ``COLOURS`` it gets.
        shrink: side of the squares of pixels that are averaged (default: 1).

    Returns:
        Shape ``(N, 3, H / shrink, W / shrink)``, float32 in [-1, 1].
    """
    ground = torch.tensor(COLOURS, dtype=torch.float32)[colour][:, :, None, None] / 127.5 - 1
    ink = F.avg_pool2d((images > 0).float(), shrink)
    return ink + (1 - ink) * ground


class _Net(nn.Module):
    """Four convolutions with BatchNorm and a linear classifier; kernels of 1×1 see colours only."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        fan_in = 3
        for stage in range(4):
            fan_out = width * 2**stage
            conv = nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(fan_out), nn.ReLU()]
            fan_in = fan_out
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(fan_in, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).mean((2, 3))
        return self.classifier(features), features


class Bias(Problem):
    """ReBias (arXiv 1910.02806): learn, while depending little on what a biased network sees.

    The network f sees neighbourhoods of 7×7 pixels, and g single pixels. Each step lowers f's cross
    entropy + λ·HSIC(f, g) in f, and g's cross entropy − λ·HSIC(f, g) in g, both at once.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    divisible = False  # HSIC is of the whole batch
    model: nn.ModuleDict

    def __init__(self, options: BiasOptions, root: Path, device: torch.device) -> None:
        data = load("mnist", root)
        self.options = options
        # The same colours for every seed, so that the seeds share their data.
        draw = torch.Generator().manual_seed(0)
        cpu = torch.device("cpu")
        x, y = part(data.train, data.train_labels, options.train_examples, cpu)
        test, test_y = part(data.test, data.test_labels, options.test_examples, cpu)
        if options.held_out:
            kept, held = divided(len(x), options.held_out)
            x, y, test, test_y = x[kept], y[kept], x[held], y[held]
        given = colours(y, options.correlation, draw)
        self.train = coloured(x, given, options.shrink).to(device)
        self.train_labels = y.to(device)
        unbiased = colours(test_y, 1 / CLASSES, draw)
        self.unbiased = coloured(test, unbiased, options.shrink).to(device)
        self.biased = coloured(test, test_y, options.shrink).to(device)
        self.test_labels = test_y.to(device)
        self.examples = len(given)
        nets = {"f": _Net(options.width, 7)}
        if options.penalty:
            nets["g"] = _Net(options.width, 1)
        self.model = nn.ModuleDict(nets).to(device)
        self.facts = {
            "data": "biased-mnist",
            "correlation": options.correlation,
            "train_examples": len(given),
            "of_another_colour": int((given.to(device) != self.train_labels).sum()),
            "test_examples": len(test_y),
        }
        # The digit whose colour it is.
        self.baseline = {
            "unbiased_accuracy": float((unbiased == test_y).double().mean()),
            "biased_accuracy": 1.0,
        }

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """Images and digits; nothing is drawn."""
        chosen = chosen.to(self.train.device)
        return self.train[chosen], self.train_labels[chosen]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of what f and g lower; each gets the gradient of its own part alone."""
        x, y = batch
        logits, seen = self.model["f"](x)
        if not self.options.penalty:
            return F.cross_entropy(logits, y)
        of_g, biased = self.model["g"](x)
        return rebias_loss(logits, seen, of_g, biased, y, self.options.penalty)

    def evaluate(self) -> Evaluation:
        """Accuracy where colours say nothing, and where they say all."""
        self.model.eval()

        def missed(images: Tensor) -> Tensor:
            parts = zip(torch.split(images, 500), torch.split(self.test_labels, 500), strict=True)
            with torch.no_grad():
                return torch.cat([self.model["f"](x)[0].argmax(1) != y for x, y in parts])

        unbiased, biased = missed(self.unbiased), missed(self.biased)
        return Evaluation(
            {
                "unbiased_accuracy": 1 - float(unbiased.double().mean()),
                "biased_accuracy": 1 - float(biased.double().mean()),
            },
            unbiased.nonzero().flatten().tolist(),
        )
