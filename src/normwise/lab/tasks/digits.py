"""Handwritten digits of 8×8 pixels, bundled with scikit-learn: real data without a download."""

from __future__ import annotations

import torch

from normwise.lab.models import ConvNet
from normwise.lab.tasks.task import Data, Task

__all__ = ["DIGITS"]


def load() -> Data:
    """The 1797 digits, half of each class for training and half for testing.

    Half, and not the usual fifth, because one image of a small test set would weigh as much as the
    differences that the comparison looks for.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.5, random_state=0, stratify=labels
    )
    mean, std = train_x.mean(), train_x.std()

    def inputs(x: object) -> torch.Tensor:
        pixels: torch.Tensor = torch.as_tensor(x, dtype=torch.float32)
        return ((pixels - float(mean)) / float(std)).view(-1, 1, 8, 8)

    return Data(
        train_inputs=inputs(train_x),
        train_targets=torch.as_tensor(train_y, dtype=torch.int64),
        test_inputs=inputs(test_x),
        test_targets=torch.as_tensor(test_y, dtype=torch.int64),
        classes=10,
    )


DIGITS = Task(
    name="digits",
    title="handwritten digits",
    source=(
        "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine "
        "Learning Repository, as bundled with scikit-learn (sklearn.datasets.load_digits)"
    ),
    epochs=30,
    batch_size=64,
    load=load,
    model=lambda data: ConvNet(data.train_inputs.shape[1], data.classes),
)
