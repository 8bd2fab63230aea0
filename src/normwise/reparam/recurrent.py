"""Let go of the effective weights that torch's recurrent layers keep between calls."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

__all__ = ["ReleaseFlatWeights"]


class ReleaseFlatWeights:
    """A forward hook of a recurrent layer with parametrized weights.

    ``nn.RNNBase`` keeps the list of weights of its last call. Computed ones hold the graph of that
    call in memory, and ``copy.deepcopy`` refuses them. Without their graph they are only a record
    that the weights have changed since, so that the next call gathers them anew.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        layer: Any = module  # to torch's types the weights are parameters, and none is missing
        kept: list[Tensor | None] = [
            w if w is None or w.is_leaf else w.detach() for w in layer._flat_weights
        ]
        layer._flat_weights = kept
        layer._flat_weight_refs = [None if w is None else weakref.ref(w) for w in kept]
