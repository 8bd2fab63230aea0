"""Which parameters go to the wrong optimizer: by role, and by the name-based rules of two peers.

    python benchmarks/roles.py [NAME ...]

Over small networks of transformers' configurations, one layer each, against answers that were made
by hand from their sources (``tests/optim/architectures.py``). It prints docs/groups.md's table.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import normwise as nw

sys.path.append(str(Path(__file__).parent.parent / "tests" / "optim"))

from architectures import ARCHITECTURES


def deepspeed(name: str, p: torch.Tensor) -> bool:
    """DeepSpeed 0.19.8, deepspeed/__init__.py, set_optimizer_flags."""
    return p.ndim >= 2 and "embed" not in name.lower() and "lm_head" not in name.lower()


def moonlight(name: str, p: torch.Tensor) -> bool:
    """MoonshotAI/Moonlight at abaa96e, examples/toy_train.py, get_optimizer."""
    return p.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name


def misrouted(name: str) -> tuple[int, dict[str, list[str]], float]:
    """How many hidden matrices a network has, who routes what wrongly, and seconds of analysis."""
    architecture = ARCHITECTURES[name]
    model, batch = architecture.made(name)
    start = time.perf_counter()
    report = nw.analyze(model, batch)
    seconds = time.perf_counter() - start
    routes = nw.groups(
        report, matrices=torch.optim.Muon, others=torch.optim.AdamW, heads="split"
    ).routes
    wrong: dict[str, list[str]] = {"roles": [], "DeepSpeed": [], "Moonlight": []}
    hidden = 0
    for route in routes:
        p = model.get_parameter(route.name)
        is_hidden, matrices = architecture.answer(route.name)
        hidden += is_hidden
        if (route.destination == "matrices") != is_hidden:
            wrong["roles"].append(route.name)
        elif is_hidden and matrices not in (None, len(route.blocks) or 1):
            wrong["roles"].append(f"{route.name} as {len(route.blocks) or 1} of {matrices}")
        for peer, rule in (("DeepSpeed", deepspeed), ("Moonlight", moonlight)):
            if rule(route.name, p) != is_hidden:
                wrong[peer].append(f"{route.name} {'kept out' if is_hidden else 'let in'}")
    return hidden, wrong, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=[*ARCHITECTURES], metavar="NAME")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    totals, spent, fine = {"hidden": 0, "roles": 0, "DeepSpeed": 0, "Moonlight": 0}, [], []
    print("| network | hidden matrices | wrong by role | by DeepSpeed's names | by Moonlight's |")
    print("|---|---|---|---|---|")
    for name in names:
        hidden, wrong, seconds = misrouted(name)
        totals["hidden"] += hidden
        spent.append(seconds)
        for who, them in wrong.items():
            totals[who] += len(them)
        if any(wrong.values()):
            cells = ["; ".join(f"`{w}`" for w in them) or "–" for them in wrong.values()]
            print(f"| {name} | {hidden} | {' | '.join(cells)} |", flush=True)
        else:
            fine.append(name)
    print("| all | " + " | ".join(str(n) for n in totals.values()) + " |")
    print(f"\n{len(names)} networks. All three rules are right for {', '.join(fine)}.")
    print(f"Analysis took {min(spent):.1f} to {max(spent):.1f} s each.")


if __name__ == "__main__":
    main()
