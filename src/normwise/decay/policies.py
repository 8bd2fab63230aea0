"""Policies: what the ``weight_decay`` of a parameter group means, for any torch optimizer.

A policy says how weights decay, the groups say how much: λ stays in ``group["weight_decay"]``,
where schedules and checkpoints look for it. For the time of a step the policy puts there what makes
the optimizer's own decay, fused or not, that of the policy. Where no value does, it puts 0 there
and acts beside the step.

[DW] arXiv 1711.05101, [ADC] arXiv 2506.02285, [CWD] arXiv 2510.12402.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.checks import check_number
from normwise.decay.attached import check_acts, check_unscheduled, label, scheduled, split_groups
from normwise.decay.fused import Spare, take_, takes
from normwise.protocols import AnalysisReport
from normwise.updates import Coupling, UpdateRule, attached_to, own_rule

__all__ = ["L2", "AttachedPolicy", "Cautious", "Corrected", "Decoupled", "Effect", "Policy"]

Number = float | Tensor


On = AnalysisReport | str | Iterable[Tensor | str | int]


class Effect(NamedTuple):
    """What a step does to a weight.

    Attributes:
        coupling: ``Coupling.L2`` or ``Coupling.DECOUPLED``.
        weight_decay: λ as torch means it: of the gradient λw, or of the factor 1 − ηλ. None where
            no such λ exists: decay that η does not change, where η is 0.
        shrink: ηλ, of the factor 1 − ηλ.
    """

    coupling: Coupling
    weight_decay: Number | None
    shrink: Number


@dataclass(frozen=True)
class Policy:
    """Base of :class:`L2`, :class:`Decoupled`, :class:`Cautious` and :class:`Corrected`.

    Args:
        weight_decay: λ of the weights that it is attached to (default: what their groups have).

    Raises:
        ValueError: for λ that is negative or not finite.
    """

    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.weight_decay is not None:
            check_number("weight_decay value", self.weight_decay)

    def effect(self, decay: Number, lr: Number, reference: Number, own: UpdateRule) -> Effect:
        """What λ = ``decay`` does at the learning rate ``lr``.

        Args:
            decay: λ of the group.
            lr: η of this step.
            reference: η where the schedule's multiplier is 1.
            own: what the optimizer does by itself.
        """
        raise NotImplementedError

    def _effect_on(
        self, optimizer: Optimizer, group: dict[str, Any], reference: Number
    ) -> tuple[UpdateRule, Effect]:
        """What the optimizer does to a group by itself, and what this policy does in its place."""
        own = own_rule(optimizer, group)
        return own, self.effect(group["weight_decay"], group["lr"], reference, own)

    def attach(self, optimizer: Optimizer, on: On | None = None) -> AttachedPolicy:
        """Decay weights of ``optimizer`` by this policy from now on.

        A group that mixes these weights with others is split. So attach before making schedulers,
        of either kind, and before loading the optimizer's state; attach again after copying or
        unpickling the optimizer, which torch does without hooks.

        Args:
            optimizer: any torch optimizer.
            on: a report of :func:`normwise.analyze`, for the weights that it finds scale-invariant
                (those of two dimensions or more); or a group's name or number, a pattern of
                parameter names (of an optimizer made from named parameters), a parameter, or
                several of these. Default: every group that nothing else is attached to.

        Returns:
            A handle, which prints what was done, and whose ``remove()`` ends it.

        Raises:
            ValueError: if ``on`` names nothing of the optimizer's, or weights that something else
                is attached to; if no weight has a λ; if this policy has one, and a group has
                another that is not 0; or for weights whose norms the optimizer fixes. Of L2 on
                weights whose steps the optimizer projects, which takes it out again, it warns.
            RuntimeError: in a step with a closure, where the policy acts before the step: the
                closure would compute the gradients anew.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        if any("lr" not in group for group in optimizer.param_groups):
            raise ValueError(
                f"{self.label} needs groups with an lr, which {type(optimizer).__name__} has not"
            )
        chosen = _chosen(optimizer, on)
        others = {p: other for other in attached_to(optimizer) for p in other.params}
        if on is None:
            chosen -= others.keys()
        for p in chosen & others.keys():
            raise ValueError(
                f"{others[p].label} is attached to a parameter of shape {tuple(p.shape)} already; "
                "remove it first, or name other weights with `on`"
            )
        if not chosen:
            attached = ", ".join(dict.fromkeys(other.label for other in others.values()))
            raise ValueError(f"no weights are left for {self.label}: they have {attached}")
        self._check_decays(optimizer, chosen)
        check_acts(
            optimizer,
            chosen,
            self.label,
            lambda own: self.effect(1.0, 1.0, 1.0, own).coupling is Coupling.L2,
        )
        groups = split_groups(optimizer, chosen)
        for group in groups:
            group.setdefault("weight_decay", 0.0)
            if self.weight_decay is not None:
                group["weight_decay"] = self.weight_decay
        return AttachedPolicy(self, optimizer, groups)

    @property
    def label(self) -> str:
        """Its name."""
        return type(self).__name__

    def _check_decays(self, optimizer: Optimizer, chosen: set[Tensor]) -> None:
        """Raise ValueError unless policy and groups agree on λ, and there is one."""
        groups = {
            i: float(group.get("weight_decay", 0.0))
            for i, group in enumerate(optimizer.param_groups)
            if not chosen.isdisjoint(group["params"])
        }
        if self.weight_decay is None:
            if not any(groups.values()) and not scheduled.get(optimizer):
                raise ValueError(
                    f"{self.label} has no weight_decay, and those of the groups are 0; give one"
                )
            return
        check_unscheduled(optimizer, f"attach {self.label}({self.weight_decay:g})")
        for i, decay in groups.items():
            if decay not in (0, self.weight_decay):
                raise ValueError(
                    f"{label(optimizer, i)} has weight_decay {decay:g}, which "
                    f"{self.label}({self.weight_decay:g}) would replace; make the optimizer with "
                    f"weight_decay=0, or take the group's with {self.label}()"
                )

    def _before_step(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        reference: Number,
        closure: bool,
        room: list[Tensor],
    ) -> Any:
        """Prepare a group for a step; what is returned is handed to :meth:`_after_step`.

        ``room`` is kept for the group from step to step, to be filled with what it needs.
        """
        own, effect = self._effect_on(optimizer, group, reference)
        value = effect.weight_decay
        if value is not None and _takes(optimizer, group, own, effect):
            group["weight_decay"] = value / own.rate
            if own.is_switch:
                group["decoupled_weight_decay"] = effect.coupling is Coupling.DECOUPLED
            return
        group["weight_decay"] = 0.0
        if not isinstance(value, Tensor) and value == 0:
            return
        if closure:
            raise RuntimeError(
                f"{self.label} is attached to an optimizer that is stepped with a closure, which "
                f"would compute the gradients anew after {self.label} has acted"
            )
        if params := _with_gradient(group):
            _act(optimizer, group, params, effect)

    def _after_step(self, optimizer: Optimizer, memo: Any) -> None:
        pass

    def _changed_rule(
        self, optimizer: Optimizer, group: dict[str, Any], rule: UpdateRule, reference: Number
    ) -> UpdateRule:
        """What becomes of the rule of a group, or of a weight of it, that has this policy."""
        own, effect = self._effect_on(optimizer, group, reference)
        value = effect.weight_decay
        through = value is not None and _takes(optimizer, group, own, effect)
        return replace(
            rule,
            coupling=effect.coupling,
            weight_decay=math.nan if value is None else value,
            rate=1.0,
            decay_per_step=effect.shrink,
            wd_ratio=rule.wd_ratio if through else 1.0,
            changed_by=(*rule.changed_by, self.label),
        )


