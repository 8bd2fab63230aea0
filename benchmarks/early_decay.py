"""Early decay (arXiv 2012.13841) on a small ResNet: decay always, at first only, later only, never.

SGD with momentum and a cosine schedule on 5,000 images of CIFAR-10; norms and scale-invariant
measures of sharpness over time::

    NORMWISE_DATA=... python benchmarks/early_decay.py run  early.jsonl
    python benchmarks/early_decay.py show early.jsonl docs/images/decay_early.png

``NORMWISE_DATA`` is a directory with CIFAR-10 in its published binary version
(``cifar-10-batches-bin`` or ``cifar10`` with ``data_batch_1.bin`` and ``test_batch.bin``).
Accuracy is on 2,000 test images on the way, and on all 10,000 at the end.

The measures, over the weights w_l that feed a batch normalization, each scale-invariant, so that
neither changes when any of them is multiplied by a positive number:

- gradient: √(Σ_l ‖w_l‖²·‖∂L/∂w_l‖²), L the loss on 500 training images in one batch;
- Fisher: Σ_l ‖w_l‖²·tr F_l. tr F_l is the mean of ‖∂(Σ_i log p(y_i|x_i))/∂w_l‖²/n over batches of
  n = 125 images x_i with labels y_i drawn from the network's own prediction p: the terms of two
  images are independent and of mean zero, so batch statistics are no hindrance.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from epsilon_shift_tables import Block
from torch import Tensor, nn

import normwise as nw
from normwise import decay
from normwise.figures import Axis, Figure, Line, Lines, Spacing, save

CONDITIONS = ("always", "early", "late", "never")
BATCH = 64


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8, 16, 2),
        Block(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def read(name: str) -> tuple[Tensor, Tensor]:
    """Images, normalized (N, 3, 32, 32), and labels, from records of 1 + 3072 bytes."""
    root = Path(os.environ["NORMWISE_DATA"])
    folders = (root, root / "cifar10", root / "cifar-10-batches-bin")
    path = next(folder / name for folder in folders if (folder / name).exists())
    records = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(-1, 3073)
    mean = torch.tensor([0.491, 0.482, 0.447]).view(3, 1, 1)
    std = torch.tensor([0.247, 0.243, 0.262]).view(3, 1, 1)
    images = (records[:, 1:].view(-1, 3, 32, 32).float() / 255 - mean) / std
    return images, records[:, 0].long()


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flipped at random, and shifted by up to four pixels, the same for a batch."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    top, left = torch.randint(9, (2,), generator=generator).tolist()
    return F.pad(x, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32]


def when(condition: str, steps: int) -> decay.Schedule | None:
    """A third of the run is early, the other two thirds are late."""
    edge = steps // 3
    whens = {"early": decay.early(edge), "late": decay.late(edge), "never": 0 * decay.late(0)}
    return whens.get(condition)


def sharpness(model: nn.Module, weights: list[Tensor], x: Tensor, y: Tensor) -> dict[str, float]:
    """Both measures, in training mode; running statistics and the state of torch's RNG are kept."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    squares = [float(w.detach().square().sum()) for w in weights]

    def scaled(loss: Tensor) -> float:
        gradients = torch.autograd.grad(loss, weights)
        return sum(s * float(g.square().sum()) for s, g in zip(squares, gradients, strict=True))

    gradient = math.sqrt(scaled(F.cross_entropy(model(x), y)))
    generator, fisher = torch.Generator().manual_seed(0), []
    for part in x.split(125):
        logp = F.log_softmax(model(part), 1)
        drawn = torch.multinomial(logp.detach().exp(), 1, generator=generator)
        fisher.append(scaled(logp.gather(1, drawn).sum()) / len(part))
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])
    return {"gradient": gradient, "fisher": statistics.mean(fisher)}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    parts = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    model.train()
    return 100 * right / len(labels)


