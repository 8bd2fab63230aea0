"""Tagging of recordings, several tags each, judged by areas under curves, the mean over tags."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from normwise.lab.checks import within
from normwise.lab.data.clips import READERS, ClipJob, Clips, Spectra, Tagged
from normwise.lab.errors import UsageError, nearest
from normwise.lab.networks import build
from normwise.lab.tasks.classification import subset
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["Tagging", "TaggingOptions", "average_precision", "roc_auc"]

METRICS = (
    Metric("roc_auc", "ROC-AUC", "%", 100.0),
    Metric("pr_auc", "PR-AUC", "%", 100.0),
)
# Clips that are tested at a time, and those whose spectra give mean and deviation.
_PART, _MEASURED = 16, 64


@dataclass(frozen=True)
class TaggingOptions:
    """What a recipe may set.

    Args:
        data: ``magnatagatune``, or ``fsdd-pairs``, two spoken digits at once.
        network: a name that :func:`normwise.lab.networks.build` knows.
        width: channels of the network's first stage (default: 16).
        seconds: of an excerpt: in training one random one of each clip, in the test all that lie
            side by side in it, whose probabilities are averaged (default: 5).
        train_examples: how many clips are used, drawn once and for all (default: all).
        test_examples: the same for testing (default: all).
    """

    data: str
    network: str
    width: int = 16
    seconds: float = 5.0
    train_examples: int | None = None
    test_examples: int | None = None

    def __post_init__(self) -> None:
        if self.data not in READERS:
            raise UsageError(f"unknown data {self.data!r}: {nearest(self.data, READERS)}")
        for name in ("width", "train_examples", "test_examples"):
            within(self, name, 1)
        within(self, "seconds", 0.1)


@cache
def _load(name: str, root: Path) -> Tagged:
    return READERS[name](root)


def _groups(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """For each score that occurs, rising, how many examples have it, and how many of them the tag.

    Args:
        scores: shape ``(N,)``.
        truth: shape ``(N,)``, bool.
    """
    _, group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    hits = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, group, truth.double())
    return counts.double(), hits


def roc_auc(scores: Tensor, truth: Tensor) -> float:
    """The probability that an example with the tag has a higher score than one without.

    Args:
        scores: shape ``(N,)``; equal ones count half.
        truth: shape ``(N,)``, bool.

    Returns:
        NaN where all or none have the tag.
    """
    counts, hits = _groups(scores, truth)
    misses = counts - hits
    below = misses.cumsum(0) - misses
    pairs = hits.sum() * misses.sum()
    return float((hits * (below + misses / 2)).sum() / pairs)


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Σ (R_k − R_{k−1}) P_k: the area under precision against recall, as steps.

    Args:
        scores: shape ``(N,)``; equal ones are one step.
        truth: shape ``(N,)``, bool.

    Returns:
        NaN where none has the tag.
    """
    counts, hits = (part.flip(0) for part in _groups(scores, truth))
    precision = hits.cumsum(0) / counts.cumsum(0)
    return float((hits * precision).sum() / hits.sum())


class Tagging(Problem):
    """Binary cross-entropy of each tag, of log-mel spectra of excerpts.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    def __init__(self, options: TaggingOptions, root: Path, device: torch.device) -> None:
        data = _load(options.data, root)
        self.device = device
        self.train, train_tags = _chosen(data.train, data.train_tags, options.train_examples)
        self.test, self.test_tags = _chosen(data.test, data.test_tags, options.test_examples)
        self.train_tags = train_tags.float().to(device)
        self.examples = len(self.train)
        self.spectra = Spectra(data, options.seconds)
        step = -(-len(self.train) // _MEASURED)
        few = self.train[::step]
        here = Spectra(data, options.seconds, processes=0)
        ((measured, _),) = here.run([ClipJob(few, [0.5] * len(few))])
        self.mean, self.std = float(measured.mean()), float(measured.std().clamp(min=1e-6))
        self.model = build(options.network, 1, len(data.tags), options.width).to(device)
        present = self.test_tags.sum(0)
        self.judged = ((present > 0) & (present < len(self.test))).nonzero().flatten().tolist()
        if not self.judged:
            raise UsageError(
                f"test_examples {options.test_examples} are too few: no tag is on some clips and "
                "not on others"
            )
        self.facts = {
            "data": data.name,
            "train_examples": len(self.train),
            "test_examples": len(self.test),
            "tags": len(data.tags),
            "tags_judged": len(self.judged),
            "empty_files_left_out": data.left_out,
        }
        # The same for every clip: each tag by how often it is there.
        self.baseline = self._areas(train_tags.double().mean(0).expand(len(self.test), -1))

    def _areas(self, scores: Tensor) -> dict[str, float]:
        """Means over the tags that are on some test clips and not on others.

        Args:
            scores: shape ``(N, T)``.
        """
        pairs = [(scores[:, k], self.test_tags[:, k]) for k in self.judged]
        return {
            name: sum(area(*pair) for pair in pairs) / len(pairs)
            for name, area in (("roc_auc", roc_auc), ("pr_auc", average_precision))
        }

    def _standardized(self, spectra: Tensor) -> Tensor:
        return (spectra.to(self.device) - self.mean) / self.std

    def batch(self, chosen: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """Spectra of random excerpts, and their tags."""
        return next(self.stream(chosen[None], [draw]))

    def stream(self, steps: Tensor, draws: Iterable[Generator]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch of each step, decoded some steps ahead."""

        def jobs() -> Iterator[ClipJob]:
            for chosen, draw in zip(steps, draws, strict=True):
                places = torch.rand(len(chosen), generator=draw, dtype=torch.float64)
                yield ClipJob([self.train[i] for i in chosen.tolist()], places.tolist())

        for (spectra, _), chosen in zip(self.spectra.run(jobs()), steps, strict=False):
            yield self._standardized(spectra), self.train_tags[chosen.to(self.device)]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Binary cross-entropy in nats, the mean over tags and clips."""
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.model(x), y)

    def evaluate(self) -> Evaluation:
        """The areas of the mean probabilities of each test clip's excerpts."""
        self.model.eval()
        jobs = (ClipJob(self.test[i : i + _PART]) for i in range(0, len(self.test), _PART))
        scores = []
        with torch.no_grad():
            for spectra, counts in self.spectra.run(jobs):
                said = self.model(self._standardized(spectra)).double().sigmoid().cpu()
                scores += [part.mean(0) for part in said.split(counts)]
        return Evaluation(self._areas(torch.stack(scores)))


def _chosen(clips: Clips, tags: object, count: int | None) -> tuple[Clips, Tensor]:
    """Of ``count`` clips, always the same ones, or of all, the files and the tags."""
    marks = torch.tensor(tags)
    if count is None:
        return clips, marks
    own = subset(count, len(clips))
    return tuple(clips[i] for i in own.tolist()), marks[own]
