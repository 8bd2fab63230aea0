"""What the norms, angles and effective learning rates of a run will be, before it is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normwise.figures.tables import paragraph
from normwise.plan.forecast import PlanRow, forecast, trajectory
from normwise.plan.printing import notes_of, table_of
from normwise.plan.settings import Settings, Weights

__all__ = ["Plan", "finite", "plan"]


@dataclass(frozen=True)
class Plan:
    """What to expect of a run. ``str(plan)`` is a table and what follows from it.

    Args:
        settings: how the run will be trained.
        rows: what to expect of each weight.
        notes: what follows, in sentences.
    """

    settings: Settings
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([str(table_of(self.settings, self.rows)), "", *map(paragraph, self.notes)])

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON data: numbers that are not finite become null."""
        content: Any = {
            "settings": {**asdict(self.settings), "dtype": str(self.settings.dtype)[6:]},
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
        }
        return dict(finite(content))

    def plot(self, path: str | Path) -> None:
        """Draw the norms and the angles over the run.

        Args:
            path: of the picture; its ending is the format.

        Raises:
            ImportError: without matplotlib.
            ValueError: where no closed form of the norms is known.
        """
        from normwise.figures import save
        from normwise.plan.drawing import figure

        save(figure(self.settings, self.rows), path)

    def trajectory(self, weights: Weights) -> tuple[list[float], list[float]]:
        """The expected norm and RMS angle of one weight before each step.

        Empty where no closed form of the norm is known, as for Lion.

        Args:
            weights: which.
        """
        return trajectory(self.settings, weights)


def plan(settings: Settings, weights: Sequence[Weights]) -> Plan:
    """Predict norms, angles and effective learning rates, by :mod:`normwise.theory.equilibrium`.

    Args:
        settings: how the run will be trained.
        weights: what will be trained: scale-invariant weights alone.

    Returns:
        The plan; ``print`` it.

    Raises:
        ValueError: for settings out of range, or beyond where the closed forms hold; if there is
            no weight to plan for.
    """
    s = settings
    takes = [w for w in weights if s.optimizer != "muon" or len(w.shape) in (0, 2)]
    if not takes:
        raise ValueError(f"there is no weight to plan for that {s.optimizer} can train")
    rows = tuple(forecast(s, w) for w in takes)
    notes = notes_of(s, rows)
    if left := [w.name for w in weights if w not in takes]:
        notes.append(f"Muon takes matrices only, and not {', '.join(left)}.")
    return Plan(s, rows, tuple(notes))


def finite(content: Any) -> Any:
    """JSON data with null for numbers that are not finite.

    Args:
        content: dictionaries, lists and tuples of values.
    """
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
