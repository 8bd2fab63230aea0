"""What a state dict is: ours, the official code's, or that of the torch optimizer of one state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor

from normwise.geometry import computing_dtype
from normwise.sharding import shard_like

# Options of torch's optimizers that a checkpoint may bring and ours do not have.
_FOREIGN = frozenset({"amsgrad", "fused", "decoupled_weight_decay"})


@dataclass(frozen=True)
class StateForm:
    """The state that an optimizer keeps of a parameter.

    Attributes:
        optimizer: its name, for messages.
        keys: the names of the tensors, in the order in which functional forms take them.
        aliases: names that other code bases give them.
        torch_decay_is_decoupled: whether ``weight_decay`` in a state dict of the torch optimizer of
            the same state is.
    """

    optimizer: str
    keys: tuple[str, ...]
    torch_decay_is_decoupled: bool
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def moments(self) -> tuple[str, ...]:
        """Those that are of their parameter's shape."""
        return tuple(key for key in self.keys if key != "step")

    def group(
        self, saved: Mapping[str, Any], current: Mapping[str, Any], options: Sequence[str]
    ) -> dict[str, Any]:
        """A saved group with our options, and those that it lacks as they are now.

        Raises:
            ValueError: for a run with ``amsgrad``.
        """
        if saved.get("amsgrad"):
            raise ValueError(f"{self.optimizer} cannot continue a run with amsgrad=True")
        ours = "delta" in saved or "variant" in saved
        decoupled = saved.get("decoupled_weight_decay", ours or self.torch_decay_is_decoupled)
        if saved.get("weight_decay") and not decoupled:
            warnings.warn(
                f"the loaded weight_decay of {saved['weight_decay']} was added to the gradient "
                f"(L2); {self.optimizer} will apply it decoupled",
                stacklevel=4,
            )
        kept = {key: value for key, value in saved.items() if key not in _FOREIGN}
        return {**{key: current[key] for key in options}, **kept}

    def state(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """One parameter's state under our names, without entries that hold nothing.

        Raises:
            ValueError: if it is not what the optimizer keeps.
        """
        renamed = {
            self.aliases.get(key, key): value for key, value in saved.items() if value is not None
        }
        if renamed and not renamed.keys() >= set(self.keys):
            raise ValueError(
                f"{self.optimizer} cannot continue this state dict: a parameter's state has "
                f"{sorted(renamed)}; must have {sorted(self.keys)}"
            )
        return renamed

    def place_(self, state: dict[str, Any], p: Tensor) -> None:
        """Check moments against their parameter, and shard them as it is.

        Raises:
            ValueError: if a moment is of another shape.
        """
        for key in self.moments:
            value = state.get(key)
            if value is not None and value.shape != p.shape:
                raise ValueError(
                    f"{self.optimizer} cannot continue this state dict: {key} of a "
                    f"parameter of shape {tuple(p.shape)} has shape {tuple(value.shape)}"
                )
        for key in self.moments:
            if state.get(key) is not None:
                state[key] = shard_like(state[key], p)

    def widened(self, state: Mapping[str, Any], p: Tensor) -> dict[str, Tensor]:
        """Moments in float32 or better, where torch would cast them to the parameter's dtype."""
        dtype = computing_dtype(p.dtype)
        if dtype == p.dtype:
            return {}
        return {key: state[key].to(p.device, dtype) for key in self.moments if key in state}


def params_of(groups: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """The parameters of groups, or in a state dict their numbers, in order."""
    return chain.from_iterable(group["params"] for group in groups)
