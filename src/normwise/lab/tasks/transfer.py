"""A character model of which the matrices' learning rate is swept, at several widths and depths."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import normwise
from normwise.decay import Decoupled
from normwise.geometry import View
from normwise.lab.checks import within
from normwise.lab.data.texts import EncodedText, tinyshakespeare, unigram_perplexity
from normwise.lab.errors import UsageError, nearest
from normwise.lab.optimizers import parse
from normwise.lab.tasks.problem import Evaluation, Metric, Problem
from normwise.optim.by_role import ByRole, Factory, Route

__all__ = ["LRTransfer", "LRTransferOptions"]

METRICS = (
    Metric("loss", "validation loss", "nats per character", higher_is_better=False, digits=3),
)
CONTEXT, HEAD = 64, 16
LENGTHS = ("fixed", "gains", "free")


@dataclass(frozen=True)
class LRTransferOptions:
    """What a recipe may set.

    Args:
        width: of the residual stream, a multiple of 16, the size of a head.
        depth: blocks.
        steps: of an epoch (default: 200).
        others_lr: the learning rate of AdamW, which steps embedding, readout and gains (default:
            3e-3).
        lengths: under ``sphere``, what becomes of those of the blocks' matrices. All are
            ``fixed``, as the whole matrices' norms; ``gains`` gives those back that the ledger says
            are lost; or only those are fixed that are ``free``: the output projections, which could
            stand in for them, are AdamW's (default: fixed).
    """

    width: int
    depth: int
    steps: int = 200
    others_lr: float = 3e-3
    lengths: str = "fixed"

    def __post_init__(self) -> None:
        for name in ("width", "depth", "steps"):
            within(self, name, 1)
        within(self, "others_lr", 0)
        if self.width % HEAD:
            raise UsageError(f"width {self.width} is not allowed: must be a multiple of {HEAD}")
        if self.lengths not in LENGTHS:
            raise UsageError(f"unknown lengths {self.lengths!r}: {nearest(self.lengths, LENGTHS)}")


class _CharacterBlock(nn.Module):
    """Attention and an MLP, each on a normalized reading of the residual stream."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.proj = nn.Linear(4 * width, width, bias=False)
        for matrix in (self.q, self.k, self.v, self.o, self.fc, self.proj):
            nn.init.normal_(matrix.weight, std=matrix.in_features**-0.5)
        for matrix in (self.o, self.proj):
            matrix.weight.data.mul_((2 * depth) ** -0.5)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        h = _normalized(x)
        q, k, v = (m(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = (_rotated(_normalized(t), rotation) for t in (q, k))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(heads.transpose(1, 2).flatten(2))
        out: Tensor = x + self.proj(F.relu(self.fc(_normalized(x))).square())
        return out


class _CharacterModel(nn.Module):
    """A decoder of characters; QK norm, relu², and RMSNorm without gains before each part."""

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_CharacterBlock(width, depth) for _ in range(depth))
        self.readout = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.readout.weight, std=0.5 * width**-0.5)
        angles = torch.arange(CONTEXT)[:, None] * 100.0 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape ``(N, length, vocabulary)`` for the character after each."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotation)
        logits: Tensor = self.readout(_normalized(x))
        return logits


