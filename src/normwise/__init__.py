"""See and control the norms of neural-network weights."""

from normwise import balancing, decay, theory
from normwise.balancing import Balance, balance, equalize
from normwise.decay import EpsilonShiftedL2
from normwise.geometry import View
from normwise.invariance import ParameterReport, Report, Symmetry, Term, analyze
from normwise.monitor import Monitor
from normwise.optim import SGDP, SGDW, AdamP, tangential
from normwise.reparam import center_weight_normalize, fold, weight_normalize, weight_standardize

__version__ = "0.1.0"

__all__ = [
    "SGDP",
    "SGDW",
    "AdamP",
    "Balance",
    "EpsilonShiftedL2",
    "Monitor",
    "ParameterReport",
    "Report",
    "Symmetry",
    "Term",
    "View",
    "__version__",
    "analyze",
    "balance",
    "balancing",
    "center_weight_normalize",
    "decay",
    "equalize",
    "fold",
    "tangential",
    "theory",
    "weight_normalize",
    "weight_standardize",
]