def train(condition: str, seed: int, epochs: int, lr: float, weight_decay: float) -> dict:
    torch.manual_seed(seed)
    images, labels = (t[:5000] for t in read("data_batch_1.bin"))
    test = read("test_batch.bin")
    some = tuple(t[:2000] for t in test)
    model = network()
    report = nw.analyze(model, images[:16])
    named = dict(model.named_parameters())
    weights = [named[name] for name in report.views() if named[name].ndim > 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "name": "decayed"},
        {"params": vectors, "weight_decay": 0.0, "name": "not decayed"},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    steps = epochs * (len(images) // BATCH)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)]
    if (factor := when(condition, steps)) is not None:
        schedules.append(decay.DecayScheduler(optimizer, factor, groups=["decayed"]))

    generator = torch.Generator().manual_seed(seed)
    history, losses, began = [], [], time.perf_counter()
    for step in range(steps):
        if step % (len(images) // BATCH) == 0:
            order = torch.randperm(len(images), generator=generator)
        if step % (steps // 18) == 0:
            history.append(measured(model, weights, images, labels, some, step, optimizer, losses))
        index = order[(step * BATCH) % (len(images) - BATCH + 1) :][:BATCH]
        loss = F.cross_entropy(model(augmented(images[index], generator)), labels[index])
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    history.append(measured(model, weights, images, labels, test, steps, optimizer, losses))
    return {
        "condition": condition,
        "seed": seed,
        "epochs": epochs,
        "lr": lr,
        "weight_decay": weight_decay,
        "history": history,
        "seconds": time.perf_counter() - began,
    }


def measured(model, weights, images, labels, test, step, optimizer, losses) -> dict[str, float]:
    norms = torch.stack([w.detach().norm() for w in weights])
    lr = optimizer.param_groups[0]["lr"]
    recent = losses[-100:]
    return {
        "step": step,
        "norm": float(norms.square().mean().sqrt()),
        "classifier": float(model[-1].weight.detach().norm()),
        "effective_lr": float((lr / norms.square()).median()),
        "loss": sum(recent) / len(recent) if recent else math.nan,
        "accuracy": accuracy(model, *test),
        **sharpness(model, weights, images[:500], labels[:500]),
    }


COLUMNS = {
    "accuracy": "test accuracy, %",
    "loss": "training loss",
    "norm": "norm, rms of the layers",
    "effective_lr": "effective lr, median",
    "gradient": "‖w‖·‖∇L‖",
    "fisher": "‖w‖²·tr F",
}


def show(results: list[dict], picture: Path | None) -> None:
    done = {(r["condition"], r["seed"]) for r in results}
    seeds = sorted(
        s for s in {r["seed"] for r in results} if all((c, s) in done for c in CONDITIONS)
    )
    results = [r for r in results if r["seed"] in seeds]
    first = results[0]
    print(
        f"{first['epochs']} epochs, lr {first['lr']:g}, λ = {first['weight_decay']:g}, seeds "
        f"{seeds}. At the end, mean (range of seeds):\n"
    )
    # The last rate is 0; the last one measured before it says more.
    print("| decay | " + " | ".join(t for k, t in COLUMNS.items() if k != "effective_lr") + " |")
    print("|---" * len(COLUMNS) + "|")
    for condition in CONDITIONS:
        ends = [r["history"][-1] for r in results if r["condition"] == condition]
        cells = []
        for key in COLUMNS:
            if key != "effective_lr":
                values = [end[key] for end in ends]
                mean = statistics.mean(values)
                digits = {"accuracy": 1, "fisher": 0}.get(key, 2)
                mean, low, high = (f"{v:.{digits}f}" for v in (mean, min(values), max(values)))
                cells.append(f"{mean} ({low}–{high})")
        print(f"| {condition} | " + " | ".join(cells) + " |")
    print("\nTest accuracy less that of never, same seed: mean, and each seed")
    by_key = {(r["condition"], r["seed"]): r["history"][-1]["accuracy"] for r in results}
    for condition in CONDITIONS[:-1]:
        gaps = [by_key[condition, seed] - by_key["never", seed] for seed in seeds]
        print(
            f"- {condition}: {statistics.mean(gaps):+.2f} ({', '.join(f'{g:+.2f}' for g in gaps)})"
        )
    if picture is not None:
        draw(results, picture)


def draw(results: list[dict], picture: Path) -> None:
    colours = {"always": "blue", "early": "orange", "late": "green", "never": "grey"}
    charts = []
    for key, title in COLUMNS.items():
        spacing = Spacing.LOG if key == "effective_lr" else Spacing.LINEAR
        lines = []
        for condition in CONDITIONS:
            runs = [r["history"] for r in results if r["condition"] == condition]
            # The last rate is 0, which a logarithmic axis does not have.
            rows = list(zip(*runs, strict=True))[: -1 if key == "effective_lr" else None]
            values = [[measured[key] for measured in row] for row in rows]
            lines.append(
                Line(
                    condition,
                    condition,
                    tuple(float(row[0]["step"]) for row in rows),
                    tuple(map(statistics.mean, values)),
                    tuple(map(min, values)),
                    tuple(map(max, values)),
                    colours[condition],
                )
            )
        rule = (float(results[0]["history"][-1]["step"] // 3),)
        step, axis = Axis("step", Spacing.TIGHT), Axis("", spacing)
        charts.append(Lines(title, "", step, axis, tuple(lines), rule))
    picture.parent.mkdir(parents=True, exist_ok=True)
    note = "Dotted: where early decay ends and late decay begins. Mean and range of the seeds."
    save(Figure("", tuple(charts), columns=3, note=note, width=1360), picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "show"])
    parser.add_argument("results", type=Path, help="JSON lines; runs that it has are not repeated")
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("--epochs", type=int, default=24, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = arguments.results.read_text() if arguments.results.exists() else ""
    results = [json.loads(line) for line in text.splitlines()]
    if arguments.action == "show":
        show(results, arguments.picture)
        return
    done = {(r["condition"], r["seed"]) for r in results}
    for seed in arguments.seeds:
        for condition in CONDITIONS:
            if (condition, seed) in done:
                continue
            result = train(condition, seed, arguments.epochs, arguments.lr, arguments.weight_decay)
            with arguments.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            end = {k: round(v, 4) for k, v in result["history"][-1].items()}
            print(condition, seed, end, f"{result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