def _takes(optimizer: Optimizer, group: dict[str, Any], own: UpdateRule, effect: Effect) -> bool:
    """Whether a value of the group's ``weight_decay`` has this effect on all of its weights."""
    if own.changed_by:  # a wrapper, which may decay some of a group's weights otherwise
        rules = [own_rule(optimizer, group, p) for p in group["params"]]
        if any((r.coupling, r.rate) != (own.coupling, own.rate) for r in rules):
            return False
    return (own.is_switch or own.coupling is effect.coupling) and (
        own.takes_tensor or not isinstance(effect.weight_decay, Tensor)
    )


@dataclass(frozen=True)
class L2(Policy):
    """λw is added to the gradient, before moments see it: the gradient of ½λ‖w‖².

    Args:
        weight_decay: λ (default: what the groups have).
    """

    def effect(self, decay: Number, lr: Number, reference: Number, own: UpdateRule) -> Effect:
        return Effect(Coupling.L2, decay, lr * decay)


@dataclass(frozen=True)
class Decoupled(Policy):
    """w ← (1 − d)w, apart from the gradient and the moments ([DW]).

    ============== ============ =====================================================
    ``per``        d            meant by
    ============== ============ =====================================================
    ``"lr"``       η_t·λ        torch: twice the learning rate, twice the decay
    ``"schedule"`` s_t·λ        [DW]: s_t = η_t/η, the schedule without the rate
    ``"step"``     λ            a decay that no learning rate changes
    ============== ============ =====================================================

    η of ``"schedule"`` is the ``max_lr`` that OneCycleLR writes into a group, or else the
    ``initial_lr`` of any scheduler, or else the learning rate when the policy was attached.

    Args:
        weight_decay: λ (default: what the groups have).
        per: what λ is counted by (default: ``"lr"``).
    """

    per: Literal["lr", "schedule", "step"] = "lr"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in ("lr", "schedule", "step"):
            raise ValueError(f"Invalid per: {self.per!r}; must be 'lr', 'schedule' or 'step'")
        if self.per != "lr" and self.weight_decay is not None and self.weight_decay >= 1:
            raise ValueError(
                f"Invalid weight_decay value: {self.weight_decay}; per {self.per} it must be "
                "below 1, which takes all of a weight in one step"
            )

    def effect(self, decay: Number, lr: Number, reference: Number, own: UpdateRule) -> Effect:
        if self.per == "lr":
            return Effect(Coupling.DECOUPLED, decay, lr * decay)
        if self.per == "schedule":
            peak = _checked_peak(reference)
            return Effect(Coupling.DECOUPLED, decay / peak, lr / peak * decay)
        at_rest = not isinstance(lr, Tensor) and lr == 0
        return Effect(Coupling.DECOUPLED, None if at_rest else decay / lr, decay)


