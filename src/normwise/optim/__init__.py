"""Optimizers that keep the norm of scale-invariant weights from growing."""

from normwise.optim.adamp import AdamP
from normwise.optim.sgdp import SGDP
from normwise.optim.sgdw import SGDW
from normwise.optim.sphere import LearnedNorm, RadialBrake, sphere
from normwise.optim.tangential import tangential

__all__ = ["SGDP", "SGDW", "AdamP", "LearnedNorm", "RadialBrake", "sphere", "tangential"]
