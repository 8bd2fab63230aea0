"""A method as code to copy: groups of one's own model, the optimizer, and what is around it."""

from __future__ import annotations

from normwise.lab.methods import Inspected, Method, Setting
from normwise.lab.optimizers import MATRICES_ONLY

__all__ = ["code"]

_SHOWN = 12  # names of weights that are written out
_CLASSES = {
    "sgd": ("torch.optim.SGD", ", momentum=0.9"),
    "sgdp": ("normwise.SGDP", ", momentum=0.9"),
    "adam": ("torch.optim.Adam", ""),
    "adamw": ("torch.optim.AdamW", ""),
    "adamp": ("normwise.AdamP", ""),
}
_POLICIES = {
    "l2": "L2()",
    "decoupled": "Decoupled()",
    "scheduled": 'Decoupled(per="schedule")',
    "cautious": "Cautious()",
    "corrected": "Corrected()",
}
_SCHEDULES = {
    "early": "early(round({share:g} * steps))",
    "late": "late(round({share:g} * steps))",
    "linear": "Linear(round({share:g} * steps))",
    "cosine": "Cosine(round({share:g} * steps))",
}


def code(method: Method, setting: Setting, inspected: Inspected) -> str:
    """What makes the optimizer of ``model`` as it was trained.

    Args:
        method: what to write.
        setting: its learning rate and weight decay.
        inspected: the network's invariant weights.
    """
    spec = method.spec
    names = list(inspected.invariant)
    needs_views = bool(spec.wrappers) or any(d.name == "corrected" for d in spec.decays)
    by_role = spec.name in MATRICES_ONLY
    needs_report = by_role or (needs_views and len(names) > _SHOWN)
    lines = ["import torch", "import normwise"]
    if spec.code is not None:
        module, _, factory = spec.code.partition(":")
        lines.append(f"from {module} import {factory}")
    lines.append("")
    if needs_report:
        lines.append("report = normwise.analyze(model, x)  # x: a batch of inputs")
    elif names:
        lines += [
            "# The scale-invariant weights, and the slices whose norms are free:",
            "views = {",
        ]
        shown = list(inspected.invariant.items())[:_SHOWN]
        lines += [f"    {name!r}: {view!r}," for name, (view, _) in shown]
        if len(names) > _SHOWN:
            lines.append(f"    # … {len(names)} in all: normwise.analyze(model, x)")
        lines.append("}")
    if needs_views and needs_report:
        lines.append(
            "invariant = {p: v for p, v in report.parameter_views().items() if p.ndim > 1}"
        )
    elif needs_views:
        lines += [
            "params = dict(model.named_parameters())",
            "invariant = {params[n]: v for n, v in views.items() if params[n].ndim > 1}",
        ]
    lines.append("")
    lines += _by_role(method, setting) if by_role else _plain(method, setting)
    lines += [f"optimizer = normwise.{w}(optimizer, invariant)" for w in spec.wrappers[::-1]]
    return "\n".join([*lines, *_decays(method)]) + "\n"


def _plain(method: Method, setting: Setting) -> list[str]:
    name = method.spec.name
    if method.spec.code is not None:
        maker, more = method.spec.code.partition(":")[2], ""
    elif name in _CLASSES:
        maker, more = _CLASSES[name]
    else:
        maker, more = f"torch.optim.{name.removeprefix('torch:')}", ""
    lines = [
        "matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]",
        "vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]",
        "groups = [",
        f'    {{"params": matrices, "weight_decay": {setting.weight_decay!r}}},',
        '    {"params": vectors, "weight_decay": 0.0},  # biases, gains',
        "]",
    ]
    if "sphere" in method.spec.wrappers and setting.weight_decay:
        lines[0] = lines[0].replace("]", " and p not in invariant]")
        lines[3:3] = [
            '    {"params": list(invariant), "weight_decay": 0.0},  # their norms are fixed'
        ]
    return [*lines, f"optimizer = {maker}(groups, lr={setting.lr!r}{more})"]


def _by_role(method: Method, setting: Setting) -> list[str]:
    lines = [
        "optimizer = normwise.groups(",
        "    report,",
        "    matrices=lambda groups: torch.optim.Muon(",
        f"        groups, lr={setting.lr!r}, weight_decay={setting.weight_decay!r},",
        '        adjust_lr_fn="match_rms_adamw",  # steps as long as AdamW\'s',
        "    ),",
        "    others=lambda groups: torch.optim.AdamW(",
        f"        groups, lr={setting.lr!r}, weight_decay={setting.weight_decay!r}",
        "    ),",
        ")",
    ]
    if "sphere" in method.spec.wrappers and setting.weight_decay:
        lines += [
            "for group in optimizer.param_groups:",
            '    if not invariant.keys().isdisjoint(group["params"]):',
            '        group["weight_decay"] = 0.0  # their norms are fixed',
        ]
    return lines


def _decays(method: Method) -> list[str]:
    lines, schedules = [], []
    for decay in method.spec.decays:
        if decay.name in _POLICIES:
            on = ", on=list(invariant)" if decay.name == "corrected" else ""
            lines.append(f"normwise.decay.{_POLICIES[decay.name]}.attach(optimizer{on})")
        else:
            schedules.append("normwise.decay." + _SCHEDULES[decay.name].format(share=decay.length))
    if schedules:
        lines += [
            "# steps: of the whole training; call schedule.step() after each optimizer.step().",
            f"schedule = normwise.decay.DecayScheduler(optimizer, {' * '.join(schedules)})",
        ]
    return lines
