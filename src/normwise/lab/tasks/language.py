"""Language modelling: a transformer, or Transformer-XL, judged by perplexity on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from normwise.lab.checks import later, within
from normwise.lab.data.texts import READERS, EncodedText, unigram_perplexity
from normwise.lab.errors import UsageError, nearest
from normwise.lab.networks.transformer_xl import TransformerXL
from normwise.lab.tasks.problem import Evaluation, Metric, Problem

__all__ = ["Language", "LanguageOptions", "Recurrent", "Transformer"]

METRICS = (Metric("perplexity", "test perplexity", higher_is_better=False),)
NETWORKS = ("transformer", "transformer-xl")


@dataclass(frozen=True)
class LanguageOptions:
    """What a recipe may set.

    Args:
        data: ``brown``, ``tinyshakespeare``, ``wikitext-2`` or ``wikitext-103``.
        vocabulary: the most words, of brown (default: 10,000).
        context: tokens a window, each predicted from those before it in the window, and of
            transformer-xl from what is remembered of earlier ones (default: 64).
        layers, width, heads: of the transformer (default: 2, 128, 4).
        dropout: after each block (default: 0).
        train_tokens: how many are used, from the first on (default: all).
        test_tokens: the same for testing (default: all).
        network: transformer or transformer-xl (default: transformer).
        hidden: units of the two-layer networks (default: 4 · ``width``).
        memory: places that transformer-xl remembers while it is trained (default: ``context``).
        test_memory: the same while it is tested (default: ``memory``).
        cutoffs: of transformer-xl, where the clusters of an adaptive softmax begin (default: an
            ordinary softmax).
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
    network: str = later("transformer")
    hidden: int | None = later(None)
    memory: int | None = later(None)
    test_memory: int | None = later(None)
    cutoffs: tuple[int, ...] = later(())
    held_out: float = later(0.0)

    def __post_init__(self) -> None:
        for name in ("context", "layers", "width", "heads", "hidden", "train_tokens"):
            within(self, name, 1)
        for name, least in (("test_tokens", 1), ("memory", 0), ("test_memory", 0)):
            within(self, name, least)
        within(self, "vocabulary", 2)
        within(self, "dropout", 0, 1, below=True)
        within(self, "held_out", 0, 1, below=True)
        if self.width % self.heads:
            raise UsageError(
                f"width {self.width} is not allowed: must be a multiple of the {self.heads} heads"
            )
        if self.network not in NETWORKS:
            raise UsageError(f"unknown network {self.network!r}: {nearest(self.network, NETWORKS)}")
        if self.network == "transformer":
            for name in ("memory", "test_memory", "cutoffs"):
                if getattr(self, name) not in (None, ()):
                    raise UsageError(f"{name} is set, but network is transformer")
        elif self.width % 2:
            raise UsageError(f"width {self.width} is not allowed: must be even")
        if list(self.cutoffs) != sorted({c for c in self.cutoffs if c > 0}):
            raise UsageError(
                f"cutoffs {list(self.cutoffs)} are not allowed: must be numbers of words, rising"
            )
        # Each further cluster's words get a quarter of the width of the one before.
        if self.width < 4 ** len(self.cutoffs):
            raise UsageError(
                f"width {self.width} is not allowed: must be at least {4 ** len(self.cutoffs)} for "
                f"{len(self.cutoffs)} cutoffs"
            )


def _hidden(options: LanguageOptions) -> int:
    return 4 * options.width if options.hidden is None else options.hidden


