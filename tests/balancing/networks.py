"""Small networks in float64, with the symmetries that a reader can name."""

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two summed branches: both are read by `b` and by `d`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 7)
        self.c, self.d = nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return self.d(h + self.c(self.b(h).relu()).relu())


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.gate, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        h = self.norm(x)
        return self.down(self.up(h) * F.silu(self.gate(h)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).flatten(2))


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.a = nn.Parameter(torch.randn(3, 6))
        self.b = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return (self.base(x) + F.linear(F.linear(x, self.a), self.b)).tanh()


class Recurrent(nn.Module):
    """A ReLU recurrence, whose square weight has each unit as a row and as a column."""

    def __init__(self):
        super().__init__()
        self.cell = nn.RNN(4, 5, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0])


class Squared(nn.Module):
    """A squared ReLU, through which the scale passes as its square."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.b(self.a(x).relu().square())


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 16, 6),
        nn.ReLU(),
        nn.Linear(6, 2),
    )


def mlp():
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.LeakyReLU(), nn.Linear(7, 3)
    )


NETWORKS = {
    "mlp": (mlp, (9, 5)),
    "residual": (Residual, (9, 5)),
    "convolutions": (convolutions, (6, 3, 8, 8)),
    "gated": (Gated, (3, 4, 6)),
    "attention": (Attention, (3, 5, 8)),
    "lora": (LoRA, (9, 6)),
    "recurrent": (Recurrent, (3, 4, 4)),
    "squared": (Squared, (9, 5)),
}


def built(name, seed=0):
    """A network of the table and a batch, both in float64."""
    make, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = make().double()
    return model, torch.randn(shape, dtype=torch.float64, generator=generator)
