"""Optimizers by name: the lab's own, torch's, the user's, wrappers around any of these, and what
becomes of their decay."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import normwise
from normwise.decay import L2, Cautious, Corrected, Cosine, Decoupled, Linear, Policy, Window
from normwise.decay.schedules import Schedule
from normwise.geometry import View
from normwise.lab.errors import UsageError, nearest
from normwise.lab.imports import attribute
from normwise.lab.trust import check_trusted

__all__ = ["KNOWN", "MATRICES_ONLY", "POLICIES", "Decay", "OptimizerSpec", "parse", "split"]

# What a recipe calls by a name alone; normwise.lab.running.prepare makes them.
KNOWN = ("sgd", "sgdp", "adam", "adamw", "adamp")
WRAPPERS = ("tangential", "sphere")
_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# torch's optimizers that need something else than one call of step() without arguments.
_NEED_CLOSURE = ("LBFGS",)
# Those that step matrices alone: the rest of a network is AdamW's.
MATRICES_ONLY = ("torch:Muon",)

# What a weight decay means, whatever the optimizer.
POLICIES: dict[str, Policy] = {
    "l2": L2(),
    "decoupled": Decoupled(),
    "scheduled": Decoupled(per="schedule"),
    "cautious": Cautious(),
    "corrected": Corrected(),
}
# When weights decay: from a share of the steps, and their number, to a factor by step.
SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {
    "early": lambda share, steps: Window(0, max(1, round(share * steps))),
    "late": lambda share, steps: Window(round(share * steps)),
    "linear": lambda share, steps: Linear(max(1, round(share * steps))),
    "cosine": lambda share, steps: Cosine(max(1, round(share * steps))),
}
_SHARES = {"early": 1 / 3, "late": 1 / 3, "linear": 1.0, "cosine": 1.0}

Groups = list[dict[str, Any]]
Views = Mapping[Tensor, View]


@dataclass(frozen=True)
class Decay:
    """What becomes of an optimizer's weight decay.

    Args:
        name: in ``POLICIES`` or ``SCHEDULES``.
        share: of the steps, of a schedule (default: its own).
    """

    name: str
    share: float | None = None

    @property
    def length(self) -> float:
        """The share of the steps that a schedule takes."""
        return _SHARES[self.name] if self.share is None else self.share

    def __str__(self) -> str:
        return self.name if self.share is None else f"{self.name}({self.share:g})"


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer that is compared.

    Args:
        name: one of ``KNOWN``, ``torch:CLASS``, or ``MODULE:FACTORY``.
        wrappers: from the outermost to the innermost.
        decays: what becomes of its decay.
    """

    name: str
    wrappers: tuple[str, ...] = ()
    decays: tuple[Decay, ...] = ()

    @property
    def code(self) -> str | None:
        """``MODULE:FACTORY`` where it is code of the user's."""
        return self.name if ":" in self.name and not self.name.startswith("torch:") else None

    def __str__(self) -> str:
        made = "".join(f"{w}(" for w in self.wrappers) + self.name + ")" * len(self.wrappers)
        return "+".join([made, *map(str, self.decays)])

    @property
    def policies(self) -> list[Policy]:
        """What its decay means, if not what the optimizer means by it."""
        return [POLICIES[decay.name] for decay in self.decays if decay.name in POLICIES]

    def schedules(self, steps: int) -> list[Schedule]:
        """When weights decay, in a training of so many steps."""
        return [SCHEDULES[d.name](d.length, steps) for d in self.decays if d.name in SCHEDULES]

    def make(
        self,
        known: Callable[[str, Groups], Optimizer],
        groups: Groups,
        lr: float,
        views: Views,
        report: Any = None,
    ) -> Optimizer:
        """The optimizer.

        Args:
            known: makes one of ``KNOWN``.
            groups: of parameters, each with its ``weight_decay``.
            lr: η.
            views: of the scale-invariant weights, which wrappers act on.
            report: of :func:`normwise.analyze`, which says which weights are hidden matrices
                (default: none, and an optimizer for matrices alone is refused).

        Raises:
            UsageError: if it cannot be made of these parameters.
        """
        if "sphere" in self.wrappers:  # it refuses decay, which would only turn up the step size
            groups = _without_decay(groups, views)
        try:
            optimizer = self._bare(known, groups, lr, report)
            matrices = {p: view for p, view in views.items() if p.ndim > 1}
            if "sphere" in self.wrappers:
                for group in optimizer.param_groups:
                    if not matrices.keys().isdisjoint(group["params"]):
                        group["weight_decay"] = 0.0
            for wrapper in reversed(self.wrappers):
                optimizer = _wrapper(wrapper)(optimizer, matrices)
            for policy in self.policies:
                policy.attach(optimizer, list(matrices) if policy == Corrected() else None)
        except UsageError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"optimizer {str(self)!r} cannot be made: {reason}") from error
        if not isinstance(optimizer, Optimizer):
            raise UsageError(
                f"optimizer {str(self)!r} is a {type(optimizer).__name__}; must be a "
                "torch.optim.Optimizer"
            )
        return optimizer

    def _bare(
        self, known: Callable[[str, Groups], Optimizer], groups: Groups, lr: float, report: Any
    ) -> Any:
        if self.name in KNOWN:
            return known(self.name, groups)
        if self.code is not None:
            check_trusted(self.code)
            return attribute(self.code)(groups, lr=lr)
        kind = _torch_class(self.name)
        takes = inspect.signature(kind).parameters
        decay = max(group["weight_decay"] for group in groups)
        if self.name in MATRICES_ONLY:
            return _by_role(kind, lr, decay, report)
        if decay and "weight_decay" not in takes:
            raise UsageError(f"optimizer {self.name!r} has no weight decay; give --weight-decay 0")
        # Foreach and fused steps sum in another order: a cell gives the same bits without.
        options = {name: False for name in ("foreach", "fused") if name in takes}
        if "weight_decay" not in takes:
            groups = [{"params": group["params"]} for group in groups]
        return kind(groups, lr=lr, **options)