@dataclass(frozen=True)
class Cautious(Decoupled):
    """Decoupled decay of those entries alone that the step moves towards zero, or not ([CWD]).

    w ← w − u − d·1[u∘w ≥ 0]∘w, where u is what the optimizer took from w, measured around its step,
    whichever optimizer it is. That costs a copy of the weights, which on the CPU is kept from step
    to step, and one pass over them where Numba is installed, else seven multi-tensor operations.

    Args:
        weight_decay: λ (default: what the groups have).
        per: as of :class:`Decoupled`.
    """

    def _before_step(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        reference: Number,
        closure: bool,
        room: list[Tensor],
    ) -> Any:
        shrink = self._effect_on(optimizer, group, reference)[1].shrink
        group["weight_decay"] = 0.0
        # Real aliases of complex weights: signs are of entries.
        params = [torch.view_as_real(p) if p.is_complex() else p for p in _with_gradient(group)]
        if not params or (not isinstance(shrink, Tensor) and shrink == 0):
            return None
        return shrink, params, _copies(params, room)

    def _after_step(self, optimizer: Optimizer, memo: Any) -> None:
        if memo is None:
            return
        shrink, params, before = memo
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:  # a step that a fused optimizer skips leaves u = 0
            shrink = shrink * (1 - _scalar(found_inf))
        if not isinstance(shrink, Tensor):
            spares = [Spare(w, p, shrink) for w, p in zip(before, params, strict=True)]
            if takes(spares):
                take_(spares)
                return
        # 1 where u·w >= 0, else 0, by signs: the product of two small numbers could vanish.
        taken = list(torch._foreach_sub(before, params))
        torch._foreach_sign_(taken)
        torch._foreach_mul_(taken, before)
        torch._foreach_sign_(taken)
        torch._foreach_clamp_max_(taken, 0.0)
        torch._foreach_add_(taken, 1.0)
        if isinstance(shrink, Tensor):
            _scale_(taken, shrink)
            shrink = 1.0
        torch._foreach_addcmul_(params, before, taken, value=-shrink)

    def _changed_rule(
        self, optimizer: Optimizer, group: dict[str, Any], rule: UpdateRule, reference: Number
    ) -> UpdateRule:
        changed = super()._changed_rule(optimizer, group, rule, reference)
        # It skips entries, by the update: of a slice, no share is known.
        return replace(changed, coupling=Coupling.UNKNOWN, wd_ratio=1.0)


