"""Classification, judged by how near norms and angles come to the equilibrium that is predicted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.geometry import View, norms
from normwise.lab.checks import within
from normwise.lab.errors import UsageError
from normwise.lab.tasks.classification import Classification, ClassificationOptions
from normwise.lab.tasks.problem import Evaluation, Metric
from normwise.monitor import Measurement, Monitor
from normwise.theory import equilibrium_of, time_to_equilibrium
from normwise.updates import rule_of

__all__ = ["Settling", "SettlingOptions"]

NEAR = 0.1
METRICS = (
    Metric("angle_near", "layers whose angle is within 10% of the prediction", "%", 100.0, True, 0),
    Metric("norm_near", "layers whose norm is within 10% of the prediction", "%", 100.0, True, 0),
    Metric("angle_low", "lowest ratio of measured to predicted angle"),
    Metric("angle_high", "highest ratio of measured to predicted angle", "", 1.0, False),
    Metric("norm_low", "lowest ratio of measured to predicted norm"),
    Metric("norm_high", "highest ratio of measured to predicted norm", "", 1.0, False),
    Metric("settled", "layers that had time to settle, by the prediction", "%", 100.0, True, 0),
    Metric("accuracy", "test accuracy", "%", 100.0),
)


@dataclass(frozen=True)
class SettlingOptions(ClassificationOptions):
    """What a recipe may set, beside the settings of classification.

    Args:
        settle: steps after which norms and angles are measured (default: 2000).
    """

    settle: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "settle", 1)


class _Sums(NamedTuple):
    """Of the slices of a weight, sums over the measured steps; one more row each in a buffer."""

    norm_fourth: Tensor
    norm_square: Tensor
    angle_square: Tensor
    gradient_square: Tensor


class _WithSums(nn.Module):
    """A network, and what has been measured of it, which a checkpoint then holds too."""

    count: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


class _Ratios(NamedTuple):
    """Measured over predicted of a layer, and the steps in which it settles, by the prediction."""

    norm: float
    angle: float
    steps: float


class Settling(Classification):
    """Cross-entropy at a constant learning rate; norms and angles against their closed forms.

    Means are taken over the measured steps after ``settle``: of ‖w‖⁴ or ‖w‖², as the prediction is
    of, of θ², and of ‖g̃‖², from which SGD's norm is predicted. Gates are taken to hold, since what
    is watched is scale-invariant.
    """

    divisible = False
    measured: ClassVar[int] = 400
    options: SettlingOptions
    model: _WithSums

    def __init__(self, options: SettlingOptions, root: Path, device: torch.device) -> None:
        super().__init__(options, root, device)
        self.model = _WithSums(self.model).to(device)
        self.optimizer: Optimizer | None = None
        self.views: dict[str, View] = {}
        self.start: dict[str, float] = {}

    def attend(self, optimizer: Optimizer, monitor: Monitor, views: Mapping[str, View]) -> None:
        """Have all that is measured after ``settle`` summed in buffers of the model."""
        self.optimizer, self.views = optimizer, dict(views)
        for name, view in views.items():
            found = norms(self.model.get_parameter(name).detach(), view).double().flatten()
            self.start[name] = float(found.log().mean().exp())
            rows = torch.zeros(len(_Sums._fields), len(found), dtype=torch.float64)
            self.model.register_buffer(_buffer(name), rows)
        monitor.writers.append(self._add)

    def _add(self, measured: Measurement) -> None:
        if measured.step <= self.options.settle:
            return
        self.model.count += 1
        for name in self.views:
            norm, angle, gradient = (
                measured.of_slices(quantity, name).double()
                for quantity in ("norm", "angular_update", "scaled_gradient")
            )
            sums = _Sums(norm**4, norm**2, angle**2, gradient**2)
            self.model.get_buffer(_buffer(name)).add_(torch.stack(sums))

    def evaluate(self) -> Evaluation:
        """Accuracy; and, once there are measurements, how near each layer is to the prediction."""
        evaluation = super().evaluate()
        if int(self.model.count) == 0:
            return evaluation
        try:
            layers = {name: self._ratios(name) for name in self.views}
        except ValueError as error:  # beyond where there is one
            raise UsageError(str(error)) from None
        self.facts["layers"] = {name: dict(r._asdict()) for name, r in layers.items()}
        found = {"settled": _share(r.steps <= self.options.settle for r in layers.values())}
        for what in ("angle", "norm"):
            ratios = [float(getattr(r, what)) for r in layers.values()]
            found |= {
                f"{what}_near": _share(abs(ratio - 1) <= NEAR for ratio in ratios),
                f"{what}_low": min(ratios),
                f"{what}_high": max(ratios),
            }
        return Evaluation({**found, **evaluation.metrics}, evaluation.wrong)

    def _ratios(self, name: str) -> _Ratios:
        optimizer = self.optimizer
        assert optimizer is not None  # attend comes first
        p = self.model.get_parameter(name)
        group = next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))
        rule = rule_of(optimizer, group, p).converted(float).with_gate(True)
        means = _Sums(*(self.model.get_buffer(_buffer(name)) / self.model.count).cpu())
        predicted = [
            equilibrium_of(rule, gradient_square=float(g), entries=p.numel() // len(means[0]))
            for g in means.gradient_square
        ]
        if not all(0 < e.norm < math.inf and e.angle > 0 for e in predicted):
            raise UsageError(f"no equilibrium is known of {rule.name} with this decay")
        gradient = rule.update.exponent == 2
        norm = means.norm_fourth**0.25 if gradient else means.norm_square**0.5
        expected = torch.tensor([e.norm for e in predicted], dtype=torch.float64).log()
        angle = float(means.angle_square.mean().sqrt()) / predicted[0].angle
        start = self.start[name] / float(expected.mean().exp())
        steps = time_to_equilibrium(rule, start)
        return _Ratios(float((norm.log() - expected).mean().exp()), angle, steps)


def _buffer(name: str) -> str:
    return "sums_" + name.replace(".", "_")


def _share(true: Iterable[bool]) -> float:
    held = list(true)
    return sum(held) / len(held)
