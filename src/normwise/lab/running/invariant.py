"""Which weights of a problem's network are scale-invariant, as :func:`normwise.analyze` finds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, nn

from normwise.geometry import View
from normwise.invariance import Report, analyze
from normwise.lab.tasks.problem import Problem

__all__ = ["Analyzed", "invariant_views"]

_EXAMPLES = 4
_Calls = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


class Analyzed(NamedTuple):
    """What is known of a network's weights.

    Attributes:
        views: of the scale-invariant weights that train, by the names of their parameters.
        not_analyzed: why there are none, where the network could not be analyzed.
        report: of the analysis, if there is one.
    """

    views: dict[str, View]
    not_analyzed: str | None
    report: Report | None


def invariant_views(problem: Problem, batch_size: int) -> Analyzed:
    """The views of the scale-invariant weights that train, by the names of their parameters.

    The network is analyzed on the inputs that its outermost modules get in the loss of four
    examples. The problem is left as it was.

    Args:
        problem: data and a network, which is whole on this process.
        batch_size: of the batch from which the examples are taken.
    """
    chosen = problem.batches(batch_size, Generator().manual_seed(0))[0][:_EXAMPLES]
    calls = _calls(problem, problem.batch(chosen, Generator().manual_seed(0)))

    def forward(model: nn.Module) -> list[Any]:
        return [
            model.get_submodule(path)(*args, **kwargs) for path, (args, kwargs) in calls.items()
        ]

    try:
        report = analyze(problem.model, forward, joint=False)
    except (ValueError, RuntimeError) as error:
        return Analyzed({}, str(error), None)
    trained = {name for name, p in problem.model.named_parameters() if p.requires_grad}
    views = {name: view for name, view in report.views().items() if name in trained}
    return Analyzed(views, None, report)


def _calls(problem: Problem, batch: Any) -> _Calls:
    """What the outermost modules are last called with while the loss is computed."""
    calls: _Calls = {}
    inside: list[str] = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not inside:
                calls[path] = (_detached(args), _detached(kwargs))
            inside.append(path)

        return hook

    def leave(*_: Any) -> None:
        inside.pop()

    model = problem.model
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    model.train()
    try:
        problem.loss(batch)
    finally:
        for handle in hooks:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return calls


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_detached, value))
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value
