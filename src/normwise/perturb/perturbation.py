"""Take a step at perturbed weights: perturb, let the optimizer step, take the perturbation back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.optimizer import Optimizer

from normwise.checks import check_model, check_number, check_optimizer, check_report
from normwise.geometry import View, at_least_float32
from normwise.perturb.sizes import Located
from normwise.protocols import Views
from normwise.sharding import local, summed_gradients

__all__ = ["Perturbation", "buffers_kept"]


class Perturbation(ABC):
    """Base of :class:`AWP` and :class:`RWP`; not for direct use.

    Args:
        model: whose weights are perturbed.
        optimizer: that steps them.
        gamma: γ; may be changed between steps, to warm up for example. At 0 a step is plain.
        views: whose slices are perturbed in proportion to their norms.

    Attributes:
        names: the weights that are perturbed, by their names in the model.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, gamma: float, views: Views) -> None:
        check_model(model)
        check_optimizer(optimizer)
        self.model, self.optimizer, self.gamma = model, optimizer, gamma
        self._check_gamma()
        self._weights = _resolved(type(self).__name__, model, optimizer, views)
        of: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.names = tuple(of[w] for w in self._weights)

    @abstractmethod
    def _ascended(self, before: Sequence[Tensor], ascend: Callable[[], Any]) -> list[Tensor]:
        """The perturbation v of each weight (this rank's shard of it), γ not included.

        The weights may be left anywhere.

        Args:
            before: copies of the weights.
            ascend: runs the model and the backward pass of what is to be increased.
        """

    @abstractmethod
    def _ascent(self, value: Any) -> Tensor:
        """The number to increase, of what the user's function returned."""

    @contextmanager
    def perturbed(self, loss: Callable[[], Tensor]) -> Iterator[None]:
        """Inside, the weights are w + γv, where v ascends ``loss``; leaving takes γv back.

        Backward passes and the optimizer's step belong inside. On leaving a weight becomes
        w + (what the step added), from a copy of w: without a step it is w bit for bit.

        Args:
            loss: what to ascend, see the class; called under autograd, once or more, with the model
                in the mode that it is in. Buffers of the model (batch normalization's statistics)
                and gradients are as before it.

        Returns:
            A context manager.
        """
        with self._at(lambda: self._backward(loss)):
            yield

    def _backward(self, loss: Callable[[], Any]) -> None:
        torch.autograd.backward(self._ascent(loss()))

    def _stepped(self, closure: Callable[[], Any], ascend: Callable[[], Any]) -> Any:
        with self._at(ascend):
            with torch.enable_grad():
                value = closure()
            self.optimizer.step()
        return value

    @contextmanager
    def _at(self, ascend: Callable[[], Any]) -> Iterator[None]:
        self._check_gamma()
        if self.gamma == 0:
            yield
            return
        before = [w.clone() for w in self._tensors()]
        try:
            steps = self._ascended(before, ascend)
        except BaseException:
            torch._foreach_copy_(self._tensors(), before)
            raise
        self._move(before, steps)
        moved = [w.clone() for w in self._tensors()]
        try:
            yield
        finally:
            weights = self._tensors()
            # Subtracted, not added: −0 − (+0) is −0, and so a weight without a step is itself.
            taken = torch._foreach_sub(moved, weights)
            torch._foreach_copy_(weights, torch._foreach_sub(before, taken))

    def _tensors(self) -> list[Tensor]:
        """The weights outside of autograd; of DTensors this rank's shards."""
        return [local(w.detach()) for w in self._weights]

    def _move(self, before: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
        """Set the weights to w + γv, rounded once."""
        for w, old, v in zip(self._tensors(), before, steps, strict=True):
            w.copy_(at_least_float32(old) + self.gamma * v)

    def _gradients(self, ascend: Callable[[], Any]) -> list[Tensor]:
        """The gradients of one ascent pass, 0 where there is none; nothing else is changed."""
        params = dict.fromkeys(self.model.parameters())
        params |= dict.fromkeys(p for group in self.optimizer.param_groups for p in group["params"])
        saved = [(p, p.grad) for p in params]
        for p in params:
            p.grad = None
        try:
            with buffers_kept(self.model), torch.enable_grad():
                ascend()
            pairs = [(w, _dense(w)) for w in self._weights]
            return [local(g) for g in summed_gradients(pairs)]
        finally:
            for p, gradient in saved:
                p.grad = gradient

    def _check_gamma(self) -> None:
        check_number("gamma", self.gamma)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Inside, the model may be run as in training; its buffers are then as they were, bit for bit.

    Running statistics, counters of batches, the vectors of spectral norm: whatever a forward pass
    writes into buffers is undone, buffers that it replaced are put back.

    Args:
        model: the model. The cost is a copy of its buffers.

    Returns:
        A context manager.
    """
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                # Whether it was written cannot be asked: batch normalization counts no version.
                if not _is_expanded(buffer):
                    buffer.copy_(value)


def _is_expanded(t: Tensor) -> bool:
    """Whether entries share memory, so that torch lets nobody write them in place."""
    return any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True))


def _dense(w: Tensor) -> Tensor:
    if w.grad is None:
        return torch.zeros_like(w)
    return w.grad.to_dense() if w.grad.is_sparse else w.grad


def _resolved(
    method: str, model: nn.Module, optimizer: Optimizer, views: Views
) -> dict[Tensor, Located]:
    """The weights to perturb, in the optimizer's order, and where their slices are."""
    names = {p: name for name, p in model.named_parameters()}
    gains = {p for module in model.modules() for p in _gains(module)}
    weights = [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if p in names and p.requires_grad and p.ndim > 1 and p not in gains
    ]
    if not weights:
        raise ValueError(
            f"{method} finds no weight of two dimensions or more that the model and the optimizer "
            "share; make the optimizer from model.parameters()"
        )
    if isinstance(views, View | str):
        return {w: _fitting(views, names[w], w) for w in weights}
    if isinstance(views, Mapping):
        mapping = views
    else:
        check_report(views, "a view, its spelling, a mapping from parameters, or")
        mapping = views.parameter_views()
    by_name = {name: p for p, name in names.items()}
    chosen: dict[Any, View | str] = {}
    for key, view in mapping.items():
        p = by_name.get(key) if isinstance(key, str) else key
        if p not in names:
            label = repr(key) if isinstance(key, str) else f"of shape {tuple(key.shape)}"
            raise ValueError(f"parameter {label} is not one of the model's")
        chosen[p] = view
    return {w: _fitting(chosen.get(w, View.layer()), names[w], w) for w in weights}


def _gains(module: nn.Module) -> Iterator[Tensor]:
    """The gain of a weight that weight normalization divides: a factor, not a weight."""
    if isinstance(module, ParametrizationList) and getattr(module[0], "gain", False) is True:
        yield cast(Tensor, module.original0)


def _fitting(view: View | str, name: str, w: Tensor) -> Located:
    found = View.parse(view) if isinstance(view, str) else view
    try:
        return Located(w, found)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
