"""Does the best learning rate stay the best as a language model gets wider and deeper?

A character model on tinyshakespeare, small enough for one core, at three widths and two depths,
under AdamW, Muon and ``sphere`` around both, each at eight or nine learning rates::

    NORMWISE_DATA=... python benchmarks/transfer.py run results.jsonl
    python benchmarks/transfer.py report results.jsonl --picture picture.png

``run`` writes one JSON line a cell (method, width, depth, learning rate, seed), in an order in
which the results of one seed are complete before the next begins; cells that the file has are
skipped, so it can be stopped and run again. ``report`` prints tables and draws the losses.

The network: blocks of attention with normalized queries and keys, and of relu², RMSNorm without
gains before each and before the readout, heads of 16. What is swept is the learning rate of the
blocks' matrices; embedding, readout and gains always step by AdamW at 3e-3. Warm-up over the first
tenth of the steps, then linearly to zero.
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
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from normwise.figures import Axis, Figure, Line, Lines, Spacing, save
from normwise.lab.data.texts import encode

WIDTHS, DEPTHS = (32, 64, 128), (2, 4)
CONTEXT, BATCH, HEAD = 64, 16, 16
REST_LR = 3e-3
# Factors of two around what is best at the smallest width, in the units of each method.
RATES = {
    "adamw": [2.0**-k for k in range(10, 2, -1)],
    "muon": [2.0**-k for k in range(8, -1, -1)],
    "sphere": [2.0**-k for k in range(9, 1, -1)],
}
# In the order in which they are run.
METHODS = {
    "AdamW": "adamw",
    "sphere(AdamW)": "sphere",
    "Muon": "muon",
    "sphere(Muon)": "sphere",
    "AdamW, decay by schedule": "adamw",
    "sphere(AdamW), gains": "sphere",
    "sphere(AdamW), free ones only": "sphere",
    "AdamW, no decay": "adamw",
}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    method: str
    width: int
    depth: int
    lr: float
    seed: int
    steps: int


class Block(nn.Module):
    """Attention and an MLP, each on a normalized reading of the residual stream."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.proj = nn.Linear(4 * width, width, bias=False)
        for matrix in self.children():
            nn.init.normal_(matrix.weight, std=matrix.in_features**-0.5)
        for matrix in (self.o, self.proj):
            matrix.weight.data.mul_((2 * depth) ** -0.5)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        h = normalized(x)
        q, k, v = (m(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = (rotated(normalized(t), rotation) for t in (q, k))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(heads.transpose(1, 2).flatten(2))
        return x + self.proj(F.relu(self.fc(normalized(x))).square())


class Model(nn.Module):
    """A decoder of characters."""

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, depth) for _ in range(depth))
        self.readout = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.readout.weight, std=0.5 * width**-0.5)
        angles = torch.arange(CONTEXT)[:, None] * 100.0 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotation)
        return self.readout(normalized(x))


