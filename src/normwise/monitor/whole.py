"""What is measured of whole weights, on schedules of its own: spectra, ranks, levels, moments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.geometry import View
from normwise.monitor.triggers import Trigger, every
from normwise.reparam import Oscillation, StatsQ
from normwise.theory import (
    condition_number,
    effective_rank,
    log_spread,
    mean_absolute_cosine,
    mean_cosine,
    stable_rank,
    utilized_ranks,
)

if TYPE_CHECKING:
    from normwise.invariance import Report

__all__ = [
    "SPECTRAL",
    "Imbalance",
    "L2Share",
    "OfEach",
    "OscillationRate",
    "UtilizedRank",
    "WeightQuantity",
    "acting_weight",
    "cosines",
    "spectral",
]

_PARAMETRIZED = "parametrizations."


class WeightQuantity(ABC):
    """One number for each whole weight, with a schedule of its own.

    Args:
        when: the steps after which it is measured (default: the first, and every 1000th).
    """

    name: str

    def __init__(self, when: Trigger | None = None) -> None:
        self.when = every(1000) if when is None else when

    @abstractmethod
    def __call__(self, model: nn.Module, names: Iterable[str]) -> Mapping[str, Tensor]:
        """The value of each parameter that it is of.

        Args:
            model: the model, between two steps; to be left as it is.
            names: of the parameters that are watched.

        Returns:
            Scalars on any device, by the names of parameters.
        """

    def after_step(self, model: nn.Module, names: Iterable[str]) -> None:  # noqa: B027  # few look after it
        """Look at every step, for what needs a memory (default: do nothing).

        Args:
            model: the model.
            names: of the parameters that are watched.
        """


def acting_weight(model: nn.Module, name: str) -> Tensor:
    """The weight that the forward pass uses: of a parametrized one what its parameter makes.

    Args:
        model: the model.
        name: of the parameter.
    """
    head, found, tail = name.rpartition(_PARAMETRIZED)
    if not found:
        return model.get_parameter(name)
    owner = model.get_submodule(head.removesuffix("."))
    weight: Tensor = getattr(owner, tail.partition(".")[0])
    return weight


class OfEach(WeightQuantity):
    """A function of each weight by itself, as the forward pass uses it.

    Args:
        name: what it is called.
        function: from a weight of two dimensions or more to a scalar.
        when: see :class:`WeightQuantity`.
    """

    def __init__(
        self, name: str, function: Callable[[Tensor], Tensor], when: Trigger | None = None
    ) -> None:
        super().__init__(when)
        self.name, self.function = name, function

    def __call__(self, model: nn.Module, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Its value for each weight of two dimensions or more."""
        weights = {name: acting_weight(model, name).detach() for name in names}
        return {name: self.function(w) for name, w in weights.items() if w.ndim > 1}


SPECTRAL: dict[str, Callable[[Tensor], Tensor]] = {
    "condition_number": condition_number,
    "log_spread": log_spread,
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
}
"""Functions of the singular values, by name; each takes one decomposition of a weight."""


def spectral(when: Trigger | None = None) -> tuple[OfEach, ...]:
    """κ, the spread of log σ, stable and effective rank.

    Args:
        when: see :class:`WeightQuantity`.

    Returns:
        A quantity for each.
    """
    return tuple(OfEach(name, function, when) for name, function in SPECTRAL.items())


def cosines(view: View | str = "channel", when: Trigger | None = None) -> tuple[OfEach, ...]:
    """How alike a weight's slices are: the mean cosine of all pairs, and the mean absolute one.

    Args:
        view: the slices, of every watched weight (default: ``"channel"``, the output channels).
        when: see :class:`WeightQuantity`.

    Returns:
        A quantity for each.
    """
    view = View.parse(view) if isinstance(view, str) else view
    return (
        OfEach("mean_cosine", lambda w: mean_cosine(w, view), when),
        OfEach("mean_absolute_cosine", lambda w: mean_absolute_cosine(w, view), when),
    )


class UtilizedRank(WeightQuantity):
    """Which share of a layer's rank the data use; see :func:`normwise.theory.utilization`.

    Args:
        batches: a few inputs of the model, which is run on them in evaluation mode each time.
        share: e_S and e_T (default: 0.99).
        when: see :class:`WeightQuantity`.
    """

    name = "utilized_rank"

    def __init__(
        self, batches: Iterable[Any], *, share: float = 0.99, when: Trigger | None = None
    ) -> None:
        super().__init__(when)
        self.batches, self.share = list(batches), share

    def __call__(self, model: nn.Module, names: Iterable[str]) -> Mapping[str, Tensor]:
        """The share for each weight of a linear layer or an ungrouped convolution."""
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            found = utilized_ranks(model, self.batches, inputs=self.share, outputs=self.share)
        finally:
            for module, training in modes:
                module.training = training
        return {
            name: torch.tensor(found[layer].share)
            for name in names
            if (layer := _module_of(name)) in found
        }


