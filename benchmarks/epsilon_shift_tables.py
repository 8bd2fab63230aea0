"""Tables II and III of the ε-shift paper (arXiv 1911.05920) at the scale of a small ResNet.

A ResNet of three blocks on CIFAR-100, with weight normalization, weight standardization or
neither, under SGD and Adam, for several λ: which runs fail (a loss that is not finite), the
accuracy, and the largest 1/‖W‖ (1/std for weight standardization) that a slice reached::

    NORMWISE_DATA=... python benchmarks/epsilon_shift_tables.py run  results.jsonl
    NORMWISE_DATA=... python benchmarks/epsilon_shift_tables.py show results.jsonl figures/

``NORMWISE_DATA`` is a directory that holds CIFAR-100 in its published binary version
(``cifar-100-binary`` or ``cifar100`` with ``train.bin`` and ``test.bin``).

How many steps a failure takes. A slice whose loss gradient is zero (a filter behind a dead ReLU)
shrinks by 1 − ηλ/(1 − β) a step under SGD. In float32 the variance of a slice is zero once its std
is below 1e-23, about 50 e-folds down, so with η = 0.1 and β = 0.9 that takes 50/λ steps: 5,000 for
λ = 1e-2, 50,000 for 1e-3 (where figure 6 of the paper has its failure), 500,000 for 1e-4.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise.decay import EpsilonShiftedL2
from normwise.figures import DASHED, Axis, Figure, Line, Lines, Spacing, save
from normwise.reparam import WeightNorm, WeightStandardization, reparametrize
from normwise.theory import sgd_without_decay

METHODS = {"none": None, "WN": WeightNorm, "WS": WeightStandardization}
# The decays of the paper's tables, and how the pictures tell them apart.
COLOURS = {1e-2: "red", 1e-3: "orange", 1e-4: "green", 1e-5: "blue", 0.0: "grey"}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        method: "none", "WN" or "WS".
        optimizer: "SGD" (learning rate 0.1, momentum 0.9) or "Adam" (learning rate 1e-3).
        weight_decay: λ, coupled, of all weights but biases.
        decay: "bare" (plain decay, and division by the bare norm as in the paper), "guarded"
            (plain decay and this library's guard) or "shifted" (ε-shifted, guarded).
        steps, batch, seed, eps: as they say.
    """

    method: str
    optimizer: str
    weight_decay: float
    decay: str
    steps: int = 6000
    batch: int = 16
    seed: int = 0
    eps: float = 1e-2


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.norm3(self.shortcut(x)))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 100),
    )


def read(split: str) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, 3, 32, 32), and fine labels, from records of 2 + 3072 bytes."""
    root = Path(os.environ["NORMWISE_DATA"])
    path = next(
        p / f"{split}.bin"
        for p in (root, root / "cifar100", root / "cifar-100-binary")
        if (p / f"{split}.bin").exists()
    )
    records = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(-1, 3074)
    return records[:, 2:].view(-1, 3, 32, 32), records[:, 1].long()


def as_input(images: Tensor) -> Tensor:
    mean = torch.tensor([0.507, 0.487, 0.441]).view(3, 1, 1)
    std = torch.tensor([0.267, 0.256, 0.276]).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def normalized_weights(model: nn.Module) -> list[tuple[Tensor, bool]]:
    """The weights that are divided, and whether by a std; all convolutions of a plain network."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            found.append((module.original, module[0].divides_by == "std"))
        elif isinstance(module, nn.Conv2d) and not nn.utils.parametrize.is_parametrized(module):
            found.append((module.weight, False))
    return found


@torch.no_grad()
def sizes(model: nn.Module) -> tuple[float, float]:
    """The largest 1/‖W‖, or 1/std, of a slice, and the median of 1/‖W‖² over the slices.

    In float64, which must not underflow before the network does.
    """
    divided, norms = [], []
    for w, is_std in normalized_weights(model):
        rows = w.double().flatten(1)
        norms.append(rows.norm(dim=1))
        divided.append(rows.std(1, correction=0) if is_std else norms[-1])
    smallest = float(torch.cat(divided).min())
    return math.inf if smallest == 0 else 1 / smallest, float(torch.cat(norms).median() ** -2)


