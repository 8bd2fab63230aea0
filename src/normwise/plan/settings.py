"""How a run will be trained, and which weights it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from normwise.geometry import View, norms
from normwise.optim import SGDP, SGDW, AdamP, sphere
from normwise.plan.timescales import Timescale, timescale
from normwise.updates import UpdateRule, rule_of

__all__ = ["OF_MATRICES", "OPTIMIZERS", "Settings", "Weights", "weights_of"]


class Lion(Optimizer):
    """What :func:`normwise.describe` needs of Lion, which torch does not have."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)


Params = Any
"""As the first argument of an optimizer: parameters, or groups of them."""


def _of_sgd(kind: Callable[..., Optimizer]) -> Callable[[Params, Settings], Optimizer]:
    return lambda params, s: kind(
        params, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, **_ratio(kind, s)
    )


def _of_adam(kind: Callable[..., Optimizer]) -> Callable[[Params, Settings], Optimizer]:
    return lambda params, s: kind(
        params, lr=s.lr, betas=s.betas, weight_decay=s.weight_decay, **_ratio(kind, s)
    )


def _ratio(kind: Callable[..., Optimizer], s: Settings) -> dict[str, float]:
    return {"wd_ratio": s.wd_ratio} if kind in (SGDP, AdamP) else {}


# How a run's settings make each optimizer; what it does then, describe() knows.
OPTIMIZERS: dict[str, Callable[[Params, Settings], Optimizer]] = {
    "sgd": _of_sgd(torch.optim.SGD),
    "sgdw": _of_sgd(SGDW),
    "sgdp": _of_sgd(SGDP),
    "adamw": _of_adam(torch.optim.AdamW),
    "adamp": _of_adam(AdamP),
    "lion": _of_adam(Lion),
    "muon": lambda params, s: _muon(
        params, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay
    ),
    "sphere": lambda params, s: _sphere(params, s),
}

# Those that are for matrices alone.
OF_MATRICES = frozenset({"muon", "sphere"})


def _muon(params: Params, **options: Any) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no Muon; it came with torch 2.9")
    made: Optimizer = torch.optim.Muon(params, **options)
    return made


def _sphere(params: Params, s: Settings) -> Optimizer:
    if s.weight_decay:
        raise ValueError(f"norms on spheres do not decay, but weight_decay is {s.weight_decay}")
    return sphere(torch.optim.SGD(params, lr=s.lr), View.layer())


@dataclass(frozen=True)
class Settings:
    """How a run will be trained.

    Args:
        optimizer: one of :data:`OPTIMIZERS`: ``"sgd"``, ``"sgdw"``, ``"sgdp"``, ``"adamw"``,
            ``"adamp"``, ``"lion"``, ``"muon"``, or ``"sphere"`` around any of them.
        lr: η, at its highest.
        weight_decay: λ, as the optimizer means it.
        steps: of the run.
        momentum: of SGD and its kin, and of Muon (default: 0).
        betas: of AdamW, AdamP and Lion (default: (0.9, 0.999)).
        schedule: ``"constant"`` or ``"cosine"``, which ends at 0 (default: ``"constant"``).
        gradient: √E‖g̃‖², the RMS norm of a slice's gradient at weight norm 1, on which only SGD
            and its kin depend; a monitor's ``scaled_gradient`` measures it (default: 1).
        dtype: whose range must hold (default: float32).
        wd_ratio: ρ of AdamP and SGDP, whose gate is taken to hold (default: 0.1, as theirs).
    """

    optimizer: str
    lr: float
    weight_decay: float
    steps: int
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "cosine"] = "constant"
    gradient: float = 1.0
    dtype: torch.dtype = torch.float32
    wd_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"Invalid optimizer: {self.optimizer!r}; must be one of {', '.join(OPTIMIZERS)}"
            )
        if self.steps < 1:
            raise ValueError(f"Invalid steps: {self.steps}; must be 1 or more")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"Invalid schedule: {self.schedule!r}; must be 'constant' or 'cosine'")

    def lrs(self) -> list[float]:
        """The learning rate of each step."""
        if self.schedule == "constant":
            return [self.lr] * self.steps
        return [self.lr * (1 + math.cos(math.pi * t / self.steps)) / 2 for t in range(self.steps)]

    def rule(self, shape: Sequence[int]) -> UpdateRule:
        """What a step at the highest learning rate does to a weight.

        Args:
            shape: of the weight.
        """
        # What a step on a sphere does depends on no shape, but the weight must have a norm.
        of_any = self.optimizer == "sphere"
        p = torch.ones(1, 1) if of_any else torch.empty(tuple(shape), device="meta")
        optimizer = self.make([p])
        (group,) = optimizer.param_groups
        return rule_of(optimizer, group, p)

    def make(self, params: Params) -> Optimizer:
        """The optimizer, of parameters or groups of them.

        Args:
            params: as any optimizer takes them.
        """
        return OPTIMIZERS[self.optimizer](params, self)

    def remembers(self, batch: float | None = None) -> Timescale:
        """How long weights remember that are not projected, at the highest learning rate.

        Args:
            batch: tokens, or samples, of a step (default: not known).
        """
        rule = self.rule((1, 1)).with_gate(False)
        return timescale(rule, steps=self.steps, batch=batch)


@dataclass(frozen=True)
class Weights:
    """Scale-invariant slices that are alike.

    Args:
        name: of the weight.
        slices: how many.
        entries: of each.
        norm: of each, before training.
        shape: of the weight (default: a square matrix of rows of so many entries).
    """

    name: str
    slices: int
    entries: int
    norm: float
    shape: tuple[int, ...] = ()

    def rule(self, settings: Settings) -> UpdateRule:
        """What a step does to these weights, whose gate holds as they are scale-invariant.

        Args:
            settings: how they will be trained.
        """
        return settings.rule(self.known(settings)["shape"]).with_gate(True)

    def known(self, settings: Settings) -> dict[str, Any]:
        """What the closed forms need to know of these weights.

        Args:
            settings: how they will be trained.
        """
        return {
            "gradient_square": settings.gradient**2,
            "entries": self.entries,
            "shape": self.shape or (self.entries, self.entries),
        }


def weights_of(model: nn.Module, views: Mapping[str, View]) -> list[Weights]:
    """The scale-invariant weights of a model, each with the geometric mean of its slices' norms.

    Args:
        model: the model.
        views: of the parameters by name, as ``report.views()``.

    Returns:
        One each, in the order of ``views``; vectors and zero weights are left out.
    """
    params = dict(model.named_parameters())
    found = []
    for name, view in views.items():
        p = params[name].detach()
        values = norms(p, view)
        alive = values[values > 0].double()
        if p.ndim > 1 and len(alive):
            norm = float(alive.log().mean().exp())
            entries = p.numel() // len(values)
            found.append(Weights(name, len(values), entries, norm, tuple(p.shape)))
    return found
