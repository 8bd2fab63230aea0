"""Transformer-XL (arXiv 1901.02860): attention that also sees the states of earlier segments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TransformerXL", "relative_positions", "shifted"]


def relative_positions(length: int, width: int, like: Tensor) -> Tensor:
    """R: sinusoids of the distances ``length`` − 1 down to 0, shape ``(length, width)``.

    Args:
        length: how many distances.
        width: an even number; sines first, then cosines, of wavelengths from 2π to 10,000 · 2π.
        like: whose device and dtype it gets.
    """
    distance = torch.arange(length - 1, -1, -1, device=like.device, dtype=like.dtype)
    exponent = torch.arange(0, width, 2, device=like.device, dtype=like.dtype) / width
    angle = distance[:, None] * torch.pow(10_000.0, -exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def shifted(scores: Tensor) -> Tensor:
    """From scores by distance those by place (appendix B).

    Args:
        scores: shape ``(…, queries, keys)``; the column c of a query is that of the key at distance
            ``keys − 1 − c``.

    Returns:
        The same shape: the last query is at the place of the last key. Where a key comes after the
        query there is no distance, and what stands there means nothing.
    """
    *rest, queries, keys = scores.shape
    padded = F.pad(scores, (1, 0)).view(*rest, keys + 1, queries)
    return padded[..., 1:, :].reshape(*rest, queries, keys)


class _Layer(nn.Module):
    """Relative attention and a two-layer network, each with a shortcut and a LayerNorm behind."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.distance, self.outward = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def _by_head(self, x: Tensor) -> Tensor:
        """From ``(…, length, width)`` to ``(…, heads, length, width / heads)``."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(-3, -2)

    def forward(self, x: Tensor, memory: Tensor, r: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Section 3.3.

        Args:
            x: states of this segment, shape ``(N, length, width)``.
            memory: this layer's inputs in earlier segments, shape ``(N, remembered, width)``.
            r: of all distances, shape ``(remembered + length, width)``, the longest first.
            u: what is added to a query that meets content, shape ``(heads, 1, width / heads)``.
            v: what is added to a query that meets a distance, of the same shape.
        """
        seen = torch.cat([memory, x], dim=1)
        query, key, value = (
            self._by_head(part) for part in (self.query(x), self.key(seen), self.value(seen))
        )
        distance = self._by_head(self.distance(r))
        content = (query + u) @ key.transpose(-2, -1)
        place = shifted((query + v) @ distance.transpose(-2, -1))
        queries, keys = place.shape[-2:]
        future = torch.ones(queries, keys, dtype=torch.bool, device=x.device)
        future = future.triu(1 + keys - queries)
        scores = (content + place) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        found = (weights @ value).transpose(-3, -2).flatten(-2)
        x = self.first_norm(x + self.dropout(self.outward(found)))
        hidden = self.dropout(F.relu(self.wide(x)))
        out: Tensor = self.second_norm(x + self.dropout(self.narrow(hidden)))
        return out


class TransformerXL(nn.Module):
    """A causal transformer that reads a text in segments and remembers the states of earlier ones.

    u and v are those of all layers. The states that are remembered lie in the buffer ``memory``,
    shape ``(layers, N, remembered, width)``, empty at first, so that a checkpoint holds them; who
    trains the network puts them there.

    Args:
        vocabulary: how many tokens, the most frequent first.
        width, heads, layers: of the network; ``width`` is even and a multiple of ``heads``.
        hidden: units between the two layers of each position-wise network.
        dropout: of hidden units, the embedding, R, and what is added to a shortcut.
        cutoffs: where the clusters of an adaptive softmax (arXiv 1609.04309) begin (default: an
            ordinary softmax).
    """

    memory: Tensor

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int,
        heads: int,
        layers: int,
        hidden: int,
        dropout: float = 0.0,
        cutoffs: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.width = width
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Layer(width, heads, hidden, dropout) for _ in range(layers))
        self.u, self.v = (nn.Parameter(torch.empty(heads, 1, width // heads)) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.predict: nn.Module = (
            nn.AdaptiveLogSoftmaxWithLoss(width, vocabulary, list(cutoffs))
            if cutoffs
            else nn.Linear(width, vocabulary)
        )
        for drawn in (self.tokens.weight, self.u, self.v):
            nn.init.normal_(drawn, std=0.02)
        self.register_buffer("memory", torch.zeros(layers, 0, 0, width))

    def no_memory(self, count: int) -> Tensor:
        """What ``count`` texts remember at their start."""
        return self.u.new_zeros(len(self.layers), count, 0, self.width)

    def forward(
        self, tokens: Tensor, targets: Tensor, memory: Tensor, remember: int
    ) -> tuple[Tensor, Tensor]:
        """Read a segment.

        Args:
            tokens: shape ``(N, length)``.
            targets: what follows each of them, of the same shape.
            memory: what earlier segments left, shape ``(layers, N, remembered, width)``; no
                gradient goes into it.
            remember: how many places of each layer are kept for the next segment.

        Returns:
            −log p of each target in nats, shape ``(N, length)``; and the memory after the segment,
            outside autograd.
        """
        x = self.dropout(self.tokens(tokens) * math.sqrt(self.width))
        memory = memory.detach()
        r = relative_positions(memory.shape[2] + tokens.shape[1], self.width, x)
        r = self.dropout(r)
        kept = []
        for layer, before in zip(self.layers, memory, strict=True):
            seen = torch.cat([before, x.detach()], dim=1)
            kept.append(seen[:, max(seen.shape[1] - remember, 0) :])
            x = layer(x, before, r, self.u, self.v)
        x = self.dropout(x).flatten(0, 1)
        if isinstance(self.predict, nn.AdaptiveLogSoftmaxWithLoss):
            losses = -self.predict(x, targets.flatten()).output
        else:
            losses = F.cross_entropy(self.predict(x), targets.flatten(), reduction="none")
        return losses.view_as(targets), torch.stack(kept)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A stored memory has the size of the batch that was trained on."""
        stored = state.get(f"{prefix}memory")
        if isinstance(stored, Tensor):
            self.memory = self.memory.new_empty(stored.shape)
        super()._load_from_state_dict(state, prefix, *rest)
