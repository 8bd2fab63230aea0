# pip install "normwise[lab]"
"""Your own network and data: normwise compare examples/your_network.py:problem --lr 0.01,0.1

Or as a script, which compares SGD and SGDP here and prints where the page is.
"""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import TensorDataset, random_split

from normwise.lab import compare, supervised


def problem():
    x, y = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    data = TensorDataset((x - x.mean(0)) / x.std(0), y)
    train, test = random_split(data, [400, 169], torch.Generator().manual_seed(0))
    return supervised(network, train, test, batch_size=50)


def network():
    hidden = nn.Linear(30, 32, bias=False)
    return nn.Sequential(hidden, nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=160, help="8 are an epoch")
    epochs = max(1, parser.parse_args().steps // 8)
    result = compare(problem, optimizers=["sgd", "sgdp"], seeds=1, epochs=epochs)
    print(result.headline, result.table, result.folder / "report.html", sep="\n")
