"""See and control the norms of neural-network weights."""

from normwise.geometry import View
from normwise.optim import SGDP, AdamP

__version__ = "0.1.0"

__all__ = ["SGDP", "AdamP", "View", "__version__"]
