"""Balance while training: after some steps, with the optimizer's state moved along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from normwise.balancing.apply import after_every, apply_, parameters_of
from normwise.balancing.sweep import CoordinateDescent
from normwise.checks import check_at_least_one, check_model, check_report
from normwise.invariance import Report

__all__ = ["Balance"]

# By which power of the weight's factor each state tensor of torch's optimizers, and of those that
# keep to their names, follows. A gradient is divided by the factor; so is whatever is linear in it.
_POWERS = {
    "exp_avg": -1,  # Adam and its kin
    "exp_avg_sq": -2,
    "max_exp_avg_sq": -2,
    "exp_inf": -1,  # Adamax
    "sum": -2,  # Adagrad
    "square_avg": -2,  # RMSprop, Adadelta
    "grad_avg": -1,
    "acc_delta": 2,  # Adadelta: squared steps, which are as long as the weight
    "prev": -1,  # Rprop
    "step_size": 1,
    "ax": 1,  # ASGD: an average of the weights
    "momentum_buffer": -1,  # SGD, Muon
    "step": 0,
    "mu_product": 0,  # NAdam: a number
}


class Balance:
    """Least mass kept while training: sweeps between steps, with momentum and moments moved along.

    The function never changes, so no forward does. What changes is the geometry in which the
    optimizer takes its next step. A gradient with respect to a weight multiplied by λ is divided
    by λ, so first moments are too, and second moments are divided by λ²: the state is then what it
    had been if all past gradients had been taken at the balanced weights.

    Args:
        model: its parameters are the optimizer's.
        report: what :func:`normwise.analyze` found for it.
        sweeps: how many at a time; one is exact where families share no weight, and is enough
            where it is repeated (default: 1).
        powers: for state tensors of other names, the power of the weight's factor by which each
            is multiplied, such as ``{"exp_avg_slow": -1}``; 0 leaves it (default: none).

    Raises:
        ValueError: for a report of another model.

    Source: ENorm (ICLR 2019), with the state of its linear layers moved too.
    """

    def __init__(
        self,
        model: nn.Module,
        report: Report,
        *,
        sweeps: int = 1,
        powers: Mapping[str, float] | None = None,
    ) -> None:
        check_model(model)
        check_report(report)
        check_at_least_one("sweeps", sweeps)
        self._params = parameters_of(model, report)
        self._families = [s for s in report.symmetries if not s.is_scale]
        self._sweeps = sweeps
        self._powers = dict(powers or {})

    def attach(self, optimizer: Optimizer, *, every: int = 1) -> RemovableHandle:
        """Balance after every so many steps of an optimizer.

        Args:
            optimizer: any whose state tensors are known, or given as ``powers``.
            every: steps from one time to the next (default: 1).

        Returns:
            A handle whose ``remove()`` detaches it.

        Raises:
            ValueError: if ``every`` is not positive, or if a weight that is trained and would be
                rescaled is not the optimizer's, so that its state would stay behind. A step raises
                it for a state tensor that is not known, before anything is changed.
        """
        stepped = {p for group in optimizer.param_groups for p in group["params"]}
        for name in dict.fromkeys(t.parameter for s in self._families for t in s.terms):
            if self._params[name].requires_grad and self._params[name] not in stepped:
                raise ValueError(
                    f"{name!r} would be rescaled, but {type(optimizer).__name__} does not step it, "
                    "so that another optimizer's state of it would stay behind: make one of all "
                    "with nw.groups, or freeze what is not trained"
                )
        return after_every(optimizer, every, self.apply_)

    def apply_(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Balance the weights and the state of an optimizer once.

        Args:
            optimizer: whose parameters are the model's.

        Returns:
            What each parameter was multiplied by, by name, as tensors that broadcast.

        Raises:
            ValueError: for a state tensor that is not known; nothing is changed then.
        """
        moves = [
            (p, name, value, power)
            for name, p in self._params.items()
            if p in optimizer.state
            for value, power in self._moved(name, p, optimizer.state[p])
        ]
        if not self._families:
            return {}
        descent = CoordinateDescent(self._families, self._params)
        for _ in range(self._sweeps):
            descent.run()
        factors = descent.factors()
        apply_(self._params, factors)
        for _, name, value, power in moves:
            if name in factors:
                apply_({name: value}, {name: factors[name] ** power})
        return factors

    def _moved(self, name: str, p: Tensor, state: Mapping[str, Any]) -> list[tuple[Tensor, float]]:
        """The tensors of a parameter's state that follow its factor, each with its power."""
        found = []
        for key, value in state.items():
            if not isinstance(value, Tensor) or (value.ndim == 0 and p.ndim > 0):
                continue
            power = self._power(key, state)
            if power is None or (power and value.shape != p.shape):
                raise ValueError(
                    f"how the optimizer's state {key!r} of {name!r}, of shape "
                    f"{tuple(value.shape)}, follows a rescaled weight is not known; give "
                    f"Balance(powers={{{key!r}: …}}), the power of the weight's factor, for a "
                    "tensor of the weight's shape"
                )
            if power:
                found.append((value, power))
        return found

    def _power(self, key: str, state: Mapping[str, Any]) -> float | None:
        if key in self._powers:
            return self._powers[key]
        # RMSprop's buffer holds gradients that were divided by their own size already.
        if key == "momentum_buffer" and "square_avg" in state:
            return 0
        return _POWERS.get(key)
