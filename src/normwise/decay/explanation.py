"""What weight decay does to each group of an optimizer: :func:`explain`.

Equilibria are those of scale-invariant weights ([ROT] arXiv 2305.17212; for SGDW, AdamP and SGDP
from the same balance of growth and decay, see :func:`_equilibrium`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.decay.attached import attached_to, label
from normwise.decay.epsilon_shifted import AttachedRegularizer
from normwise.decay.native import Coupling, native_decay
from normwise.decay.policies import AttachedPolicy, Cautious, Effect
from normwise.geometry import View, norms
from normwise.theory import Equilibrium, adamw_equilibrium, sgd_equilibrium

__all__ = ["Explanation", "GroupDecay", "explain"]


class _Report(Protocol):
    def parameter_views(self) -> Mapping[nn.Parameter, View]: ...


@dataclass(frozen=True)
class GroupDecay:
    """The decay of one parameter group at its present learning rate.

    ``None`` stands for what is not known.

    Attributes:
        label: the group's number, and its name if it has one.
        entries: of all its parameters.
        rule: what decays it: the optimizer, or a policy.
        coupling: ``"L2"`` or ``"decoupled"``.
        weight_decay: λ in torch's convention, which the learning rate multiplies; SGDP's own is
            divided by 1 − momentum.
        per_step: ηλ, the papers' λ: the part of a weight that the term takes in a step, before
            momentum repeats it or moments divide it.
        half_life: the steps in which a weight without a gradient loses half; infinite without
            decay.
        norm: the smallest and the largest equilibrium norm of the slices of its weights.
        rms: the root mean square of an entry in equilibrium, where that is the same for all.
        angle: the root mean square of the angle that a step turns a slice by, in radians.
    """

    label: str
    entries: int
    rule: str
    coupling: Coupling | None
    weight_decay: float | None
    per_step: float | None
    half_life: float | None
    norm: tuple[float, float] | None = None
    rms: float | None = None
    angle: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str()`` is a table.

    Attributes:
        groups: one row for each parameter group.
        notes: what a reader must know beside the rows.
    """

    groups: tuple[GroupDecay, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        header = (
            "group",
            "entries",
            "decay",
            "λ (torch)",
            "η·λ",
            "half-life",
            "norm →",
            "rms →",
            "angle",
        )
        rows = [header]
        for g in self.groups:
            coupling = f"{g.rule}, {g.coupling}" if g.coupling else g.rule
            if g.per_step == 0:
                rows.append((g.label, f"{g.entries:,}", "none", "0", "0", "–", "–", "–", "–"))
                continue
            norm = None if g.norm is None else f"{g.norm[0]:.3g}"
            if g.norm is not None and g.norm[1] > 1.005 * g.norm[0]:
                norm = f"{g.norm[0]:.3g} … {g.norm[1]:.3g}"
            rows.append(
                (
                    g.label,
                    f"{g.entries:,}",
                    coupling,
                    _number(g.weight_decay),
                    _number(g.per_step),
                    _unknown if g.half_life is None else f"{g.half_life:,.0f} steps",
                    norm or _unknown,
                    _number(g.rms),
                    _unknown if g.angle is None else f"{math.degrees(g.angle):.3g}°",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "─" * max(map(len, lines)))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


_unknown = "not known"


def _number(value: float | None) -> str:
    return _unknown if value is None else f"{value:.3g}"


def explain(optimizer: Optimizer, report: _Report | None = None) -> Explanation:
    """Say what decay each group has, in both conventions, and where it leads.

    Norms and angles are those at which scale-invariant weights settle if the learning rate stays.
    For SGD and its kin they need E‖g̃‖², the mean square of the gradient at norm 1. It is estimated
    from the present gradients, one batch: call it after ``backward()`` and before ``zero_grad()``.

    Args:
        optimizer: any torch optimizer; policies that are attached to it count.
        report: of :func:`normwise.analyze`: equilibria are then of the weights that it finds
            scale-invariant, slice by slice. Default: of all weights of two dimensions or more, as
            if each were scale-invariant as a whole.

    Returns:
        An object to print. It says "not known" where no closed form is.
    """
    views = None
    if report is not None:
        views = {p: view for p, view in report.parameter_views().items() if p.ndim > 1}
    rows = []
    shifted = set()
    for i, group in enumerate(optimizer.param_groups):
        rule, effect, is_cautious = _rule(optimizer, group)
        entries = sum(p.numel() for p in group["params"])
        name = label(optimizer, i)
        for other in attached_to(optimizer):
            if isinstance(other, AttachedRegularizer) and set(other.params) & set(group["params"]):
                shifted.add(name)
        if effect is None or effect.weight_decay is None:
            per_step = None if effect is None else float(effect.shrink)
            rows.append(GroupDecay(name, entries, rule, None, None, per_step, None))
            continue
        value, lr = float(effect.weight_decay), float(group["lr"])
        half_life = None if is_cautious else _half_life(optimizer, group, effect, value)
        norm = rms = angle = None
        if value > 0 and lr > 0 and not is_cautious:
            norm, rms, angle = _settled(optimizer, group, effect.coupling, value, views)
        per_step = float(effect.shrink)
        rows.append(
            GroupDecay(
                name, entries, rule, effect.coupling, value, per_step, half_life, norm, rms, angle
            )
        )
    notes = [
        "norm, rms and angle: of scale-invariant weights, at the present learning rate; "
        + (
            "taking every matrix for one slice that is scale-invariant (give a report to know)"
            if views is None
            else "of those that the report finds, slice by slice"
        )
    ]
    policies = [o.policy for o in attached_to(optimizer) if isinstance(o, AttachedPolicy)]
    if any(isinstance(policy, Cautious) for policy in policies):
        notes.append("cautious decay skips entries, so that η·λ is an upper bound")
    if any(group.get("view") == "auto" and "wd_ratio" in group for group in optimizer.param_groups):
        notes.append("where AdamP's or SGDP's gate holds, the decay is wd_ratio times what is said")
    if shifted:
        notes.append(f"EpsilonShiftedL2 decays weights of {', '.join(sorted(shifted))} too")
    return Explanation(tuple(rows), tuple(notes))


def _rule(optimizer: Optimizer, group: dict[str, Any]) -> tuple[str, Effect | None, bool]:
    """What decays a group: its name, its effect if that is known, and whether it is cautious."""
    for attached in attached_to(optimizer):
        if isinstance(attached, AttachedPolicy) and any(g is group for _, g in attached.groups()):
            return attached.label, attached.effect(group), isinstance(attached.policy, Cautious)
    if "weight_decay" not in group:
        return "optimizer", Effect("decoupled", 0.0, 0.0), False
    native = native_decay(optimizer, group)
    if native is None:
        return "optimizer", None, False
    decay = group["weight_decay"] * native.rate
    return "optimizer", Effect(native.coupling, decay, group["lr"] * decay), False


def _kind(optimizer: Optimizer) -> str:
    """The class of torch or normwise that an optimizer is of, by name; else empty."""
    for kind in type(optimizer).__mro__:
        if kind.__module__.partition(".optim")[0] in ("torch", "normwise"):
            return kind.__name__
    return ""


def _half_life(
    optimizer: Optimizer, group: dict[str, Any], effect: Effect, value: float
) -> float | None:
    """Steps in which a weight without a gradient halves."""
    if value == 0 or float(effect.shrink) == 0:
        return math.inf
    if effect.coupling == "decoupled":
        kept = 1 - float(effect.shrink) * (group["wd_ratio"] if _is_projected(group) else 1)
        return math.log(0.5) / math.log(kept) if 0 < kept < 1 else None
    if _kind(optimizer) != "SGD" or group["nesterov"]:
        return None  # moments divide what is left by its own size
    # w and its buffer: the larger root of α² − (1 + γ − ηλ(1 − dampening))α + γ = 0.
    gamma, lr = group["momentum"], float(group["lr"])
    middle = 1 + gamma - lr * value * (1 - group["dampening"] if gamma else 1)
    square = middle**2 - 4 * gamma
    root = (middle + math.sqrt(square)) / 2 if square >= 0 else math.sqrt(gamma)
    return math.log(0.5) / math.log(root) if 0 < root < 1 else None


def _settled(
    optimizer: Optimizer,
    group: dict[str, Any],
    coupling: Coupling,
    weight_decay: float,
    views: Mapping[nn.Parameter, View] | None,
) -> tuple[tuple[float, float] | None, float | None, float | None]:
    """The range of equilibrium norms of a group's slices, the rms of entries, and the angle."""
    lengths, roots, angles = [], set(), set()
    for p in group["params"]:
        view = View.layer() if views is None and p.ndim > 1 else (views or {}).get(p)
        if view is None:
            continue
        slices = view.slices(p.detach())
        entries = slices.numel() // len(slices)
        for square in _gradient_squares(p, view):
            found = _equilibrium(optimizer, group, coupling, weight_decay, entries, square)
            if found is None:
                return None, None, None
            if found.norm is not None:
                lengths.append(found.norm)
                roots.add(round(found.norm / math.sqrt(entries), 12))
            angles.add(found.angle)
    norm = (min(lengths), max(lengths)) if lengths else None
    rms = roots.pop() if len(roots) == 1 else None
    return norm, rms, angles.pop() if len(angles) == 1 else None


@torch.no_grad()
def _gradient_squares(p: Tensor, view: View) -> list[float | None]:
    """‖g̃‖² of each slice from the present gradient: (‖g‖‖w‖)²; None where there is none."""
    if p.grad is None:
        return [None]
    products = (norms(p, view) * norms(p.grad, view)).square()
    return [square or None for square in products.tolist()]


@dataclass(frozen=True)
class _Partial:
    norm: float | None
    angle: float | None


def _equilibrium(
    optimizer: Optimizer,
    group: dict[str, Any],
    coupling: Coupling,
    weight_decay: float,
    entries: int,
    gradient_square: float | None,
) -> Equilibrium | _Partial | None:
    """Of a slice, where a closed form is known.

    A step with momentum μ turns g into a displacement of η/(1 − μ) over time, so that ‖w‖² grows by
    η²‖g‖²/(1 − μ)² a step. SGD's L2 passes the buffer too and takes 2ηλ/(1 − μ) of it, SGDW's decay
    2ηλ: its equilibrium is SGD's for λ(1 − μ). A projected step grows ‖w‖² by its own square alone,
    and decays it by 2ηλρ, ρ = wd_ratio, as long as a step turns w by far less than 1 − μ: else
    the buffer has turned against w, and the projection shortens it.
    """
    kind, lr = _kind(optimizer), float(group["lr"])
    if kind in ("AdamP", "SGDP") and group["norm"] == "fixed":
        return None
    if kind in ("Adam", "AdamW") and coupling == "decoupled" and not group["amsgrad"]:
        return adamw_equilibrium(lr, weight_decay, entries, float(group["betas"][0]))
    if kind in ("SGD", "SGDW"):
        mu = group["momentum"]
        if group["nesterov"]:
            return None
        damped = lr * (1 - group["dampening"]) if mu else lr
        if coupling == "decoupled":
            weight_decay *= (1 - mu) * lr / damped
        angle = math.sqrt(2 * damped * weight_decay / (1 + mu))
        if gradient_square is None:
            return _Partial(None, angle)
        return sgd_equilibrium(damped, weight_decay, gradient_square, mu)
    if kind == "AdamP" and coupling == "decoupled" and _is_projected(group):
        beta1 = float(group["betas"][0])
        decay = lr * weight_decay * group["wd_ratio"]
        if group["nesterov"] or decay == 0:
            return None
        square = lr**2 * entries * (1 - beta1) / (1 + beta1)
        return Equilibrium(math.sqrt(square / (2 * decay)), math.sqrt(2 * decay))
    if kind == "SGDP" and coupling == "decoupled" and _is_projected(group):
        mu, decay = group["momentum"], lr * weight_decay * group["wd_ratio"]
        if group["nesterov"] or decay == 0:
            return None
        angle = math.sqrt(2 * decay)
        if gradient_square is None:
            return _Partial(None, angle)
        square = (lr * (1 - group["dampening"])) ** 2 * gradient_square / (1 - mu**2)
        return Equilibrium(math.sqrt(math.sqrt(square / (2 * decay))), angle)
    return None


def _is_projected(group: dict[str, Any]) -> bool:
    """Whether weights are projected for certain; of "auto", that the gate holds is not."""
    return isinstance(group.get("view"), View) and all(p.ndim > 1 for p in group["params"])
