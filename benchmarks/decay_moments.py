"""Where the decay enters Adam: the first-moment experiment of arXiv 2012.13841 in a small form.

An MLP on 1,000 images of MNIST, 14×14, under Adam with five couplings of the decay, over a grid of
learning rates and λ; the accuracy is on the 10,000 test images. All networks of one coupling, every
cell and seed of the grid, are trained side by side as one batch of matrices::

    NORMWISE_DATA=... python benchmarks/decay_moments.py run  decay-moments.json
    python benchmarks/decay_moments.py show decay-moments.json decay_moments.png

``NORMWISE_DATA`` is a directory with MNIST in its published IDX files, in it or in ``mnist/``.

With a = m̂(·), the first moment of what is in brackets, b = √v̂(·) + 1e-8, g the gradient of the
loss and s the schedule of the learning rate (cosine, from 1 to 0), a step takes from w

=================== ======================================== ====================================
coupling            step                                     the L2 term is
=================== ======================================== ====================================
L2                  sη·a(g + λw)/b(g + λw)                   in both moments: torch.optim.Adam
second moment only  sη·(a(g) + λw)/b(g + λw)                 beside the first, and in the second
in the scale alone  sη·a(g)/b(g + λw)                        in the second, and nowhere else
adaptive            sη·(a(g) + λw)/b(g)                      in neither, but divided by the second
decoupled           sη·a(g)/b(g) + sλw                       in neither: AdamW, the paper's λ
=================== ======================================== ====================================
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.figures import Figure, Heat, save

COUPLINGS = ("L2", "second moment only", "in the scale alone", "adaptive", "decoupled")
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
DECAYS = [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def idx(name: str) -> Tensor:
    """One of MNIST's files: a header of 4 bytes, the sizes, the bytes."""
    root = Path(os.environ["NORMWISE_DATA"])
    for path in (folder / f for folder in (root, root / "mnist") for f in (name, f"{name}.gz")):
        if path.exists():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
            return torch.frombuffer(bytearray(raw[4 + 4 * raw[3] :]), dtype=torch.uint8).view(shape)
    raise FileNotFoundError(f"{root} has no {name}, nor {name}.gz, nor mnist/")


def images(name: str) -> Tensor:
    x = F.avg_pool2d(idx(name).float().unsqueeze(1) / 255, 2).flatten(1)
    return (x - 0.1307) / 0.27


def start(seeds: list[int], cells: int, hidden: int) -> list[Tensor]:
    """He's initialization, one for each seed and the same in every cell: (cells·seeds, ...)."""
    layers = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        layers.append(
            [
                torch.randn(196, hidden, generator=generator) * math.sqrt(2 / 196),
                torch.zeros(1, hidden),
                torch.randn(hidden, 10, generator=generator) * math.sqrt(2 / hidden),
                torch.zeros(1, 10),
            ]
        )
    return [torch.stack(t).repeat(cells, 1, 1).requires_grad_() for t in zip(*layers, strict=True)]


def logits(params: list[Tensor], x: Tensor) -> Tensor:
    """Of every network: x is (networks, batch, 196)."""
    w1, b1, w2, b2 = params
    return torch.baddbmm(b2, F.relu(torch.baddbmm(b1, x, w1)), w2)


@torch.no_grad()
def adam_step(
    params: list[Tensor],
    moments: list[tuple[Tensor, Tensor]],
    t: int,
    schedule: float,
    rate: Tensor,
    decay: Tensor,
    coupling: str,
) -> None:
    """One step of every network; biases, the odd parameters, are not decayed."""
    for i, (w, (m, v)) in enumerate(zip(params, moments, strict=True)):
        g = w.grad
        assert g is not None
        penalty = decay * w if i % 2 == 0 else torch.zeros_like(w)
        m.lerp_(g + penalty if coupling == "L2" else g, 1 - BETA1)
        scaled = g if coupling in ("adaptive", "decoupled") else g + penalty
        v.mul_(BETA2).addcmul_(scaled, scaled, value=1 - BETA2)
        above = m / (1 - BETA1**t)
        if coupling in ("second moment only", "adaptive"):
            above += penalty
        below = (v / (1 - BETA2**t)).sqrt_().add_(EPS)
        w -= schedule * rate * above / below
        if coupling == "decoupled":
            w -= schedule * penalty
        w.grad = None


