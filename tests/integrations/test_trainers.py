"""A trainer trains as a plain loop does with the same groups."""

import copy
import functools

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.integrations.accelerate import unwrapped

if not hasattr(torch.optim, "Muon"):
    pytest.skip("Muon came with torch 2.9", allow_module_level=True)
MUON = functools.partial(torch.optim.Muon, lr=0.02)
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(12, 8), nn.Linear(8, 8, bias=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 12)

    def forward(self, x, labels=None):
        logits = self.head(self.norm(self.hidden(self.embed(x).mean(1))).relu())
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(12, (16, 5), generator=generator)
    return x, torch.randint(12, (16,), generator=generator)


def make(model, report):
    return nw.groups(report, matrices=MUON, others=ADAMW, model=model)


def plain_loop(model):
    """Four steps of a loop of one's own; the weights then, and the norms on the way."""
    model = copy.deepcopy(model)
    x, y = data()
    optimizer = make(model, nw.analyze(model, x))
    found = []
    with nw.Monitor(model, optimizer, {"hidden.weight": "layer"}, every=1, writers=[found.append]):
        for t in range(4):
            optimizer.zero_grad()
            part = slice(4 * t, 4 * t + 4)
            model(x[part], y[part])["loss"].backward()
            optimizer.step()
    return dict(model.named_parameters()), [m["norm"]["hidden.weight"] for m in found]


def assert_same(a, b):
    for name, p in b.items():
        torch.testing.assert_close(a[name], p, rtol=0, atol=0, msg=name)


def arguments(transformers, tmp_path, **options):
    return transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **options,
    )


def test_transformers_trainer_takes_any_optimizer_and_logs_the_norms(model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the trainer that is tested")
    pytest.importorskip("accelerate", reason="the trainer that is tested")
    from normwise.integrations.transformers import MonitorCallback, OptimizerFactory

    expected, norms = plain_loop(model)
    x, y = data()
    trainer = transformers.Trainer(
        model=model,
        args=arguments(transformers, tmp_path),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        optimizer_cls_and_kwargs=(OptimizerFactory, {"make": make, "batch": x}),
    )
    views = {"hidden.weight": "layer"}
    trainer.add_callback(
        MonitorCallback(lambda m, o: nw.Monitor(m, o, views, every=1), log=trainer.log)
    )
    trainer.train()
    assert_same(dict(model.named_parameters()), expected)
    logged = [entry for entry in trainer.state.log_history if "monitored_step" in entry]
    assert [entry["monitored_step"] for entry in logged] == [1, 2, 3, 4]
    assert [entry["norm/hidden.weight"] for entry in logged] == norms


def test_the_factory_says_what_it_needs(model):
    pytest.importorskip("transformers", reason="the trainer that is tested")
    from normwise.integrations.transformers import OptimizerFactory

    with pytest.raises(ValueError, match="one of batch= and report="):
        OptimizerFactory()(model, make=make)
    with pytest.raises(TypeError, match="make returned list"):
        OptimizerFactory()(model, make=lambda m, r: [], batch=data()[0])


def test_what_accelerate_has_prepared_trains_alike_and_is_unwrapped_for_hooks(model):
    accelerate = pytest.importorskip("accelerate", reason="the trainer that is tested")
    expected, norms = plain_loop(model)
    x, y = data()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, make(model, nw.analyze(model, x)))
    found = []
    with nw.Monitor(
        model, unwrapped(optimizer), {"hidden.weight": "layer"}, every=1, writers=[found.append]
    ):
        for t in range(4):
            optimizer.zero_grad()
            part = slice(4 * t, 4 * t + 4)
            accelerator.backward(prepared(x[part], y[part])["loss"])
            optimizer.step()
    assert_same(dict(model.named_parameters()), expected)
    assert [m["norm"]["hidden.weight"] for m in found] == norms


def test_lightning_steps_groups_by_role_as_one_optimizer_and_watches_several(model, tmp_path):
    lightning = pytest.importorskip("lightning", reason="the trainer that is tested")
    from normwise.integrations.lightning import MonitorCallback, configured

    expected, norms = plain_loop(model)
    x, y = data()
    report = nw.analyze(model, x)

    class Module(lightning.LightningModule):
        def __init__(self, automatic):
            super().__init__()
            self.net, self.automatic_optimization = copy.deepcopy(model), automatic

        def training_step(self, batch, _):
            loss = self.net(*batch)["loss"]
            if self.automatic_optimization:
                return loss
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            if self.automatic_optimization:
                optimizer = make(self.net, report)
                constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
                return configured(optimizer, constant)
            halves = [*self.net.embed.parameters()], [*self.net.hidden.parameters()]
            return [torch.optim.SGD(half, lr=0.1) for half in halves]

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)

    def fit(module, callback):
        lightning.Trainer(
            max_epochs=1,
            callbacks=[callback],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            accelerator="cpu",
            default_root_dir=str(tmp_path),
        ).fit(module, loader)

    views = {"net.hidden.weight": "layer", "net.embed.weight": "layer"}
    callback = MonitorCallback(lambda m, o: nw.Monitor(m, o, views, every=1))
    module = Module(True)
    fit(module, callback)
    assert_same(dict(module.net.named_parameters()), expected)
    assert [m["norm"]["net.hidden.weight"] for m in callback.monitor.history] == norms

    callback = MonitorCallback(lambda m, o: nw.Monitor(m, o, views, every=1))
    fit(Module(False), callback)
    assert callback.monitor.step == 4
    assert set(callback.monitor.layers) == set(views)


def test_torchtitans_container_knows_our_optimizers_and_matches_roles_exactly(model):
    pytest.importorskip("torchtitan.components.optimizer", reason="the trainer that is tested")
    from normwise.integrations.torchtitan import Container, param_group_configs

    expected, _ = plain_loop(model)
    x, y = data()
    report = nw.analyze(model, x)
    others = {"lr": 1e-3, "weight_decay": 0.01}
    config = Container.Config(
        param_groups=param_group_configs(
            report, {"matrices": ("Muon", {"lr": 0.02}), "others": ("AdamW", others)}
        ),
        implementation="for-loop",
    )
    container = config.build(model_parts=[model])
    for t in range(4):
        container.zero_grad()
        part = slice(4 * t, 4 * t + 4)
        model(x[part], y[part])["loss"].backward()
        container.step()
    for name, p in model.named_parameters():  # for-loop and foreach round differently
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-6)
    state = container.state_dict()
    assert any("hidden.weight" in key and "momentum_buffer" in key for key in state)
    with pytest.raises(ValueError, match="one for 'others'"):
        param_group_configs(report, {"matrices": ("Muon", {})})
