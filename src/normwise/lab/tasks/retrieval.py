"""Retrieval: embed images so that the nearest neighbour of each is of its class, seen or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.lab.data.drawings import omniglot
from normwise.lab.data.images import cifar100
from normwise.lab.errors import UsageError, nearest
from normwise.lab.networks import build
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["LOSSES", "Options", "Retrieval", "hits", "make_loss"]

METRICS = (
    Metric("recall_at_1", "Recall@1 on unseen classes", "%", 100.0),
    Metric("recall_at_4", "Recall@4 on unseen classes", "%", 100.0),
)
LOSSES = ("triplet", "proxy-anchor")


@dataclass(frozen=True)
class Options:
    """What a recipe may set.

    Args:
        data: ``omniglot`` (learn on the background characters, test on the evaluation ones) or
            ``cifar100`` (learn on the first half of the classes, test on the second).
        network: a name that :func:`normwise.lab.networks.build` knows.
        loss: ``triplet`` or ``proxy-anchor``.
        width: channels of the network's first stage (default: 16).
        embedding: numbers an image becomes (default: 64).
        images_per_class: in a batch (default: 4).
        train_classes: only so many (default: all).
        test_classes: only so many (default: all).
    """

    data: str
    network: str
    loss: str
    width: int = 16
    embedding: int = 64
    images_per_class: int = 4
    train_classes: int | None = None
    test_classes: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("data", tuple(READERS)), ("loss", LOSSES)):
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"unknown {name} {value!r}: {nearest(value, allowed)}")
        for name in ("images_per_class", "train_classes", "test_classes"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UsageError(f"{name} {value} is not allowed: must be 2 or more")


def make_loss(name: str, classes: int, embedding: int) -> nn.Module:
    """A loss of embeddings, shape ``(N, embedding)`` and of any length, and of their classes.

    ``triplet`` is FaceNet's with semi-hard negatives: squared distances of unit vectors, margin 0.2
    (arXiv 1503.03832, Eqs. 3 and 4). ``proxy-anchor`` has a trained vector for each class, margin
    0.1 and scale 32 (arXiv 2003.13911, Eq. 4).

    Args:
        name: one of ``LOSSES``.
        classes: how many there are.
        embedding: numbers an image becomes.

    Raises:
        UsageError: if pytorch-metric-learning is not installed.
    """
    try:
        from pytorch_metric_learning.distances import LpDistance
        from pytorch_metric_learning.losses import ProxyAnchorLoss, TripletMarginLoss
        from pytorch_metric_learning.miners import TripletMarginMiner
    except ImportError:
        raise UsageError(
            'retrieval needs pytorch-metric-learning: pip install "normwise[retrieval]"'
        ) from None
    if name == "proxy-anchor":
        loss: nn.Module = ProxyAnchorLoss(classes, embedding, margin=0.1, alpha=32)
        return loss
    squared = LpDistance(power=2)
    miner = TripletMarginMiner(margin=0.2, type_of_triplets="semihard", distance=squared)
    return _Mined(miner, TripletMarginLoss(margin=0.2, distance=squared))


class _Mined(nn.Module):
    """A loss over the triplets that a miner finds."""

    def __init__(self, miner: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.miner = miner
        self.loss = loss

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.loss(embeddings, labels, self.miner(embeddings, labels))
        return out


def hits(embeddings: Tensor, labels: Tensor, k: int) -> Tensor:
    """For each image whether one of the ``k`` nearest others by cosine is of its class.

    The mean is Recall@k. An image is never its own neighbour, also where others coincide with it;
    pytorch-metric-learning takes the nearest of all for the image itself.

    Args:
        embeddings: shape ``(N, …)``, of any length.
        labels: shape ``(N,)``.
        k: at most N − 1.
    """
    unit = F.normalize(embeddings.flatten(1).double(), dim=1)
    found = []
    for start in range(0, len(unit), 1000):
        similarity = unit[start : start + 1000] @ unit.T
        rows = torch.arange(len(similarity), device=unit.device)
        similarity[rows, start + rows] = -torch.inf
        neighbours = labels[similarity.topk(k).indices]
        found.append((neighbours == labels[start : start + 1000, None]).any(1))
    return torch.cat(found)


Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _omniglot(root: Path, train_classes: int | None, test_classes: int | None) -> Parts:
    seen = omniglot(root, "background", characters=train_classes)
    unseen = omniglot(root, "evaluation", characters=test_classes)
    return (
        torch.tensor(seen.images),
        torch.tensor(seen.labels),
        torch.tensor(unseen.images),
        torch.tensor(unseen.labels),
    )


def _cifar100(root: Path, train_classes: int | None, test_classes: int | None) -> Parts:
    data = cifar100(root)
    x, y = torch.tensor(data.train), torch.tensor(data.train_labels)
    test, test_y = torch.tensor(data.test), torch.tensor(data.test_labels)
    seen = y < min(train_classes or 50, 50)
    unseen = (test_y >= 50) & (test_y < 50 + (test_classes or 50))
    return x[seen], y[seen], test[unseen], test_y[unseen]


READERS: dict[str, Callable[[Path, int | None, int | None], Parts]] = {
    "omniglot": _omniglot,
    "cifar100": _cifar100,
}


@cache
def _load(name: str, root: Path, train_classes: int | None, test_classes: int | None) -> Parts:
    return READERS[name](root, train_classes, test_classes)


class Retrieval(Problem):
    """Metric learning on some classes, tested on others.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    divisible = False  # pairs of the whole batch
    model: nn.ModuleDict

    def __init__(self, options: Options, root: Path, device: torch.device) -> None:
        x, y, test, test_y = _load(options.data, root, options.train_classes, options.test_classes)
        self.options = options
        self.classes = int(y.max()) + 1
        # Where each class's images are; all classes have the same number.
        self.members = torch.stack([(y == k).nonzero().flatten() for k in range(self.classes)])
        self.train, self.labels = x.to(device), y.to(device)
        self.test, self.test_labels = test.to(device), test_y.to(device)
        self.mean, self.std = float(x.float().mean()), float(x.float().std())
        self.examples = self.members.numel()
        self.model = nn.ModuleDict(
            {
                "body": build(options.network, x.shape[1], options.embedding, options.width),
                # What it trains is trained with the network.
                "loss": make_loss(options.loss, self.classes, options.embedding),
            }
        ).to(device)
        self.facts = {
            "data": options.data,
            "train_examples": self.examples,
            "test_examples": len(test),
            "train_classes": self.classes,
            "test_classes": len(torch.unique(test_y)),
        }
        # The nearest neighbours by the pixels themselves.
        self.trivial = self._recalls(self._input(self.test))

    def _input(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std

    def _recalls(self, embeddings: Tensor) -> dict[str, float]:
        return {
            f"recall_at_{k}": float(hits(embeddings, self.test_labels, k).double().mean())
            for k in (1, 4)
        }

    def batches(self, size: int, draw: Generator) -> Tensor:
        """Each step has random classes, and ``images_per_class`` random images of each."""
        each = self.options.images_per_class
        classes, available = self.members.shape
        if size % each or size // each > classes or each > available:
            raise UsageError(
                f"batch_size {size} is not allowed: must be {each} images each of at most "
                f"{classes} classes with {available} images"
            )

        def chosen() -> Tensor:
            some = self.members[torch.randperm(classes, generator=draw)[: size // each]]
            order = torch.rand(some.shape, generator=draw).argsort(1)[:, :each]
            return some.gather(1, order).flatten()

        return torch.stack([chosen() for _ in range(self.examples // size)])

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """Images and classes; nothing is drawn."""
        chosen = chosen.to(self.train.device)
        return self._input(self.train[chosen]), self.labels[chosen]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The chosen loss of the batch's embeddings."""
        x, y = batch
        out: Tensor = self.model["loss"](self.model["body"](x), y)
        return out

    def evaluate(self) -> Evaluation:
        """Recall@1 and @4 among the test images, all of unseen classes."""
        self.model.eval()
        with torch.no_grad():
            embeddings = torch.cat(
                [self.model["body"](self._input(x)) for x in torch.split(self.test, 500)]
            )
        missed = ~hits(embeddings, self.test_labels, 1)
        return Evaluation(self._recalls(embeddings), missed.nonzero().flatten().tolist())