class _TransformerBlock(nn.Module):
    """Attention and a two-layer network, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
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
                _TransformerBlock(options.width, options.heads, _hidden(options), options.dropout)
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

    With the network transformer-xl it is a :class:`Recurrent`, whose windows do.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    def __new__(cls, options: LanguageOptions, *_: object) -> Language:
        """The kind of language model that the options name."""
        return super().__new__(Recurrent if options.network == "transformer-xl" else cls)

    def __init__(self, options: LanguageOptions, root: Path, device: torch.device) -> None:
        text = _load(options.data, root, options.vocabulary)
        train = torch.from_numpy(text.train[: options.train_tokens])
        test = torch.from_numpy(text.test[: options.test_tokens])
        self.options = options
        if options.held_out:
            kept = len(train) - round(options.held_out * len(train))
            train, test = train[:kept], train[kept:]
        self.train = _windows(train, options.context).to(device)
        self.test_text = test.to(device)
        self.test = _windows(self.test_text, options.context)
        self.examples = len(self.train)
        self.model = self._network(len(text.vocabulary)).to(device)
        self.facts = {
            "data": text.name,
            "train_tokens": len(train),
            "test_tokens": len(test),
            "vocabulary": len(text.vocabulary),
            "unknown_share_of_test": float((test == 0).double().mean()),
        }
        self.baseline = {"perplexity": unigram_perplexity(train, test, len(text.vocabulary))}

    def _network(self, vocabulary: int) -> nn.Module:
        return Transformer(vocabulary, self.options)

    def batch(self, chosen: Tensor, draw: Generator) -> Tensor:
        """Windows of tokens; nothing is drawn."""
        return self.train[chosen.to(self.train.device)]

    def loss(self, batch: Any) -> Tensor:
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
        return _perplexity(total / len(self.test))


def _perplexity(nats: float) -> Evaluation:
    # A loss beyond 700 nats would not fit; no training that learns anything comes near.
    return Evaluation({"perplexity": math.exp(min(nats, 700.0))})


class Recurrent(Language):
    """Transformer-XL: the rows of a batch read the text on from where they stopped.

    The text is cut into as many streams as the batch has rows, and each step reads the next window
    of every stream. What is remembered lies in the network's buffer ``memory`` and is forgotten
    after each epoch.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    divisible = False  # what is remembered belongs to a row of the batch
    model: TransformerXL

    def _network(self, vocabulary: int) -> TransformerXL:
        o = self.options
        if o.cutoffs and o.cutoffs[-1] >= vocabulary:
            raise UsageError(
                f"cutoffs {list(o.cutoffs)} are not allowed: must be below the {vocabulary} words"
            )
        return TransformerXL(
            vocabulary,
            width=o.width,
            heads=o.heads,
            layers=o.layers,
            hidden=_hidden(o),
            dropout=o.dropout,
            cutoffs=o.cutoffs,
        )

    @property
    def _remembered(self) -> int:
        """How many places are remembered in training."""
        return self.options.context if self.options.memory is None else self.options.memory

    def batches(self, size: int, draw: Generator) -> Tensor:
        """Each row of a batch goes on where it stopped in the batch before; nothing is drawn."""
        steps = self.examples // size
        return torch.arange(steps * size).view(size, steps).T

    def prepared(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The windows, and what is remembered of those before them."""
        memory = self.model.memory
        if memory.shape[1] != len(batch):
            memory = self.model.no_memory(len(batch))
        return batch, memory

    def loss(self, batch: Any) -> Tensor:
        """Cross-entropy in nats a token.

        Of what was :meth:`prepared` the new memory replaces that of the network. Windows alone are
        read as if they began a text, and leave no trace.
        """
        windows, memory = batch if isinstance(batch, tuple) else (batch, None)
        before = self.model.no_memory(len(windows)) if memory is None else memory
        losses, after = self.model(windows[:, :-1], windows[:, 1:], before, self._remembered)
        if memory is not None:
            self.model.memory = after
        return losses.mean()  # type: ignore[no-any-return]  # modules return anything

    def end_epoch(self) -> None:
        """Forget: the next epoch begins at the start of the streams."""
        self.model.memory = self.model.no_memory(0)

    def evaluate(self) -> Evaluation:
        """exp of the mean cross-entropy of the test text, of which every token but the first is
        predicted once, in order."""
        self.model.eval()
        remember = self.options.test_memory
        remember = self._remembered if remember is None else remember
        text, total = self.test_text, 0.0
        with torch.no_grad():
            memory = self.model.no_memory(1)
            for window in torch.split(torch.stack([text[:-1], text[1:]]), self.options.context, 1):
                losses, memory = self.model(window[:1], window[1:], memory, remember)
                total += float(losses.double().sum())
        return _perplexity(total / (len(text) - 1))