def parse(text: str) -> OptimizerSpec:
    """An optimizer by its name; nothing is imported but for torch's own.

    Args:
        text: such as ``sgdp``, ``torch:NAdam``, ``mine.py:make_optimizer`` or
            ``tangential(torch:NAdam)``, each with or without ``+early(0.33)`` or ``+cautious``.

    Raises:
        UsageError: for a name that is none of these.
    """
    base, *decays = split(text, "+")
    if decays:
        inner = parse(base)
        return OptimizerSpec(inner.name, inner.wrappers, tuple(map(_decay, decays)))
    wrapper = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    if wrapper:
        name = wrapper[1]
        if name not in WRAPPERS:
            raise UsageError(f"unknown wrapper {name!r}: {nearest(name, WRAPPERS)}")
        _wrapper(name)
        inner = parse(wrapper[2])
        if inner.decays:
            raise UsageError(
                f"{text.strip()!r} is not allowed: write the decay last, "
                f"{OptimizerSpec(inner.name, (name, *inner.wrappers), inner.decays)}"
            )
        return OptimizerSpec(inner.name, (name, *inner.wrappers))
    name = text.strip()
    if name.lower() in KNOWN:
        return OptimizerSpec(name.lower())
    if name.startswith("torch:"):
        _torch_class(name)
        return OptimizerSpec(name)
    module, colon, factory = name.partition(":")
    if colon:
        module = module.removesuffix(".py").replace("/", ".") if module.endswith(".py") else module
        if _PLACE.fullmatch(f"{module}:{factory}"):
            return OptimizerSpec(f"{module}:{factory}")
    hint = nearest(name, KNOWN).removesuffix(")")
    raise UsageError(
        f"unknown optimizer {name!r}: {hint}, torch:CLASS, MODULE:FACTORY, tangential(…), "
        "sphere(…))"
    )


def split(text: str, by: str) -> list[str]:
    """The parts of a text between a character, where that is in no parentheses."""
    parts, depth = [""], 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == by and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def _decay(text: str) -> Decay:
    found = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", text)
    name = found[1] if found else text
    if found is None or name not in {**POLICIES, **SCHEDULES}:
        raise UsageError(f"unknown decay {name!r}: {nearest(name, [*POLICIES, *SCHEDULES])}")
    if found[2] is None:
        return Decay(name)
    try:
        share = float(found[2])
    except ValueError:
        share = -1.0
    if name in POLICIES or not 0 < share <= 1 or (name == "late" and share == 1):
        allowed = "takes nothing" if name in POLICIES else "takes a share of the steps, as 0.33"
        raise UsageError(f"decay {text!r} is not allowed: {name} {allowed}")
    return Decay(name, share)


def _by_role(kind: Any, lr: float, decay: float, report: Any) -> Optimizer:
    """An optimizer of hidden matrices, its steps of the length of AdamW's, which has the rest."""
    if report is None:
        raise UsageError(
            f"{kind.__name__} steps hidden matrices alone, and which these are could not be found "
            "out; choose another optimizer"
        )
    return normwise.groups(
        report,
        matrices=lambda own: kind(own, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        others=lambda own: torch.optim.AdamW(own, lr=lr, weight_decay=decay, foreach=False),
    )


def _torch_class(name: str) -> Any:
    own = name.removeprefix("torch:")
    classes = [
        key
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    ]
    if own in _NEED_CLOSURE:
        raise UsageError(f"optimizer {name!r} is not allowed: its step needs a closure")
    if own not in classes:
        raise UsageError(f"unknown optimizer {name!r}: {nearest(own, classes)}")
    return getattr(torch.optim, own)


def _wrapper(name: str) -> Callable[[Optimizer, Views], Any]:
    found: Callable[[Optimizer, Views], Any] | None = getattr(normwise, name, None)
    if found is None:
        raise UsageError(f"this version of normwise has no {name!r}; choose tangential")
    return found


def _without_decay(groups: Groups, views: Views) -> Groups:
    made = []
    for group in groups:
        on = [p for p in group["params"] if p in views]
        off = [p for p in group["params"] if p not in views]
        made += [{**group, "params": on, "weight_decay": 0.0}] if on else []
        made += [{**group, "params": off}] if off else []
    return made
