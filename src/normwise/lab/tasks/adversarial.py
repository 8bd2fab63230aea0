"""Adversarial training: the loss at the worst image that projected gradient descent finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.lab.checks import within
from normwise.lab.errors import UsageError, nearest
from normwise.lab.tasks.classification import Classification, ClassificationOptions
from normwise.lab.tasks.problem import Evaluation, Metric

__all__ = ["Adversarial", "AdversarialOptions", "attack"]

METRICS = (
    Metric("attacked_accuracy", "test accuracy under attack", "%", 100.0),
    Metric("accuracy", "test accuracy", "%", 100.0),
    Metric("attacked_gap", "attacked accuracy, training less test", "%", 100.0, False),
)
BALLS = ("linf", "l2")
OBJECTIVES = ("attacked", "trades")
_PART = 500


@dataclass(frozen=True)
class AdversarialOptions(ClassificationOptions):
    """What a recipe may set, beside the settings of classification.

    Args:
        ball: ``linf`` or ``l2`` (default: linf).
        radius: of the ball around an image, in 1/255 of a pixel's range (default: 4).
        attack_steps: of the attack in training (default: 10).
        test_attack_steps: of the attack in testing, PGD-10 by default (default: 10).
        objective: ``attacked``, the cross-entropy of attacked images, or ``trades``, that of clean
            ones and beta times the divergence of attacked from clean outputs, which the attack in
            training then maximizes (default: attacked).
        beta: β of ``trades`` (default: 6).
    """

    ball: str = "linf"
    radius: float = 4.0
    attack_steps: int = 10
    test_attack_steps: int = 10
    objective: str = "attacked"
    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ball not in BALLS:
            raise UsageError(f"unknown ball {self.ball!r}: {nearest(self.ball, BALLS)}")
        if self.objective not in OBJECTIVES:
            near = nearest(self.objective, OBJECTIVES)
            raise UsageError(f"unknown objective {self.objective!r}: {near}")
        within(self, "radius", 0, above=True)
        within(self, "beta", 0)
        for name in ("attack_steps", "test_attack_steps"):
            within(self, name, 1)


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
    """Images within a ball at which the cross-entropy of ``model`` is high (PGD, arXiv 1706.06083).

    Each step goes 2.5·radius/steps, as far as that paper's, along the sign of the gradient for L∞
    and along the gradient of each image for L2; then the point is brought back into the ball, and
    the pixels into [0, 1].

    Args:
        model: from pixels in [0, 1] to logits, each image's apart from the others' (so BatchNorm in
            evaluation mode).
        x: images, shape ``(N, C, H, W)``, in [0, 1].
        y: targets as classes or probabilities.
        ball: ``linf`` or ``l2``.
        radius: in units of ``x``.
        steps: how many.
        start: where to begin, as a difference to ``x`` in units of the radius; it is brought into
            the ball.

    Returns:
        The attacked images, detached.
    """

    def project(delta: Tensor) -> Tensor:
        if ball == "linf":
            delta = delta.clamp(-radius, radius)
        else:
            delta = delta * (radius / _lengths(delta)).clamp(max=1)
        # No pixel moves further than before, so that the point stays in the ball.
        return (x + delta).clamp(0, 1) - x

    delta = project(radius * start)
    for _ in range(steps):
        delta.requires_grad_()
        loss = F.cross_entropy(model(x + delta), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, delta)
        direction = g.sign() if ball == "linf" else g / _lengths(g)
        delta = project(delta.detach() + 2.5 * radius / steps * direction)
    return (x + delta).clamp(0, 1)


def _lengths(x: Tensor) -> Tensor:
    """The L2 norm of each image, broadcastable; never 0."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    return lengths.clamp(min=1e-30)


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


class Attacked(NamedTuple):
    """A batch under attack: images, targets, and the images before it."""

    images: Tensor
    targets: Tensor
    clean: Tensor


