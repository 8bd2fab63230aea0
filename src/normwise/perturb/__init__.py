"""Steps that are taken at perturbed weights, around any optimizer; copies that are trained on."""

from normwise.perturb.adversarial import AWP
from normwise.perturb.perturbation import Perturbation, buffers_kept
from normwise.perturb.robust import RWP
from normwise.perturb.stabilization import Stabilization, loss_stabilization

__all__ = ["AWP", "RWP", "Perturbation", "Stabilization", "buffers_kept", "loss_stabilization"]
