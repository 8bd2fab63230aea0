"""The cells of the first learning-rate transfer runs as results of the recipe ``lr-transfer``.

They were trained by benchmarks/transfer.py of commit 96d528c, which the recipe repeats and which
wrote a JSON line a cell: method, width, depth, learning rate, seed, steps, loss (null where it was
not finite). What this writes is as ``normwise report RUNS --out FILE.json`` writes it::

    python tools/lr_transfer.py sphere_transfer.jsonl docs/results/lr-transfer.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from normwise.lab.recipes import Recipe, find
from normwise.lab.recipes.grids import Point
from normwise.lab.running.export import as_json
from normwise.lab.running.results import Entry, ResultTable
from normwise.lab.tasks.kinds import kind

METHODS = {
    "AdamW": "adamw",
    "sphere(AdamW)": "sphere-adamw",
    "Muon": "muon",
    "sphere(Muon)": "sphere-muon",
    "AdamW, decay by schedule": "adamw-schedule",
    "sphere(AdamW), gains": "sphere-gains",
    "sphere(AdamW), free ones only": "sphere-free",
    "AdamW, no decay": "adamw-no-decay",
}
STEPS = 200


def tables(lines: list[str]) -> list[ResultTable]:
    """A table for each network, a row of the recipe."""
    recipe = find("lr-transfer")
    losses: dict[tuple[str, str, Point], dict[int, float | None]] = {}
    for cell in map(json.loads, lines):
        if cell["steps"] == STEPS:
            row = f"depth-{cell['depth']}-width-{cell['width']}"
            place = (row, METHODS[cell["method"]], (("lr", cell["lr"]),))
            losses.setdefault(place, {})[cell["seed"]] = cell["loss"]
    (metric,) = kind(recipe.task).metrics
    order = list(METHODS.values())
    made = []
    for row in recipe.scales["small"].rows:
        own = sorted(
            (order.index(method), point, found)
            for (place, method, point), found in losses.items()
            if place == row
        )
        entries = tuple(_entry(recipe, order[k], point, found) for k, point, found in own)
        if entries:
            made.append(ResultTable(recipe, "small", row, metric, entries, ()))
    return made


def _entry(recipe: Recipe, method: str, point: Point, found: dict[int, float | None]) -> Entry:
    seeds = sorted(found)
    return Entry(
        method=method,
        label=recipe.methods[method].label,
        values={seed: loss for seed in seeds if (loss := found[seed]) is not None},
        failed=tuple(seed for seed in seeds if found[seed] is None),
        unfinished=(),
        paper=None,
        compared_with=None,
        difference=None,
        half_width=None,
        sd_of_differences=None,
        claimed=None,
        baseline=None,
        point=point,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    made = tables(arguments.cells.read_text(encoding="utf-8").splitlines())
    arguments.out.write_text(as_json(made), encoding="utf-8")


if __name__ == "__main__":
    main()
