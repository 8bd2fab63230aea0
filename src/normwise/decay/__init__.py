"""Weight decay as a policy: what decays, when, and on what, with any optimizer."""

from normwise.decay.epsilon_shifted import AttachedRegularizer, EpsilonShiftedL2
from normwise.decay.explanation import Explanation, GroupDecay, explain
from normwise.decay.groups import Groups, Rule, by_analysis, by_rules
from normwise.decay.policies import L2, AttachedPolicy, Cautious, Corrected, Decoupled, Policy
from normwise.decay.scheduler import DecayScheduler, WarmRestarts, normalized, warm_restarts
from normwise.decay.schedules import (
    Cosine,
    Linear,
    Piecewise,
    Restarts,
    Schedule,
    Window,
    early,
    late,
)

__all__ = [
    "L2",
    "AttachedPolicy",
    "AttachedRegularizer",
    "Cautious",
    "Corrected",
    "Cosine",
    "DecayScheduler",
    "Decoupled",
    "EpsilonShiftedL2",
    "Explanation",
    "GroupDecay",
    "Groups",
    "Linear",
    "Piecewise",
    "Policy",
    "Restarts",
    "Rule",
    "Schedule",
    "WarmRestarts",
    "Window",
    "by_analysis",
    "by_rules",
    "early",
    "explain",
    "late",
    "normalized",
    "warm_restarts",
]
