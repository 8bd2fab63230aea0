"""A Lightning module by its steps; the stand-in has what a module has, without Lightning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from normwise import lab
from normwise.lab.errors import UsageError
from normwise.lab.running.invariant import invariant_views

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, (X[:, 0] > 0).long())
CPU = torch.device("cpu")


class Module(nn.Module):
    """As `lightning.LightningModule`: its steps log to a trainer, which is not there."""

    automatic_optimization = True

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def log(self, name, value, **options):
        raise RuntimeError("no trainer")

    log_dict = log

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        hits = (out.argmax(1) == y).float().mean()
        self.log_dict({"val_loss": F.cross_entropy(out, y), "val_acc": hits})


def test_what_it_logs_is_averaged_over_examples_and_its_step_is_the_loss():
    problem = lab.lightning(Module, DATA, DATA, metrics=["val_acc", "val_loss"], batch_size=25)
    problem = problem.fresh(CPU)
    batch = problem.batch(torch.arange(10), torch.Generator().manual_seed(0))
    expected = F.cross_entropy(problem.model.net(X[:10]), DATA.tensors[1][:10])
    torch.testing.assert_close(problem.loss(batch), expected)
    found = problem.evaluate().metrics
    problem.model.eval()
    out = problem.model.net(X)
    assert found["val_loss"] == pytest.approx(F.cross_entropy(out, DATA.tensors[1]).item())
    hits = (out.argmax(1) == DATA.tensors[1]).double().mean()
    assert found["val_acc"] == pytest.approx(hits.item())
    assert set(invariant_views(problem, 20).views) == {"net.0.weight"}
    copy.deepcopy(problem.model)  # as the analysis does: what it logs to holds no data


def test_a_lightning_module_is_compared(tmp_path):
    accuracy = lab.Metric("val_acc", "validation accuracy", "%", 100.0)
    problem = lab.lightning(Module, DATA, DATA, metrics=accuracy, batch_size=20, epochs=2)
    result = lab.compare(problem, optimizers=["sgd", "sgdp"], seeds=1, out=tmp_path / "a")
    assert "validation accuracy" in result.headline
    assert "net.0.weight" in result.headline


class Manual(Module):
    automatic_optimization = False


class Fails(Module):
    def training_step(self, batch, batch_idx):
        raise KeyError("no trainer")


@pytest.mark.parametrize(
    ("make", "given", "words"),
    [
        (nn.BatchNorm1d(4).__class__, {}, "make_model raised"),
        (lambda: nn.Linear(4, 2), {}, "has no training_step"),
        (Manual, {}, "steps its optimizers itself"),
        (Fails, {}, "training_step of the module .* raised KeyError"),
        (Module, {"metrics": "val_f1"}, "logged no 'val_f1' but 'val_loss', 'val_acc'"),
        (Module, {"epochs": 0}, "epochs 0 is not allowed"),
    ],
)
def test_a_module_that_cannot_be_compared_is_said_before_anything_is_trained(
    tmp_path, make, given, words
):
    with pytest.raises(UsageError, match=words):
        lab.compare(lab.lightning(make, DATA, DATA, **given), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