def train(coupling: str, seeds: list[int], epochs: int, hidden: int, batch: int) -> dict:
    x, y = images("train-images-idx3-ubyte")[:1000], idx("train-labels-idx1-ubyte")[:1000].long()
    cells = [(rate, decay) for rate in RATES for decay in DECAYS]
    params = start(seeds, len(cells), hidden)
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in params]
    per_network = [cell for cell in cells for _ in seeds]
    rate, decay = (torch.tensor(column).view(-1, 1, 1) for column in zip(*per_network, strict=True))
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    steps, began = epochs * (len(x) // batch), time.perf_counter()
    for t in range(steps):
        if t % (len(x) // batch) == 0:
            order = torch.stack([torch.randperm(len(x), generator=g) for g in generators])
        index = order[:, (t * batch) % len(x) :][:, :batch]
        out = logits(params, x[index].repeat(len(cells), 1, 1))
        labels = y[index].repeat(len(cells), 1)
        # A sum over the networks, each of which then gets the gradient of its own mean.
        loss = F.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum") / batch
        loss.backward()
        schedule = (1 + math.cos(math.pi * t / steps)) / 2
        adam_step(params, moments, t + 1, schedule, rate, decay, coupling)
    accuracy = test_accuracy(params).view(len(RATES), len(DECAYS), len(seeds))
    norm = sum(w.detach().square().sum((1, 2)) for w in params[::2]).sqrt()
    return {
        "accuracy": accuracy.tolist(),
        "norm": norm.view(accuracy.shape).tolist(),
        "seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def test_accuracy(params: list[Tensor]) -> Tensor:
    x, y = images("t10k-images-idx3-ubyte"), idx("t10k-labels-idx1-ubyte").long()
    right = torch.zeros(len(params[0]))
    for part, labels in zip(x.split(500), y.split(500), strict=True):
        out = logits(params, part.expand(len(right), -1, -1))
        right += (out.argmax(2) == labels).sum(1)
    return 100 * right / len(x)


def show(results: dict, picture: Path | None) -> None:
    rates, decays = results["rates"], results["decays"]
    margin = 0.5
    print(
        f"Seeds {results['seeds']}, {results['epochs']} epochs. Accuracy in %, mean of the seeds."
    )
    print(
        f"| coupling | best (range of seeds) | at η, λ | cells within {margin} of the best of all |"
    )
    print("|---|---|---|---|")
    means = {c: torch.tensor(r["accuracy"]).mean(2) for c, r in results["couplings"].items()}
    best_of_all = max(float(mean.max()) for mean in means.values())
    for coupling, mean in means.items():
        i, j = divmod(int(mean.argmax()), len(decays))
        seeds = results["couplings"][coupling]["accuracy"][i][j]
        near = int((mean >= best_of_all - margin).sum())
        print(
            f"| {coupling} | {mean.max():.2f} ({min(seeds):.2f}–{max(seeds):.2f}) "
            f"| {rates[i]:g}, {decays[j]:g} | {near} of {mean.numel()} |"
        )
    print("\nThe best λ > 0 at each η, and what it gains over λ = 0 there, in points:\n")
    print("| coupling | " + " | ".join(f"η = {rate:g}" for rate in rates) + " |")
    print("|---" * (len(rates) + 1) + "|")
    for coupling, mean in means.items():
        best = mean[:, 1:].argmax(1) + 1
        row = [f"{decays[j]:g} ({mean[i, j] - mean[i, 0]:+.1f})" for i, j in enumerate(best)]
        print(f"| {coupling} | " + " | ".join(row) + " |")
    l2, second = means["L2"], means["second moment only"]
    kept = (l2 + second) / 2 >= best_of_all - 10
    print(
        f"\nL2 less second moment only, the {int(kept.sum())} cells above "
        f"{best_of_all - 10:.0f}%: mean {(l2 - second)[kept].mean():+.2f}, largest "
        f"{(l2 - second)[kept].abs().max():.2f} points"
    )
    if picture is not None:
        draw(results, means, picture)


def draw(results: dict, means: dict[str, Tensor], picture: Path) -> None:
    rates, decays = results["rates"], results["decays"]
    best = max(float(mean.max()) for mean in means.values())
    charts = tuple(
        Heat(
            coupling,
            "",
            tuple(f"{rate:g}" for rate in reversed(rates)),
            tuple(f"{decay:g}" for decay in decays),
            tuple(tuple(row) for row in reversed(mean.tolist())),
            "λ; rows: learning rate η",
            "%",
            text=lambda value: f"{value:.0f}" if value < best - 6 else f"{value:.1f}",
            least=best - 6,
            most=best,
            outlined=outlined(mean),
        )
        for coupling, mean in means.items()
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    save(Figure("", charts, columns=3, note="Test accuracy, %", width=1360), picture)


def outlined(mean: Tensor) -> tuple[int, int]:
    """Row, from the top, and column of the best cell."""
    i, j = divmod(int(mean.argmax()), mean.shape[1])
    return len(mean) - 1 - i, j


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "show"])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.action == "show":
        show(json.loads(arguments.results.read_text()), arguments.picture)
        return
    settings = {key: getattr(arguments, key) for key in ("seeds", "epochs", "hidden", "batch")}
    results = {
        **settings,
        "rates": RATES,
        "decays": DECAYS,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "couplings": {},
    }
    for coupling in COUPLINGS:
        results["couplings"][coupling] = train(coupling, **settings)
        print(coupling, f"{results['couplings'][coupling]['seconds']:.0f} s", flush=True)
        arguments.results.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
