# pip install "normwise[lab,vision]"
"""timm: its factory with our AdamP, groups from the analysis, learning rates by layer as timm's.

Try `--opt muon`: timm's own Muon takes the hidden matrices alone, by the same groups.
"""

import argparse
import functools

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.integrations.timm import param_groups, register

IMAGES = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
LABELS = torch.tensor(load_digits().target)


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    chosen = torch.randint(len(IMAGES), (steps, 64), generator=torch.Generator().manual_seed(0))
    return [(IMAGES[i], LABELS[i]) for i in chosen]


def network() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    sizes |= {"embed_dim": 48, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def optimizer_for(model: nn.Module, opt: str = "nwadamp") -> torch.optim.Optimizer:
    register()  # timm's names for ours: nwadamp, nwsgdp, nwsgdw
    grouped = functools.partial(
        param_groups,
        report=nw.analyze(model, IMAGES[:16]),
        weight_decay=0.05,
        layer_decay=0.75,
    )
    return create_optimizer_v2(model, opt, lr=3e-3, param_group_fn=grouped)


def train(model: nn.Module, steps: int, opt: str = "nwadamp") -> nw.Monitor:
    optimizer = optimizer_for(model, opt)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
    with nw.Monitor(model, optimizer, every=20) as monitor:
        for step, (images, labels) in enumerate(batches(steps), 1):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step_update(step)  # it knows the layers' lr_scale; torch's schedules do not
            if step % 50 == 0:
                print(f"step {step}: loss {loss.item():.3f}")
    return monitor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--opt", default="nwadamp")
    arguments = parser.parse_args()
    print(train(network(), arguments.steps, arguments.opt))