def train(run: Run) -> dict[str, object]:
    torch.manual_seed(run.seed)
    model = network()
    method = METHODS[run.method]
    if method is not None:
        guard = 0.0 if run.decay == "bare" else None
        reparametrize(model, method, gain=False, eps=guard)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    decayed += [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    others = [p for p in model.parameters() if all(p is not q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": run.weight_decay}, {"params": others}]
    optimizer: torch.optim.Optimizer
    if run.optimizer == "SGD":
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(groups, lr=1e-3)
    if run.decay == "shifted":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # ε above the start of small runs' scale
            reg = EpsilonShiftedL2(model, weight_decay=run.weight_decay, eps=run.eps)
        reg.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [run.steps * 9 // 10])

    images, labels = read("train")
    generator = torch.Generator().manual_seed(run.seed)
    history, failed, losses = [], None, []
    start = time.perf_counter()
    for step in range(run.steps):
        index = torch.randint(len(images), (run.batch,), generator=generator)
        x = as_input(images[index])
        flip = torch.rand(run.batch, generator=generator) < 0.5
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
        loss = F.cross_entropy(model(x), labels[index])
        losses.append(float(loss.detach()))
        if step % 25 == 0:
            history.append((step, *sizes(model), scheduler.get_last_lr()[0]))
        if not math.isfinite(losses[-1]):
            failed = step
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    history.append((len(losses), *sizes(model), scheduler.get_last_lr()[0]))
    return {
        **asdict(run),
        "failed_at": failed,
        "accuracy": None if failed is not None else accuracy(model),
        "loss": sum(losses[-200:]) / len(losses[-200:]),
        "largest": max((v for _, v, *_ in history if not math.isnan(v)), default=math.nan),
        "history": history,
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    images, labels = read("test")
    model.eval()
    parts = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((model(as_input(x)).argmax(1) == y).sum()) for x, y in parts)
    return 100 * right / len(labels)


def all_runs(steps: int, seed: int) -> list[Run]:
    rates = list(COLOURS)
    runs = []
    for optimizer in ("SGD", "Adam"):
        for method in ("WS", "WN"):
            runs += [Run(method, optimizer, r, "bare", steps, seed=seed) for r in rates]
            runs += [Run(method, optimizer, r, "shifted", steps, seed=seed) for r in rates[:-1]]
            runs += [Run(method, optimizer, r, "guarded", steps, seed=seed) for r in rates[:-1]]
        runs += [Run("none", optimizer, r, "bare", steps, seed=seed) for r in rates]
    return runs


def show(results: list[dict], figures: Path | None) -> None:
    rates = sorted({r["weight_decay"] for r in results}, reverse=True)
    print("Test accuracy in %, or – for a failed run and its last step; the largest 1/‖W‖.\n")
    print("| | " + " | ".join(f"λ = {rate:g}" for rate in rates) + " |")
    print("|---" * (len(rates) + 1) + "|")
    rows = dict.fromkeys((r["method"], r["optimizer"], r["decay"], r["steps"]) for r in results)
    for row in rows:
        cells = []
        for rate in rates:
            match = [
                r
                for r in results
                if (r["method"], r["optimizer"], r["decay"], r["steps"]) == row
                and r["weight_decay"] == rate
            ]
            if not match:
                cells.append("")
            elif match[-1]["failed_at"] is not None:
                cells.append(f"– ({match[-1]['failed_at']}), {match[-1]['largest']:.1g}")
            else:
                cells.append(f"{match[-1]['accuracy']:.1f}, {match[-1]['largest']:.1g}")
        print(f"| {row[0]}, {row[1]}, {row[2]}, {row[3]} steps | " + " | ".join(cells) + " |")
    if figures is not None:
        draw(results, figures)


STEP = Axis("step", Spacing.TIGHT)


def line(label: str, points: list[tuple[float, float]], r: dict, dash: tuple = ()) -> Line:
    steps, values = zip(*points, strict=True) if points else ((), ())
    return Line(label, label, steps, values, colour=COLOURS[r["weight_decay"]], dash=dash)


def draw(results: list[dict], figures: Path) -> None:
    """Figures 6 and 7, the largest 1/‖W‖ over the steps, then the effective learning rates."""
    figures.mkdir(parents=True, exist_ok=True)
    for method in ("WS", "WN"):
        charts = []
        for optimizer in ("SGD", "Adam"):
            lines = []
            for r in sorted(results, key=lambda r: (-r["weight_decay"], r["decay"])):
                if (r["method"], r["optimizer"]) != (method, optimizer) or r["decay"] == "guarded":
                    continue
                points = [(s, v) for s, v, *_ in r["history"] if math.isfinite(v)]
                shifted = r["decay"] == "shifted"
                failed = "" if r["failed_at"] is None else ", fails"
                label = f"λ = {r['weight_decay']:g}{', shifted' if shifted else ''}{failed}"
                lines.append(line(label, points, r, DASHED if shifted else ()))
            y = Axis("largest 1/std" if method == "WS" else "largest 1/‖W‖", Spacing.LOG)
            charts.append(Lines(f"{method}, {optimizer}", "", STEP, y, tuple(lines)))
        save(Figure("", tuple(charts), width=1180), figures / f"epsilon_shift_{method}.png")
    draw_effective_learning_rates(results, figures)


def draw_effective_learning_rates(results: list[dict], figures: Path) -> None:
    """Figure 2, over the whole run, and figures 4 and 5, its start beside Theorem 1's schedule."""

    def rates(r: dict, until: float = math.inf) -> list[tuple[float, float]]:
        return [(s, lr * inverse) for s, _, inverse, lr in r["history"] if s <= until]

    plain = [r for r in results if (r["optimizer"], r["decay"]) == ("SGD", "bare")]
    plain = [r for r in plain if r["weight_decay"] in (0, 1e-4, 1e-3)]
    plain.sort(key=lambda r: (r["method"] == "none", -r["weight_decay"]))
    charts = []
    for method in ("WS", "WN"):
        lines = [
            line(
                f"λ = {r['weight_decay']:g}" + (", plain" if r["method"] == "none" else ""),
                rates(r),
                r,
                DASHED if r["method"] == "none" else (),
            )
            for r in plain
            if r["method"] in (method, "none")
        ]
        y = Axis("median effective learning rate η/‖W‖²", Spacing.LOG)
        note = "dashed: without normalization"
        charts.append(Lines(f"{method}, SGD", note, STEP, y, tuple(lines)))
    save(Figure("", tuple(charts), width=1180), figures / "effective_learning_rate.png")

    start = 3000
    measured, schedule = [], []
    for r in plain:
        if r["method"] == "WS":
            points = rates(r, start)
            label = f"λ = {r['weight_decay']:g}"
            measured.append(line(label, [(s, v / points[0][1]) for s, v in points], r))
            equivalent = sgd_without_decay([0.1] * start, r["weight_decay"], 0.9, torch.float64)
            points = [(float(s), v / 0.1) for s, v in enumerate(equivalent.lrs)]
            schedule.append(line(label, points[::10], r))
    charts = [
        Lines(title, "", STEP, Axis(f"{what}, relative to its start", Spacing.LOG), tuple(lines))
        for title, what, lines in (
            ("WS, SGD, median of the slices", "effective learning rate", measured),
            ("The same without decay (Theorem 1)", "learning rate", schedule),
        )
    ]
    save(Figure("", tuple(charts), width=1180), figures / "implicit_warm_up.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "show"])
    parser.add_argument("results", type=Path, help="JSON lines; runs that it has are not repeated")
    parser.add_argument("figures", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=6000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--one",
        metavar="METHOD,OPTIMIZER,λ,DECAY",
        action="append",
        help="only this run, such as WS,SGD,1e-3,bare; may be repeated",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = arguments.results.read_text() if arguments.results.exists() else ""
    results = [json.loads(line) for line in text.splitlines()]
    if arguments.action == "show":
        show(results, arguments.figures)
        return
    runs = all_runs(arguments.steps, arguments.seed)
    if arguments.one:
        runs = []
        for text in arguments.one:
            method, optimizer, rate, decay = text.split(",")
            runs.append(
                Run(method, optimizer, float(rate), decay, arguments.steps, seed=arguments.seed)
            )
    done = [{key: r[key] for key in asdict(runs[0])} for r in results]
    for run in runs:
        if asdict(run) in done:
            continue
        result = train(run)
        with arguments.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(run, {k: result[k] for k in ("failed_at", "accuracy", "largest", "seconds")})


if __name__ == "__main__":
    main()
