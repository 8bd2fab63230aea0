# pip install "normwise[lab]" deepspeed
"""DeepSpeed: AdamP on whole weights at stage 0, DeepSpeed's own Muon by role at stages 1 to 3.

    deepspeed examples/deepspeed_digits.py --stage 2     # or just python; stages need no GPU

On CPUs DeepSpeed compiles an extension when it first starts, which takes a minute or more.
"""

import argparse
import os

import deepspeed
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.integrations.deepspeed import configured, muon

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


def optimizer_for(model: nn.Module, stage: int = 0) -> torch.optim.Optimizer:
    report = nw.analyze(model, IMAGES[:32])
    if stage == 0:
        return nw.AdamP(report.param_groups(weight_decay=0.1, model=model), lr=3e-3)
    matrices, others = {"lr": 0.02, "weight_decay": 0.1}, {"lr": 3e-3, "weight_decay": 0.1}
    return muon(report, matrices=matrices, others=others, model=model)


def train(model: nn.Module, steps: int, stage: int = 0) -> float:
    optimizer = optimizer_for(model, stage)
    config = {
        "train_micro_batch_size_per_gpu": 64,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "zero_optimization": {"stage": stage},
    }
    # It adds the keys that this optimizer needs, or says why the stage would step it wrongly.
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=configured(optimizer, config)
    )
    for images, labels in batches(steps):
        loss = F.cross_entropy(engine(images.to(engine.device)), labels.to(engine.device))
        engine.backward(loss)
        engine.step()
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stage", type=int, default=0, choices=range(4))
    parser.add_argument("--local_rank", type=int, default=0, help="what the launcher gives")
    arguments = parser.parse_args()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in (alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}).items():
        os.environ.setdefault(name, value)
    print(f"loss {train(network(), arguments.steps, arguments.stage):.3f}")
    torch.distributed.destroy_process_group()
