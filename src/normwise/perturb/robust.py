"""Robust weight perturbation (arXiv 2205.14826, "[RWP]")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from normwise.checks import check_at_least_one
from normwise.geometry import View, at_least_float32
from normwise.perturb.perturbation import Perturbation
from normwise.perturb.sizes import sized_as, sized_together
from normwise.protocols import Views

__all__ = ["RWP"]


class RWP(Perturbation):
    r"""AWP that ascends the small losses of a batch only, in several steps ([RWP]).

    With ℓᵢ the loss of sample i, K times

    .. math::
        D \leftarrow D + \nabla_w \tfrac1N \sum_i \ell_i(w + \gamma P)\, 1[\ell_i < c], \qquad
        P = \frac{\|w\|}{\|D\|} D,

    from D = 0, P = 0; then a step as :class:`AWP` takes it, at w + γP. Norms are those of all
    perturbed weights together, as published, so that the size is γ‖w‖ whatever c is, and layers
    with small gradients hardly move; or of slices, with ``views``. If no loss of the batch is below
    c, nothing is perturbed. The paper's learning rate of the ascent cancels::

        rwp = nw.RWP(model, optimizer, gamma=0.01, max_loss=1.7)
        with rwp.perturbed(lambda: F.cross_entropy(model(x), y, reduction="none")):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    Args:
        model: the model, see :class:`AWP`.
        optimizer: any optimizer of its parameters.
        gamma: γ (default: 0.01).
        max_loss: c, above 0 (default: 1.7, for CIFAR-10 and SVHN; [RWP] takes 4.0 on CIFAR-100).
        steps: K (default: 10).
        views: ``None``, one ratio for all weights (default); or as :class:`AWP` takes them.

    Raises:
        ValueError: as :class:`AWP`; for a negative ``max_loss``; for ``steps`` below 1.

    Source: arXiv 2205.14826; the accumulation of D and the one ratio are those of its code.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        gamma: float = 0.01,
        max_loss: float = 1.7,
        steps: int = 10,
        views: Views | None = None,
    ) -> None:
        given: Any = max_loss
        if not (isinstance(given, int | float) and given >= 0):
            raise ValueError(f"Invalid max_loss: {max_loss!r}; must be 0 or more")
        check_at_least_one("steps", steps)
        self.max_loss, self.steps, self._together = max_loss, steps, views is None
        super().__init__(model, optimizer, gamma, View.layer() if views is None else views)

    def step(self, closure: Callable[[], Any], losses: Callable[[], Tensor]) -> Any:
        """One step of the optimizer, at the perturbed weights.

        Args:
            closure: clears gradients, runs the model, calls ``backward`` and returns the loss. It
                runs at w + γP.
            losses: returns the loss of each sample, shape ``(samples,)``; called K times.

        Returns:
            What ``closure`` returned.
        """
        return self._stepped(closure, lambda: self._backward(losses))

    def _ascent(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.ndim != 1 or not value.requires_grad:
            shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the losses that RWP ascends are {shown}; must be one number a sample, shape "
                "(samples,): take reduction='none', and sum over classes where there are some"
            )
        return torch.where(value < self.max_loss, value, 0).mean()

    def _ascended(self, before: Sequence[Tensor], ascend: Callable[[], Any]) -> list[Tensor]:
        located = list(self._weights.values())
        sized = sized_together if self._together else sized_as
        directions = [torch.zeros_like(at_least_float32(w)) for w in before]
        steps: list[Tensor] = []
        for k in range(self.steps):
            if k:
                self._move(before, steps)
            torch._foreach_add_(directions, [at_least_float32(g) for g in self._gradients(ascend)])
            steps = sized(before, directions, located)
        return steps
