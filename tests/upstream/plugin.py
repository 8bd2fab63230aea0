"""A pytest plugin that puts our optimizers in the place of a project's own; see run.py."""

import importlib
import importlib.util
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cannot_pass import CANNOT_PASS

import normwise

SUITE = os.environ["NORMWISE_UPSTREAM"]
CHECKOUT = Path(os.environ["NORMWISE_CHECKOUT"])
OURS = {"AdamP": normwise.AdamP, "SGDP": normwise.SGDP, "SGDW": normwise.SGDW}


def in_torch():
    """The tests are made of ``optim_db``, by the decorator ``optims``."""
    from torch.testing._internal import common_optimizers

    path = Path(__file__).parent.parent / "optim" / "test_torch_suite.py"
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location("our_inputs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    common_optimizers.optim_db[:] = module.INFOS


def in_package(name):
    """Wherever modules of a package have a class of one of our names, ours takes its place."""
    importlib.import_module(name)
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != name:
            continue
        for attribute, ours in OURS.items():
            if hasattr(module, attribute):
                setattr(module, attribute, ours)
            registry = getattr(module, "OPTIMIZERS", None)
            if isinstance(registry, dict) and attribute.lower() in registry:
                registry[attribute.lower()] = ours


def in_jettify():
    """Its package needs another only for optimizers that are not tested here."""
    if importlib.util.find_spec("pytorch_ranger") is None:
        absent = types.ModuleType("pytorch_ranger")
        for name in ("Ranger", "RangerQH", "RangerVA"):
            setattr(absent, name, type(name, (torch.optim.Optimizer,), {}))
        sys.modules["pytorch_ranger"] = absent
    in_package("torch_optimizer")


def in_timm():
    """Without torchvision its models do not import; only layer-wise decay needs them."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("timm", "timm.models"):
            bare = types.ModuleType(name)
            bare.__path__ = [str(CHECKOUT / name.replace(".", "/"))]
            sys.modules[name] = bare
        sys.modules["timm.models"].group_parameters = None
    from timm.optim import _optim_factory

    registry = _optim_factory.default_registry
    for attribute, ours in OURS.items():
        name = attribute.lower()
        registry._optimizers[name] = replace(registry._optimizers[name], opt_class=ours)


PUT_IN_PLACE = {
    "torch": in_torch,
    "jettify": in_jettify,
    "kozistr": lambda: in_package("pytorch_optimizer"),
    "timm": in_timm,
}
PUT_IN_PLACE[SUITE]()


def pytest_collection_modifyitems(items):
    """Keep what concerns us; expect to fail what cannot pass, and only that."""
    names = [*OURS, *(name.lower() for name in OURS)]
    items[:] = [item for item in items if any(concerns(item, name) for name in names)]
    for item in items:
        for pattern, reason in CANNOT_PASS[SUITE].items():
            if pattern in item.nodeid:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=SUITE != "torch"))


def concerns(item, name):
    """Whether a test is named after an optimizer, or is given it."""
    if SUITE == "torch":  # which makes a method of each test and optimizer
        return f"_{name}_" in item.name
    values = [*item.callspec.params.values()] if hasattr(item, "callspec") else []
    for value in [*values]:
        values += value if isinstance(value, tuple | list) else []
    given = any(value is OURS.get(name) or value == name for value in values)
    return given or item.originalname == f"test_{name}"