def trades(clean: Tensor, attacked: Tensor, y: Tensor, beta: float, smoothing: float) -> Tensor:
    """Cross-entropy at clean images, and beta times the divergence of attacked outputs, in nats.

    CE(f(x), y) + β·KL(f(x) ‖ f(x′)); gradients pass through both.

    Args:
        clean: logits f(x), shape ``(N, K)``.
        attacked: logits f(x′), shape ``(N, K)``.
        y: targets as classes or probabilities.
        beta: β.
        smoothing: of the targets.

    Source: arXiv 1901.08573; β is its 1/λ.
    """
    logs = F.log_softmax(attacked, dim=1), F.log_softmax(clean, dim=1)
    divergence = F.kl_div(*logs, reduction="batchmean", log_target=True)
    return F.cross_entropy(clean, y, label_smoothing=smoothing) + beta * divergence


class Adversarial(Classification):
    """Cross-entropy of attacked images, or TRADES; tested on attacked and on clean ones."""

    options: AdversarialOptions

    def __init__(self, options: AdversarialOptions, root: Path, device: torch.device) -> None:
        super().__init__(options, root, device)
        if not self.data.pixels:
            raise UsageError(
                f"data {options.data!r} is not allowed: an attack needs pixels between 0 and 255"
            )
        self.model = _OnPixels(self.model, torch.as_tensor(self.mean), torch.as_tensor(self.std))
        # DDP writes to the batch statistics before the second of the two passes of TRADES.
        self.divisible = options.objective == "attacked"
        accuracy = self.baseline["accuracy"]
        self.baseline = {"attacked_accuracy": accuracy, "accuracy": accuracy, "attacked_gap": 0.0}

    def standardized(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1]: the network standardizes them itself."""
        return x.float() / 255

    def _made(self, x: Tensor, labels: Tensor, draw: Generator) -> tuple[Tensor, ...]:
        """Inputs, targets, and where the attack begins."""
        x, y = super()._made(x, labels, draw)
        return x, y, self._start(x, draw)

    def _start(self, x: Tensor, draw: Generator) -> Tensor:
        """Uniform in the cube; on the sphere, where a ball of many dimensions has its volume."""
        if self.options.ball == "linf":
            return (2 * torch.rand(x.shape, generator=draw) - 1).to(x.device)
        start = torch.randn(x.shape, generator=draw)
        return (start / _lengths(start)).to(x.device)

    def _attacked(self, x: Tensor, y: Tensor, steps: int, start: Tensor) -> Tensor:
        self.model.eval()
        return attack(
            self.model,
            x,
            y,
            ball=self.options.ball,
            radius=self.options.radius / 255,
            steps=steps,
            start=start,
        )

    def prepared(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The images under attack, their targets, and the images."""
        x, y, start = batch
        against = y
        if self.options.objective == "trades":
            self.model.eval()
            with torch.no_grad():
                # Of fixed outputs the cross-entropy is the divergence and a constant.
                against = F.softmax(self.model(x), dim=1)
        worst = self._attacked(x, against, self.options.attack_steps, start)
        self.model.train()
        return Attacked(worst, y, x)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The objective in nats; of a batch that is not prepared, the cross-entropy."""
        x, y, *_ = batch
        if self.options.objective == "trades" and isinstance(batch, Attacked):
            clean, attacked = self.model(batch.clean), self.model(batch.images)
            return trades(clean, attacked, y, self.options.beta, self.options.label_smoothing)
        return super().loss((x, y))

    def evaluate(self) -> Evaluation:
        """Accuracy on the test set, attacked (from the same start each time) and clean.

        The gap is to attacked training images, as many as there are to test on, without
        augmentation.
        """
        clean = super().evaluate().metrics
        missed = self._missed(self.data.test_parts())
        attacked = 1 - float(missed.double().mean())
        trained = 1 - float(self._missed(self._train_parts(len(missed))).double().mean())
        metrics = {"attacked_accuracy": attacked, **clean, "attacked_gap": trained - attacked}
        return Evaluation(metrics, missed.nonzero().flatten().tolist())

    def _train_parts(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        for step in torch.split(torch.arange(min(count, self.examples)), _PART):
            for x, y, _ in self.data.batches(step[None], [draw]):
                yield x, y

    def _missed(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Which images are classified wrongly under attack."""
        draw = torch.Generator().manual_seed(0)
        wrong = []
        for part, y in parts:
            x = self.standardized(part)
            worst = self._attacked(x, y, self.options.test_attack_steps, self._start(x, draw))
            with torch.no_grad():
                wrong.append(self.model(worst).argmax(1) != y)
        return torch.cat(wrong)
