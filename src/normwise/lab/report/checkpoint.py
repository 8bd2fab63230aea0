"""The page on a checkpoint."""

from __future__ import annotations

from normwise.checkpoint import CheckpointReport
from normwise.lab.report.pages import page

__all__ = ["checkpoint_page"]


def checkpoint_page(report: CheckpointReport) -> str:
    """One HTML document that loads nothing.

    Args:
        report: of :func:`normwise.checkpoint.examine`.
    """
    findings = report.findings()
    entries = sum(t.entries for t in report.tensors)
    return page(
        "checkpoint.html",
        brand="normwise checkpoint",
        title=report.source,
        page_title=report.source,
        subtitle=f"{len(report.tensors)} tensors, {entries:,} entries",
        notices=(),
        findings=findings,
        chart=report.chart(),
        numbers=report.table(),
    )
