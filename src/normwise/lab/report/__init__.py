"""The report of a comparison: one HTML file that needs no network."""

from normwise.lab.report.page import render

__all__ = ["render"]
