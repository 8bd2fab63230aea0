"""Language modelling: a small transformer, judged by its perplexity on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.lab.checks import within
from normwise.lab.data.texts import READERS, EncodedText
from normwise.lab.errors import UsageError, nearest
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["Language", "LanguageOptions", "Transformer"]

METRICS = (Metric("perplexity", "test perplexity", higher_is_better=False),)


@dataclass(frozen=True)
class LanguageOptions:
    """What a recipe may set.

    Args:
        data: ``brown``, ``tinyshakespeare``, ``wikitext-2`` or ``wikitext-103``.
        vocabulary: the most words, of brown (default: 10,000).
        context: tokens a window, each predicted from those before it in the window (default: 64).
        layers, width, heads: of the transformer (default: 2, 128, 4).
        dropout: after each block (default: 0).
        train_tokens: how many are used, from the first on (default: all).
        test_tokens: the same for testing (default: all).
        held_out: share of the training tokens, the last ones, that is tested on instead of the test
            text, by which settings are chosen (default: 0).
    """

    data: str
    vocabulary: int = 10_000
    context: int = 64
    layers: int = 2
    width: int = 128
    heads: int = 4
    dropout: float = 0.0
    train_tokens: int | None = None
    test_tokens: int | None = None
    held_out: float = 0.0

    def __post_init__(self) -> None:
        for name in ("context", "layers", "width", "heads", "train_tokens", "test_tokens"):
            within(self, name, 1)
        within(self, "vocabulary", 2)
        within(self, "dropout", 0, 1, below=True)
        within(self, "held_out", 0, 1, below=True)
        if self.width % self.heads:
            raise UsageError(
                f"width {self.width} is not allowed: must be a multiple of the {self.heads} heads"
            )


class _TransformerBlock(nn.Module):
    """Attention and a two-layer network, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        mixed = self.inward(self.first_norm(x)).view(n, length, 3, self.heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.outward(seen.transpose(1, 2).reshape(n, length, width)))
        hidden = F.gelu(self.wide(self.second_norm(x)))
        out: Tensor = x + self.dropout(self.narrow(hidden))
        return out


class Transformer(nn.Module):
    """A causal transformer with learnt positions and LayerNorm before each part.

    Args:
        vocabulary: how many tokens.
        options: sizes.
    """

    def __init__(self, vocabulary: int, options: LanguageOptions) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, options.width)
        self.positions = nn.Embedding(options.context, options.width)
        self.blocks = nn.Sequential(
            *(
                _TransformerBlock(options.width, options.heads, options.dropout)
                for _ in range(options.layers)
            )
        )
        self.norm = nn.LayerNorm(options.width)
        self.predict = nn.Linear(options.width, vocabulary)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape ``(N, length, vocabulary)`` for the token after each of ``tokens``."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.predict(self.norm(self.blocks(x)))
        return logits


@cache
def _load(name: str, root: Path, vocabulary: int) -> EncodedText:
    if name not in READERS:
        raise UsageError(f"unknown data {name!r}: {nearest(name, READERS)}")
    return READERS[name](root, vocabulary)


def _windows(tokens: Tensor, length: int) -> Tensor:
    """Windows of ``length`` tokens and the one after, side by side: ``(N, length + 1)``."""
    count = (len(tokens) - 1) // length
    if count < 1:
        raise UsageError(f"{len(tokens)} tokens are too few for a context of {length}")
    return tokens[: count * length + 1].unfold(0, length + 1, length)


class Language(Problem):
    """Cross-entropy of each next token; windows do not overlap and do not see one another.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    def __init__(self, options: LanguageOptions, root: Path, device: torch.device) -> None:
        text = _load(options.data, root, options.vocabulary)
        train = torch.from_numpy(text.train[: options.train_tokens])
        test = torch.from_numpy(text.test[: options.test_tokens])
        if options.held_out:
            kept = len(train) - round(options.held_out * len(train))
            train, test = train[:kept], train[kept:]
        self.train = _windows(train, options.context).to(device)
        self.test = _windows(test, options.context).to(device)
        self.examples = len(self.train)
        self.model = Transformer(len(text.vocabulary), options).to(device)
        self.facts = {
            "data": text.name,
            "train_tokens": len(train),
            "test_tokens": len(test),
            "vocabulary": len(text.vocabulary),
            "unknown_share_of_test": float((test == 0).double().mean()),
        }
        self.baseline = {"perplexity": unigram_perplexity(train, test, len(text.vocabulary))}

    def batch(self, chosen: Tensor, draw: Generator) -> Tensor:
        """Windows of tokens; nothing is drawn."""
        return self.train[chosen.to(self.train.device)]

    def loss(self, batch: Tensor) -> Tensor:
        """Cross-entropy in nats a token."""
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self) -> Evaluation:
        """exp of the mean cross-entropy of the test text."""
        self.model.eval()
        total = 0.0
        with torch.no_grad():
            for windows in torch.split(self.test, 32):
                total += float(self.loss(windows)) * len(windows)
        # A loss beyond 700 nats would not fit; no training that learns anything comes near.
        return Evaluation({"perplexity": math.exp(min(total / len(self.test), 700.0))})


def unigram_perplexity(train: Tensor, test: Tensor, vocabulary: int) -> float:
    """The perplexity of guessing each token by how often it is in ``train``, plus one."""
    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    return float((-(counts / counts.sum()).log()[test].mean()).exp())
