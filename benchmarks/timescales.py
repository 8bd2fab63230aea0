"""What η and λ cost that rules carry over to another batch, horizon or width.

The character model of the recipe ``lr-transfer``, 32 wide and 2 deep, under AdamW. η and λ of the
blocks' matrices are swept together where they are chosen (300 steps of 4 × 64 characters), and
again at four times the batch (same characters, so a quarter of the steps), four times the horizon
and twice the width; what each rule of :data:`normwise.plan.TRANSFERS` makes of the best pair is run
as a cell of its own, so that nothing is interpolated::

    NORMWISE_DATA=... python benchmarks/timescales.py run results.jsonl
    python benchmarks/timescales.py report results.jsonl --picture picture.png

``run`` writes one JSON line a cell and skips those that the file has. Embedding, readout and gains
step by AdamW at 3e-3 without decay. Warm-up over a tenth of the steps, then linearly to zero.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from normwise.figures import Axis, Figure, Line, Lines, Spacing, nth_of, save
from normwise.lab.tasks.transfer import CONTEXT, LRTransfer, LRTransferOptions
from normwise.plan import TRANSFERS, Run, carry

DEPTH, BETAS, SEEDS = 2, (0.9, 0.95), 3
RATES = tuple(2.0**-k for k in range(8, 2, -1))
DECAYS = tuple(0.0125 * 4.0**k for k in range(5))
GRID = tuple(itertools.product(RATES, DECAYS))
MIDDLE = (2**-5.5, DECAYS[2])  # around which the base is swept first
REACH = 1.51  # of the sweep around that, the best, and what rules say, in steps of the grid
BATCH, STEPS, WIDTH = 4, 300, 32


@dataclass(frozen=True)
class Place:
    """Where η and λ are swept, the batch in windows of 64 characters."""

    batch: int = BATCH
    steps: int = STEPS
    width: int = WIDTH


@dataclass(frozen=True)
class Cell(Place):
    """One training run."""

    lr: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0


BASE = Place()
PLACES = {
    "base": BASE,
    "4 × batch": Place(batch=4 * BATCH, steps=STEPS // 4),
    "4 × horizon": Place(steps=4 * STEPS),
    "2 × width": Place(width=2 * WIDTH),
}


def train(cell: Cell, root: Path) -> dict[str, Any]:
    """Run a cell; the loss is None if it is not finite."""
    torch.manual_seed(cell.seed)
    options = LRTransferOptions(cell.width, DEPTH, cell.steps)
    problem = LRTransfer(options, root, torch.device("cpu"))
    matrices = list(problem.matrices.values())
    rest = [p for name, p in problem.model.named_parameters() if name not in problem.matrices]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "lr": cell.lr, "weight_decay": cell.weight_decay},
            {"params": rest, "lr": options.others_lr, "weight_decay": 0.0},
        ],
        betas=BETAS,
        fused=True,
    )
    warmup = max(1, cell.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (cell.steps - step) / (cell.steps - warmup)),
    )
    draw = torch.Generator().manual_seed(cell.seed)
    start = time.process_time()
    for _ in range(cell.steps):
        chosen = torch.randint(problem.examples, (cell.batch,), generator=draw)
        loss = problem.loss(problem.batch(chosen, draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if not math.isfinite(float(loss.detach())):
            break
    valid = problem.evaluate().metrics["loss"]
    return {
        **asdict(cell),
        "loss": valid if math.isfinite(valid) else None,
        "seconds": round(time.process_time() - start, 2),
        "torch": torch.__version__,
    }


Losses = dict[tuple[float, float], list[float]]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "not run"
    return f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})"


def losses(rows: list[dict[str, Any]], place: Place) -> Losses:
    """Losses by (η, λ), one a seed in their order, of pairs that all have; failed runs are inf."""
    found: Losses = {}
    for r in sorted(rows, key=lambda r: r["seed"]):
        if Place(r["batch"], r["steps"], r["width"]) == place:
            loss = math.inf if r["loss"] is None else r["loss"]
            found.setdefault((r["lr"], r["weight_decay"]), []).append(loss)
    return {pair: own for pair, own in found.items() if len(own) == SEEDS}


def best(found: Losses) -> tuple[float, float]:
    """η and λ of the least mean loss."""
    return min(found, key=lambda pair: statistics.mean(found[pair]))


def parameters(width: int) -> int:
    """Of the blocks' matrices, as the papers count them."""
    return 12 * DEPTH * width**2


def run_of(place: Place, pair: tuple[float, float]) -> Run:
    batch = place.batch * CONTEXT
    return Run(*pair, batch, batch * place.steps, place.width, parameters(place.width))


def carried(pair: tuple[float, float], place: Place) -> dict[str, tuple[float, float]]:
    """What each rule that speaks of the change makes of η and λ that are best at the base."""
    there = run_of(place, pair)
    target = {"batch": there.batch, "tokens": there.tokens, "width": there.width}
    target["parameters"] = there.parameters
    here = run_of(BASE, pair)
    changed = {name for name, value in target.items() if value != getattr(here, name)}
    return {
        name: (new.lr, new.weight_decay)
        for name, transfer in TRANSFERS.items()
        # The rule for fixed norms is of a network without decay.
        if transfer.changes >= changed and name != "hypersphere"
        for new in (carry(here, name, **target),)
    }