def _normalized(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of shape ``(batch, heads, positions, HEAD)``."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2)


@cache
def _load(root: Path) -> EncodedText:
    return tinyshakespeare(root, "validation")


class LRTransfer(Problem):
    """Cross-entropy of each next character of windows drawn at random, and at fixed ones to test.

    Only the learning rate of the blocks' matrices is the recipe's.

    Args:
        options: the settings.
        root: where the data sets are.
        device: where to compute.
    """

    divisible = False
    model: _CharacterModel

    def __init__(self, options: LRTransferOptions, root: Path, device: torch.device) -> None:
        text = _load(root)
        self.options, self.device = options, device
        self.train, self.test = (torch.from_numpy(part) for part in (text.train, text.test))
        self.examples = len(self.train) - CONTEXT
        model = _CharacterModel(len(text.vocabulary), options.width, options.depth)
        self.model = model.to(device)
        outward = [
            p for name, p in model.named_parameters() if name.endswith(("o.weight", "proj.weight"))
        ]
        # Fixing all six matrices of L blocks loses 2L − 1 lengths: q and k are free, v trades with
        # o and fc with proj, and all o and proj together with the embedding. The ledger asks for
        # gains on all o and proj but the first.
        gains = options.lengths == "gains"
        wanted: dict[Any, Any] = dict.fromkeys(outward[1:] if gains else (), "scalar")
        gained = normwise.add_gains(model, wanted)
        left = {*gained, *(outward if options.lengths == "free" else ())}
        self.matrices = {
            name: p
            for name, p in self.model.named_parameters()
            if name.startswith("blocks.") and p not in left
        }
        self.facts = {"data": text.name, "train_tokens": len(self.train), "context": CONTEXT}
        perplexity = unigram_perplexity(self.train, self.test, len(text.vocabulary))
        self.baseline = {"loss": math.log(perplexity)}

    def batches(self, size: int, draw: Generator) -> Tensor:
        """Where the windows of each step begin."""
        return torch.randint(self.examples, (self.options.steps, size), generator=draw)

    def batch(self, chosen: Tensor, draw: Generator) -> Tensor:
        """Windows of characters, each with the one after."""
        return self._windows(self.train, chosen)

    def _windows(self, text: Tensor, starts: Tensor) -> Tensor:
        return text[starts[:, None] + torch.arange(CONTEXT + 1)].to(self.device)

    def make_optimizer(self, training: Any) -> Optimizer:
        """AdamW or Muon on the blocks' matrices, AdamW without decay on the rest; sphere around it.

        Args:
            training: its optimizer, lr, weight_decay, betas and coupling are the matrices'.
        """
        spec = parse(training.optimizer)
        betas = (training.betas[0], training.betas[1])
        on_spheres = spec.wrappers == ("sphere",)
        decay = 0.0 if on_spheres or training.coupling == "schedule" else training.weight_decay
        # Fused steps sum in another order: a cell gives the same bits without.
        made: dict[str, Factory] = {
            "adamw": lambda groups: torch.optim.AdamW(
                groups, lr=training.lr, betas=betas, weight_decay=decay, foreach=False
            ),
            "torch:Muon": lambda groups: torch.optim.Muon(
                groups, lr=training.lr, weight_decay=decay
            ),
        }
        if spec.name not in made or spec.wrappers not in ((), ("sphere",)) or spec.decays:
            raise UsageError(
                f"optimizer {training.optimizer!r} is not allowed: choose adamw or torch:Muon, or "
                "sphere around one of them"
            )

        def others(groups: list[dict[str, Any]]) -> Optimizer:
            lr = self.options.others_lr
            return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=0.0, foreach=False)

        routes = [
            Route(name, "matrices", "its rate is swept")
            if name in self.matrices
            else Route(name, "others", "its rate is the same everywhere", is_vector=p.ndim < 2)
            for name, p in self.model.named_parameters()
        ]
        factories = {"matrices": made[spec.name], "others": others}
        optimizer: Any = ByRole(factories, dict(self.model.named_parameters()), routes)
        matrices = list(self.matrices.values())
        if training.coupling == "schedule":
            Decoupled(training.weight_decay, per="schedule").attach(optimizer, matrices)
        if on_spheres:
            optimizer = normwise.sphere(optimizer, dict.fromkeys(matrices, View.layer()))
        own: Optimizer = optimizer
        return own

    def loss(self, batch: Tensor) -> Tensor:
        """Cross-entropy in nats a character."""
        return F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The mean cross-entropy of 512 windows, always the same."""
        draw = Generator().manual_seed(0)
        losses = []
        for _ in itertools.repeat(None, 8):
            starts = torch.randint(len(self.test) - CONTEXT, (64,), generator=draw)
            losses.append(float(self.loss(self._windows(self.test, starts))))
        return Evaluation({"loss": fmean(losses)})
