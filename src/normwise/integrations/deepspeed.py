"""For DeepSpeed's ``initialize``: which optimizer may go with which stage of ZeRO, and its Muon.

ZeRO's stages 1 to 3 join the parameters of a group into one flat run of numbers and cut that among
the ranks. What an optimizer does entry by entry is the same there; a norm, a view or an
orthogonalization is not, for no weight has a shape any more, and nothing would say so.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.invariance import Report
from normwise.optim.by_role import ByRole, groups
from normwise.updates import Update, UpdateRule, rule_of

__all__ = ["configured", "muon"]

# Normalized, but not entry by entry: it keeps sums of rows and columns.
_FACTORED = {"Adafactor"}
# DeepSpeed gathers whole matrices for its own, at every stage.
_GATHERED = "MuonWithAuxAdam"


def configured(optimizer: Optimizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of DeepSpeed with the keys that an optimizer of one's own needs.

    For ``deepspeed.initialize(model=..., optimizer=optimizer, config=configured(optimizer, ...))``.
    In full precision and at stage 0 it steps as it does without DeepSpeed. At stages 1 to 3 it may
    only do what is done entry by entry: torch's AdamW, or ``AdamP`` in groups with ``view=None``.

    Args:
        optimizer: what goes to ``initialize`` as ``optimizer=``, with all that is attached to it.
        config: DeepSpeed's, without a section ``"optimizer"``.

    Returns:
        A copy with the keys added; ``config`` is left as it is.

    Raises:
        ValueError: for a section ``"optimizer"``, and for an optimizer that would be stepped
            wrongly, with the group that shows it.
    """
    if "optimizer" in config:
        raise ValueError(
            "the configuration has a section 'optimizer', which belongs to an optimizer that "
            "DeepSpeed makes; leave it out"
        )
    made: dict[str, Any] = copy.deepcopy(dict(config))
    zero = made.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    if type(optimizer).__name__ != _GATHERED:
        if stage > 0:
            _check_entrywise(optimizer, stage)
        elif any(made.get(half, {}).get("enabled") for half in ("fp16", "bf16", "bfloat16")):
            _check_parameters_may_be_copied(optimizer)
    elif stage == 3:
        zero["reduce_scatter"] = False  # a matrix is orthogonalized from its whole gradient
    if stage > 0:
        made["zero_allow_untested_optimizer"] = True
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            made["zero_force_ds_cpu_optimizer"] = False
    return made


def muon(
    report: Report,
    *,
    matrices: Mapping[str, Any],
    others: Mapping[str, Any],
    embeddings: Mapping[str, Any] | None = None,
    readouts: Mapping[str, Any] | None = None,
    routers: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
) -> Optimizer:
    """DeepSpeed's Muon, for every stage of ZeRO, with parameters chosen by role.

    What DeepSpeed makes from ``"optimizer": {"type": "Muon"}`` goes by names. The same optimizer,
    given to ``initialize``, goes by the marks that are set here. Fused parts and heads are stepped
    whole.

    Args:
        report: of :func:`normwise.analyze`, made before ``deepspeed.zero.Init`` takes shapes away.
        matrices: options of Muon: ``lr``, ``momentum``, ``weight_decay``, ``ns_method``.
        others: options of the AdamW beside it: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        embeddings: likewise, of tables whose rows are looked up (default: ``others``).
        readouts: of the last matrix (default: ``others``).
        routers: of what chooses among experts (default: ``others``).
        model: whose parameters to take (default: those of the model analyzed).

    Raises:
        ImportError: without DeepSpeed 0.19 or later.
        ValueError: as :func:`normwise.groups`, and for kernels of convolutions in one or three
            dimensions, which DeepSpeed takes for stacks of matrices.
    """
    try:
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
    except ImportError as error:
        raise ImportError(
            "this needs DeepSpeed 0.19 or later; install it with `pip install deepspeed`"
        ) from error
    made = groups(
        report,
        matrices=matrices,
        others=others,
        embeddings=embeddings,
        readouts=readouts,
        routers=routers,
        model=model,
    )
    kernels = {
        row.name for row in report if "conv" in row.role.evidence and len(row.shape) in (3, 5)
    }
    for group in made:
        goes_to_muon = group.pop("optimizer") == "matrices"
        # DeepSpeed sorts the parameters of a group, and names would not follow; it has no views.
        names, _ = group.pop("param_names"), group.pop("view")
        if goes_to_muon and (wrong := sorted(kernels.intersection(names))):
            raise ValueError(
                f"DeepSpeed's Muon takes {', '.join(wrong)} for stacks of matrices, but these are "
                "kernels of convolutions; freeze them or take another optimizer"
            )
        group["use_muon"] = goes_to_muon
        for p in group["params"]:
            p.use_muon = goes_to_muon  # what the stages look at
    optimizer: Optimizer = MuonWithAuxAdam(made)
    return optimizer


def _check_entrywise(optimizer: Optimizer, stage: int) -> None:
    for i, group in enumerate(optimizer.param_groups):
        # Of the group as well: under zero.Init each weight looks like a vector.
        whole = rule_of(optimizer, group)
        are_vectors = all(_dimensions(p) < 2 for p in group["params"])
        rules = [whole, *(rule_of(optimizer, group, p) for p in group["params"])]
        for why in (_not_entrywise(rule, are_vectors) for rule in rules):
            if why:
                raise ValueError(
                    f"ZeRO stage {stage} flattens the weights of a group, and group {i} of "
                    f"{type(optimizer).__name__} needs them whole: {why}. Take stage 0, FSDP2 "
                    "(torch.distributed.fsdp.fully_shard), or groups with view=None; for Muon, "
                    "normwise.integrations.deepspeed.muon"
                )
    if getattr(optimizer, "_families", None):  # of AdamP and SGDP with symmetries=
        raise ValueError(
            f"ZeRO stage {stage} flattens the weights of a group, and symmetries= are of whole "
            "weights; take stage 0, or FSDP2 (torch.distributed.fsdp.fully_shard)"
        )


def _not_entrywise(rule: UpdateRule, is_of_vectors: bool) -> str:
    """Why a step is not taken entry by entry; empty if it is."""
    if rule.changed_by:
        return f"{' and '.join(rule.changed_by)} changes what is done to them"
    if rule.name in _FACTORED or rule.update is Update.UNKNOWN:
        return f"nothing shows that {rule.name} steps each entry by itself"
    if rule.update not in (Update.GRADIENT, Update.NORMALIZED, Update.SIGN):
        return f"its update is {rule.update.value}"
    if not is_of_vectors and (rule.view is not None or rule.norm == "fixed"):
        return f"it projects in view {rule.view}"
    return ""


def _check_parameters_may_be_copied(optimizer: Optimizer) -> None:
    """DeepSpeed steps copies in float32 of half-precision weights: other tensors, same shapes."""
    attached = {
        name
        for group in optimizer.param_groups
        for p in group["params"]
        for name in rule_of(optimizer, group, p).changed_by
    }
    if isinstance(optimizer, ByRole) and any(route.blocks for route in optimizer.routes):
        attached.add("groups of blocks")
    if attached:
        raise ValueError(
            "DeepSpeed steps float32 copies of half-precision weights, which "
            f"{', '.join(sorted(attached))} would not know; leave the weights in float32 "
            "(torch_autocast in the configuration), or give fused='whole' and heads='whole'"
        )


def _dimensions(p: Tensor) -> int:
    # zero.Init leaves an empty tensor with the shape beside it.
    return len(getattr(p, "ds_shape", p.shape))
