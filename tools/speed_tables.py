"""The tables of docs/kernels.md, from what benchmarks/optimizers.py and benchmarks/gpu.py write.

python tools/speed_tables.py docs/results/speed_cpu.json
python tools/speed_tables.py docs/results/gpu.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
NAMES = {
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "vit_b_16": "ViT-B/16",
    "gpt2": "GPT-2 small",
    "small": "nine small tensors",
}
OURS = {"Adam": ("AdamP", "AdamW"), "SGD": ("SGDP", "SGD")}


def by_model(records: list[Record]) -> Iterator[tuple[str, str, dict[str, Record]]]:
    """Models and families, and the records of each by peer: Adam's rows first."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for r in records:
        found.setdefault((r["family"], r["model"]), {})[r["peer"]] = r
    for family in OURS:
        for (of, model), peers in found.items():
            if of == family:
                yield NAMES[model], family, peers


def table(title: list[str], rows: Iterator[list[str]]) -> str:
    """A Markdown table."""
    lines = [title, ["---"] * len(title), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(x: float | None, digits: int = 3) -> str:
    """With so many digits that count, and none of them lost to an exponent."""
    return "–" if x is None else f"{float(f'{x:.{digits}g}'):g}"


def of_cpu(found: Record) -> str:
    """Milliseconds and their quartiles, ratios, and bytes per second."""

    def time(r: Record) -> str:
        median, low, high = (number(1e3 * r[k]) for k in ("median", "low", "high"))
        return f"{median} ({low} … {high})"

    def rows() -> Iterator[list[str]]:
        for model, family, peers in by_model(found["results"]):
            ours, theirs = OURS[family]
            fused = peers[f"torch {theirs}, fused"]
            views, auto = (peers[f"{ours}, {view}, fused"] for view in ("channel", "auto"))
            free = peers["AdamP, no view, fused" if family == "Adam" else "SGDW, fused"]
            rates = [f"{r['bytes_per_second'] / 1e9:.0f}" for r in (fused, views, auto)]
            yield [
                model,
                family,
                time(fused),
                *(f"{time(r)}, {r['ratio']:.2f}" for r in (views, auto)),
                f"{free['ratio']:.2f}",
                f"{peers[f'torch {theirs}, foreach']['ratio']:.2f}",
                f"{peers[f'official {ours}']['ratio']:.1f}",
                ", ".join([*rates, f"{fused['best_stream'] / 1e9:.0f}"]),
            ]

    title = ["model", "", "torch fused", "explicit views", '`"auto"`', "no view, SGDW"]
    title += ["torch foreach", "official", 'GB/s: torch, views, `"auto"`, best stream']
    return table(title, rows())


def of_gpu(found: Record) -> str:
    """The device's own milliseconds, then those of the host's clock; then around an optimizer."""
    speed = found["speed"]

    def rows(time: str, ratio: str, last: str) -> Iterator[list[str]]:
        for model, family, peers in by_model(speed):
            ours, theirs = OURS[family]
            fused = peers[f"torch {theirs}, fused"]
            views, auto = (peers[f"{ours}, {view}, fused"] for view in ("channel", "auto"))
            free = peers["AdamP, no view, fused" if family == "Adam" else "SGDW, fused"]
            yield [
                model,
                family,
                number(fused[time]),
                *(f"{number(r[time])}, {number(r[ratio])}" for r in (views, auto)),
                *(number(peers[p][ratio], 2) for p in (f"torch {theirs}, foreach", last % ours)),
                number(free[ratio], 2),
            ]

    def around() -> Iterator[list[str]]:
        kinds = [(w, v) for v in ("channel", "layer") for w in ("tangential", "sphere")]
        for model, family, peers in by_model(speed):
            label = f"(torch {OURS[family][1]}, fused)"
            names = [f"{wrapper}{label}, {view}" for wrapper, view in kinds]
            names.append(f"tangential{label}, plain")
            yield [
                model,
                family,
                *(number(peers[n]["graph_ratio"]) for n in names),
                *(number(peers[n]["ratio"]) for n in (names[0], names[1], names[-1])),
            ]

    title = ["model", "", "torch fused, ms", "explicit views", '`"auto"`', "torch foreach"]
    wrapped = ["`tangential`, channel", "`sphere`, channel", "`tangential`, layer"]
    wrapped += ["`sphere`, layer", "plain way"]
    launched = ["launched: `tangential`", "`sphere`", "plain way"]
    return "\n\n".join(
        (
            table(
                [*title, "ours, foreach", "no view, SGDW"],
                rows("graph_ms", "graph_ratio", "%s, channel, foreach"),
            ),
            table([*title, "official", "no view, SGDW"], rows("ms", "ratio", "official %s")),
            table(["model", "", *wrapped, *launched], around()),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    found = json.loads(parser.parse_args().file.read_text())
    make: Callable[[Record], str] = of_gpu if "speed" in found else of_cpu
    print(make(found))


if __name__ == "__main__":
    main()
