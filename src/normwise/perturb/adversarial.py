"""Adversarial weight perturbation (arXiv 2004.05884, "[AWP]")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from normwise.geometry import View
from normwise.perturb.perturbation import Perturbation
from normwise.perturb.sizes import sized_as
from normwise.protocols import Views

__all__ = ["AWP"]


class AWP(Perturbation):
    r"""Take each step at weights that are perturbed against the loss ([AWP]), with any optimizer.

    With g the gradient of the loss at w, a weight is perturbed to w + γv,

    .. math::
        v = \|w\| \, \frac{g}{\|g\|},

    the optimizer takes its step there, its weight decay included, and γv is taken back. Two forms::

        awp = nw.AWP(model, optimizer, gamma=0.01)
        with awp.perturbed(lambda: criterion(model(x), y)):      # a context
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

        loss = awp.step(closure)          # or a closure that returns the loss after its backward

    Norms are those of the whole tensor, as published, or of the slices that ``views`` says. A
    scale-invariant slice has v ⟂ w, so it turns by arctan γ and its norm grows by √(1 + γ²): γ is
    an angle. In the view of its invariance the perturbation is equivariant to the scale of every
    slice, per tensor only to one scale of them all.

    The function may multiply the loss by any number, such as a gradient scaler's scale: v stays.
    Under ``DistributedDataParallel`` and FSDP2 the backward pass averages g over ranks; norms of
    slices that are split over ranks take one exchange. The cost is one more
    forward and backward pass, and two copies of the weights during a step.

    Args:
        model: the model. Biases and other parameters of fewer than two dimensions are not
            perturbed, nor are gains of weight normalization.
        optimizer: any optimizer of its parameters; weights that it does not have stay.
        gamma: γ (default: 0.01; [AWP] takes 0.005 with TRADES).
        views: a :class:`normwise.View` or its spelling for all weights (default: the whole tensor);
            or a mapping from parameters or names to views, or a report of
            :func:`normwise.analyze`, where a weight that it does not have keeps the whole tensor.

    Raises:
        ValueError: for ``gamma`` that is negative or not finite, a view that does not fit, a name
            that the model does not have, or no weight to perturb.

    Source: arXiv 2004.05884; the steps are those of its code, whose proxy model cancels.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        gamma: float = 0.01,
        views: Views = View.layer(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(model, optimizer, gamma, views)

    def step(self, closure: Callable[[], Any], ascent: Callable[[], Tensor] | None = None) -> Any:
        """One step of the optimizer, at the perturbed weights.

        Args:
            closure: clears gradients, runs the model, calls ``backward`` and returns the loss. It
                runs at w, where what it computes is the ascent, and again at w + γv.
            ascent: another loss to ascend, such as one that leaves a term out (default: that of
                ``closure``); called once, without a backward of its own.

        Returns:
            What ``closure`` returned at w + γv.
        """
        if ascent is None:
            return self._stepped(closure, closure)
        return self._stepped(closure, lambda: self._backward(ascent))

    def _ascent(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the loss that AWP ascends is {shown}; must be one number that depends on the "
                "weights, without a backward pass of its own"
            )
        return value

    def _ascended(self, before: Sequence[Tensor], ascend: Callable[[], Any]) -> list[Tensor]:
        return sized_as(before, self._gradients(ascend), list(self._weights.values()))
