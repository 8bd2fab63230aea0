"""Networks that are fine-tuned from one start, each on its own examples, and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.balancing import learn_gamma, merge
from normwise.invariance import analyze
from normwise.lab.errors import UsageError, nearest
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["Merging", "MergingOptions"]

METRICS = (
    Metric("accuracy", "test accuracy", "%", 100.0),
    Metric("loss", "test loss", "nats", higher_is_better=False),
)
HOW = ("none", "alone", "average", "sphere", "gamma")
# Of 1,797 digits: to train the start, three parts to fine-tune on, the proxy set, the test set.
_BOUNDS = (0, 150, 450, 750, 1050, 1200, 1797)


@dataclass(frozen=True)
class MergingOptions:
    """What a recipe may set.

    Args:
        merge: ``none`` trains one network on the 150 digits of the start; the others three on 300
            each. ``alone`` tests the three as they are, ``average`` and ``sphere`` (mean directions
            and norms) their merge, ``gamma`` the latter times a scale that is learned on the proxy
            set (default: none).
    """

    merge: str = "none"

    def __post_init__(self) -> None:
        if self.merge not in HOW:
            raise UsageError(f"unknown merge {self.merge!r}: {nearest(self.merge, HOW)}")


def _network() -> nn.Sequential:
    """Two convolutions before batch norms, and a head."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 10),
    )


class Merging(Problem):
    """The sum of the networks' cross-entropies, each of its own examples, on scikit-learn's digits.

    The gradient of each network is that of its own loss, so they train as they would alone.

    Args:
        options: the settings.
        root: where the data sets are; the digits need none.
        device: where to compute.
    """

    divisible = False

    def __init__(self, options: MergingOptions, root: Path, device: torch.device) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=Generator().manual_seed(0))
        x = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
        y = torch.tensor(digits.target)[order]
        starts, ends = _BOUNDS[:-1], _BOUNDS[1:]
        data = [(x[a:b].to(device), y[a:b].to(device)) for a, b in zip(starts, ends, strict=True)]
        start, *parts, self.proxy, self.test = data
        self.options = options
        self.parts = [start] if options.merge == "none" else parts
        self.examples = len(self.parts[0][0])
        self.model = nn.ModuleList(_network() for _ in self.parts).to(device)
        test_y = self.test[1]
        commonest = int(torch.bincount(start[1]).argmax())
        self.baseline = {"accuracy": float((test_y == commonest).double().mean())}
        self.facts = {
            "networks": len(self.parts),
            "train_examples": sum(len(y) for _, y in self.parts),
            "test_examples": len(test_y),
        }

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """All networks take the weights of the one that the start trained."""
        own = {name.removeprefix("0."): value for name, value in weights.items()}
        for network in self._networks:
            network.load_state_dict(own)

    @property
    def _networks(self) -> list[nn.Module]:
        return list(self.model.children())

    def batch(self, chosen: Tensor, draw: Generator) -> list[tuple[Tensor, Tensor]]:
        """Of each part the examples at these places."""
        return [(x[chosen], y[chosen]) for x, y in self.parts]

    def loss(self, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over the networks, in nats."""
        losses = [
            F.cross_entropy(network(x), y)
            for network, (x, y) in zip(self._networks, batch, strict=True)
        ]
        return torch.stack(losses).sum()

    def evaluate(self) -> Evaluation:
        """Accuracy and loss of what was merged; of networks that were not, their mean."""
        self.model.eval()
        tested = self._networks
        if self.options.merge not in ("none", "alone"):
            tested = [self._merged(tested)]
        found = [self._scores(network) for network in tested]
        return Evaluation({k: sum(s[k] for s in found) / len(found) for k in found[0]})

    def _merged(self, networks: list[nn.Module]) -> nn.Module:
        report = analyze(networks[0], self.parts[0][0][:16])
        how = self.options.merge
        if how == "average":
            return self._settled(merge(networks, report, how="average", align=False).model)
        found = self._settled(merge(networks, report).model)
        if how == "sphere":
            return found
        x, y = self.proxy
        gamma = learn_gamma(
            found, report, lambda network: F.cross_entropy(network.eval()(x), y), steps=200
        )
        self.facts["gamma"] = gamma
        return self._settled(merge(networks, report, gamma=gamma).model)

    def _settled(self, network: nn.Module) -> nn.Module:
        """With running statistics of the merged weights, on the proxy set, as FedLAW's."""
        torch.optim.swa_utils.update_bn([self.proxy[0]], network)
        return network

    @torch.no_grad()
    def _scores(self, network: nn.Module) -> dict[str, float]:
        x, y = self.test
        logits = network.eval()(x)
        accuracy = (logits.argmax(1) == y).double().mean()
        return {"accuracy": float(accuracy), "loss": float(F.cross_entropy(logits, y))}
