"""A run with weight decay, and the run without it that the theory calls the same, in float32.

A network with weight standardization is trained on CIFAR-100 images, four times from the same
weights on the same batches: with decay; without it, under the translated schedule of
``normwise.theory.sgd_without_decay``; with decay and one entry one unit in the last place larger,
which shows how fast training itself spreads rounding; and without decay at the plain learning rate.
The run is as long as float32 holds the translated one.

    python benchmarks/decay_as_schedule.py DATA --plot decay_as_schedule.png

DATA is the folder of CIFAR-100's binary version (``train.bin``).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from normwise import View, weight_standardize
from normwise.figures import DASHED, Axis, Figure, Line, Lines, Spacing, save
from normwise.geometry import norms
from normwise.theory import PlannedGroups, sgd_schedule_limit, sgd_without_decay

LR, DECAY, MOMENTUM = 0.01, 0.2, 0.9


def images(folder: Path) -> tuple[Tensor, Tensor]:
    raw = np.fromfile(folder / "train.bin", dtype=np.uint8).reshape(-1, 3074)
    pixels = torch.from_numpy(raw[:, 2:].reshape(-1, 3, 32, 32).copy()).float() / 255
    pixels = nn.functional.avg_pool2d(pixels, 2)
    pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
    return pixels, torch.from_numpy(raw[:, 0].astype(np.int64))  # the 20 superclasses


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)]
        layers += [nn.GroupNorm(4, outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 20))
    weight_standardize(model)
    return model


def run(data: tuple[Tensor, Tensor], steps: int, how: str) -> dict[str, list[float]]:
    model = network()
    weights = [p for name, p in model.named_parameters() if "parametrizations" in name]
    rest = [p for name, p in model.named_parameters() if "parametrizations" not in name]
    decay = 0.0 if how.startswith("without") else DECAY
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}],
        lr=LR,
        momentum=MOMENTUM,
    )
    schedule = None
    if how == "without, translated":
        plan = sgd_without_decay([LR] * steps, DECAY, MOMENTUM)
        schedule = PlannedGroups(optimizer, {0: plan.groups()})
    if how == "with, nudged":
        with torch.no_grad():
            first = weights[0].view(-1)
            first[0] = torch.nextafter(first[0], torch.tensor(math.inf))
    generator = torch.Generator().manual_seed(1)
    found: dict[str, list[float]] = {"loss": [], "norm": [], "lr": []}
    for _ in range(steps):
        chosen = torch.randint(len(data[1]), (32,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data[0][chosen]), data[1][chosen])
        loss.backward()
        with torch.no_grad():
            every = torch.cat([norms(w, View.channel()) for w in weights])
        found["loss"].append(float(loss.detach()))
        found["norm"].append(float(every.double().log().mean().exp()))
        found["lr"].append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return found


def smooth(values: list[float], window: int = 25) -> np.ndarray:
    return np.convolve(values, np.ones(window) / window, mode="valid")


def draw(runs: dict[str, dict[str, list[float]]], path: Path) -> None:
    styles = {
        "with": ("with decay", "blue", ()),
        "with, nudged": ("nudged", "violet", (1.0, 1.4)),
        "without": ("without", "grey", ()),
        "without, translated": ("translated", "orange", DASHED),
    }
    charts = []
    for key, title, axis in (
        ("loss", "Training loss", Axis("mean of 25 steps")),
        ("norm", "Norm of the weights", Axis("log scale", Spacing.LOG)),
        ("lr", "Learning rate", Axis("log scale", Spacing.LOG)),
    ):
        lines = []
        for how, (label, colour, dash) in styles.items():
            values = smooth(runs[how]["loss"]).tolist() if key == "loss" else runs[how][key]
            steps = tuple(map(float, range(0, len(values), 3)))
            lines.append(Line(how, label, steps, tuple(values[::3]), colour=colour, dash=dash))
        charts.append(Lines(title, "", Axis("step", Spacing.TIGHT), axis, tuple(lines)))
    save(Figure("", tuple(charts), width=1440), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, help="(default: as many as float32 holds)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    most = sgd_schedule_limit(LR, DECAY, MOMENTUM)
    while True:  # the closed form leaves out the first steps of momentum, in which α is larger
        try:
            sgd_without_decay([LR] * (most + 1), DECAY, MOMENTUM)
        except ValueError:
            break
        most += 1
    steps = args.steps or most
    data = images(args.data)
    hows = ("with", "without, translated", "with, nudged", "without")
    runs = {how: run(data, steps, how) for how in hows}
    print(f"lr {LR}, weight decay {DECAY}, momentum {MOMENTUM}, float32 holds {most} steps")
    reference = runs["with"]
    for how in hows[1:]:
        difference = np.abs(np.subtract(runs[how]["loss"], reference["loss"]))
        apart = next((t for t, d in enumerate(difference) if d > 1e-3), steps)
        curves = np.abs(smooth(runs[how]["loss"]) - smooth(reference["loss"]))
        print(
            f"{how:20}: a loss differs by more than 0.001 first at step {apart}; smoothed curves "
            f"differ by {curves.max():.4f} at most, {curves.mean():.4f} in the mean; norm at the "
            f"end {runs[how]['norm'][-1]:.3g} (with decay {reference['norm'][-1]:.3g})"
        )
    if args.json:
        args.json.write_text(json.dumps(runs))
    if args.plot:
        draw(runs, args.plot)


if __name__ == "__main__":
    main()
