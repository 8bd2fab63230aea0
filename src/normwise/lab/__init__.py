"""The lab: optimizers side by side, on the papers' problems and on your own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normwise.lab.contest import compare
    from normwise.lab.tasks.lightning import lightning
    from normwise.lab.tasks.problem import Metric
    from normwise.lab.tasks.supervised import Measure, supervised

__all__ = ["Measure", "Metric", "compare", "lightning", "supervised"]

# They need the packages of the lab's extra, which the command line names where they are missing.
_PLACES = {
    "compare": "normwise.lab.contest",
    "supervised": "normwise.lab.tasks.supervised",
    "Measure": "normwise.lab.tasks.supervised",
    "Metric": "normwise.lab.tasks.problem",
    "lightning": "normwise.lab.tasks.lightning",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from normwise.lab.errors import require_lab

    require_lab()
    return getattr(import_module(_PLACES[name]), name)
