"""Load checkpoints of plain networks and of torch's older weight norm into converted modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normwise.reparam.parametrizations import WeightNorm, WeightParametrization, originals, stacks

__all__ = ["LoadOtherFormats"]


@dataclass(frozen=True)
class LoadOtherFormats:
    """A ``load_state_dict`` pre-hook that rewrites the keys of other formats to ours.

    A plain ``weight``, as of timm's ``StdConv2d`` or of a network without normalized weights, and
    the ``weight_g`` and ``weight_v`` of ``torch.nn.utils.weight_norm``. The keys of torch's newer
    ``torch.nn.utils.parametrizations.weight_norm`` are those of :class:`WeightNorm`.

    Args:
        name: the parametrized tensor.
    """

    name: str

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stack = stacks(module)[self.name]
        parametrization = stack[0]
        assert isinstance(parametrization, WeightParametrization)
        ours = f"{prefix}parametrizations.{self.name}."
        plain, g, v = (f"{prefix}{self.name}{end}" for end in ("", "_g", "_v"))
        if plain in state_dict:
            self._store(parametrization, state_dict.pop(plain), state_dict, ours)
        elif g in state_dict and v in state_dict:
            gain, direction = state_dict.pop(g), state_dict.pop(v)
            if not (isinstance(parametrization, WeightNorm) and parametrization.gain):
                error_msgs.append(
                    f"{g} and {v} are of weight norm with a gain, but {prefix}{self.name} has "
                    f"{parametrization}"
                )
            elif gain.shape == originals(stack)[0].shape:
                state_dict[f"{ours}original0"] = gain
                state_dict[f"{ours}original1"] = direction
            else:
                # The norms were taken over other dimensions than ours, as torch does by default
                # for a transposed convolution; the effective weight is what both agree on.
                effective = torch_weight_norm(gain, direction)
                self._store(parametrization, effective, state_dict, ours)

    def _store(
        self,
        parametrization: WeightParametrization,
        effective: Tensor,
        state_dict: dict[str, Any],
        ours: str,
    ) -> None:
        inverse = parametrization.right_inverse(effective)
        if isinstance(inverse, Tensor):
            state_dict[f"{ours}original"] = inverse
        else:
            state_dict[f"{ours}original0"], state_dict[f"{ours}original1"] = inverse


def torch_weight_norm(gain: Tensor, direction: Tensor) -> Tensor:
    """The effective weight of torch's weight norm, whose gain has size 1 where it is normed."""
    dims = tuple(d for d in range(direction.ndim) if gain.ndim == 0 or gain.shape[d] == 1)
    length: Tensor = torch.linalg.vector_norm(direction, dim=dims, keepdim=True)
    return gain * direction / length
