"""For TRL's trainers, which are transformers' ``Trainer`` with losses of their own.

Importing this module needs transformers; TRL is what its trainers come from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.integrations.transformers import MonitorCallback, OptimizerFactory
from normwise.invariance import Report, analyze

__all__ = ["MonitorCallback", "set_optimizer", "tokens_for"]


def set_optimizer(
    trainer: Any,
    make: Callable[[nn.Module, Report], Optimizer],
    *,
    batch: Any = None,
    report: Report | None = None,
) -> None:
    """Let a trainer that has been made train with an optimizer of or with normwise.

    Not all of TRL's trainers take ``optimizer_cls_and_kwargs`` (those for DPO, GRPO, KTO and RLOO
    do not), and all of them change the model that they are given, adding adapters for one. So this
    comes after a trainer is made and before it trains; the model is analyzed here, with the
    forwards of its classes, over which TRL puts its own.

    Args:
        trainer: any of TRL's, or another ``Trainer`` of transformers.
        make: makes the optimizer from the model and its report, as for :class:`OptimizerFactory`.
        batch: what :func:`normwise.analyze` is to run the model on (default: :func:`tokens_for` the
            model; its roles do not depend on what is said).
        report: of this network, from an earlier analysis, instead of ``batch``.

    Raises:
        ValueError: if the trainer has an optimizer already, or the model no vocabulary; as
            :func:`normwise.analyze`.
    """
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            f"this {type(trainer).__name__} has an optimizer already; leave out optimizers= and "
            "optimizer_cls_and_kwargs="
        )
    if report is None:
        with _own_forwards(trainer.model):
            report = analyze(trainer.model, tokens_for(trainer.model) if batch is None else batch)
    trainer.optimizer_cls_and_kwargs = (OptimizerFactory, {"make": make, "report": report})


@contextlib.contextmanager
def _own_forwards(model: nn.Module) -> Iterator[None]:
    """Inside, modules have the forwards of their classes.

    TRL puts others over them, which hold on to the model: a copy's would run the original.
    """
    put_over = [(m, m.__dict__.pop("forward")) for m in model.modules() if "forward" in m.__dict__]
    try:
        yield
    finally:
        for module, forward in put_over:
            module.forward = forward


def tokens_for(model: nn.Module, *, rows: int = 2, length: int = 16) -> dict[str, Tensor]:
    """A batch of random tokens for a language model that reads ``input_ids`` alone.

    It does not touch torch's random numbers.

    Args:
        model: of transformers, or a wrapper that has its ``config``.
        rows: of the batch (default: 2).
        length: of each row in tokens (default: 16).

    Raises:
        ValueError: if its configuration says nothing of a vocabulary.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if size is None:
        raise ValueError(f"{type(model).__name__} has no config.vocab_size; give batch= or report=")
    tokens = torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens.to(next(model.parameters()).device)}
