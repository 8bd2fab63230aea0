"""See and control the norms of neural-network weights."""

from normwise.geometry import View
from normwise.optim import SGDP, SGDW, AdamP, tangential

__version__ = "0.1.0"

__all__ = ["SGDP", "SGDW", "AdamP", "View", "__version__", "tangential"]