def _module_of(name: str) -> str:
    """The name of the module that a parameter belongs to, parametrized or not."""
    head, found, _ = name.rpartition(_PARAMETRIZED)
    return head.removesuffix(".") if found else name.rpartition(".")[0]


class OscillationRate(WeightQuantity):
    """How often entries of a quantized weight turn back to the level that they came from, mean.

    It looks at the levels after every step, which costs one pass over the quantized weights.

    Args:
        momentum: see :class:`normwise.reparam.Oscillation`.
        when: see :class:`WeightQuantity`.
    """

    name = "oscillation"

    def __init__(self, momentum: float = 0.01, when: Trigger | None = None) -> None:
        super().__init__(when)
        self._momentum = momentum
        self._of: dict[str, Oscillation] = {}
        self._rates: dict[str, Tensor] = {}

    def after_step(self, model: nn.Module, names: Iterable[str]) -> None:
        """Take the levels of every weight under :class:`normwise.reparam.StatsQ`.

        Args:
            model: the model.
            names: of the parameters that are watched.
        """
        for name in names:
            quantizer = _quantizer(model, name)
            if quantizer is not None:
                oscillation = self._of.setdefault(name, Oscillation(self._momentum))
                levels = quantizer.levels(model.get_parameter(name).detach())
                self._rates[name] = oscillation.update(levels).mean()

    def __call__(self, model: nn.Module, names: Iterable[str]) -> Mapping[str, Tensor]:
        """The rate so far of each quantized weight."""
        return dict(self._rates)


def _quantizer(model: nn.Module, name: str) -> StatsQ | None:
    head, found, tail = name.rpartition(_PARAMETRIZED)
    if not found or not tail.endswith("original"):
        return None
    stack = model.get_submodule(f"{head}{_PARAMETRIZED}{tail.partition('.')[0]}")
    first = next(iter(stack.children()), None)
    return first if isinstance(first, StatsQ) and first.groups == 1 else None


class L2Share(WeightQuantity):
    r"""What share of Adam's first moment is the decay's, under L2.

    The first moment of g + λw is the sum m = m_g + m_λ of two averages; the share is
    ⟨m_λ, m⟩/⟨m, m⟩, which with that of the gradient sums to 1: 1 where decay alone moves the
    weight, 0 without decay, negative where the gradient holds against it. It keeps an average of λw
    of its own, which costs one pass over the weights a step.

    Args:
        optimizer: ``torch.optim.Adam`` or another with ``exp_avg``, ``betas`` and coupled decay.
        when: see :class:`WeightQuantity`.

    Source: ours; which of both moments the decay should enter is the question of arXiv 2012.13841.
    """

    name = "l2_share"

    def __init__(self, optimizer: Optimizer, when: Trigger | None = None) -> None:
        super().__init__(when)
        if "betas" not in optimizer.defaults:
            raise ValueError(f"{type(optimizer).__name__} has no betas; must be Adam or its kin")
        self._optimizer = optimizer
        self._decay: dict[Tensor, Tensor] = {}
        optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            coupled = not group.get("decoupled_weight_decay", False)
            for p in group["params"]:
                if p.grad is not None:
                    average = self._decay.setdefault(p, torch.zeros_like(p))
                    decay = group["weight_decay"] if coupled else 0.0
                    average.lerp_(decay * p, 1 - group["betas"][0])

    def __call__(self, model: nn.Module, names: Iterable[str]) -> Mapping[str, Tensor]:
        """The share for each weight that has a first moment."""
        found = {}
        for name in names:
            p = model.get_parameter(name)
            m = self._optimizer.state[p].get("exp_avg") if p in self._optimizer.state else None
            if m is not None and p in self._decay:
                found[name] = (self._decay[p] * m).sum() / m.square().sum()
        return found


class Imbalance(WeightQuantity):
    r"""How far units are from least mass: the mean of \|Σ a‖w‖²\|/Σ \|a\|‖w‖² over trades.

    For a ReLU unit that is (‖row‖² + bias² − ‖column‖²) over the sum of all three. Gradient flow
    without decay conserves the numerator, decay drives it to 0, and at least mass it is 0.

    Args:
        report: what :func:`normwise.analyze` found.
        when: see :class:`WeightQuantity`.
    """

    name = "imbalance"

    def __init__(self, report: Report, when: Trigger | None = None) -> None:
        super().__init__(when)
        self._trades = [s for s in report.symmetries if not s.is_scale]

    def __call__(self, model: nn.Module, names: Iterable[str]) -> Mapping[str, Tensor]:
        """The mean over the units of all trades that a weight takes part in."""
        of: dict[str, list[Tensor]] = {}
        for symmetry in self._trades:
            weighed = torch.stack(
                [
                    t.exponent * t.slices.sum(model.get_parameter(t.parameter).detach().square())
                    for t in symmetry.terms
                ]
            )
            total = weighed.abs().sum(0)
            share = weighed.sum(0).abs() / torch.where(total > 0, total, 1)
            for name in symmetry.parameters:
                of.setdefault(name, []).append(share)
        wanted = set(names)
        return {name: torch.cat(shares).mean() for name, shares in of.items() if name in wanted}