def pairs(place: Place, path: Path) -> list[tuple[float, float]]:
    """η and λ to run at a place: what rules say of the base's best, and what is beside on the grid.

    Once they have run, what is beside the best of them too: run until nothing is new.
    """
    said = [] if place == BASE else list(carried(best(losses(read(path), BASE)), place).values())
    middle = said or [MIDDLE]
    if found := losses(read(path), place):
        middle.append(best(found))
    beside = [pair for pair in GRID if distance(pair, middle) <= REACH]
    near = sorted(beside, key=lambda pair: (distance(pair, said or middle), -pair[0], -pair[1]))
    return list(dict.fromkeys([*said, *near]))


def distance(pair: tuple[float, float], middle: list[tuple[float, float]]) -> float:
    """Steps of the grid to the nearest of these."""
    return min(
        abs(math.log2(pair[0] / lr)) + abs(math.log(pair[1] / decay, 4)) for lr, decay in middle
    )


def cells(path: Path) -> Iterator[Cell]:
    """All cells in their order, place by place; of the seeds of a pair one after the other."""
    for place in PLACES.values():
        done: set[tuple[float, float]] = set()
        while new := [pair for pair in pairs(place, path) if pair not in done]:
            for pair, seed in itertools.product(new, range(SEEDS)):
                yield Cell(**asdict(place), lr=pair[0], weight_decay=pair[1], seed=seed)
            done |= set(new)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    root = Path(os.environ["NORMWISE_DATA"])
    names = Cell.__dataclass_fields__
    done = {Cell(**{k: r[k] for k in names}) for r in read(arguments.results)}
    for cell in cells(arguments.results):
        if cell in done:
            continue
        row = train(cell, root)
        with arguments.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{cell}: {row['loss']} in {row['seconds']} s", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """A row a place and rule, in Markdown.

    Regret is the mean over the seeds of a rule's loss less that of the best pair of the place,
    those of the rules included, and in brackets the standard deviation.
    """
    lines = [
        "| | rule | η | λ | τ | loss | regret |",
        "|---|---|---|---|---|---|---|",
    ]
    chosen = best(losses(rows, BASE))
    for name, place in PLACES.items():
        found = losses(rows, place)
        if not found:
            continue
        least = best(found)
        lines.append(
            _row(name, f"best of {len(found)}{_edge(least, found)}", place, least, found, least)
        )
        for rule, pair in carried(chosen, place).items() if place != BASE else ():
            lines.append(_row("", rule, place, pair, found, least))
    return "\n".join(lines)


def _row(
    name: str,
    rule: str,
    place: Place,
    pair: tuple[float, float],
    found: Losses,
    least: tuple[float, float],
) -> str:
    own = found.get(pair, [])
    regret = [a - b for a, b in zip(own, found[least], strict=False)]
    lr, decay = pair
    return (
        f"| {name} | {rule} | 2^{math.log2(lr):.3g} | {decay:.3g} | "
        f"{run_of(place, pair).timescale:.2g} | {spread(own)} | "
        f"{'–' if pair == least and 'best' in rule else spread(regret)} |"
    )


def _edge(pair: tuple[float, float], found: Losses) -> str:
    """Where the best is at the end of what was swept, so that a better one may be beyond."""
    names = [
        name
        for name, value, swept in zip("ηλ", pair, zip(*found, strict=True), strict=True)
        if not min(swept) < value < max(swept)
    ]
    return f" (at the edge of {' and '.join(names)})" if names else ""


def least_decay(found: Losses, lr: float) -> str:
    """λ of the least mean loss at one η: a parabola over log λ through the three lowest."""
    decays = [decay for decay in DECAYS if (lr, decay) in found]
    curve = [statistics.mean(found[lr, decay]) for decay in decays]
    k = min(range(len(curve)), key=curve.__getitem__)
    if not 0 < k < len(curve) - 1:
        return f"{decays[k]:.2g} or beyond"
    low, mid, high = curve[k - 1 : k + 2]
    return f"{decays[k] * 4.0 ** ((low - high) / (2 * (low - 2 * mid + high))):.2g}"


def decay_table(rows: list[dict[str, Any]]) -> str:
    """The best λ at the η that is best at the base."""
    lr, _ = best(losses(rows, BASE))
    lines = [f"| | best λ at η = 2^{math.log2(lr):.3g} |", "|---|---|"]
    for name, place in PLACES.items():
        found = losses(rows, place)
        if any(rate == lr for rate, _ in found):
            lines.append(f"| {name} | {least_decay(found, lr)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The losses over λ: a chart for each place, a line for each η, verticals where rules go."""
    y = Axis("validation loss, nats per character")
    x = Axis("weight decay λ, log scale", Spacing.LOG)
    chosen = best(losses(rows, BASE))
    charts = []
    for name, place in PLACES.items():
        found = losses(rows, place)
        said = {chosen[1]} if place == BASE else {d for _, d in carried(chosen, place).values()}
        lines = []
        for k, lr in enumerate(RATES):
            decays = sorted(decay for rate, decay in found if rate == lr)
            if len(decays) > 1:
                means = (statistics.mean(found[lr, decay]) for decay in decays)
                label = f"η = 1/{1 / lr:.0f}"
                lines.append(
                    Line(label, label, tuple(decays), tuple(means), colour=nth_of(k, len(RATES)))
                )
        if lines:
            note = f"verticals: {'the best' if place == BASE else 'what rules say'}"
            charts.append(Lines(name, note, x, y, tuple(lines), tuple(sorted(said))))
    save(Figure("", tuple(charts), columns=2, width=1180), path)


def report(arguments: argparse.Namespace) -> None:
    rows = read(arguments.results)
    print(table(rows))
    print()
    print(decay_table(rows))
    if arguments.picture is not None:
        draw(rows, arguments.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("report", report)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("results", type=Path, help="JSON lines, one a cell")
        if name == "report":
            command.add_argument("--picture", type=Path, help="where to draw (default: nowhere)")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
