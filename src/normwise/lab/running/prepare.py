"""From a recipe's settings to a network with its weights normalized, and its optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import reduce
from operator import mul
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.decay import L2, DecayScheduler, Decoupled, EpsilonShiftedL2, Policy, Schedule, Window
from normwise.geometry import View
from normwise.invariance import Report
from normwise.lab.errors import UsageError
from normwise.lab.optimizers import parse
from normwise.lab.recipes.schema import Training
from normwise.optim import SGDP, AdamP
from normwise.reparam import CenteredWeightNorm, WeightNorm, WeightStandardization, reparametrize
from normwise.theory import sgd_without_decay

__all__ = [
    "decay_within_window",
    "decayed_lrs",
    "make_optimizer",
    "normalize_weights",
    "scale_invariant_weights",
]

_NORMALIZATION = {"WN": WeightNorm, "CWN": CenteredWeightNorm, "WS": WeightStandardization}
_POLICY: dict[str, Policy] = {
    "l2": L2(),
    "decoupled": Decoupled(),
    "schedule": Decoupled(per="schedule"),
}


def make_optimizer(
    model: nn.Module,
    training: Training,
    views: Mapping[Tensor, View] = MappingProxyType({}),
    report: Report | None = None,
) -> Optimizer:
    """The optimizer of a model that is normalized, and distributed.

    Args:
        model: whose parameters it trains.
        training: its settings.
        views: of the scale-invariant weights, which ``tangential`` and ``sphere`` act on (default:
            none).
        report: of the analysis that found these, for optimizers of matrices alone (default: none).
    """
    spared: set[nn.Parameter] = set()
    if training.decay_on == "no-depthwise":
        spared = {p for m in _depthwise(model) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            bias = name.rpartition(".")[2] == "bias"
            decays = {
                "no-biases": p.ndim > 1 or not bias,
                "invariant": p in views,
                "all": True,
            }.get(training.decay_on, p.ndim > 1 and p not in spared)
            (decayed if decays else others).append(p)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = parse(training.optimizer).make(
        lambda name, own: _optimizer(name, own, training),
        [group for group in groups if group["params"]],
        training.lr,
        views,
        report,
    )
    if training.epsilon_shift is not None:
        with warnings.catch_warnings():
            # ε above the weights' start is what a recipe may want to show.
            warnings.simplefilter("ignore", UserWarning)
            shifted = EpsilonShiftedL2(
                model, weight_decay=training.weight_decay, eps=training.epsilon_shift
            )
        shifted.attach(optimizer)
    if training.coupling == "translated":
        if not decayed:
            raise UsageError(
                "coupling translated needs scale-invariant weights, and there are none"
            )
        optimizer.param_groups[0]["weight_decay"] = 0.0
    elif training.coupling != "own" and training.weight_decay > 0:
        _POLICY[training.coupling].attach(optimizer)
    return optimizer


def decayed_lrs(training: Training, steps: int) -> list[float]:
    """The learning rate of the weights that decay, at each step.

    Raises:
        UsageError: if float32 cannot hold the run that it is translated to.
    """
    lrs = [training.lr * training.factor(step, steps) for step in range(steps)]
    if training.coupling != "translated":
        return lrs
    try:
        return list(sgd_without_decay(lrs, training.weight_decay, training.momentum).lrs)
    except ValueError as error:
        raise UsageError(f"coupling translated: {error}") from None


def _depthwise(model: nn.Module) -> list[nn.Conv2d]:
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return [m for m in convolutions if m.groups == m.in_channels > 1]


def normalize_weights(model: nn.Module, training: Training) -> None:
    """Normalize the weights as asked."""
    if training.normalization == "none":
        return
    depthwise = _depthwise(model)
    if training.normalize_depthwise and not depthwise:
        raise UsageError("normalize_depthwise is set, but the network has no depthwise convolution")

    def normalize(only: list[nn.Conv2d] | None) -> None:
        reparametrize(
            model,
            _NORMALIZATION[training.normalization],
            gain=training.gain,
            only=only,
            skip=training.normalization_skip,
            eps=training.normalization_eps,
        )

    try:
        normalize(None)
        if training.normalize_depthwise:
            normalize(depthwise)
    except ValueError as error:
        raise UsageError(f"normalization {training.normalization}: {error}") from None


def scale_invariant_weights(
    model: nn.Module, views: Iterable[str], factor: float, drawn: bool
) -> None:
    """Multiply the scale-invariant weights, which leaves what the network computes.

    Args:
        model: whose weights they are.
        views: the names of the scale-invariant parameters.
        factor: above 0.
        drawn: whether weights were drawn, and not taken from another training.

    Raises:
        UsageError: if none are, or if they come from another training.
    """
    names = list(views)
    if not names:
        raise UsageError(
            f"initial_scale {factor:g} needs scale-invariant weights, and there are none"
        )
    if not drawn:
        raise UsageError(
            f"initial_scale {factor:g} is not allowed where a method starts from another's weights"
        )
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).mul_(factor)


def decay_within_window(optimizer: Optimizer, training: Training, steps: int) -> None:
    """Let the decay follow the window and the schedules that were asked for, in ``steps`` steps.

    The schedule goes into the optimizer's state, and with it into the checkpoint.
    """
    if steps == 0:  # weights that are only tested
        return
    start, stop = (round(share * steps) for share in training.decay_window)
    factors: list[Schedule] = parse(training.optimizer).schedules(steps)
    if (start, stop) != (0, steps) and start < stop:
        factors.append(Window(start, stop))
    elif start == stop:
        raise UsageError(
            f"decay_window {list(training.decay_window)} is not allowed: none of the {steps} steps "
            "lies in it"
        )
    if not factors:
        return
    schedule = DecayScheduler(optimizer, reduce(mul, factors))

    def put(_: Optimizer, state: dict[str, Any]) -> None:
        state["decay"] = schedule.state_dict()

    def take(_: Optimizer, state: dict[str, Any]) -> None:
        schedule.load_state_dict(state["decay"])

    optimizer.register_step_post_hook(lambda *_: schedule.step())
    optimizer.register_state_dict_post_hook(put)
    optimizer.register_load_state_dict_pre_hook(take)


def _optimizer(name: str, groups: list[dict[str, Any]], t: Training) -> Optimizer:
    betas = (t.betas[0], t.betas[1])
    if name == "sgd":
        return torch.optim.SGD(groups, lr=t.lr, momentum=t.momentum, nesterov=t.nesterov)
    if name == "adam":
        return torch.optim.Adam(groups, lr=t.lr, betas=betas, eps=t.eps)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=t.lr, betas=betas, eps=t.eps)
    # Fused steps sum in another order, and are not everywhere: a cell gives the same bits without.
    shared: dict[str, Any] = {
        "lr": t.lr,
        "eps": t.eps,
        "delta": t.delta,
        "wd_ratio": t.wd_ratio,
        "nesterov": t.nesterov,
        "fused": False,
    }
    if name == "sgdp":
        return SGDP(groups, momentum=t.momentum, **shared)
    return AdamP(groups, betas=betas, **shared)
