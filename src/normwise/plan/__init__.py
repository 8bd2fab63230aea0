"""What norms will do before training, how long weights remember, η and λ for another run."""

from normwise.plan.forecast import PlanRow
from normwise.plan.planning import Plan, plan
from normwise.plan.roles import RoleRow, Roles, optimizer_for, roles
from normwise.plan.rules import Change, RuleRow, Rules, rules
from normwise.plan.settings import OPTIMIZERS, Settings, Weights, weights_of
from normwise.plan.timescales import Timescale, Timescales, timescale, timescales
from normwise.plan.transfer import TRANSFERS, Run, Transfer, carry, carry_by, carry_by_each

__all__ = [
    "OPTIMIZERS",
    "TRANSFERS",
    "Change",
    "Plan",
    "PlanRow",
    "RoleRow",
    "Roles",
    "RuleRow",
    "Rules",
    "Run",
    "Settings",
    "Timescale",
    "Timescales",
    "Transfer",
    "Weights",
    "carry",
    "carry_by",
    "carry_by_each",
    "optimizer_for",
    "plan",
    "roles",
    "rules",
    "timescale",
    "timescales",
    "weights_of",
]
