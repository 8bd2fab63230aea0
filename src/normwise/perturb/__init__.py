"""Steps that are taken at perturbed weights, around any optimizer."""

from normwise.perturb.adversarial import AWP
from normwise.perturb.perturbation import Perturbation, buffers_kept
from normwise.perturb.robust import RWP

__all__ = ["AWP", "RWP", "Perturbation", "buffers_kept"]
