"""Nine classes of ImageNet whose textures mislead, ReBias, and three accuracies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.lab.augment import flip
from normwise.lab.checks import within
from normwise.lab.data.nine_classes import CLASSES, nine_classes
from normwise.lab.data.sources import DecodedImages
from normwise.lab.dependence import rebias_loss
from normwise.lab.errors import UsageError
from normwise.lab.networks import build
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["NineClasses", "NineClassesOptions", "unbiased_accuracy"]

METRICS = (
    Metric("unbiased_accuracy", "unbiased test accuracy", "%", 100.0),
    Metric("biased_accuracy", "test accuracy", "%", 100.0),
    Metric("imagenet_a_accuracy", "accuracy on ImageNet-A", "%", 100.0),
)


@dataclass(frozen=True)
class NineClassesOptions:
    """What a recipe may set.

    Args:
        network: of f: a name that :func:`normwise.lab.networks.build` knows, whose last linear
            layer is its classifier (default: ``torchvision:resnet18``).
        biased_network: of g, which is to see textures alone (default: ``bagnet18``).
        width: channels of the first stage of both, where a name does not decide it (default: 64).
        penalty: λ of the dependence between the two networks (default: 1; 0 for none, and then
            without the second network).
        image_size: pixels a side (default: 224).
        imagenet: the folder of ImageNet, below that of the data sets (default: ``imagenet``).
        imagenet_a: the folder of ImageNet-A (default: ``imagenet-a``).
        clusters: the table of clusters (default: ``9class_imagenet_val.csv``).
        least_images: that a class and a cluster must share to count (default: 10, as published).
    """

    network: str = "torchvision:resnet18"
    biased_network: str = "bagnet18"
    width: int = 64
    penalty: float = 1.0
    image_size: int = 224
    imagenet: str = "imagenet"
    imagenet_a: str = "imagenet-a"
    clusters: str = "9class_imagenet_val.csv"
    least_images: int = 10

    def __post_init__(self) -> None:
        for name in ("width", "image_size", "least_images"):
            within(self, name, 1)
        within(self, "penalty", 0)


class _Seen(nn.Module):
    """A network and what its classifier sees."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        linear = [path for path, m in network.named_modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise UsageError(f"network {name!r} has no linear layer to classify with")
        parent, _, child = linear[-1].rpartition(".")
        classifier = network.get_submodule(linear[-1])
        setattr(network.get_submodule(parent), child, nn.Identity())
        self.body, self.classifier = network, classifier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.classifier(features), features


def _scaled(features: Tensor) -> Tensor:
    """Over the median distance of a batch, outside autograd, so that no kernel vanishes."""
    with torch.no_grad():
        distances = torch.pdist(features.float())
        return features / distances.median().clamp(min=1e-12)


def unbiased_accuracy(right: Tensor, labels: Tensor, clusters: Tensor, least: int = 10) -> float:
    """The mean accuracy over pairs of a class and a cluster, and over clusterings (ReBias, 5.2).

    Args:
        right: which images are classified rightly, shape ``(N,)``.
        labels: their classes, shape ``(N,)``.
        clusters: their clusters in each clustering, shape ``(K, N)``.
        least: how many images a pair must have to count (default: 10, as in the published code).

    Returns:
        NaN where no pair has as many.
    """
    means = []
    for own in clusters:
        pair = labels * (int(own.max()) + 1) + own
        counts = torch.bincount(pair).double()
        hits = torch.bincount(pair, weights=right.double())
        counted = counts >= least
        means.append((hits[counted] / counts[counted]).mean())
    return float(torch.stack(means).mean())


class NineClasses(Problem):
    """ReBias (arXiv 1910.02806) on nine classes: f depends little on what g sees in textures.

    Each step lowers f's cross entropy + λ·HSIC(f, g) in f, and g's cross entropy − λ·HSIC(f, g) in
    g, both at once. The kernels' widths are the median distances of the batch.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    divisible = False  # HSIC is of the whole batch
    model: nn.ModuleDict

    def __init__(self, options: NineClassesOptions, root: Path, device: torch.device) -> None:
        self.options = options
        data = nine_classes(
            root / options.imagenet, root / options.imagenet_a, root / options.clusters
        )
        (paths, labels), (test, test_labels), (hard, hard_labels) = data.train, data.test, data.hard
        self.tested = len(test)
        self.clusters = torch.from_numpy(data.clusters)
        self.data = DecodedImages(
            (paths, torch.from_numpy(labels).to(device)),
            (test + hard, torch.cat([*map(torch.from_numpy, (test_labels, hard_labels))])),
            options.image_size,
        )
        self.examples = len(paths)
        networks = {"f": options.network, "g": options.biased_network}
        if not options.penalty:
            del networks["g"]
        self.model = nn.ModuleDict(
            {
                key: _Seen(build(name, 3, len(CLASSES), options.width), name)
                for key, name in networks.items()
            }
        ).to(device)
        commonest = int(torch.bincount(self.data.train_labels).argmax())
        said = self._accuracies(self.data.test_labels == commonest)
        if not said["unbiased_accuracy"] >= 0:
            raise UsageError(
                f"least_images {options.least_images} is not allowed: no class and cluster share "
                "as many"
            )
        self.baseline = said
        self.facts = {
            "data": "nine classes of ImageNet",
            "train_examples": len(paths),
            "test_examples": len(test),
            "imagenet_a_examples": len(hard),
            "classes": len(CLASSES),
        }

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """Images and classes."""
        return next(self.stream(chosen[None], [draw]))

    def stream(self, steps: Tensor, draws: Iterable[Generator]) -> Iterator[tuple[Tensor, Tensor]]:
        """Random crops, each mirrored with probability ½, decoded some steps ahead."""
        for x, labels, draw in self.data.batches(steps, draws):
            yield self.data.standardized(flip(x, draw)), labels

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of what f and g lower; each gets the gradient of its own part alone."""
        x, y = batch
        logits, seen = self.model["f"](x)
        if not self.options.penalty:
            return F.cross_entropy(logits, y)
        of_g, biased = self.model["g"](x)
        penalty = self.options.penalty
        return rebias_loss(logits, _scaled(seen), of_g, _scaled(biased), y, penalty)

    def _accuracies(self, right: Tensor) -> dict[str, float]:
        test, hard = right[: self.tested], right[self.tested :]
        labels = self.data.test_labels[: self.tested].cpu()
        return {
            "unbiased_accuracy": unbiased_accuracy(
                test, labels, self.clusters, self.options.least_images
            ),
            "biased_accuracy": float(test.double().mean()),
            "imagenet_a_accuracy": float(hard.double().mean()),
        }

    def evaluate(self) -> Evaluation:
        """f's accuracies."""
        self.model.eval()
        with torch.no_grad():
            parts = [
                self.model["f"](self.data.standardized(x))[0].argmax(1).cpu() == y.cpu()
                for x, y in self.data.test_parts()
            ]
        return Evaluation(self._accuracies(torch.cat(parts)))
