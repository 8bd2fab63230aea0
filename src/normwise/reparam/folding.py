"""Bake effective weights in, and remove every trace of the parametrizations."""

from __future__ import annotations

from typing import TypeGuard, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from normwise.reparam.checkpoint import LoadOtherFormats
from normwise.reparam.gains import Gain
from normwise.reparam.lipschitz import SLL
from normwise.reparam.parametrizations import (
    WeightParametrization,
    originals,
    owner,
    stacks,
)
from normwise.reparam.recurrent import ReleaseFlatWeights

__all__ = ["fold"]


def fold(model: nn.Module) -> nn.Module:
    """Replace every weight that :func:`reparametrize` converted by its effective weight, in place.

    And every weight that :func:`add_gains` has put a gain on. :class:`SLL` layers inside of the
    model become :class:`ContractiveResidual` ones.

    Outputs are the same to rounding. Modules are again of their plain classes, and the state dict
    has the keys of the unconverted model, in its order. Parametrizations of other libraries stay,
    except where they are stacked on a weight that is folded: they are baked in with it.

    Copies of the model made by ``copy.deepcopy`` are not touched (torch's
    ``remove_parametrizations`` breaks them).

    Args:
        model: a module with converted weights.

    Returns:
        The model itself.

    Raises:
        ValueError: if no weight of the model is converted.
        RuntimeError: inside of :class:`computed_once`.
    """
    hosts: dict[nn.Module, list[str]] = {}
    for module in model.modules():
        names = [name for name, stack in stacks(module).items() if any(map(_is_ours, stack))]
        if names:
            hosts[module] = names
    folded = _fold_residual_layers(model)
    if not hosts and not folded:
        raise ValueError("fold finds no weight that normwise has converted; nothing to fold")
    for module, names in hosts.items():
        owners = [o for name in names if (o := owner(stacks(module)[name])) is not None]
        if any(o.held is not None for o in owners):
            raise RuntimeError("fold inside of computed_once: leave the context first")
        # Recorded one by one as tensors were converted, so the longest is the original order.
        ours = [part for name in names for part in stacks(module)[name] if _is_ours(part)]
        order = max((part.siblings for part in ours), key=len)
        for name in names:
            _fold_one(module, name)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, ReleaseFlatWeights):
                del module._forward_hooks[key]
        for name in order:
            if name in module._parameters:
                module._parameters[name] = module._parameters.pop(name)
    return model


def _fold_residual_layers(model: nn.Module) -> dict[SLL, nn.Module]:
    """What each :class:`SLL` layer inside of the model was replaced by, wherever it is used."""
    folded: dict[SLL, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, SLL):
                if child not in folded:
                    folded[child] = child.folded().train(child.training)
                parent._modules[name] = folded[child]
    return folded


def _is_ours(part: nn.Module) -> TypeGuard[WeightParametrization | Gain]:
    return isinstance(part, WeightParametrization | Gain)


def _fold_one(module: nn.Module, name: str) -> None:
    stack = stacks(module)[name]
    with torch.no_grad():
        effective = stack().clone()
    requires_grad = any(p.requires_grad for p in originals(stack))

    # torch makes one class for a parametrized module and its deep copies, with the tensor as a
    # property. It must not be changed here: a copy may still use it.
    parametrized_class = type(module)
    plain_class = parametrize.type_before_parametrizations(module)
    del cast(nn.ModuleDict, module.parametrizations)[name]
    if stacks(module):
        rest = {
            key: value
            for key, value in vars(parametrized_class).items()
            if key not in (name, "__dict__", "__weakref__")
        }
        module.__class__ = type(parametrized_class.__name__, (plain_class,), rest)
    else:
        del module.parametrizations
        module.__class__ = plain_class

    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) == LoadOtherFormats(name):
            del module._load_state_dict_pre_hooks[key]
    setattr(module, name, nn.Parameter(effective, requires_grad))
