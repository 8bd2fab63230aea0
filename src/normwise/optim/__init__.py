"""Optimizers that keep the norm of scale-invariant weights from growing."""

from normwise.optim.adamp import AdamP
from normwise.optim.sgdp import SGDP

__all__ = ["SGDP", "AdamP"]
