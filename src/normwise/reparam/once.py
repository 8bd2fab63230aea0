"""Compute effective weights once per step, however often a model is called."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from normwise.reparam.parametrizations import WeightParametrization, originals, owner, stacks

__all__ = ["computed_once"]


@dataclass
class _Held:
    parametrization: WeightParametrization
    effective: Tensor
    originals: list[Tensor]
    versions: list[int]


class computed_once:
    """Compute each effective weight once on entry, and differentiate it once on exit.

    Between, every use of a converted weight reads the held tensor, and ``backward`` accumulates the
    gradient of the effective weights; leaving the context carries it on to the parameters::

        with nw.reparam.computed_once(model):
            for part in parts:
                loss(model(part)).backward()
        optimizer.step()

    ``torch.nn.utils.parametrize.cached`` computes once too, but allows a single ``backward``, hands
    out graph-less weights after a first use under ``no_grad``, and confuses a module with its deep
    copies (torch 2.13). Unscale and clip gradients, and step, after the context.

    Args:
        model: a module with converted weights.

    Raises:
        ValueError: on entry, if no weight of the model is converted.
        RuntimeError: on entry, if the context is already entered; on exit, if a parameter was
            changed inside (its held effective weight would have been stale).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held: list[_Held] = []

    def __enter__(self) -> computed_once:
        found = [
            (parametrization, originals(stack))
            for module in self._model.modules()
            for stack in stacks(module).values()
            if (parametrization := owner(stack)) is not None
        ]
        if not found:
            raise ValueError("computed_once finds no weight that normwise has converted")
        if any(parametrization.held is not None for parametrization, _ in found):
            raise RuntimeError("computed_once is already entered for this model")
        for parametrization, tensors in found:
            with torch.enable_grad():
                effective = parametrization(*tensors)
            parametrization.held = effective.detach().requires_grad_(effective.requires_grad)
            versions = [t._version for t in tensors]
            self._held.append(_Held(parametrization, effective, tensors, versions))
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tensors, gradients, stale = [], [], False
        for h in self._held:
            leaf, h.parametrization.held = h.parametrization.held, None
            stale |= [t._version for t in h.originals] != h.versions
            if leaf is not None and leaf.grad is not None:
                tensors.append(h.effective)
                gradients.append(leaf.grad)
        self._held.clear()
        if error is not None:
            return
        if stale:
            raise RuntimeError(
                "a parameter was changed inside of computed_once; step the optimizer after it"
            )
        if tensors:
            torch.autograd.backward(tensors, gradients)
