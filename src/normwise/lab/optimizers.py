"""Optimizers by name: the lab's own, torch's, the user's, and wrappers around any of these."""

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
from normwise.geometry import View
from normwise.lab.errors import UsageError, nearest
from normwise.lab.imports import attribute
from normwise.lab.trust import check_trusted

__all__ = ["KNOWN", "OptimizerSpec", "parse"]

# What a recipe calls by a name alone; normwise.lab.running.prepare makes them.
KNOWN = ("sgd", "sgdp", "adam", "adamw", "adamp")
WRAPPERS = ("tangential", "sphere")
_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# torch's optimizers that need something else than one call of step() without arguments.
_NEED_CLOSURE = ("LBFGS",)

Groups = list[dict[str, Any]]
Views = Mapping[Tensor, View]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer that is compared.

    Args:
        name: one of ``KNOWN``, ``torch:CLASS``, or ``MODULE:FACTORY``.
        wrappers: from the outermost to the innermost.
    """

    name: str
    wrappers: tuple[str, ...] = ()

    @property
    def code(self) -> str | None:
        """``MODULE:FACTORY`` where it is code of the user's."""
        return self.name if ":" in self.name and not self.name.startswith("torch:") else None

    def __str__(self) -> str:
        return "".join(f"{w}(" for w in self.wrappers) + self.name + ")" * len(self.wrappers)

    def make(
        self, known: Callable[[str, Groups], Optimizer], groups: Groups, lr: float, views: Views
    ) -> Optimizer:
        """The optimizer.

        Args:
            known: makes one of ``KNOWN``.
            groups: of parameters, each with its ``weight_decay``.
            lr: η.
            views: of the scale-invariant weights, which wrappers act on.

        Raises:
            UsageError: if it cannot be made of these parameters.
        """
        if "sphere" in self.wrappers:  # it refuses decay, which would only turn up the step size
            groups = _without_decay(groups, views)
        try:
            optimizer = self._bare(known, groups, lr)
            for wrapper in reversed(self.wrappers):
                matrices = {p: view for p, view in views.items() if p.ndim > 1}
                optimizer = _wrapper(wrapper)(optimizer, matrices)
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

    def _bare(self, known: Callable[[str, Groups], Optimizer], groups: Groups, lr: float) -> Any:
        if self.name in KNOWN:
            return known(self.name, groups)
        if self.code is not None:
            check_trusted(self.code)
            return attribute(self.code)(groups, lr=lr)
        kind = _torch_class(self.name)
        takes = inspect.signature(kind).parameters
        if any(group["weight_decay"] for group in groups) and "weight_decay" not in takes:
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
            ``tangential(torch:NAdam)``.

    Raises:
        UsageError: for a name that is none of these.
    """
    wrapper = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    if wrapper:
        name = wrapper[1]
        if name not in WRAPPERS:
            raise UsageError(f"unknown wrapper {name!r}: {nearest(name, WRAPPERS)}")
        _wrapper(name)
        inner = parse(wrapper[2])
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
        f"unknown optimizer {name!r}: {hint}, torch:CLASS, MODULE:FACTORY, tangential(…))"
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
