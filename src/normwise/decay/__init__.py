"""Weight decay as a policy: regularizers that attach to any optimizer."""

from normwise.decay.epsilon_shifted import AttachedRegularizer, EpsilonShiftedL2

__all__ = ["AttachedRegularizer", "EpsilonShiftedL2"]
