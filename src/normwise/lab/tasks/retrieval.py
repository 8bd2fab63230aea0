"""Retrieval: embed images so that the nearest neighbour of each is of its class, seen or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.lab.augment import flip
from normwise.lab.checks import later, within
from normwise.lab.data.drawings import omniglot
from normwise.lab.data.images import cifar100
from normwise.lab.data.retrieval import LISTS, Split
from normwise.lab.data.sources import DecodedImages, HeldImages, ImageSource
from normwise.lab.errors import UsageError, nearest
from normwise.lab.networks import build
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["LOSSES", "Retrieval", "RetrievalOptions", "hits", "make_loss"]

METRICS = (
    Metric("recall_at_1", "Recall@1 on unseen classes", "%", 100.0),
    Metric("recall_at_4", "Recall@4 on unseen classes", "%", 100.0),
)
LOSSES = ("triplet", "proxy-anchor")


@dataclass(frozen=True)
class RetrievalOptions:
    """What a recipe may set.

    Args:
        data: ``omniglot`` (learn on the background characters, test on the evaluation ones),
            ``cifar100`` (learn on the first half of the classes, test on the second), or ``cub``,
            ``cars``, ``sop`` or ``inshop``, split as published.
        network: a name that :func:`normwise.lab.networks.build` knows.
        loss: ``triplet`` or ``proxy-anchor``.
        width: channels of the network's first stage (default: 16).
        embedding: numbers an image becomes (default: 64).
        images_per_class: in a batch (default: 4).
        train_classes: how many are used (default: all).
        test_classes: the same for testing (default: all).
        image_size: pixels a side, of the four sets that are split as published (default: 224).
        held_out: share of the classes to learn on, the last ones, that is tested on instead of the
            test classes, by which settings are chosen (default: 0).
    """

    data: str
    network: str
    loss: str
    width: int = 16
    embedding: int = 64
    images_per_class: int = 4
    train_classes: int | None = None
    test_classes: int | None = None
    image_size: int = 224
    held_out: float = later(0.0)

    def __post_init__(self) -> None:
        within(self, "held_out", 0, 1, below=True)
        for name, allowed in (("data", (*READERS, *LISTS)), ("loss", LOSSES)):
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"unknown {name} {value!r}: {nearest(value, allowed)}")
        for name in ("images_per_class", "train_classes", "test_classes"):
            within(self, name, 2)
        for name in ("image_size", "width", "embedding"):
            within(self, name, 1)


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
            'retrieval needs pytorch-metric-learning: pip install "normwise[lab]"'
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


def hits(
    embeddings: Tensor, labels: Tensor, k: int, gallery: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """For each image whether one of the ``k`` nearest others by cosine is of its class.

    The mean is Recall@k. An image is never its own neighbour, also where others coincide with it;
    pytorch-metric-learning takes the nearest of all for the image itself.

    Args:
        embeddings: shape ``(N, …)``, of any length.
        labels: shape ``(N,)``.
        k: at most N − 1; a gallery of fewer than that is looked through whole.
        gallery: embeddings and labels of the images that alone can be neighbours (default: those
            of ``embeddings`` are each other's).
    """
    unit = F.normalize(embeddings.flatten(1).double(), dim=1)
    others, names = unit, labels
    if gallery is not None:
        others, names = F.normalize(gallery[0].flatten(1).double(), dim=1), gallery[1]
    found = []
    for start in range(0, len(unit), 1000):
        similarity = unit[start : start + 1000] @ others.T
        if gallery is None:
            rows = torch.arange(len(similarity), device=unit.device)
            similarity[rows, start + rows] = -torch.inf
        neighbours = names[similarity.topk(min(k, len(others))).indices]
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


@cache
def _list(name: str, root: Path) -> Split:
    return LISTS[name](root)


def _kept(classes: int, held_out: float) -> int:
    """How many classes are left to learn on.

    Raises:
        UsageError: if fewer than two are left, or held out.
    """
    kept = classes - round(held_out * classes)
    if min(kept, classes - kept) < 2:
        raise UsageError(
            f"held_out {held_out} is not allowed: of {classes} classes {kept} are left to learn "
            f"on and {classes - kept} to test on; both must be two or more"
        )
    return kept


def _held(options: RetrievalOptions, root: Path, device: torch.device) -> HeldImages:
    """A set on the device whole, standardized by mean and deviation of all pixels."""
    x, y, test, test_y = (
        part.to(device)
        for part in _load(options.data, root, options.train_classes, options.test_classes)
    )
    if options.held_out:
        kept = y < _kept(int(y.max()) + 1, options.held_out)
        x, y, test, test_y = x[kept], y[kept], x[~kept], y[~kept]
    mean, std = float(x.float().mean()), float(x.float().std())
    return HeldImages((x, y), (test, test_y), mean, std, pixels=False)


def _decoded(
    options: RetrievalOptions, root: Path, device: torch.device
) -> tuple[DecodedImages, int | None]:
    """A set whose images are in files, and how many of its test images, the first, are queries.

    The others are the gallery; None where there is none.
    """
    split = _list(options.data, root)
    train = split.train.first(options.train_classes)
    if options.held_out:
        kept = _kept(int(train.labels.max()) + 1, options.held_out)
        split = Split(train.first(kept), train.without_first(kept))
        train = split.train
    tested = [p.first(options.test_classes) for p in (split.test, split.gallery) if p is not None]
    labels = torch.cat([torch.tensor(part.labels) for part in tested])
    source = DecodedImages(
        (train.paths, torch.tensor(train.labels, device=device)),
        (tuple(path for part in tested for path in part.paths), labels.to(device)),
        options.image_size,
    )
    return source, None if split.gallery is None else len(tested[0].paths)


def _recalls(found: dict[int, Tensor]) -> dict[str, float]:
    return {f"recall_at_{k}": float(hit.double().mean()) for k, hit in found.items()}


class Retrieval(Problem):
    """Metric learning on some classes, tested on others.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    divisible = False  # pairs of the whole batch
    model: nn.ModuleDict

    def __init__(self, options: RetrievalOptions, root: Path, device: torch.device) -> None:
        self.options = options
        self.data: ImageSource
        self.queries: int | None = None
        self.in_files = options.data in LISTS
        if self.in_files:
            self.data, self.queries = _decoded(options, root, device)
        else:
            self.data = _held(options, root, device)
        self.labels, self.test_labels = self.data.train_labels, self.data.test_labels
        self.classes = int(self.labels.max()) + 1
        # Where each class's images are.
        labels = self.labels.cpu()
        self.members = torch.split(labels.argsort(stable=True), torch.bincount(labels).tolist())
        self.examples = len(labels)
        self.model = nn.ModuleDict(
            {
                "body": build(
                    options.network, self.data.channels, options.embedding, options.width
                ),
                # What it trains is trained with the network.
                "loss": make_loss(options.loss, self.classes, options.embedding),
            }
        ).to(device)
        tested = self.test_labels[: self.queries]
        self.facts = {
            "data": options.data,
            "train_examples": self.examples,
            "test_examples": len(tested),
            "train_classes": self.classes,
            "test_classes": len(torch.unique(tested)),
        }
        if self.queries is not None:
            self.facts["gallery_examples"] = len(self.test_labels) - len(tested)
        # The nearest neighbours by the pixels themselves; of what is not held, by small ones.
        self.baseline = _recalls(self._hits(self._pixels()))

    def _pixels(self) -> Tensor:
        """The test images; of those in files the means over channels, at 16×16 pixels."""
        parts = (self.data.standardized(x) for x, _ in self.data.test_parts())
        if self.in_files:
            parts = (F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 16) for x in parts)
        return torch.cat(list(parts))

    def _hits(self, embeddings: Tensor) -> dict[int, Tensor]:
        """For each k that is judged, and each test image or query, whether it has a hit."""
        queries = self.queries
        own = embeddings[:queries], self.test_labels[:queries]
        gallery = None
        if queries is not None:
            gallery = embeddings[queries:], self.test_labels[queries:]
        return {k: hits(*own, k, gallery) for k in (1, 4)}

    def batches(self, size: int, draw: Generator) -> Tensor:
        """Each step has random classes, and ``images_per_class`` random images of each: different
        ones, but of a class with fewer images, from which they are drawn with replacement."""
        each, classes = self.options.images_per_class, len(self.members)
        if size % each or size // each > classes:
            raise UsageError(
                f"batch_size {size} is not allowed: must be {each} images each of at most "
                f"{classes} classes"
            )

        def some(own: Tensor) -> Tensor:
            if len(own) < each:
                return own[torch.randint(len(own), (each,), generator=draw)]
            return own[torch.rand(len(own), generator=draw).argsort()[:each]]

        def chosen() -> Tensor:
            classes_of_step = torch.randperm(classes, generator=draw)[: size // each]
            return torch.cat([some(self.members[k]) for k in classes_of_step.tolist()])

        return torch.stack([chosen() for _ in range(self.examples // size)])

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """Images and classes."""
        return next(self.stream(chosen[None], [draw]))

    def stream(self, steps: Tensor, draws: Iterable[Generator]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch of each step; images in files are decoded some steps ahead, and mirrored with
        probability ½."""
        for x, labels, draw in self.data.batches(steps, draws):
            yield self.data.standardized(flip(x, draw) if self.in_files else x), labels

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The chosen loss of the batch's embeddings."""
        x, y = batch
        out: Tensor = self.model["loss"](self.model["body"](x), y)
        return out

    def evaluate(self) -> Evaluation:
        """Recall@1 and @4 among the test images, or the gallery, all of unseen classes."""
        self.model.eval()
        with torch.no_grad():
            body = self.model["body"]
            embeddings = [body(self.data.standardized(x)) for x, _ in self.data.test_parts()]
        found = self._hits(torch.cat(embeddings))
        return Evaluation(_recalls(found), (~found[1]).nonzero().flatten().tolist())
