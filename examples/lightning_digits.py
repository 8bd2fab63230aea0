# pip install "normwise[lab]" lightning
"""Lightning: Muon for hidden matrices and AdamW for the rest as one optimizer, norms in its log."""

import argparse
import functools
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.integrations.lightning import MonitorCallback, configured

IMAGES = torch.tensor(load_digits().data, dtype=torch.float32) / 16
LABELS = torch.tensor(load_digits().target)


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    chosen = torch.randint(len(IMAGES), (steps, 64), generator=torch.Generator().manual_seed(0))
    return [(IMAGES[i], LABELS[i]) for i in chosen]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()),
        *(nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()),
        nn.Linear(128, 10),
    )


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return nw.groups(
        nw.analyze(model, IMAGES[:32]),
        matrices=functools.partial(torch.optim.Muon, lr=0.02, weight_decay=0.1),
        others=functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
        model=model,
    )


class Digits(lightning.LightningModule):
    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict:
        optimizer = optimizer_for(self.net)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, self.steps)
        return configured(optimizer, falling)  # the schedule counts steps


def train(net: nn.Module, steps: int, out: Path) -> MonitorCallback:
    norms = MonitorCallback(lambda model, optimizer: nw.Monitor(model, optimizer, every=20))
    lightning.Trainer(
        max_epochs=1,
        callbacks=[norms],
        logger=CSVLogger(str(out)),
        default_root_dir=str(out),
        enable_checkpointing=False,
    ).fit(Digits(net, steps), torch.utils.data.DataLoader(batches(steps), batch_size=None))
    return norms


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("lightning-digits"))
    arguments = parser.parse_args()
    callback = train(network(), arguments.steps, arguments.out)
    print(callback.monitor)
