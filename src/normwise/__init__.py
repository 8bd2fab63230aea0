"""See and control the norms of neural-network weights."""

from normwise import balancing, decay, init, reparam, theory
from normwise.balancing import Balance, balance, equalize
from normwise.decay import EpsilonShiftedL2
from normwise.geometry import View
from normwise.invariance import ParameterReport, Report, Symmetry, Term, analyze
from normwise.monitor import Monitor
from normwise.optim import SGDP, SGDW, AdamP, LearnedNorm, RadialBrake, sphere, tangential
from normwise.optim.by_role import groups
from normwise.perturb import AWP, RWP
from normwise.reparam import (
    add_gains,
    center_weight_normalize,
    fold,
    weight_normalize,
    weight_standardize,
)
from normwise.updates import UpdateRule, describe

__version__ = "0.2.0.dev0"

__all__ = [
    "AWP",
    "RWP",
    "SGDP",
    "SGDW",
    "AdamP",
    "Balance",
    "EpsilonShiftedL2",
    "LearnedNorm",
    "Monitor",
    "ParameterReport",
    "RadialBrake",
    "Report",
    "Symmetry",
    "Term",
    "UpdateRule",
    "View",
    "__version__",
    "add_gains",
    "analyze",
    "balance",
    "balancing",
    "center_weight_normalize",
    "decay",
    "describe",
    "equalize",
    "fold",
    "groups",
    "init",
    "reparam",
    "sphere",
    "tangential",
    "theory",
    "weight_normalize",
    "weight_standardize",
]
