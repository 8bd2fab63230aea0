"""What an optimizer's step does to a weight, known in one place: :func:`describe`.

Optimizers and wrappers that have a method ``update_rule(group, p)`` describe themselves, as those
of normwise do; torch's are in a table here, and :func:`register` takes any other. What is attached
to an optimizer, such as a decay policy, changes the rule of the groups that it acts on.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal, Protocol, cast

from torch import Tensor
from torch.optim import Optimizer

from normwise.geometry import View

__all__ = [
    "Attached",
    "Coupling",
    "Update",
    "UpdateRule",
    "attached_to",
    "describe",
    "own_rule",
    "register",
    "rule_of",
    "unknown_rule",
]

Number = float | Tensor
Group = dict[str, Any]


class Update(Enum):
    """What sets the length of an update, before the learning rate.

    Attributes:
        GRADIENT: it is as long as the gradient, which shrinks as 1/‖w‖ where w is scale-invariant:
            SGD and its kin.
        NORMALIZED: each entry is divided by its own size: Adam and its kin.
        SIGN: each entry is −1 or 1: Lion.
        ORTHOGONALIZED: all singular values are brought near 1: Muon.
        RELATIVE: it is η times as long as the weight, which is put back on its norm: hyperball.
        ROTATION: the weight turns by η exactly, along a great circle.
        UNKNOWN: nothing is known of this optimizer; taken as normalized, as most are.
    """

    GRADIENT = "as the gradient"
    NORMALIZED = "normalized"
    SIGN = "sign"
    ORTHOGONALIZED = "orthogonalized"
    RELATIVE = "relative to the norm"
    ROTATION = "a rotation by the learning rate"
    UNKNOWN = "not known"

    @property
    def is_relative(self) -> bool:
        """Whether η is an angle, or its tangent, whatever the norm and the gradient."""
        return self in (Update.RELATIVE, Update.ROTATION)

    @property
    def exponent(self) -> int:
        """The power of the norm by which the effective learning rate falls: 2, 1 or 0."""
        if self.is_relative:
            return 0
        return 2 if self is Update.GRADIENT else 1


class Coupling(str, Enum):
    """How weight decay reaches a weight.

    Attributes:
        NONE: the optimizer has none.
        L2: λw is added to the gradient, before any buffer or moment.
        DECOUPLED: the weight is multiplied by 1 − ηλ beside the update.
        UNKNOWN: in a way that is not known, or that is neither.
    """

    NONE = "none"
    L2 = "L2"
    DECOUPLED = "decoupled"
    UNKNOWN = "not known"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class UpdateRule:
    """What a step does to the weights of one parameter group.

    Numbers that are not known are NaN. A number that an optimizer holds in a tensor stays one, so
    that nothing waits for its device.

    Attributes:
        name: of the optimizer's class.
        update: what sets the length of an update.
        lr: η.
        momentum: μ of the buffer; β1 of Adam, Muon and their kin, whose buffer is an average.
        betas: as the group has them; empty where it has none.
        dampening: τ: the buffer takes (1 − τ)g. 0 where the buffer is an average.
        nesterov: whether the update looks ahead of the buffer.
        scale: by how much an update is longer than ``update`` says, Muon's adjustment of η to the
            shape of a weight for example; NaN where no constant says it (RMS entries of 1 of Adam
            do not hold with amsgrad, for NAdam, Adafactor ...).
        newton_schulz: of an orthogonalized update, the coefficients of the iteration and how often
            it is taken; empty where the singular values are exactly 1.
        coupling: how weight decay reaches the weight.
        weight_decay: λ: the term λw of L2, or of the factor 1 − ηλ, before ``wd_ratio``.
        rate: λ over the group's ``weight_decay``; SGDP's is 1/(1 − momentum).
        decay_per_step: ηλ at the present η.
        is_switch: whether the group's ``decoupled_weight_decay`` chooses the coupling.
        takes_tensor: whether the group's ``weight_decay`` may be a tensor, and is not waited for.
        view: what projects: a :class:`normwise.View`, ``"auto"`` (the papers' gate), or None.
        wd_ratio: ρ, the factor on the decay of projected weights.
        delta: the threshold of the gate, a cosine times √entries.
        norm: ``"fixed"`` if each slice keeps its norm, else ``"free"``.
        rounds_at_random: whether small steps of 16-bit weights work on average, by stochastic
            rounding.
        changed_by: the wrappers and policies that have changed what the optimizer does.
    """

    name: str
    update: Update
    lr: Number
    momentum: Number = 0.0
    betas: tuple[Number, ...] = ()
    dampening: Number = 0.0
    nesterov: bool = False
    scale: float = math.nan
    newton_schulz: tuple[tuple[float, float, float], int] | tuple[()] = ()
    coupling: Coupling = Coupling.NONE
    weight_decay: Number = 0.0
    rate: float = 1.0
    decay_per_step: Number = 0.0
    is_switch: bool = False
    takes_tensor: bool = False
    view: View | Literal["auto"] | None = None
    wd_ratio: float = 1.0
    delta: float = 0.0
    norm: Literal["free", "fixed"] = "free"
    rounds_at_random: bool = False
    changed_by: tuple[str, ...] = ()

    @property
    def is_projected(self) -> bool | None:
        """Whether the radial part of a step is removed; None where the gate decides."""
        return None if self.view == "auto" else self.view is not None

    def with_gate(self, is_open: bool) -> UpdateRule:
        """This rule where the gate has been seen to hold, or not; itself without a gate.

        Args:
            is_open: whether it holds.
        """
        if self.view != "auto":
            return self
        return replace(self, view=View.channel() if is_open else None)

    def converted(self, convert: Callable[[Tensor], Number]) -> UpdateRule:
        """This rule with each tensor in it replaced by what ``convert`` makes of it.

        Args:
            convert: from a tensor to a number, such as ``float``.
        """

        def of(value: Any) -> Any:
            return convert(value) if isinstance(value, Tensor) else value

        return replace(
            self,
            betas=tuple(of(beta) for beta in self.betas),
            **{name: of(getattr(self, name)) for name in _NUMBERS},
        )

    @property
    def share(self) -> Number:
        """The part of ηλ by which decay alone shortens a weight in a step, with buffers filled.

        ρ where the step is projected; (1 − τ)/(1 − μ) for L2 that passes through a momentum buffer;
        0 where the norm is fixed, or a projection takes out the term of L2. NaN for L2 of
        normalized updates, which depends on the gradient, and where a gate decides and ρ is not 1.
        """
        if self.coupling is Coupling.NONE or self.norm == "fixed":
            return 0.0
        if self.coupling is Coupling.DECOUPLED:
            if self.is_projected is None:
                return 1.0 if self.wd_ratio == 1 else math.nan
            return self.wd_ratio if self.is_projected else 1.0
        if self.coupling is Coupling.L2 and self.update is Update.GRADIENT:
            if self.view is not None:  # the term is radial, and the projection takes it out
                return 0.0 if self.is_projected else math.nan
            return (1 - self.dampening) / (1 - self.momentum)
        return 0.0 if is_zero(self.weight_decay) else math.nan

    @property
    def shrink(self) -> Number:
        """The share by which decay alone shortens a weight in one step, at the present η."""
        return self.decay_per_step * self.share

    @property
    def shrink_per_lr(self) -> Number:
        """:attr:`shrink` over η."""
        return self.weight_decay * self.share


_NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "decay_per_step")


def is_zero(value: Number) -> bool:
    """Whether an option is the number 0; a tensor is not looked up."""
    return not isinstance(value, Tensor) and value == 0


class Describes(Protocol):
    """An optimizer that describes itself."""

    def update_rule(self, group: Group, p: Tensor | None) -> UpdateRule: ...


class Attached(Protocol):
    """Something that acts on weights of an optimizer through its hooks."""

    @property
    def label(self) -> str:
        """What it is, for a person."""
        ...

    @property
    def params(self) -> Collection[Tensor]:
        """The weights that it acts on."""
        ...

    def changed_rule(self, rule: UpdateRule, group: Group) -> UpdateRule:
        """What becomes of the rule of a group, or a weight, that it acts on.

        Args:
            rule: without what is attached.
            group: the group.
        """
        ...


_attached: weakref.WeakKeyDictionary[Optimizer, list[Attached]] = weakref.WeakKeyDictionary()

Describer = Callable[[Optimizer, Group], UpdateRule]
_registered: dict[type | str, Describer] = {}
_found: weakref.WeakKeyDictionary[type, Describer | None] = weakref.WeakKeyDictionary()


def attached_to(optimizer: Optimizer) -> list[Attached]:
    """What is attached to ``optimizer`` at present; a list to append to and remove from.

    Args:
        optimizer: any.

    Returns:
        The list itself.
    """
    return _attached.setdefault(optimizer, [])


def register(kind: type | str, describer: Describer) -> None:
    """Say how an optimizer that normwise does not know steps.

    It comes before what normwise knows of torch's, so that a subclass can be told apart.

    Args:
        kind: the class, or the name of a class of whatever package; subclasses are meant too.
        describer: a function of an optimizer and one of its groups, which gives the
            :class:`UpdateRule` of that group.

    Raises:
        TypeError: for a kind that is neither a class nor a name.
    """
    if not isinstance(kind, type | str):
        raise TypeError(f"Invalid kind: {kind!r}; must be a class or the name of one")
    _registered[kind] = describer
    _found.clear()


def describe(optimizer: Any) -> list[UpdateRule]:
    """What the next step of an optimizer does, one rule for each parameter group.

    A rule is of the group's weights of two dimensions or more; others are never projected. The
    ``optimizer`` attributes of schedulers and wrappers are followed.

    Args:
        optimizer: any torch optimizer, a wrapper of one, or a learning-rate scheduler. Of one that
            is not known the rule says so: ``Update.UNKNOWN``, ``Coupling.UNKNOWN``.

    Returns:
        The rules, in the order of the groups.

    Raises:
        TypeError: for what neither is an optimizer nor holds one.
    """
    while not isinstance(optimizer, Optimizer):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        optimizer = optimizer.optimizer
    return [rule_of(optimizer, group) for group in optimizer.param_groups]


def rule_of(optimizer: Optimizer, group: Group, p: Tensor | None = None) -> UpdateRule:
    """The rule of one group of ``optimizer``, with what is attached to it.

    Args:
        optimizer: any.
        group: one of its parameter groups.
        p: one weight of the group, which a wrapper may treat otherwise than the rest (default: the
            group's weights of two dimensions or more).

    Returns:
        The rule.
    """
    rule = own_rule(optimizer, group, p)
    member = p if p is not None else next(iter(group["params"]), None)
    for attached in _attached.get(optimizer, ()):
        if member is not None and member in attached.params:
            rule = attached.changed_rule(rule, group)
    return rule


def own_rule(optimizer: Optimizer, group: Group, p: Tensor | None = None) -> UpdateRule:
    """What ``optimizer`` does by itself, without what is attached to it.

    Args:
        optimizer: any.
        group: one of its parameter groups.
        p: as of :func:`rule_of`.

    Returns:
        The rule.
    """
    describer = _describer_of(type(optimizer))
    if describer is not None:
        rule = describer(optimizer, group)
    elif hasattr(optimizer, "update_rule"):
        rule = cast(Describes, optimizer).update_rule(group, p)
    elif isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        return rule_of(inner, group, p)
    else:
        rule = unknown_rule(optimizer, group)
    if p is not None:
        rule = _of_weight(rule, group, p)
    return rule


def decoupled(group: Group, rate: float = 1.0) -> dict[str, Any]:
    """The fields of a rule whose group decays by 1 − rate·η·``weight_decay``.

    Args:
        group: a parameter group.
        rate: what ηλ is multiplied by (default: 1).
    """
    decay = group["weight_decay"] * rate
    return {
        "coupling": Coupling.DECOUPLED,
        "weight_decay": decay,
        "rate": rate,
        "decay_per_step": group["lr"] * decay,
    }


def _of_weight(rule: UpdateRule, group: Group, p: Tensor) -> UpdateRule:
    """A group's rule for one of its weights: vectors are not projected; Muon adjusts η by shape."""
    if rule.view is not None and p.ndim < 2:
        rule = replace(rule, view=None, norm="free")
    if "adjust_lr_fn" in group and p.ndim == 2:
        rule = replace(rule, scale=_muon_scale(group["adjust_lr_fn"], p.shape))
    return rule


def unknown_rule(optimizer: Optimizer, group: Group) -> UpdateRule:
    """The rule of a group of which only the learning rate is known.

    Args:
        optimizer: any.
        group: one of its parameter groups.

    Returns:
        A rule with ``Update.UNKNOWN``.
    """
    decays = not is_zero(group.get("weight_decay", 0.0))
    return UpdateRule(
        type(optimizer).__name__,
        Update.UNKNOWN,
        group.get("lr", math.nan),
        coupling=Coupling.UNKNOWN if decays else Coupling.NONE,
        weight_decay=math.nan if decays else 0.0,
        decay_per_step=math.nan if decays else 0.0,
    )


def _describer_of(kind: type) -> Describer | None:
    if kind not in _found:
        _found[kind] = _find(kind)
    return _found[kind]


def _find(kind: type) -> Describer | None:
    for ancestor in kind.__mro__:
        for key in (ancestor, ancestor.__name__):
            if key in _registered:
                return _registered[key]
        if "update_rule" in ancestor.__dict__:
            return None
        if ancestor.__module__.partition(".optim")[0] == "torch" and ancestor.__name__ in _TORCH:
            return _TORCH[ancestor.__name__]
    return None


def _row(
    update: Update,
    coupling: Coupling,
    scale: Callable[[Group], float] | float = 1.0,
    *,
    nesterov: bool = False,
) -> Describer:
    """A row of the table: how to read a group of an optimizer of this kind."""

    def describer(optimizer: Optimizer, group: Group) -> UpdateRule:
        is_switch = "decoupled_weight_decay" in group
        how = coupling
        if is_switch:
            how = Coupling.DECOUPLED if group["decoupled_weight_decay"] else Coupling.L2
        decay = group.get("weight_decay", 0.0)
        betas = tuple(group.get("betas", ()))
        return UpdateRule(
            type(optimizer).__name__,
            update,
            group["lr"],
            momentum=betas[0] if betas else group.get("momentum", 0.0),
            betas=betas,
            dampening=group.get("dampening", 0.0) if group.get("momentum", 0.0) else 0.0,
            nesterov=bool(group.get("nesterov", nesterov)),
            scale=scale(group) if callable(scale) else scale,
            coupling=how if "weight_decay" in group else Coupling.NONE,
            weight_decay=decay,
            decay_per_step=group["lr"] * decay,
            is_switch=is_switch,
        )

    return describer


def _muon(optimizer: Optimizer, group: Group) -> UpdateRule:
    scales = {_muon_scale(group["adjust_lr_fn"], p.shape) for p in group["params"]}
    return UpdateRule(
        type(optimizer).__name__,
        Update.ORTHOGONALIZED,
        group["lr"],
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        scale=scales.pop() if len(scales) == 1 else math.nan,
        newton_schulz=(tuple(group["ns_coefficients"]), group["ns_steps"]),
        **decoupled(group),
    )


def _muon_scale(adjustment: str | None, shape: Any) -> float:
    """What torch's Muon multiplies η by for a matrix of this shape."""
    rows, columns = shape[:2]
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _adam_scale(group: Group) -> float:
    return math.nan if group.get("amsgrad") else 1.0


def _rmsprop_scale(group: Group) -> float:
    return float(1 / (1 - group["momentum"]))  # its buffer is a sum, where Adam's is an average


_TORCH: dict[str, Describer] = {
    "SGD": _row(Update.GRADIENT, Coupling.L2),
    "ASGD": _row(Update.GRADIENT, Coupling.L2, math.nan),  # its η falls by itself
    "Adam": _row(Update.NORMALIZED, Coupling.L2, _adam_scale),
    "AdamW": _row(Update.NORMALIZED, Coupling.DECOUPLED, _adam_scale),
    "NAdam": _row(Update.NORMALIZED, Coupling.L2, math.nan, nesterov=True),
    "RAdam": _row(Update.NORMALIZED, Coupling.L2, math.nan),  # its steps lengthen as v fills
    "Adamax": _row(Update.NORMALIZED, Coupling.L2, math.nan),
    "SparseAdam": _row(Update.NORMALIZED, Coupling.NONE),
    "Adagrad": _row(Update.NORMALIZED, Coupling.L2, math.nan),
    "Adadelta": _row(Update.NORMALIZED, Coupling.L2, math.nan),
    "RMSprop": _row(Update.NORMALIZED, Coupling.L2, _rmsprop_scale),
    "Rprop": _row(Update.SIGN, Coupling.NONE, math.nan),
    "Adafactor": _row(Update.NORMALIZED, Coupling.DECOUPLED, math.nan),  # η goes with the RMS of w
    "Muon": _muon,
    "LBFGS": _row(Update.UNKNOWN, Coupling.NONE, math.nan),
}

# Of many packages, alike in all: sign(β1·m + (1 − β1)·g), decoupled decay (arXiv 2302.06675).
register("Lion", _row(Update.SIGN, Coupling.DECOUPLED))
