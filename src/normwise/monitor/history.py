"""What a monitor has measured, as plain data to look at and to draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.monitor.measurement import Measurement
from normwise.updates import Update

__all__ = ["History"]


@dataclass(frozen=True)
class History:
    """The measurements of a run so far.

    Attributes:
        layers: the names of the weights that are watched.
        names: of what is known of a layer: the quantities, and the predictions.
        measurements: in the order of their steps.
        update: what sets the length of an update, and so which effective learning rate counts.
        knows_invariance: whether the weights are known to be scale-invariant, of which alone
            norms and angles can be expected.
    """

    layers: tuple[str, ...]
    names: tuple[str, ...]
    measurements: tuple[Measurement, ...]
    update: Update
    knows_invariance: bool = True

    def series(self, name: str) -> tuple[list[int], Tensor]:
        """The steps measured so far, and a quantity of each layer at them.

        Returns:
            The steps, and a tensor of shape ``(steps, layers)``, the layers as in :attr:`layers`.

        Raises:
            KeyError: for an unknown quantity.
        """
        if name not in self.names:
            raise KeyError(f"no quantity {name!r} is measured; there are {', '.join(self.names)}")
        row = self.names.index(name)
        steps = [m.step for m in self.measurements]
        values = [m.values[row] for m in self.measurements]
        return steps, torch.stack(values) if values else torch.empty(0, len(self.layers))
