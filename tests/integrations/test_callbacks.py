"""The callbacks, with the real packages."""

import json
import sys

import pytest
import torch
from torch import nn

from normwise.monitor import JsonLines, Monitor

VIEWS = {"net.0.weight": "channel"}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 2))


def reference(steps):
    """Norms of the same training by hand."""
    model = nn.Module()
    model.net = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found = []
    x, y = data()
    with Monitor(model, optimizer, VIEWS, every=2, writers=[found.append]):
        for t in range(steps):
            optimizer.zero_grad()
            part = slice(4 * t, 4 * t + 4)
            nn.functional.cross_entropy(model.net(x[part]), y[part]).backward()
            optimizer.step()
    return {m.step: m["norm"]["net.0.weight"] for m in found}


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 4, generator=generator), torch.randint(2, (32,), generator=generator)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="the callback is for Lightning")
    from lightning.pytorch.loggers import CSVLogger

    from normwise.integrations.lightning import MonitorCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=4)
    callback = MonitorCallback(lambda m, o: Monitor(m, o, VIEWS, every=2))
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[callback],
        logger=CSVLogger(str(tmp_path)),
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=str(tmp_path),
    )
    trainer.fit(Module(), loader)
    found = {m.step: m["norm"]["net.0.weight"] for m in callback.monitor.history}
    assert found == pytest.approx(reference(8))
    assert callback.state_dict()["step"] == 8
    (log,) = tmp_path.rglob("metrics.csv")
    assert "norm/net.0.weight" in log.read_text()

    checkpoint = tmp_path / "last.ckpt"
    trainer.save_checkpoint(checkpoint)
    resumed = MonitorCallback(lambda m, o: Monitor(m, o, VIEWS, every=2))
    more = lightning.Trainer(
        max_epochs=2,
        callbacks=[resumed],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=str(tmp_path),
    )
    more.fit(Module(), loader, ckpt_path=checkpoint)
    assert [m.step for m in resumed.monitor.history] == [10, 12, 14, 16]


def test_transformers(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="the callback is for transformers' Trainer"
    )
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    from normwise.integrations.transformers import MonitorCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    path = tmp_path / "norms.jsonl"
    callback = MonitorCallback(
        lambda m, o: Monitor(m, o, VIEWS, every=2, writers=[JsonLines(path)])
    )
    model = Model()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[callback],
        optimizers=(torch.optim.AdamW(model.parameters(), lr=0.01), None),
    )
    trainer.create_scheduler = lambda *_, **__: setattr(
        trainer,
        "lr_scheduler",
        torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, 1.0),
    )
    trainer.train()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["step"]: line["norm"]["net.0.weight"] for line in lines}
    assert found == pytest.approx(reference(8))


@pytest.mark.parametrize(
    ("module", "hidden", "extra"),
    [
        ("lightning", ("lightning", "lightning.pytorch", "pytorch_lightning"), "trackers"),
        ("transformers", ("transformers",), "transformers"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(module, hidden, extra, monkeypatch):
    monkeypatch.delitem(sys.modules, f"normwise.integrations.{module}", raising=False)
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"normwise\[{extra}\]"):
        __import__(f"normwise.integrations.{module}")
