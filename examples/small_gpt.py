# pip install "normwise[lab]"
"""A small GPT on the characters of a text file: AdamP on exactly the scale-invariant weights.

RMSNorm before each block and on queries and keys (QK norm), squared ReLU, no biases.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out, self.wide, self.narrow = (
            nn.Linear(inward, outward, bias=False)
            for inward, outward in [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:])
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for layer in (self.query, self.key, self.value)
        )
        q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        x = x + self.out(mixed.transpose(-2, -3).flatten(-2))
        return x + self.narrow(F.relu(self.wide(F.rms_norm(x, x.shape[-1:]))).square())


class GPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(layers)))
        self.readout = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.token(tokens) + self.place.weight[: tokens.shape[-1]])
        return self.readout(F.rms_norm(x, x.shape[-1:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", type=Path, default=Path(__file__), help="a text file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--picture", type=Path, default=Path("gpt-norms.png"))
    arguments = parser.parse_args()

    text = arguments.text.read_text(encoding="utf-8")
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(letter) for letter in text])
    context, batch = 64, 16
    torch.manual_seed(0)
    model = GPT(len(letters), context)
    report = nw.analyze(model, tokens[None, :context])
    print(report)
    optimizer = nw.AdamP(report.param_groups(weight_decay=0.1), lr=3e-3)
    with nw.Monitor(model, optimizer, report, every=10) as monitor:
        for step in range(1, arguments.steps + 1):
            starts = torch.randint(len(tokens) - context, (batch, 1))
            window = tokens[starts + torch.arange(context + 1)]
            loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0 or step == arguments.steps:
                print(f"step {step}: {loss.item():.3f} nats a character")
    monitor.plot(arguments.picture)
