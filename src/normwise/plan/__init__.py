"""How long weights remember, and η and λ for another batch, horizon or width."""

from normwise.plan.timescales import Timescale, Timescales, timescale, timescales
from normwise.plan.transfer import TRANSFERS, Run, Transfer, carry

__all__ = [
    "TRANSFERS",
    "Run",
    "Timescale",
    "Timescales",
    "Transfer",
    "carry",
    "timescale",
    "timescales",
]
