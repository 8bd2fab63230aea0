"""Find scale-invariant weights, explain them, and make parameter groups of them."""

from normwise.invariance.analyze import analyze
from normwise.invariance.report import Report
from normwise.invariance.row import ParameterReport
from normwise.invariance.symmetry import Slices, Symmetry, Term

__all__ = ["ParameterReport", "Report", "Slices", "Symmetry", "Term", "analyze"]
