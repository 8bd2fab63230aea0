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

__all__ = ["Options", "Retrieval", "proxy_anchor", "recall_at_1", "semi_hard_triplet"]

METRICS = (Metric("recall", "Recall@1 on unseen classes", "%", 100.0),)
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
        per_class: images of each class in a batch (default: 4).
        train_classes: only so many (default: all).
        test_classes: only so many (default: all).
    """

    data: str
    network: str
    loss: str
    width: int = 16
    embedding: int = 64
    per_class: int = 4
    train_classes: int | None = None
    test_classes: int | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UsageError(f"unknown loss {self.loss!r}: {nearest(self.loss, LOSSES)}")
        if self.per_class < 2:
            raise UsageError(f"per_class {self.per_class} is not allowed: must be 2 or more")


def semi_hard_triplet(embeddings: Tensor, labels: Tensor, margin: float = 0.2) -> Tensor:
    """The triplet loss over semi-hard negatives (FaceNet, arXiv 1503.03832, section 3.2).

    For each anchor and positive, the nearest negative that is farther than the positive but within
    the margin, in squared Euclidean distance of unit vectors; pairs without one count nothing.

    Args:
        embeddings: unit vectors, shape ``(N, D)``.
        labels: shape ``(N,)``.
        margin: (default: 0.2).
    """
    distance = 2 - 2 * embeddings @ embeddings.T
    same = labels[:, None] == labels[None]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = distance[:, :, None]
    negative = distance[:, None, :]
    semi_hard = (
        (same & ~itself)[:, :, None]
        & ~same[:, None, :]
        & (negative > positive)
        & (negative < positive + margin)
    )
    nearest_one = torch.where(semi_hard, negative, torch.inf).amin(2)
    found = nearest_one.isfinite()
    gap = torch.where(found, distance + margin - nearest_one, 0.0)
    return gap.sum() / found.sum().clamp(min=1)


def proxy_anchor(
    embeddings: Tensor, labels: Tensor, proxies: Tensor, margin: float = 0.1, scale: float = 32.0
) -> Tensor:
    """Proxy-Anchor (arXiv 2003.13911, Eq. 4).

    Args:
        embeddings: unit vectors, shape ``(N, D)``.
        labels: shape ``(N,)``.
        proxies: one for each class, of any length, shape ``(classes, D)``.
        margin: δ (default: 0.1).
        scale: α (default: 32).
    """
    cosine = embeddings @ F.normalize(proxies, dim=1).T
    positive = F.one_hot(labels, len(proxies)).bool()

    def log1p_sum_exp(x: Tensor, chosen: Tensor) -> Tensor:
        x = torch.where(chosen, x, -torch.inf)
        return torch.logaddexp(x.logsumexp(0), x.new_zeros(()))

    pulled = log1p_sum_exp(-scale * (cosine - margin), positive)
    pushed = log1p_sum_exp(scale * (cosine + margin), ~positive)
    present = positive.any(0)
    return pulled[present].sum() / present.sum() + pushed.mean()


def recall_at_1(embeddings: Tensor, labels: Tensor) -> Tensor:
    """For each image, whether the nearest other one by cosine is of its class."""
    unit = F.normalize(embeddings.flatten(1).double(), dim=1)
    hits = []
    for start in range(0, len(unit), 1000):
        similarity = unit[start : start + 1000] @ unit.T
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -torch.inf
        hits.append(labels[similarity.argmax(1)] == labels[start : start + 1000])
    return torch.cat(hits)


@cache
def _load(
    name: str, root: Path, train_classes: int | None, test_classes: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def drawings() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        seen = omniglot(root, "background", characters=train_classes)
        unseen = omniglot(root, "evaluation", characters=test_classes)
        return (
            torch.tensor(seen.images),
            torch.tensor(seen.labels),
            torch.tensor(unseen.images),
            torch.tensor(unseen.labels),
        )

    def pictures() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        data = cifar100(root)
        x, y = torch.tensor(data.train), torch.tensor(data.train_labels)
        test, test_y = torch.tensor(data.test), torch.tensor(data.test_labels)
        seen = y < (50 if train_classes is None else train_classes)
        unseen = (test_y >= 50) & (test_y < 50 + (50 if test_classes is None else test_classes))
        return x[seen], y[seen], test[unseen], test_y[unseen]

    readers: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]] = {
        "omniglot": drawings,
        "cifar100": pictures,
    }
    if name not in readers:
        raise UsageError(f"unknown data {name!r}: {nearest(name, readers)}")
    return readers[name]()


class _Embedder(nn.Module):
    def __init__(self, body: nn.Module, classes: int, size: int, loss: str) -> None:
        super().__init__()
        self.body = body
        if loss == "proxy-anchor":
            self.proxies = nn.Parameter(torch.randn(classes, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x), dim=1)


class Retrieval(Problem):
    """Metric learning on some classes, tested on others.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    def __init__(self, options: Options, root: Path, device: torch.device) -> None:
        x, y, test, test_y = _load(options.data, root, options.train_classes, options.test_classes)
        self.options = options
        self.train, self.labels = x.to(device), y.to(device)
        self.test, self.test_labels = test.to(device), test_y.to(device)
        self.mean, self.std = float(x.float().mean()), float(x.float().std())
        self.examples = len(x)
        self.classes = int(y.max()) + 1
        body = build(options.network, x.shape[1], options.embedding, options.width)
        self.model = _Embedder(body, self.classes, options.embedding, options.loss).to(device)
        self.facts = {
            "data": options.data,
            "train_examples": len(x),
            "test_examples": len(test),
            "train_classes": self.classes,
            "test_classes": len(test_y.unique()),
        }
        # The nearest neighbour by the pixels themselves.
        self.trivial = {
            "recall": float(recall_at_1(self._input(self.test), self.test_labels).double().mean())
        }

    def _input(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std

    def batches(self, size: int, draw: Generator) -> Tensor:
        """``size / per_class`` classes a step, ``per_class`` images of each."""
        per_class = self.options.per_class
        if size % per_class or size // per_class > self.classes:
            raise UsageError(
                f"batch_size {size} is not allowed: must be a multiple of per_class {per_class}, "
                f"and at most {per_class * self.classes}"
            )
        # Classes in random order, the images of each in random order.
        labels = self.labels.cpu()
        members = [(labels == k).nonzero().flatten() for k in range(self.classes)]
        steps = self.examples // size
        batches = []
        for _ in range(steps):
            chosen = torch.randperm(self.classes, generator=draw)[: size // per_class].tolist()
            batches.append(
                torch.cat(
                    [
                        members[k][torch.randperm(len(members[k]), generator=draw)[:per_class]]
                        for k in chosen
                    ]
                )
            )
        return torch.stack(batches)

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """Images and classes; nothing is drawn."""
        chosen = chosen.to(self.train.device)
        return self._input(self.train[chosen]), self.labels[chosen]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The chosen loss of the batch's embeddings."""
        x, y = batch
        embeddings = self.model(x)
        if self.options.loss == "triplet":
            return semi_hard_triplet(embeddings, y)
        return proxy_anchor(embeddings, y, self.model.proxies)  # type: ignore[arg-type]  # a parameter

    def evaluate(self) -> Evaluation:
        """Recall@1 among the test images, all of unseen classes."""
        self.model.eval()
        with torch.no_grad():
            embeddings = torch.cat([self.model(self._input(x)) for x in self.test.split(500)])
        hit = recall_at_1(embeddings, self.test_labels)
        return Evaluation(
            {"recall": float(hit.double().mean())}, (~hit).nonzero().flatten().tolist()
        )
