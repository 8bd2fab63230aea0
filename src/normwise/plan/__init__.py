"""What norms will do before training, how long weights remember, η and λ for another run."""

from normwise.plan.forecast import PlanRow
from normwise.plan.planning import Plan, plan
from normwise.plan.settings import OPTIMIZERS, Settings, Weights, weights_of
from normwise.plan.timescales import Timescale, Timescales, timescale, timescales
from normwise.plan.transfer import TRANSFERS, Run, Transfer, carry

__all__ = [
    "OPTIMIZERS",
    "TRANSFERS",
    "Plan",
    "PlanRow",
    "Run",
    "Settings",
    "Timescale",
    "Timescales",
    "Transfer",
    "Weights",
    "carry",
    "plan",
    "timescale",
    "timescales",
    "weights_of",
]
