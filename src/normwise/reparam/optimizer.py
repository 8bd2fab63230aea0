"""Weight normalization inside of an optimizer, which leaves the model plain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from normwise.geometry import View
from normwise.reparam.parametrizations import WeightNorm
from normwise.updates import UpdateRule, rule_of, unknown_rule

__all__ = ["WeightNormalized"]


class WeightNormalized(Optimizer):
    r"""An optimizer that steps gain and direction of each weight, W = g·V/‖V‖, and writes W.

    The model keeps plain weights: nothing to convert, to fold, or to rename in its checkpoints.
    With ∇W the gradient that the model got,

    .. math::
        \nabla g = \frac{\langle \nabla W, V \rangle}{\|V\|}, \qquad
        \nabla V = \frac{g}{\|V\|} \Big(\nabla W - \nabla g \frac{V}{\|V\|}\Big),

    the wrapped optimizer takes its step on g and V, with moments and weight decay of their own, and
    W is put to g·V/‖V‖. The steps are those of :class:`WeightNorm` with a gain on a model whose
    directions start as the weights themselves. In memory V is one copy of the weights::

        optimizer = nw.reparam.WeightNormalized(torch.optim.Adam(model.parameters(), lr=1e-3))

    Groups, and so learning-rate schedules and gradient scalers, are those of the wrapped optimizer,
    with the model's parameters. ``state_dict()`` holds g and V beside its state. A weight that
    something else writes (a loaded checkpoint) starts anew from what was written, V = W, g = ‖W‖,
    with the moments that it had.

    Args:
        optimizer: any torch optimizer of plain parameters, before its first step.
        view: the slices that have a gain each (default: ``View.channel()``). Parameters of fewer
            than two dimensions, without entries, or that the view does not fit, are stepped as
            they are.
        eps: as for :class:`WeightNorm`.

    Raises:
        ValueError: if the optimizer has stepped already, or has nothing to normalize.

    Source: arXiv 1602.07868, Eqs. 2 and 3; the form as an optimizer is its Keras code's.
    """

    def __init__(
        self, optimizer: Optimizer, view: View | None = None, *, eps: float | None = None
    ) -> None:
        # Intentionally no call of Optimizer.__init__, which would make groups of its own.
        if optimizer.state:
            raise ValueError("the optimizer has stepped already; wrap it before its first step")
        self.optimizer = optimizer
        self._formula = WeightNorm(view, eps=eps)
        self._pairs: dict[Tensor, _Pair] = {}
        self.__setstate__({})
        if not any(True for _ in self._normalized()):
            raise ValueError("the optimizer has no weight of two dimensions or more to normalize")

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # shared, not a copy
        """The wrapped optimizer's."""
        return self.optimizer.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # shared
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # shared, not a copy
        """The wrapped optimizer's, by gain and direction."""
        return self.optimizer.state

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", "_formula", "_pairs")}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; its weights are normalized too.

        Args:
            param_group: as any optimizer's.
        """
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer does it.

        Args:
            set_to_none: rather than to zeros (default: True).
        """
        self.optimizer.zero_grad(set_to_none)

    def update_rule(self, group: dict[str, Any], p: Tensor | None = None) -> UpdateRule:
        """What a step does, for :func:`normwise.describe`: of W = g·V/‖V‖ itself it is not known.

        The wrapped optimizer's rule holds for weights that are stepped as they are.

        Args:
            group: of the wrapped optimizer.
            p: a weight of the group (default: any).
        """
        if p is not None and not self._is_normalized(p):
            return rule_of(self.optimizer, group, p)
        return unknown_rule(self, group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step gains and directions by the gradients of the weights.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss; called
                once, before the step.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for w in self._normalized():
            self._pair(w).take_gradient(w, self._formula)
        with self._stepping_pairs():
            self.optimizer.step()
        with torch.no_grad():
            for w in self._normalized():
                if w.grad is not None:
                    self._pair(w).write(w, self._formula)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, of gains and directions, and these under ``"weight_norm"``."""
        with self._stepping_pairs():
            state = self.optimizer.state_dict()
        pairs = [self._pair(w) for w in self._normalized()]
        state["weight_norm"] = [(p.gain.detach(), p.direction.detach()) for p in pairs]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, and write the weights.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another optimizer, or of other weights.
        """
        pairs = state_dict.get("weight_norm")
        weights = list(self._normalized())
        if pairs is None or [v.shape for _, v in pairs] != [w.shape for w in weights]:
            raise ValueError(
                "the state dict has no gains and directions of these weights; it must be of a "
                "WeightNormalized of the same model"
            )
        rest = {key: value for key, value in state_dict.items() if key != "weight_norm"}
        with self._stepping_pairs():
            self.optimizer.load_state_dict(rest)
        with torch.no_grad():
            for w, (gain, direction) in zip(weights, pairs, strict=True):
                pair = self._pair(w)
                pair.gain.copy_(gain)
                pair.direction.copy_(direction)
                pair.write(w, self._formula)

    def _normalized(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            for p in group["params"]:
                if self._is_normalized(p):
                    yield p

    def _is_normalized(self, p: Tensor) -> bool:
        if p in self._pairs:
            return True
        if p.ndim < 2 or p.numel() == 0 or p.is_complex():
            return False
        try:
            self._formula.view.check(p.shape)
        except ValueError:
            return False
        return True

    def _pair(self, w: Tensor) -> _Pair:
        pair = self._pairs.get(w)
        if pair is None:
            pair = self._pairs[w] = _Pair(w, self._formula)
        elif pair.version != w._version:
            pair.read(w, self._formula)
        return pair

    @contextmanager
    def _stepping_pairs(self) -> Iterator[None]:
        """Inside, the wrapped optimizer has gains and directions in place of the weights."""
        normalized = set(self._normalized())
        groups = self.optimizer.param_groups
        kept = [(group["params"], group.get("param_names")) for group in groups]
        for group in groups:
            params = []
            for p in group["params"]:
                params += [self._pair(p).gain, self._pair(p).direction] if p in normalized else [p]
            group["params"] = params
            group.pop("param_names", None)
        try:
            yield
        finally:
            # Loading a state dict makes new groups.
            for group, (params, names) in zip(self.optimizer.param_groups, kept, strict=True):
                group["params"] = params
                if names is not None:
                    group["param_names"] = names


class _Pair:
    """The gain and the direction of one weight, and the version of the weight that they made."""

    def __init__(self, w: Tensor, formula: WeightNorm) -> None:
        gain, direction = formula.right_inverse(w.detach())
        self.gain = nn.Parameter(gain.clone())
        self.direction = nn.Parameter(direction.clone())
        self.version = w._version

    def read(self, w: Tensor, formula: WeightNorm) -> None:
        """Start anew from a weight that was written."""
        gain, direction = formula.right_inverse(w.detach())
        with torch.no_grad():
            self.gain.copy_(gain)
            self.direction.copy_(direction)
        self.version = w._version

    def take_gradient(self, w: Tensor, formula: WeightNorm) -> None:
        """The gradients of gain and direction, of the weight's."""
        self.gain.grad = self.direction.grad = None
        if w.grad is not None:
            with torch.enable_grad():
                effective = formula(self.gain, self.direction)
            self.gain.grad, self.direction.grad = torch.autograd.grad(
                effective, (self.gain, self.direction), w.grad
            )

    def write(self, w: Tensor, formula: WeightNorm) -> None:
        """Put the weight to g·V/‖V‖."""
        w.copy_(formula(self.gain, self.direction))
        self.version = w._version
