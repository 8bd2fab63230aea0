"""For timm's training scripts: names for its ``--opt``, and groups that know views and roles.

Importing this module needs timm, 1.0 or later.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import nn

from normwise.invariance import Report
from normwise.optim import SGDP, SGDW, AdamP

try:
    from timm.optim import OptimInfo, param_groups_layer_decay
    from timm.optim._optim_factory import default_registry
except ImportError as error:
    raise ImportError(
        "this module needs timm 1.0 or later; install it with `pip install normwise[vision]`"
    ) from error

__all__ = ["param_groups", "register"]


def register() -> tuple[str, ...]:
    """Let ``create_optimizer_v2`` and timm's scripts (``--opt nwadamp``) know our optimizers.

    timm has an AdamP, an SGDP and an SGDW of its own, under the names without ``nw``. Without
    :func:`param_groups` ours take the papers' gate, as timm's do.

    Returns:
        The names: ``nwadamp``, ``nwsgdp`` and ``nwsgdw``.
    """
    infos = (
        OptimInfo(
            name="nwadamp",
            opt_class=AdamP,
            description="normwise's AdamP, which projects in the views of its groups",
            has_betas=True,
        ),
        OptimInfo(
            name="nwsgdp",
            opt_class=SGDP,
            description="normwise's SGDP, which projects in the views of its groups",
            has_momentum=True,
        ),
        OptimInfo(
            name="nwsgdw",
            opt_class=SGDW,
            description="normwise's SGD with decoupled weight decay",
            has_eps=False,
            has_momentum=True,
        ),
    )
    known = default_registry.list_optimizers()
    for info in infos:
        if info.name not in known:  # timm warns of a name that comes again
            default_registry.register(info)
    return tuple(info.name for info in infos)


def param_groups(
    model: nn.Module,
    report: Report,
    *,
    weight_decay: float,
    layer_decay: float | None = None,
    min_scale: float = 0.0,
    no_opt_scale: float | None = None,
) -> list[dict[str, Any]]:
    """Groups by what an analysis found, with timm's learning rates by layer.

    For ``create_optimizer_v2(..., param_group_fn=...)``, as ``functools.partial(param_groups,
    report=report, weight_decay=0.05, layer_decay=0.75)``. A group has the key ``view``, in which
    our optimizers project, and ``use_fallback``, by which timm's Muon tells what is no hidden
    matrix; optimizers keep keys that they do not know. timm's own schedulers apply ``lr_scale``,
    torch's do not.

    Args:
        model: timm's, or any; where it has a ``group_matcher``, its layers are timm's.
        report: of :func:`normwise.analyze`.
        weight_decay: of all but vectors and what the model's ``no_weight_decay()`` names.
        layer_decay: the factor on the learning rate from a layer to the one below it (default:
            none).
        min_scale: the least product of such factors (default: 0).
        no_opt_scale: the product below which a layer is frozen (default: none is).

    Returns:
        Groups with ``params``, ``weight_decay``, ``view``, ``use_fallback``, and ``lr_scale`` where
        a ``layer_decay`` is given.

    Raises:
        ValueError: if the model's parameters are others than the report's.
    """
    params = report.parameters(model)
    scales: dict[nn.Parameter, float] = {}
    if layer_decay is not None:
        by_layer = param_groups_layer_decay(
            model,
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            min_scale=min_scale,
            no_opt_scale=no_opt_scale,
        )
        scales = {p: group["lr_scale"] for group in by_layer for p in group["params"]}
    undecayed: set[str] = getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in report:
        p = params[row.name]
        if not p.requires_grad:  # timm freezes what is below no_opt_scale
            continue
        is_decayed = not row.is_vector and not any(fnmatch.fnmatch(row.name, n) for n in undecayed)
        options: dict[str, Any] = {
            "weight_decay": weight_decay if is_decayed else 0.0,
            "view": None if row.is_vector or row.view is None else str(row.view),
            "use_fallback": row.is_vector or row.role.kind != "hidden",
        }
        if layer_decay is not None:
            options["lr_scale"] = scales[p]
        group = groups.setdefault(tuple(options.values()), {"params": [], **options})
        group["params"].append(p)
    return list(groups.values())