@dataclass(frozen=True)
class Corrected(Policy):
    """λ_t = λ·η_t/η_max, for the weights that feed a normalization (AdamC, [ADC]).

    Under a schedule plain decay lets the equilibrium norm, √(ηC/2λ) under AdamW, fall with the
    learning rate, and gradients rise; with this it stays. It is meant for the weights whose output
    is normalized, not for the norm's own gain. So ``on`` must be given: a report, as a rule.

    The coupling is the optimizer's own; decoupled where that is not known.

    Args:
        weight_decay: λ (default: what the groups have).
        max_lr: η_max (default: as η of :class:`Decoupled`).
    """

    max_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_lr is not None:
            check_number("max_lr", self.max_lr, positive=True)

    def attach(self, optimizer: Optimizer, on: On | None = None) -> AttachedPolicy:
        """As :meth:`Policy.attach`, but ``on`` must be given.

        Args:
            optimizer: as of :meth:`Policy.attach`.
            on: the weights to correct.
        """
        if on is None:
            raise ValueError(
                "Corrected must be told which weights feed a normalization: "
                "attach(optimizer, on=normwise.analyze(model, batch)), or a group's name"
            )
        return super().attach(optimizer, on)

    def effect(self, decay: Number, lr: Number, reference: Number, own: UpdateRule) -> Effect:
        corrected = decay * lr / _checked_peak(reference if self.max_lr is None else self.max_lr)
        corrected = corrected * own.rate
        coupling = Coupling.L2 if own.coupling is Coupling.L2 else Coupling.DECOUPLED
        return Effect(coupling, corrected, lr * corrected)


# The options of a group that a policy may change for the time of a step.
_SWAPPED = ("weight_decay", "decoupled_weight_decay")


