"""The loss-stabilization probe: what a run would reach at a small learning rate from here on."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normwise.perturb.perturbation import buffers_kept

__all__ = ["Stabilization", "loss_stabilization"]


@dataclass(frozen=True)
class Stabilization:
    """What :func:`loss_stabilization` found.

    Attributes:
        running: the loss of the network as it is.
        settled: the loss of the copy at the end.
        model: the copy, for further measures, such as curvature.
    """

    running: float
    settled: float
    model: nn.Module

    @property
    def gap(self) -> float:
        """How much of the running loss is the noise of its learning rate."""
        return self.running - self.settled


def loss_stabilization(
    model: nn.Module,
    loss: Callable[[nn.Module, object], Tensor],
    batches: Iterable[object],
    evaluate: Callable[[nn.Module], float],
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
) -> Stabilization:
    """Train a copy on at a small learning rate without decay, and compare its loss with the run's.

    With a large learning rate and decay a run's loss stays above what the place where it is would
    allow: noise holds it there. The copy shows the loss below. The original is not touched, bit for
    bit: parameters, gradients, buffers, modes, and the state of the random number generators; its
    optimizer is not used.

    Args:
        model: the network in training.
        loss: of a model and a batch.
        batches: the copy's batches, one step of SGD each; the paper takes 100 epochs.
        evaluate: the loss of a model, in its training mode, on what it is judged by; any mode that
            it switches is of the copies alone.
        lr: the copy's learning rate (default: 1e-3, of the paper's figure 3).
        momentum: its momentum, best that of the run (default: 0, as in the paper).

    Returns:
        Both losses, and the copy.

    Raises:
        ValueError: for no batches.

    Source: arXiv 2310.04415, figures 2 and 3.
    """
    with _random_state_kept():
        probe = copy.deepcopy(model)
        for p in probe.parameters():
            p.grad = None
        with torch.no_grad(), _buffers_and_modes_kept(probe):
            running = float(evaluate(probe))
        optimizer = torch.optim.SGD(
            [p for p in probe.parameters() if p.requires_grad], lr=lr, momentum=momentum
        )
        steps = 0
        with torch.enable_grad():
            for batch in batches:
                optimizer.zero_grad()
                torch.autograd.backward(loss(probe, batch))
                optimizer.step()
                steps += 1
        if not steps:
            raise ValueError("loss_stabilization got no batches; give one or more")
        optimizer.zero_grad()
        with torch.no_grad(), _buffers_and_modes_kept(probe):
            settled = float(evaluate(probe))
    return Stabilization(running, settled, probe)


@contextmanager
def _buffers_and_modes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, a model may be run and switched; its buffers and modes are then as they were."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with buffers_kept(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """On leaving, the generators of torch, Python and NumPy are as they were."""
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    array_state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(array_state)
