"""Robustness to bias: digits whose background nearly always tells the class, and ReBias."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.lab.errors import UsageError
from normwise.lab.tasks.classification import load, subset
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["Bias", "Options", "coloured", "hsic"]

METRICS = (
    Metric("unbiased_accuracy", "unbiased test accuracy", "%", 100.0),
    Metric("biased_accuracy", "biased test accuracy", "%", 100.0),
)
CLASSES = 10


@dataclass(frozen=True)
class Options:
    """What a recipe may set.

    Args:
        correlation: ρ, the share of training images whose background is their class's colour
            (default: 0.99).
        width: channels of both networks (default: 16).
        penalty: λ of the dependence between the two networks (default: 1; 0 for none, and then
            without the second network).
        train_examples: only so many (default: all 60,000).
        test_examples: only so many (default: all 10,000).
    """

    correlation: float = 0.99
    width: int = 16
    penalty: float = 1.0
    train_examples: int | None = None
    test_examples: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.correlation <= 1:
            raise UsageError(
                f"correlation {self.correlation} is not allowed: must be between 0 and 1"
            )


def coloured(images: Tensor, labels: Tensor, correlation: float, draw: Generator) -> Tensor:
    """White digits on coloured grounds (Biased-MNIST, arXiv 1910.02806).

    The colour is that of the digit's class with probability ``correlation``, and otherwise that of
    another class. The ten colours are evenly spaced hues, and every ground is a little lighter or
    darker; the published set's exact colours are not known to us.

    Args:
        images: shape ``(N, 1, H, W)``, uint8.
        labels: shape ``(N,)``.
        correlation: ρ; 0.1 makes colour and class independent.
        draw: the source of randomness.

    Returns:
        Shape ``(N, 3, H, W)``, float32 in [0, 1].
    """
    palette = torch.tensor([colorsys.hsv_to_rgb(k / CLASSES, 0.9, 0.8) for k in range(CLASSES)])
    other = torch.randint(1, CLASSES, labels.shape, generator=draw)
    keep = torch.rand(labels.shape, generator=draw) < correlation
    ground = palette[torch.where(keep, labels, (labels + other) % CLASSES)]
    ground = (ground + 0.05 * torch.randn(len(labels), 1, generator=draw)).clamp(0, 1)
    ink = images.float() / 255
    return ink + (1 - ink) * ground[:, :, None, None]


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """How much two sets of features depend on each other: the unbiased HSIC with Gaussian kernels.

    Song et al., JMLR 13 (2012), Eq. 5; each kernel's width is the median distance.

    Args:
        x: features, shape ``(N, …)``, N ≥ 4.
        y: the other features of the same examples.
    """
    n = len(x)
    k, m = _kernel(x), _kernel(y)
    trace = (k * m).sum()
    product = k.sum() * m.sum() / ((n - 1) * (n - 2))
    cross = (k.sum(0) * m.sum(0)).sum() * 2 / (n - 2)
    return (trace + product - cross) / (n * (n - 3))


def _kernel(x: Tensor) -> Tensor:
    """exp(−d²/2σ²) of all pairs, with a diagonal of zeros."""
    x = x.flatten(1)
    square = (x[:, None] - x[None]).square().sum(2)
    width = square.detach()[~torch.eye(len(x), dtype=torch.bool, device=x.device)].median()
    kernel = torch.exp(-square / (2 * width).clamp(min=1e-12))
    return kernel - torch.diag_embed(torch.diagonal(kernel))


class _Net(nn.Module):
    """Four convolutions with BatchNorm and a linear classifier; a 1×1 kernel sees colours only."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        fan_in = 3
        for stage in range(4):
            fan_out = width * (1 if stage < 2 else 2)
            layers += [
                nn.Conv2d(fan_in, fan_out, kernel, 2 if stage == 1 else 1, kernel // 2, bias=False),
                nn.BatchNorm2d(fan_out),
                nn.ReLU(),
            ]
            fan_in = fan_out
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(fan_in, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).mean((2, 3))
        return self.classifier(features), features


class Bias(Problem):
    """ReBias (arXiv 1910.02806): learn, while depending little on what a biased network sees.

    The network sees 5×5 neighbourhoods, the biased one single pixels. The first minimizes
    CE + λ·HSIC with the second's features held fixed, the second CE − λ·HSIC with the first's held
    fixed, in one step.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    def __init__(self, options: Options, root: Path, device: torch.device) -> None:
        data = load("mnist", root)
        self.options = options

        def part(images: Tensor, labels: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
            chosen = subset(len(images) if count is None else count, len(images))
            return images[chosen], labels[chosen]

        x, y = part(
            torch.tensor(data.train), torch.tensor(data.train_labels), options.train_examples
        )
        test, test_y = part(
            torch.tensor(data.test), torch.tensor(data.test_labels), options.test_examples
        )
        draw = torch.Generator().manual_seed(0)
        self.train = coloured(x, y, options.correlation, draw).to(device)
        self.biased = coloured(test, test_y, options.correlation, draw).to(device)
        self.unbiased = coloured(test, test_y, 1 / CLASSES, draw).to(device)
        self.train_labels, self.test_labels = y.to(device), test_y.to(device)
        self.examples = len(y)
        nets = {"main": _Net(options.width, 5)}
        if options.penalty:
            nets["biased"] = _Net(options.width, 1)
        self.model = nn.ModuleDict(nets).to(device)
        self.facts = {
            "data": "biased-mnist",
            "correlation": options.correlation,
            "train_examples": len(y),
            "test_examples": len(test_y),
        }
        # Guessing by the colour alone is right whenever the colour is.
        self.trivial = {
            "unbiased_accuracy": 1 / CLASSES,
            "biased_accuracy": options.correlation,
        }

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """Images and classes; nothing is drawn."""
        chosen = chosen.to(self.train.device)
        return self.train[chosen], self.train_labels[chosen]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of both networks' losses."""
        x, y = batch
        logits, features = self.model["main"](x)
        loss = F.cross_entropy(logits, y)
        if self.options.penalty:
            biased_logits, biased = self.model["biased"](x)
            loss = loss + F.cross_entropy(biased_logits, y)
            dependence = hsic(features, biased.detach()) - hsic(features.detach(), biased)
            loss = loss + self.options.penalty * dependence
        return loss

    def evaluate(self) -> Evaluation:
        """Accuracy where colours say nothing, and where they say as much as in training."""
        self.model.eval()

        def missed(images: Tensor) -> Tensor:
            parts = zip(images.split(500), self.test_labels.split(500), strict=True)
            with torch.no_grad():
                return torch.cat([self.model["main"](x)[0].argmax(1) != y for x, y in parts])

        unbiased, biased = missed(self.unbiased), missed(self.biased)
        return Evaluation(
            {
                "unbiased_accuracy": 1 - float(unbiased.double().mean()),
                "biased_accuracy": 1 - float(biased.double().mean()),
            },
            unbiased.nonzero().flatten().tolist(),
        )
