"""Adversarial training: the loss at the worst point that projected gradient descent finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.lab.errors import UsageError, nearest
from normwise.lab.tasks import classification
from normwise.lab.tasks.classification import Classification
from normwise.lab.tasks.problem import Evaluation, Metric

__all__ = ["Adversarial", "Options", "attack"]

METRICS = (
    Metric("attacked_accuracy", "test accuracy under attack", "%", 100.0),
    Metric("accuracy", "test accuracy", "%", 100.0),
)


@dataclass(frozen=True)
class Options(classification.Options):
    """What a recipe may set, beside the settings of classification.

    Args:
        ball: ``linf`` or ``l2`` (default: linf).
        radius: of the ball around an image, in steps of 1/255 of a pixel's range (default: 4).
        attack_steps: of the attack in training (default: 10).
        test_attack_steps: of the attack in testing (default: 10).
    """

    ball: str = "linf"
    radius: float = 4.0
    attack_steps: int = 10
    test_attack_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ball not in ("linf", "l2"):
            raise UsageError(f"unknown ball {self.ball!r}: {nearest(self.ball, ('linf', 'l2'))}")
        if not self.radius > 0:
            raise UsageError(f"radius {self.radius} is not allowed: must be greater than 0")


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    ball: str,
    radius: float,
    steps: int,
    start: Tensor,
) -> Tensor:
    """Ascend the cross-entropy of ``model`` within a ball (PGD, arXiv 1706.06083).

    Each step is 2.5·radius/steps long: along the sign of the gradient for L∞, along the gradient
    of each image for L2; then the point is projected onto the ball and onto the range of pixels.

    Args:
        model: in evaluation mode, from pixels in [0, 1] to logits.
        x: images, shape ``(N, C, H, W)``, in [0, 1].
        y: targets as classes or probabilities.
        ball: ``linf`` or ``l2``.
        radius: in units of ``x``.
        steps: how many.
        start: where in the ball to begin, in units of the radius, shape of ``x``; it is projected.

    Returns:
        The attacked images, detached.
    """

    def project(delta: Tensor) -> Tensor:
        if ball == "linf":
            delta = delta.clamp(-radius, radius)
        else:
            length = delta.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
            delta = delta * (radius / length).clamp(max=1)
        return (x + delta).clamp(0, 1) - x

    delta = project(radius * start)
    for _ in range(steps):
        delta.requires_grad_()
        loss = F.cross_entropy(model(x + delta), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, delta)
        if ball == "linf":
            direction = g.sign()
        else:
            direction = g / g.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        delta = project(delta.detach() + 2.5 * radius / steps * direction)
    return (x + delta).detach()


class _OnPixels(nn.Module):
    """A network that takes pixels in [0, 1] and standardizes them itself."""

    def __init__(self, body: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.body = body
        self.mean = nn.Buffer(mean / 255)
        self.std = nn.Buffer(std / 255)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body((x - self.mean) / self.std)
        return out


class Adversarial(Classification):
    """Cross-entropy of attacked images; tested on attacked and on clean ones."""

    def __init__(self, options: Options, root: Path, device: torch.device) -> None:
        super().__init__(options, root, device)
        if self.train.dtype != torch.uint8:
            raise UsageError(f"adversarial training needs images, and {options.data!r} are none")
        self.model = _OnPixels(self.model, self.mean, self.std)
        self.attack = options
        self.trivial = {"attacked_accuracy": self.trivial["accuracy"], **self.trivial}

    def standardized(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1]: the network standardizes them itself."""
        return x.float() / 255

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]  # an attack needs a start
        """Inputs, targets, and where the attack begins."""
        x, y = super().batch(chosen, draw)
        return x, y, self._start(x, draw)

    def _start(self, x: Tensor, draw: Generator) -> Tensor:
        if self.attack.ball == "linf":
            return (2 * torch.rand(x.shape, generator=draw) - 1).to(x.device)
        start = torch.randn(x.shape, generator=draw)
        return (start / start.flatten(1).norm(dim=1)[:, None, None, None]).to(x.device)

    def _attacked(self, x: Tensor, y: Tensor, steps: int, start: Tensor) -> Tensor:
        self.model.eval()
        return attack(
            self.model,
            x,
            y,
            ball=self.attack.ball,
            radius=self.attack.radius / 255,
            steps=steps,
            start=start,
        )

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:  # type: ignore[override]  # as batch
        """Cross-entropy at the attacked images, in nats."""
        x, y, start = batch
        worst = self._attacked(x, y, self.attack.attack_steps, start)
        self.model.train()
        return super().loss((worst, y))

    def evaluate(self) -> Evaluation:
        """Accuracy on the test set, attacked (from the same start each time) and clean."""
        clean = super().evaluate().metrics
        draw = torch.Generator().manual_seed(0)
        wrong = []
        for part, y in zip(self.test.split(500), self.test_labels.split(500), strict=True):
            x = self.standardized(part)
            worst = self._attacked(x, y, self.attack.test_attack_steps, self._start(x, draw))
            with torch.no_grad():
                wrong.append(self.model(worst).argmax(1) != y)
        missed = torch.cat(wrong)
        attacked = 1 - float(missed.double().mean())
        return Evaluation(
            {"attacked_accuracy": attacked, **clean}, missed.nonzero().flatten().tolist()
        )
