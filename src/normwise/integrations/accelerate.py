"""With Hugging Face's accelerate, which wraps optimizers of its own around others."""

from __future__ import annotations

from torch.optim import Optimizer

__all__ = ["unwrapped"]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that ``accelerator.prepare`` has wrapped: the one whose hooks are called.

    A :class:`normwise.Monitor`, a policy of decay and all else that attaches to an optimizer
    belongs on this one.

    Args:
        optimizer: prepared, or not yet.
    """
    # By name, so that accelerate need not be imported where it is not used.
    while any(kind.__name__ == "AcceleratedOptimizer" for kind in type(optimizer).__mro__):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]  # a wrapper's
    return optimizer
