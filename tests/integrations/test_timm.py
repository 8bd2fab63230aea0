"""timm's factory takes our optimizers by name, and groups that know views, roles and layers."""

import functools
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import normwise as nw
import normwise.integrations


class Net(nn.Module):
    """With what timm's models say of themselves."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.position = nn.Parameter(torch.randn(8, 6, 6))
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = (self.bn(self.stem(x)) + self.position).relu().mean((2, 3))
        return self.head(self.hidden(x).relu())

    def no_weight_decay(self):
        return {"hidden.weight"}

    def group_matcher(self, coarse=False):
        return {"stem": r"^stem|^bn|^position", "blocks": r"^hidden"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 6, 6, generator=generator), torch.arange(12) % 5


@dataclass(frozen=True)
class OptimInfo:
    """The interface of timm's."""

    name: str
    opt_class: type
    description: str = ""
    has_eps: bool = True
    has_momentum: bool = False
    has_betas: bool = False


class Registry:
    """Likewise: names, and optimizers made of them with the arguments that they take."""

    def __init__(self):
        self.infos = {}

    def register(self, info):
        assert info.name not in self.infos
        self.infos[info.name] = info

    def list_optimizers(self):
        return sorted(self.infos)

    def create(self, model, opt, lr, weight_decay, momentum=0.9, param_group_fn=None, **options):
        info = self.infos[opt]
        options |= {"momentum": momentum} if info.has_momentum else {}
        params = param_group_fn(model)
        return info.opt_class(params, lr=lr, weight_decay=weight_decay, **options)


def param_groups_layer_decay(model, weight_decay, layer_decay, min_scale=0.0, no_opt_scale=None):
    """Likewise: three layers, of which the head's is the last."""
    groups = {}
    for name, p in model.named_parameters():
        depth = {"hidden": 1, "head": 0}.get(name.split(".")[0], 2)
        scale = max(layer_decay**depth, min_scale)
        if no_opt_scale and scale < no_opt_scale:
            p.requires_grad = False
            continue
        group = groups.setdefault(scale, {"lr_scale": scale, "params": []})
        group["params"].append(p)
    return list(groups.values())


@pytest.fixture
def module_anew(monkeypatch):
    """Import normwise's module again, with what stands for timm now."""
    name = "normwise.integrations.timm"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(normwise.integrations, "timm", raising=False)


@pytest.fixture(params=["stand-in", "timm"])
def timm(request, monkeypatch, module_anew):
    """The factory ``create_optimizer_v2``, of timm where it is installed, and of a stand-in."""
    if request.param == "timm":
        reason = "the factory that is tested; it needs a torchvision for this torch"
        return pytest.importorskip(
            "timm.optim", reason=reason, exc_type=(ImportError, RuntimeError)
        )
    registry = Registry()
    optim, factory = types.ModuleType("timm.optim"), types.ModuleType("timm.optim._optim_factory")
    optim.OptimInfo, factory.default_registry = OptimInfo, registry
    optim.param_groups_layer_decay = param_groups_layer_decay
    optim.create_optimizer_v2, optim.list_optimizers = registry.create, registry.list_optimizers
    package = types.ModuleType("timm")
    for module in (package, optim, factory):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return optim


def test_its_factory_makes_our_optimizers_and_they_step_as_ours_do(timm, model):
    from normwise.integrations.timm import param_groups, register

    names = register()
    assert names == register()
    assert set(names) <= set(timm.list_optimizers())
    x, y = data()
    report = nw.analyze(model, x)
    grouped = functools.partial(param_groups, report=report, weight_decay=0.1)
    made = {
        "nwadamp": functools.partial(nw.AdamP, betas=(0.8, 0.9)),
        "nwsgdp": functools.partial(nw.SGDP, momentum=0.9),
        "nwsgdw": functools.partial(nw.SGDW, momentum=0.9),
    }
    for name, plain in made.items():
        torch.manual_seed(0)
        pair = Net(), Net()
        pair[1].load_state_dict(pair[0].state_dict())
        options = {"betas": (0.8, 0.9)} if name == "nwadamp" else {}
        theirs = timm.create_optimizer_v2(
            pair[0], name, lr=0.01, weight_decay=0.1, param_group_fn=grouped, **options
        )
        ours = plain(grouped(pair[1]), lr=0.01)
        assert type(theirs) is type(ours)
        for one, optimizer in zip(pair, (theirs, ours), strict=True):
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(one(x), y).backward()
                optimizer.step()
        for p, q in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
            assert torch.equal(p, q)


def test_groups_have_views_roles_and_the_learning_rates_of_layers(timm, model):
    from normwise.integrations.timm import param_groups

    report = nw.analyze(model, data()[0])
    names = {p: name for name, p in model.named_parameters()}
    found = {
        names[p]: (g["lr_scale"], g["weight_decay"], g["view"], g["use_fallback"])
        for g in param_groups(model, report, weight_decay=0.1, layer_decay=0.5)
        for p in g["params"]
    }
    assert found == {
        "stem.weight": (0.25, 0.1, "channel", False),
        "bn.weight": (0.25, 0.0, None, True),
        "bn.bias": (0.25, 0.0, None, True),
        "position": (0.25, 0.0, None, True),  # added: a bias, whatever its shape
        "hidden.weight": (0.5, 0.0, None, False),  # the model's own no_weight_decay
        "hidden.bias": (0.5, 0.0, None, True),
        "head.weight": (1.0, 0.1, None, True),
        "head.bias": (1.0, 0.0, None, True),
    }


def test_layers_that_are_not_to_be_trained_are_in_no_group(timm, model):
    from normwise.integrations.timm import param_groups

    report = nw.analyze(model, data()[0])
    groups = param_groups(model, report, weight_decay=0.1, layer_decay=0.5, no_opt_scale=0.3)
    assert not model.stem.weight.requires_grad
    taken = {p for group in groups for p in group["params"]}
    assert taken == {*model.hidden.parameters(), *model.head.parameters()}
    plain = param_groups(model, report, weight_decay=0.1)
    assert all("lr_scale" not in group for group in plain)


def test_timms_muon_takes_hidden_matrices_only(timm, model):
    from normwise.integrations.timm import param_groups

    if "muon" not in timm.list_optimizers():
        pytest.skip("timm's Muon is needed")
    x, y = data()
    report = nw.analyze(model, x)
    optimizer = timm.create_optimizer_v2(
        model,
        "muon",
        lr=0.01,
        param_group_fn=functools.partial(param_groups, report=report, weight_decay=0.1),
    )
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    taken = {n for n, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert taken == {"stem.weight", "hidden.weight"}


def test_without_timm_it_says_what_to_install(module_anew, monkeypatch):
    for name in ("timm", "timm.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"normwise\[vision\]"):
        __import__("normwise.integrations.timm")
