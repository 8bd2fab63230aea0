"""What an analysis costs, and what it spares AdamP.

    python benchmarks/invariance.py cost  [--threads 2] [--batch 2] [--size 64]
    python benchmarks/invariance.py gpt2  [--threads 2]
    python benchmarks/invariance.py gates [--steps 500] [--seed 0]

``cost`` analyzes transformers' ResNet-50 at random weights and compares time and peak memory with
one training step of the same network in float64. ``gpt2`` analyzes a GPT-2 of 12 layers and width
128, all symmetries included, beside a search for symmetries of whole tensors alone, which takes a
backward pass for each independent equation. ``gates`` trains a network with a head that no
normalization follows, and counts the steps at which the cosine gate of AdamP decides wrongly.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import normwise
from normwise.geometry import View
from normwise.invariance import Report, analyze
from normwise.invariance.nullspace import RowSpace, null_space
from normwise.invariance.replica import Replica
from normwise.optim.projection import gated_radial


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model: nn.Module = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    return model


def training_step(batch: int, size: int) -> None:
    """One step of SGD with momentum in float64."""
    model = resnet50().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(batch, 3, size, size, dtype=torch.float64)).logits.square().mean().backward()
    optimizer.step()


def analysis(batch: int, size: int) -> None:
    report = analyze(resnet50(), torch.randn(batch, 3, size, size))
    assert len(report.views()) == 53


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    """12 layers, width 128, 4 heads, and a batch of 2 sequences of 32 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 12, "n_embd": 128, "n_head": 4, "n_positions": 64, "vocab_size": 256}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))
    return model, {"input_ids": torch.randint(0, 256, (2, 32))}


def all_symmetries(batch: int, size: int) -> None:
    report = analyze(*gpt2())
    # Four families a layer of 128 units each, and the residual stream.
    assert len(report.symmetries) == 4 * 12 + 1
    assert all(row.kind in ("balanced", "none") for row in report)


def whole_tensors(batch: int, size: int) -> None:
    """The null space of the Euler products of whole tensors, from scratch."""
    replica = Replica(*gpt2(), seed=0, mode="train")
    names = list(replica.params)
    rows: list[Tensor] = []
    space: RowSpace | None = None
    for point in range(len(names)):
        replica.move(point)
        outputs = replica.run(graph=True)
        for draw in range(len(names)):
            cotangents = replica.cotangents(outputs, 1000 * point + draw)
            grads = replica.gradients(outputs, cotangents, names, retain=True)
            row = torch.tensor(
                [
                    0.0 if g is None else float(replica.products(name, g).sum())
                    for name, g in zip(names, grads, strict=True)
                ],
                dtype=torch.float64,
            )
            space = RowSpace(row.unsqueeze(0)) if space is None else space
            if rows and not space.add(row):
                break
            rows.append(row)
        if draw == 0:
            break
    null_space(torch.stack(rows))
    print(f"  {len(rows)} backward passes for whole tensors")


def _measured(function: Callable[[int, int], None], args: argparse.Namespace, pipe: Any) -> None:
    torch.set_num_threads(args.threads)
    from transformers import GPT2LMHeadModel, ResNetForImageClassification  # noqa: F401 -- not part of the time

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    function(args.batch, args.size)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((wall, cpu, (peak - before) / 1024))


def cost(args: argparse.Namespace) -> None:
    print(f"ResNet-50 at {args.batch}×3×{args.size}×{args.size}")
    functions = {"training step, float64": training_step, "analysis": analysis}
    memory = _compared(functions, args)
    print(f"memory of the analysis: {memory[1] / memory[0]:.2f} × the training step's")


def language(args: argparse.Namespace) -> None:
    print("GPT-2, 12 layers of width 128, 2 sequences of 32 tokens")
    _compared({"all symmetries": all_symmetries, "whole tensors alone": whole_tensors}, args)


def _compared(
    functions: dict[str, Callable[[int, int], None]], args: argparse.Namespace
) -> list[float]:
    """Time and peak memory of each, in a process of its own; the memory in MiB is returned."""
    context = multiprocessing.get_context("spawn")
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'':24}{'wall, s':>10}{'CPU, s':>10}{'memory, MiB':>14}")
    memory = []
    for name, function in functions.items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_measured, args=(function, args, sender))
        process.start()
        wall, cpu, mebibytes = receiver.recv()
        process.join()
        memory.append(mebibytes)
        print(f"{name:24}{wall:10.1f}{cpu:10.1f}{mebibytes:14.0f}")
    return memory


def network_with_a_head() -> nn.Module:
    """Two convolutions before batch norms, and two linear layers before none."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.GELU(),
        nn.Linear(32, 10),
    )


def batches(steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ten classes of images around ten random means, in noise ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(10, 3, 8, 8, generator=generator)
    for _ in range(steps):
        y = torch.randint(10, (16,), generator=generator)
        yield 0.1 * means[y] + torch.randn(16, 3, 8, 8, generator=generator), y


def wrong_gates(steps: int, seed: int) -> tuple[Report, dict[str, int], dict[str, int]]:
    """Train with AdamP's ``"auto"`` and count, for each weight, the gate's wrong decisions.

    A decision is wrong if the gate is open for a weight that is not scale-invariant, or shut for
    one that is.

    Returns:
        The report that says what is right; the wrong decisions of ``"auto"``; and those of the
        report's views, given to AdamP in parameter groups.
    """
    torch.manual_seed(seed)
    model = network_with_a_head()
    data = list(batches(steps, seed))
    report = analyze(model, data[0][0])
    views = report.views()
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    chosen = {
        p: group["view"]
        for group in report.param_groups(weight_decay=1e-2)
        for p in group["params"]
    }
    auto, ours = dict.fromkeys(weights, 0), dict.fromkeys(weights, 0)
    optimizer = normwise.AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for name, p in weights.items():
            w, g = (View.channel().slices(t).unsqueeze(0) for t in (p.detach(), p.grad))
            *_, is_open = gated_radial(g, w, g, delta=0.1, eps=1e-8)
            auto[name] += bool(is_open) != (name in views)
            ours[name] += (chosen[p] is not None) != (name in views)
        optimizer.step()
    return report, auto, ours


def gates(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    report, auto, ours = wrong_gates(args.steps, args.seed)
    print(f"wrong decisions of AdamP in {args.steps} steps, seed {args.seed}")
    print(f"{'weight':12}{'is':>12}{'auto':>8}{'report':>8}")
    for name in auto:
        print(f"{name:12}{report[name].verdict:>12}{auto[name]:8}{ours[name]:8}")
    print(f"{'all':24}{sum(auto.values()):8}{sum(ours.values()):8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("cost", "gpt2", "gates"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"cost": cost, "gpt2": language, "gates": gates}[args.what](args)


if __name__ == "__main__":
    main()
