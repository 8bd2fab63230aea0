"""An MLP on few images of MNIST, under Adam with the decay in one of five places of its step.

The first-moment experiment of arXiv 2012.13841 in a small form. With a the bias-corrected first
moment of what is in brackets, b the root of the second plus ε, g the gradient of the loss and s the
schedule of the learning rate, a step takes from w

=========== ======================================== ===========================================
``decay``   step                                     the L2 term is
=========== ======================================== ===========================================
both        sη·a(g + λw)/b(g + λw)                   in both moments: torch.optim.Adam
second      sη·(a(g) + λw)/b(g + λw)                 beside the first, and in the second
scale       sη·a(g)/b(g + λw)                        in the second, and nowhere else
adaptive    sη·(a(g) + λw)/b(g)                      in neither, but divided by the second
decoupled   sη·a(g)/b(g) + sλw                       in neither: AdamW, the paper's λ
=========== ======================================== ===========================================
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from normwise.lab.checks import within
from normwise.lab.data.images import Labelled
from normwise.lab.errors import UsageError, nearest
from normwise.lab.tasks.classification import load
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["AdamDecayingIn", "DecayMoments", "DecayMomentsOptions"]

METRICS = (
    Metric("accuracy", "test accuracy", "%", 100.0),
    Metric("weight_norm", "norm of all weights", higher_is_better=False, digits=1),
)
DECAYS = ("both", "second", "scale", "adaptive", "decoupled")


@dataclass(frozen=True)
class DecayMomentsOptions:
    """What a recipe may set.

    Args:
        decay: where the decay enters the step: both, second, scale, adaptive or decoupled.
        hidden: units (default: 64).
        train_examples: how many are used, the first ones (default: 1000).
    """

    decay: str
    hidden: int = 64
    train_examples: int = 1000

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise UsageError(f"unknown decay {self.decay!r}: {nearest(self.decay, DECAYS)}")
        for name in ("hidden", "train_examples"):
            within(self, name, 1)


class AdamDecayingIn(Optimizer):
    """Adam with the decay in one place of its step; see the table at the head of this module.

    Args:
        groups: of parameters, each with its ``weight_decay``.
        lr: η.
        betas, eps: as of Adam.
        decay: the place, one of ``DECAYS``.
    """

    def __init__(
        self, groups: Any, lr: float, betas: tuple[float, float], eps: float, decay: str
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "peak": lr}
        super().__init__(groups, defaults)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step.

        Args:
            closure: reevaluates the loss (default: none).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._step(w, group)
        return loss

    def _step(self, w: Tensor, group: dict[str, Any]) -> None:
        state = self.state[w]
        if not state:
            zeros = [torch.zeros_like(w) for _ in range(2)]
            state["exp_avg"], state["exp_avg_sq"] = zeros
            state["step"] = torch.tensor(0.0)
        state["step"] += 1
        t, (beta1, beta2) = float(state["step"]), group["betas"]
        g, penalty = w.grad, group["weight_decay"] * w
        assert g is not None
        mixed = g + penalty
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(mixed if self.decay == "both" else g, 1 - beta1)
        scaled = g if self.decay in ("adaptive", "decoupled") else mixed
        second.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
        above = first / (1 - beta1**t)
        if self.decay in ("second", "adaptive"):
            above += penalty
        w -= group["lr"] * above / (second / (1 - beta2**t)).sqrt_().add_(group["eps"])
        if self.decay == "decoupled":
            w -= group["lr"] / group["peak"] * penalty


class DecayMoments(Problem):
    """Cross-entropy of a two-layer network on 14×14 pixels.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    divisible = False
    model: nn.Sequential

    def __init__(self, options: DecayMomentsOptions, root: Path, device: torch.device) -> None:
        data: Labelled = load("mnist", root)
        count = options.train_examples
        self.options = options
        self.x, self.test_x = (_pixels(x).to(device) for x in (data.train[:count], data.test))
        self.y = torch.tensor(data.train_labels[:count], device=device)
        self.test_y = torch.tensor(data.test_labels, device=device)
        self.examples = len(self.y)
        layers = nn.Linear(196, options.hidden), nn.Linear(options.hidden, 10)
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.model = nn.Sequential(layers[0], nn.ReLU(), layers[1]).to(device)
        self.facts = {
            "data": data.name,
            "train_examples": self.examples,
            "test_examples": len(self.test_y),
        }
        commonest = int(torch.bincount(self.y).argmax())
        self.baseline = {"accuracy": float((self.test_y == commonest).double().mean())}

    def make_optimizer(self, training: Any) -> Optimizer:
        """Adam with the decay where the options say; biases do not decay.

        Args:
            training: its lr, weight_decay, betas and eps.
        """
        if training.optimizer != "adam":
            raise UsageError(f"optimizer {training.optimizer!r} is not allowed: must be adam")
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        biases = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": weights, "weight_decay": training.weight_decay}, {"params": biases}]
        betas = (training.betas[0], training.betas[1])
        return AdamDecayingIn(groups, training.lr, betas, training.eps, self.options.decay)

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """The chosen images and their labels."""
        chosen = chosen.to(self.y.device)
        return self.x[chosen], self.y[chosen]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy in nats."""
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Accuracy on the test set, and the norm of both matrices together."""
        wrong = self.model(self.test_x).argmax(1) != self.test_y
        norms = [p.square().sum() for p in self.model.parameters() if p.ndim > 1]
        found = {
            "accuracy": 1 - float(wrong.double().mean()),
            "weight_norm": float(torch.stack(norms).sum().sqrt()),
        }
        return Evaluation(found, wrong.nonzero().flatten().tolist())


def _pixels(images: Any) -> Tensor:
    """Means of squares of four pixels, standardized by MNIST's constants, as vectors."""
    x = F.avg_pool2d(torch.tensor(images).float() / 255, 2).flatten(1)
    return (x - 0.1307) / 0.27