def normalized(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of shape ``(batch, heads, positions, HEAD)``."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


def optimizers(model: Model, cell: Cell) -> list[torch.optim.Optimizer]:
    """The optimizer of the blocks' matrices, whose learning rate is swept, and that of the rest."""
    swept = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [*model.embedding.parameters(), *model.readout.parameters()]
    base = torch.optim.Muon if "Muon" in cell.method else torch.optim.AdamW
    options: dict[str, Any] = {"lr": cell.lr, "weight_decay": 0.0}
    if base is torch.optim.AdamW:
        options |= {"betas": (0.9, 0.95), "fused": True}
    if cell.method in ("AdamW", "Muon"):
        options["weight_decay"] = 0.1
    if cell.method == "sphere(AdamW), gains":
        # Fixing all six matrices of each of L blocks loses 2L − 1 lengths: q and k are free, v
        # trades with o and fc with proj, and all o and proj together with the embedding. The ledger
        # asks for gains on all o and proj but the first.
        bound = [m.weight for block in model.blocks for m in (block.o, block.proj)]
        rest += nw.add_gains(model, dict.fromkeys(bound[1:], "scalar"))
    if cell.method == "sphere(AdamW), free ones only":
        # Fixing q, k, v and fc loses none, as o and proj can take over the lengths of v and fc.
        bound = [m.weight for block in model.blocks for m in (block.o, block.proj)]
        swept = [p for p in swept if p not in set(bound)]
        rest += bound
    optimizer: torch.optim.Optimizer = base(swept, **options)
    if cell.method == "AdamW, decay by schedule":
        nw.decay.Decoupled(1e-3, per="schedule").attach(optimizer)
    if cell.method.startswith("sphere"):
        optimizer = nw.sphere(optimizer, "layer")
    others = torch.optim.AdamW(rest, lr=REST_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [optimizer, others]


def train(cell: Cell, text: tuple[Tensor, Tensor, int]) -> dict[str, Any]:
    """Run a cell; the loss is None if it is not finite."""
    training, validation, vocabulary = text
    torch.manual_seed(cell.seed)
    model = Model(vocabulary, cell.width, cell.depth)
    steppers = optimizers(model, cell)
    warmup = max(1, cell.steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, (cell.steps - step) / (cell.steps - warmup))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in steppers]
    generator = torch.Generator().manual_seed(cell.seed)
    losses = []
    start = time.process_time()
    for _ in range(cell.steps):
        loss = loss_of(model, *sample(training, BATCH, generator))
        for optimizer in steppers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer, scheduler in zip(steppers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
    seconds = time.process_time() - start
    with torch.no_grad():
        fixed = torch.Generator().manual_seed(0)
        batches = [sample(validation, 64, fixed) for _ in range(8)]
        valid = statistics.mean(float(loss_of(model, *b)) for b in batches)
    return {
        **asdict(cell),
        "loss": valid if math.isfinite(valid) else None,
        "train_loss": statistics.mean(losses[-20:]),
        "seconds": round(seconds, 2),
        "torch": torch.__version__,
    }


def sample(tokens: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(tokens) - CONTEXT, (count, 1), generator=generator)
    windows = tokens[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: Model, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def cells(methods: list[str], seeds: int, steps: int) -> Iterator[Cell]:
    """All cells: those of one seed first, of its first four methods, of the small networks."""
    for seed in range(seeds):
        for some in (methods[:4], methods[4:]):
            for depth, width in itertools.product(DEPTHS, WIDTHS):
                for method in some:
                    for lr in RATES[METHODS[method]]:
                        yield Cell(method, width, depth, lr, seed, steps)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    root = Path(os.environ["NORMWISE_DATA"])
    text = (root / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    # The last 5% stay unread: the learning rate is chosen by the 5% before them.
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    coded = encode("tinyshakespeare", (text[:first], text[first:second]))
    data = (torch.from_numpy(coded.train), torch.from_numpy(coded.test), len(coded.vocabulary))
    done = {Cell(**{k: r[k] for k in Cell.__dataclass_fields__}) for r in read(arguments.results)}
    for cell in cells(arguments.methods, arguments.seeds, arguments.steps):
        if cell in done:
            continue
        row = train(cell, data)
        with arguments.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{cell}: {row['loss']} in {row['seconds']} s", flush=True)


Curve = dict[float, list[float]]


def curves(rows: list[dict[str, Any]], steps: int) -> dict[tuple[str, int, int], Curve]:
    """Losses of seeds by learning rate, of each method, depth and width; failed runs are inf."""
    found: dict[tuple[str, int, int], Curve] = {}
    for r in rows:
        if r["steps"] == steps:
            curve = found.setdefault((r["method"], r["depth"], r["width"]), {})
            curve.setdefault(r["lr"], []).append(math.inf if r["loss"] is None else r["loss"])
    return found


def best(curve: Curve) -> tuple[float, float]:
    """The learning rate of the least mean loss, and that loss."""
    return min(((lr, statistics.mean(losses)) for lr, losses in curve.items()), key=lambda x: x[1])


def table(found: dict[tuple[str, int, int], Curve]) -> str:
    """One row a network and method, in Markdown; the ratio is to the best rate of the smallest.

    Regret is what the learning rate that is best for the smallest network costs here: the mean over
    the seeds of its loss less that of the best one, and in brackets the standard deviation.
    """
    lines = [
        "| method | depth | width | seeds | best lr | loss | log2 of its ratio | regret |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        smallest = found.get((method, DEPTHS[0], WIDTHS[0]))
        for depth in DEPTHS:
            for width in WIDTHS:
                curve = found.get((method, depth, width))
                if curve is None or smallest is None:
                    continue
                lr = best(curve)[0]
                carried = best(smallest)[0]
                # A sweep that is still running may lack the rate, or some of its seeds.
                regret = [a - b for a, b in zip(curve.get(carried, []), curve[lr], strict=False)]
                edge = "" if min(curve) < lr < max(curve) else " (edge)"
                lines.append(
                    f"| {method} | {depth} | {width} | {len(curve[lr])} | {lr:.3g}{edge} | "
                    f"{spread(curve[lr])} | {math.log2(lr / carried):+.0f} | {spread(regret)} |"
                )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and, of two or more, standard deviation."""
    if not values:
        return "not run"
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def draw(found: dict[tuple[str, int, int], Curve], path: Path) -> None:
    """The losses over the learning rate: charts by method and depth, a line for each width."""
    colours = dict(zip(WIDTHS, ("blue", "orange", "green"), strict=True))
    x = Axis("learning rate, log scale", Spacing.LOG)
    y = Axis("validation loss, nats per character", holds=(1.9, 2.8))
    charts = []
    for method, depth in itertools.product(METHODS, DEPTHS):
        lines = []
        for width in WIDTHS:
            curve = found.get((method, depth, width), {})
            means = {lr: statistics.mean(losses) for lr, losses in sorted(curve.items())}
            # What is far above the best would flatten the rest.
            shown = {lr: loss for lr, loss in means.items() if loss < 2.8}
            label = f"{width} wide"
            lines.append(
                Line(label, label, tuple(shown), tuple(shown.values()), colour=colours[width])
            )
        charts.append(Lines(f"{method}, {depth} deep", "", x, y, tuple(lines)))
    shown = tuple(chart for chart in charts if not chart.empty)
    save(Figure("", shown, columns=2, width=1180), path)


def report(arguments: argparse.Namespace) -> None:
    found = curves(read(arguments.results), arguments.steps)
    print(table(found))
    if arguments.picture is not None:
        draw(found, arguments.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("report", report)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("results", type=Path, help="JSON lines, one a cell")
        command.add_argument("--steps", type=int, default=200, help="(default: %(default)s)")
        if name == "run":
            command.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
            command.add_argument(
                "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD"
            )
        else:
            command.add_argument("--picture", type=Path, help="where to draw (default: nowhere)")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
