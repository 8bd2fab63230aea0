# pip install "normwise[lab]"
"""The gallery: what optimizers and decay policies do to norms, angles and loss.

Three small problems, whose weights are scale-invariant by channel (BatchNorm), by head (QK norm)
and as a whole (LayerNorm). Draws two pictures of each, and prints a table for each picture:

    python examples/gallery.py --out docs/images/gallery
"""

import argparse
import math
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import normwise as nw
from normwise import decay
from normwise.figures import Axis, Figure, Line, Lines, Spacing, marks, save

Groups = list[dict]
POINTS = 60  # measurements of a run


@dataclass(frozen=True)
class Problem:
    """Something small to learn.

    Args:
        title: for the reader.
        network: makes it, the same one each time.
        batches: inputs and targets without end.
        loss: of outputs and targets.
    """

    title: str
    network: Callable[[], nn.Module]
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    loss: Callable[[Tensor, Tensor], Tensor]


def sampled(x: Tensor, y: Tensor, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        chosen = torch.randint(len(x), (size,))
        yield x[chosen], y[chosen]


def digits() -> Problem:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16

    def network() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )

    labels = torch.tensor(data.target)
    return Problem("digits", network, lambda: sampled(images, labels), F.cross_entropy)


def characters() -> Problem:
    text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    letters = sorted(set(text))
    windows = torch.tensor([letters.index(c) for c in text]).unfold(0, 49, 1)

    def network() -> nn.Module:
        path = Path(__file__).parent / "small_gpt.py"
        return runpy.run_path(str(path))["GPT"](len(letters), context=48, width=32)

    return Problem(
        "characters",
        network,
        lambda: sampled(windows[:, :-1], windows[:, 1:], size=16),
        lambda scores, targets: F.cross_entropy(scores.flatten(0, 1), targets.flatten()),
    )


def diabetes() -> Problem:
    data = load_diabetes(scaled=True)
    x = torch.tensor(data.data, dtype=torch.float32) * math.sqrt(len(data.data))
    y = torch.tensor(data.target, dtype=torch.float32).unsqueeze(1)

    def network() -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(10, 64, bias=False), nn.LayerNorm(64), nn.ReLU()),
            *(nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.ReLU()),
            nn.Linear(64, 1),
        )

    return Problem("diabetes", network, lambda: sampled(x, (y - y.mean()) / y.std()), F.mse_loss)


PROBLEMS = (digits(), characters(), diabetes())


def sgd(groups: Groups, report: nw.Report) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def sgdp(groups: Groups, report: nw.Report) -> torch.optim.Optimizer:
    return nw.SGDP(groups, lr=0.1, momentum=0.9)


def adamw(groups: Groups, report: nw.Report) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=3e-3)


def adamp(groups: Groups, report: nw.Report) -> torch.optim.Optimizer:
    return nw.AdamP(groups, lr=3e-3)


def nadam(groups: Groups, report: nw.Report) -> torch.optim.Optimizer:
    inner = torch.optim.NAdam(groups, lr=3e-3, decoupled_weight_decay=True)
    return nw.tangential(inner, report)


def fixed(groups: Groups, report: nw.Report) -> torch.optim.Optimizer:
    for group in groups:
        if group["view"] is not None:
            group |= {"norm": "fixed", "weight_decay": 0.0}
    return nw.AdamP(groups, lr=3e-3)


OPTIMIZERS = {
    "SGD": (sgd, 1e-3),
    "SGDP": (sgdp, 1e-3),
    "AdamW": (adamw, 0.1),
    "AdamP": (adamp, 0.1),
    "tangential": (nadam, 0.1),
    "fixed norms": (fixed, 0.1),
}


def with_policy(policy: decay.Policy) -> Callable[[Groups, nw.Report], torch.optim.Optimizer]:
    def make(groups: Groups, report: nw.Report) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(groups, lr=3e-3)
        policy.attach(optimizer, on=report)
        return optimizer

    return make


POLICIES = {
    "none": (adamw, 0.0),
    "decoupled": (adamw, 0.5),
    "corrected": (with_policy(decay.Corrected()), 0.5),
    "cautious": (with_policy(decay.Cautious()), 0.5),
    "L2": (with_policy(decay.L2()), 0.5),
    "per step": (with_policy(decay.Decoupled(per="step")), 1.5e-3),
}


@dataclass(frozen=True)
class Course:
    """One run: steps, and at each the mean loss since the last, norm ÷ first norm, and angle."""

    steps: list[int]
    loss: list[float]
    norm: list[float]
    angle: list[float]


def train(problem: Problem, make: Callable, weight_decay: float, steps: int) -> Course:
    torch.manual_seed(0)
    model, data = problem.network(), problem.batches()
    report = nw.analyze(model, next(data)[0][:16], joint=False)
    # Decay on the scale-invariant weights alone, where all that it does is seen in the pictures.
    groups = report.param_groups(weight_decay=weight_decay)
    groups = [g if g["view"] is not None else {**g, "weight_decay": 0.0} for g in groups]
    optimizer = make(groups, report)
    schedule = CosineAnnealingLR(optimizer, steps)
    every, losses = max(1, steps // POINTS), []
    with nw.Monitor(model, optimizer, report, every=every, rules=[]) as monitor:
        torch.manual_seed(1)  # the same batches for all
        for _ in range(steps):
            x, y = next(data)
            optimizer.zero_grad()
            loss = problem.loss(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
    at, norms = monitor.series("norm")
    angles = monitor.series("angular_update")[1].square().mean(1).sqrt()
    growth = (norms / norms[0]).log().mean(1).exp()
    means = [torch.stack(losses[max(0, t - every) : t]).mean().item() for t in at]
    return Course(at, means, growth.tolist(), angles.tolist())


def picture(problem: Problem, courses: dict[str, Course]) -> Figure:
    looks = marks([name.lower() for name in courses])

    def panel(title: str, quantity: str, spacing: Spacing) -> Lines:
        lines = (
            Line(
                name.lower(),
                name,
                tuple(course.steps),
                tuple(getattr(course, quantity)),
                colour=looks[name.lower()][0],
                dash=looks[name.lower()][1],
            )
            for name, course in courses.items()
        )
        return Lines(title, "", Axis("step", Spacing.TIGHT), Axis("", spacing), tuple(lines))

    return Figure(
        "",
        (
            panel("Norm ÷ norm at the start", "norm", Spacing.LOG),
            panel("Angle per step, rad", "angle", Spacing.LOG),
            panel("Training loss", "loss", Spacing.LOG),
        ),
        columns=2,
        width=820,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--out", type=Path, default=Path("gallery"))
    parser.add_argument("--only", choices=[p.title for p in PROBLEMS], help="one of the problems")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for problem in (p for p in PROBLEMS if arguments.only in (None, p.title)):
        for kind, contenders in (("optimizers", OPTIMIZERS), ("policies", POLICIES)):
            courses = {
                name: train(problem, make, weight_decay, arguments.steps)
                for name, (make, weight_decay) in contenders.items()
            }
            save(picture(problem, courses), arguments.out / f"{problem.title}-{kind}.svg")
            print(f"\n{problem.title}, {kind}\n\n| | norm × | angle halfway | loss at the end |")
            print("|---|---|---|---|")
            for name, course in courses.items():
                angle, loss = course.angle[len(course.angle) // 2], course.loss[-1]
                print(f"| {name} | {course.norm[-1]:.2f} | {angle:.4f} rad | {loss:.3f} |")
