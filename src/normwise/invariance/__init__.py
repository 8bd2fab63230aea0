"""Find scale-invariant weights, explain them, and make parameter groups of them."""

from normwise.invariance.analyze import analyze
from normwise.invariance.report import JointSet, ParameterReport, Report

__all__ = ["JointSet", "ParameterReport", "Report", "analyze"]
