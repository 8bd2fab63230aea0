# pip install "normwise[lab]"
"""Rounding to few bits: four sets of weights of one function, and what int8 and int4 do to each."""

import argparse
import copy
import itertools

import torch
from sklearn.datasets import load_digits
from torch import nn

import normwise as nw
from normwise.balancing import rounded
from normwise.figures import Axis, Dots, Figure, Series, Spacing, save

ORDER = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
IMAGES = torch.tensor(load_digits().images, dtype=torch.float32)[ORDER].unsqueeze(1) / 16
LABELS = torch.tensor(load_digits().target)[ORDER]
Errors = dict[tuple[str, int, str], list[float]]  # by choice of weights, bits, and view
CHOICES = ("as trained", "at other scales", "balanced", "equalized")
VIEWS = {"by tensor": "layer", "by row": "channel"}


def trained(seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(1200, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES[chosen]), LABELS[chosen]).backward()
        optimizer.step()
    return model.eval()


def same_function(model: nn.Module, report: nw.Report, seed: int) -> dict[str, nn.Module]:
    scaled, balanced, equalized = (copy.deepcopy(model) for _ in range(3))
    for other in (scaled, balanced, equalized):
        report.rescale_(other, seed=seed)  # every unit by a factor from 1/2 to 2
    nw.balance(balanced, report, batch=IMAGES[:16])
    nw.equalize(equalized, report, batch=IMAGES[:16])
    return dict(zip(CHOICES, (model, scaled, balanced, equalized), strict=True))


def errors(steps: int) -> Errors:
    found: Errors = {}
    for seed in range(3):
        model = trained(seed, steps)
        report = nw.analyze(model, IMAGES[:16])
        expected = model(IMAGES[1200:]).detach()
        for choice, candidate in same_function(model, report, seed).items():
            for bits, by in itertools.product((8, 4), VIEWS):
                logits = rounded(candidate, report, bits, VIEWS[by])(IMAGES[1200:]).detach()
                error = (logits - expected).norm() / expected.norm()
                found.setdefault((choice, bits, by), []).append(error.item())
    return found


def chart(found: Errors, bits: int) -> Dots:
    series = []
    for by, colour in zip(VIEWS, ("orange", "blue"), strict=True):
        values = torch.tensor([found[choice, bits, by] for choice in CHOICES])
        ends = [tuple(v.tolist()) for v in (values.mean(1), values.amin(1), values.amax(1))]
        series.append(Series(by, *ends, colours=(colour,)))
        print(f"int{bits} {by}:", *map("{}: {:.4f}".format, CHOICES, ends[0]), sep="  ")
    x = Axis("relative error of the logits", Spacing.LOG)
    return Dots(f"int{bits}", "mean and range over three seeds", x, CHOICES, (*series,))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", default="quantization.png")
    given = parser.parse_args()
    found = errors(given.steps)
    save(Figure("", (chart(found, 8), chart(found, 4))), given.out)
