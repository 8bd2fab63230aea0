# pip install "normwise[lab]" accelerate
"""accelerate: a loop of your own for one device or many, AdamP, and a monitor on what is inside.

accelerate launch examples/accelerate_digits.py     # or just python
"""

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.integrations.accelerate import unwrapped

IMAGES = torch.tensor(load_digits().data, dtype=torch.float32) / 16
LABELS = torch.tensor(load_digits().target)


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    chosen = torch.randint(len(IMAGES), (steps, 64), generator=torch.Generator().manual_seed(0))
    return [(IMAGES[i], LABELS[i]) for i in chosen]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(64, 128, bias=False), nn.LayerNorm(128), nn.ReLU()),
        *(nn.Linear(128, 128, bias=False), nn.LayerNorm(128), nn.ReLU()),
        nn.Linear(128, 10),
    )


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    report = nw.analyze(model, IMAGES[:32])
    return nw.AdamP(report.param_groups(weight_decay=0.1, model=model), lr=3e-3)


def train(model: nn.Module, steps: int) -> nw.Monitor:
    accelerator = Accelerator()
    optimizer = optimizer_for(model)  # before prepare, which may shard the model
    loader = torch.utils.data.DataLoader(batches(steps), batch_size=None)
    wrapped, prepared, loader = accelerator.prepare(model, optimizer, loader)
    # Prepared, an optimizer is a wrapper whose hooks nobody calls; a monitor belongs inside.
    with nw.Monitor(accelerator.unwrap_model(wrapped), unwrapped(prepared), every=20) as monitor:
        for step, (images, labels) in enumerate(loader, 1):
            prepared.zero_grad()
            loss = F.cross_entropy(wrapped(images), labels)
            accelerator.backward(loss)
            prepared.step()
            if step % 100 == 0:
                accelerator.print(f"step {step}: loss {loss.item():.3f}")
    return monitor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    print(train(network(), parser.parse_args().steps))