class AttachedPolicy:
    """What :meth:`Policy.attach` did; ``print`` it, ``remove()`` it.

    Attributes:
        policy: the policy.
        params: the parameters that it acts on.

    Args:
        policy: what to do.
        optimizer: whose hooks it is to be on.
        groups: the groups that it is to act on.
    """

    def __init__(self, policy: Policy, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
        self.policy = policy
        self.params = frozenset(p for group in groups for p in group["params"])
        self._optimizer = weakref.ref(optimizer)
        # By parameter: load_state_dict makes new groups.
        self._lrs: dict[Tensor, Number] = {}
        for group in groups:
            lr = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
            self._lrs.update(dict.fromkeys(group["params"], lr))
        # Of each group, for the time of a step: its own options, and the policy's memo.
        self._in_step: list[tuple[dict[str, Any], dict[str, Any], Any]] = []
        self._rooms: dict[int, list[Tensor]] = {}
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._save),
        )
        _after_failure(optimizer, self._restore)
        attached_to(optimizer).append(self)

    @property
    def label(self) -> str:
        """The policy's name."""
        return self.policy.label

    def remove(self) -> None:
        """End it; the groups' ``weight_decay`` is the optimizer's own again."""
        self._restore()
        for hook in self._hooks:
            hook.remove()
        optimizer = self._optimizer()
        if optimizer is not None and self in attached_to(optimizer):
            attached_to(optimizer).remove(self)

    def groups(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The groups that it acts on at present, with their numbers."""
        optimizer = self._optimizer()
        for i, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
            if group["params"] and group["params"][0] in self.params:
                yield i, group

    def effect(self, group: dict[str, Any]) -> Effect:
        """What the next step does to the weights of one of its groups.

        Args:
            group: one of the groups that it acts on.

        Raises:
            ReferenceError: if the optimizer is gone.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError(f"the optimizer of {self.policy} is gone")
        group = self._own_options(group)
        return self.policy._effect_on(optimizer, group, self._lr(group))[1]

    def changed_rule(self, rule: UpdateRule, group: dict[str, Any]) -> UpdateRule:
        """What becomes of the rule of one of its groups, for :func:`normwise.describe`.

        Args:
            rule: of the group without the policy.
            group: the group.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            return rule
        own = self._own_options(group)
        return self.policy._changed_rule(optimizer, own, rule, self._lr(own))

    def _own_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group as it is between steps, also for who asks in the middle of one."""
        for current, kept, _ in self._in_step:
            if current is group:
                return {**group, **kept}
        return group

    def __str__(self) -> str:
        optimizer = self._optimizer()
        if optimizer is None:
            return f"{self.policy}: its optimizer is gone"
        lines = [f"{self.policy} on {len(self.params)} parameters of {type(optimizer).__name__}"]
        for i, group in self.groups():
            lines.append(
                f"  {label(optimizer, i)}: {len(group['params'])} parameters, "
                f"λ = {float(group['weight_decay']):g}"
            )
        return "\n".join(lines)

    def _lr(self, group: dict[str, Any]) -> Number:
        at_attach = self._lrs[group["params"][0]]
        return cast(Number, group.get("max_lr", group.get("initial_lr", at_attach)))

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._restore()  # of a step that has raised past the guard
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is self
        for i, group in self.groups():
            kept: dict[str, Any] = {key: group[key] for key in _SWAPPED if key in group}
            self._in_step.append((group, kept, None))
            lr, room = self._lr(group), self._rooms.setdefault(i, [])
            memo = self.policy._before_step(optimizer, group, lr, closure is not None, room)
            self._in_step[-1] = group, kept, memo

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for _, _, memo in self._in_step:
            self.policy._after_step(optimizer, memo)
        self._restore()

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Put the groups' own options into a state dict that is made in the middle of a step."""
        pairs = list(zip(optimizer.param_groups, state_dict["param_groups"], strict=True))
        for group, kept, _ in self._in_step:
            for current, saved in pairs:
                if current is group:
                    saved.update(kept)

    def _restore(self) -> None:
        for group, kept, _ in self._in_step:
            group.update(kept)
        self._in_step.clear()


def _after_failure(optimizer: Optimizer, restore: Callable[[], None]) -> None:
    """Have ``optimizer.step`` call ``restore`` when it raises, for torch has no hook for that.

    As torch's learning-rate schedulers do, it replaces the method of this one optimizer, and holds
    no reference to it. They look for ``__func__``.
    """
    method: Any = optimizer.step
    # A method's function, or the function that a scheduler has put in its place.
    inner: Callable[..., Any] = getattr(method, "__func__", method)
    is_method = inner is not method
    reference = weakref.ref(optimizer)

    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(self, *args, **kwargs) if is_method else inner(*args, **kwargs)
        except BaseException:
            restore()
            raise

    def bound(*args: Any, **kwargs: Any) -> Any:
        return step(cast(Optimizer, reference()), *args, **kwargs)

    functools.update_wrapper(bound, method)
    vars(bound).update(__wrapped__=inner, __func__=step)
    optimizer.step = bound  # type: ignore[method-assign]  # as torch's schedulers do


def _checked_peak(lr: Number) -> Number:
    if not isinstance(lr, Tensor) and lr == 0:
        raise ValueError(
            "the learning rate was 0 when the policy was attached, and decay relative to it has no "
            'meaning; set group["initial_lr"] to the rate at which the schedule is 1'
        )
    return lr


def _act(optimizer: Optimizer, group: dict[str, Any], params: list[Tensor], effect: Effect) -> None:
    """Add λw to the gradients, or shrink the weights, before the optimizer's step."""
    # Set by GradScaler around the step of a fused optimizer, which unscales by itself.
    grad_scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    if effect.coupling is Coupling.DECOUPLED:
        shrink = effect.shrink
        if found_inf is not None:
            shrink = shrink * (1 - _scalar(found_inf))
        _scale_(params, 1 - shrink)
        return
    value = cast(Number, effect.weight_decay) * (-1 if group.get("maximize", False) else 1)
    grads = [cast(Tensor, p.grad) for p in params]
    if grad_scale is None and not isinstance(value, Tensor):
        torch._foreach_add_(grads, params, alpha=value)
        return
    penalties = list(torch._foreach_mul(params, 1))
    _scale_(penalties, value if grad_scale is None else value * _scalar(grad_scale))
    torch._foreach_add_(grads, penalties)


def _copies(params: list[Tensor], room: list[Tensor]) -> list[Tensor]:
    """Copies of weights; on the CPU in memory that is kept, since new memory is slow there."""
    alike = len(room) == len(params) and all(
        (copy.shape, copy.stride(), copy.dtype) == (p.shape, p.stride(), p.dtype)
        for copy, p in zip(room, params, strict=True)
    )
    if alike:
        torch._foreach_copy_(room, params)
        return room
    copies = list(torch._foreach_mul(params, 1))
    plain = all(type(p) in (Tensor, torch.nn.Parameter) and p.device.type == "cpu" for p in params)
    room[:] = copies if plain and not torch.compiler.is_compiling() else []
    return copies


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    """The parameters that a step moves."""
    return [p for p in group["params"] if p.grad is not None]


def _scalar(t: Tensor) -> Tensor:
    """0-dimensional, and in float64 where the device has it."""
    return t.reshape(()) if t.device.type == "mps" else t.reshape(()).double()


def _scale_(tensors: list[Tensor], factor: Number) -> None:
    """Multiply by a number, or by a tensor that is brought to their devices."""
    if not isinstance(factor, Tensor):
        torch._foreach_mul_(tensors, factor)
        return
    for device in dict.fromkeys(t.device for t in tensors):
        here = _scalar(factor).to(device, non_blocking=True)
        torch._foreach_mul_([t for t in tensors if t.device == device], here)


def _chosen(optimizer: Optimizer, on: On | None) -> set[Tensor]:
    """The parameters of ``optimizer`` that ``on`` means."""
    groups = optimizer.param_groups
    held = {p for group in groups for p in group["params"]}
    if on is None:
        return held
    if hasattr(on, "parameter_views"):
        found = {p for p in on.parameter_views() if p.ndim > 1} & held
        if not found:
            raise ValueError("the optimizer has none of the weights that the report finds")
        return found
    items = [on] if isinstance(on, str | int | Tensor) else on
    chosen: set[Tensor] = set()
    for item in items:
        if isinstance(item, Tensor):
            if item not in held:
                raise ValueError(
                    f"a parameter of shape {tuple(item.shape)} is not one of the optimizer's"
                )
            chosen.add(item)
        else:
            chosen |= _named(groups, item)
    return chosen


def _named(groups: list[dict[str, Any]], name: str | int) -> set[Tensor]:
    """The parameters of a group, by its number or name, or else those whose names match."""
    for i, group in enumerate(groups):
        if name == i or (isinstance(name, str) and name == group.get("name")):
            return set(group["params"])
    matching = {
        p
        for group in groups
        for n, p in zip(group.get("param_names", ()), group["params"], strict=False)
        if isinstance(name, str) and fnmatch.fnmatchcase(n, name)
    }
    if not matching:
        known = [str(i) if "name" not in g else repr(g["name"]) for i, g in enumerate(groups)]
        raise ValueError(
            f"unknown group {name!r}; the optimizer has the groups {', '.join(known)}"
            + ("" if "param_names" in groups[0] else ", and no names of parameters")
        )
    return matching
