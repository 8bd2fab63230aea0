"""The optimizers' common class: groups, steps and state dicts, of which each has a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _default_to_fused_or_foreach

from normwise.geometry import View, computing_dtype
from normwise.optim.displaced import Displacements
from normwise.optim.groups import (
    as_view_option,
    check_keys,
    check_not_flattened,
    check_options,
    names_of,
)
from normwise.optim.joint import (
    Family,
    Joint,
    Removal,
    Symmetries,
    families_of,
    with_views,
)
from normwise.optim.kernels import FusedPlans, check_available, takes_scaler, use_fused
from normwise.optim.sharded import Exchange
from normwise.optim.state_dicts import StateForm, params_of
from normwise.optim.step import AT_ONCE, AdamRule, Part, SGDRule, Step
from normwise.sharding import is_sharded, local, summed_gradients
from normwise.updates import Update, UpdateRule, decoupled

# Tells of a CUDA graph captured without capturable=True. Newer versions of torch have renamed it.
_check_capture: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None)
    or Optimizer._cuda_graph_capture_health_check
)


class NormwiseOptimizer(Optimizer):
    """Base of :class:`AdamP`, :class:`SGDP` and :class:`SGDW`; not for direct use."""

    _form: StateForm
    # The step of some weights: weights, gradients, a list for each key of the state, and options.
    _functional: Callable[..., None]

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], symmetries: Symmetries | None = None
    ) -> None:
        check_options(_with_view(defaults))
        self._families: list[Family] = []
        super().__init__(params, defaults)
        if symmetries is not None:
            self._families = self._resolved(symmetries)

    def _rule(self, group: dict[str, Any]) -> tuple[AdamRule | SGDRule, float]:
        """How directions are made, and what lr·weight_decay is multiplied by."""
        raise NotImplementedError

    def update_rule(self, group: dict[str, Any], p: Tensor | None = None) -> UpdateRule:
        """What a step does to the weights of a group, for :func:`normwise.describe`.

        Args:
            group: one of this optimizer's.
            p: a weight of it (default: any that has no symmetry with others).

        Returns:
            The rule.
        """
        rule, decay_scale = self._rule(group)
        if isinstance(rule, AdamRule):
            betas = (rule.beta1, rule.beta2)
            directions: dict[str, Any] = {"momentum": rule.beta1, "betas": betas}
        else:
            directions = {"momentum": rule.momentum, "dampening": rule.dampening}
        found = UpdateRule(
            type(self).__name__,
            Update.NORMALIZED if isinstance(rule, AdamRule) else Update.GRADIENT,
            group["lr"],
            nesterov=rule.nesterov,
            scale=1.0,
            takes_tensor=True,
            rounds_at_random=bool(group.get("stochastic_rounding")),
            **{key: group[key] for key in ("view", "wd_ratio", "delta", "norm") if key in group},
            **directions,
            **decoupled(group, decay_scale),
        )
        return self._along_families(found, p)

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a weight before its first step."""
        raise NotImplementedError

    def _resolved(self, symmetries: Symmetries) -> list[Family]:
        """Families of the weights; those that are one weight's view are left to its group."""
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        name = type(self).__name__
        families = families_of(symmetries, names_of(self), list(group_of), name)
        given = {p: group["view"] for p, group in group_of.items() if p.ndim > 1}
        given = {p: view for p, view in given.items() if isinstance(view, View)}
        joint, views = with_views(families, given)
        joint += [Family.of_view(p, view) for p, view in views.items() if given.get(p) != view]
        for family in joint:
            if any(group_of[p]["norm"] == "fixed" for p in family.params):
                raise ValueError(
                    f"norm='fixed' keeps the norm of each weight, and symmetries={family.name} "
                    "moves along it; wrap torch's optimizer in normwise.sphere to fix joint norms"
                )
        if self.defaults["differentiable"]:
            raise ValueError("differentiable=True cannot be had with symmetries")
        return joint

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked, and an option that is misspelt is an error."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        check_keys(param_group, self.defaults, type(self).__name__)
        group = _with_view({**self.defaults, **param_group})
        check_options(group)
        super().add_param_group(group)
        try:
            if group["fused"]:
                self._step_supports_amp_scaling = True
                check_available(group["params"], stochastic_rounding=group["stochastic_rounding"])
            for p in group["params"]:
                check_not_flattened(p, group.get("view"))
                if isinstance(group.get("view"), View) and p.ndim > 1:
                    group["view"].check(p.shape)
        except (ValueError, RuntimeError, ImportError):
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            RuntimeError: if a gradient is sparse, or the memory of a tensor is gone.
        """
        if "capturable" in self.defaults:
            _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._unscale():
            return loss
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            parts = [part for part in map(self._part, self.param_groups) if part.params]
            if self._families:
                self._step_along_families(parts)
            elif (exchange := self._step_all(parts)) is not None:
                exchange.finish_()
        return loss

    def _step_all(self, parts: list[Part]) -> Exchange | None:
        """Step all weights as the options of their parts say.

        Returns:
            Where there are DTensors, what ends their step.
        """
        # Types are compared faster than they are asked for a base.
        plain = all(_PLAIN.issuperset(map(type, part.params)) for part in parts)
        if not plain and any(is_sharded(p) for part in parts for p in part.params):
            return self._step_sharded(parts)
        self._step_parts(parts, 0)
        return None

    def _step_along_families(self, parts: list[Part]) -> None:
        """Step all weights; of those of families take symmetries out of what was done, and decay.

        They take the step of the optimizer without a view first, as one that is wrapped does.
        """
        joint: Joint = self.__dict__.setdefault("_joint_plans", Joint(self._families))
        taking = joint.taking(lambda p: p.grad is not None)
        if not taking:
            if (exchange := self._step_all(parts)) is not None:
                exchange.finish_()
            return
        plan = joint.plan(taking)
        engine: Displacements = self.__dict__.setdefault(
            "_displacements", Displacements(stochastic_rounding=False)
        )
        together = set(plan.params)
        split: list[Part] = []
        for part in parts:
            ours = [i for i, p in enumerate(part.params) if p in together]
            theirs = [i for i, p in enumerate(part.params) if p not in together]
            if theirs:
                split.append(part.only(theirs))
            if ours:
                free = replace(part.step, view=None, norm="free", weight_decay=0.0)
                split.append(replace(part.only(ours), step=free))
        members = [(p, part.group) for part in parts for p in part.params if p in together]
        with engine.stepping(members, lambda _: False) as stepped:
            exchange = self._step_all(split) or Exchange({})
        rounding = self.defaults["stochastic_rounding"]
        exchange.finish_(Removal(plan, stepped, self._keep, stochastic_rounding=rounding))

    def _keep(self, group: Mapping[str, Any]) -> float | Tensor:
        """What decay leaves of a projected weight in a step."""
        _, scale = self._rule(dict(group))
        keep: float | Tensor = 1 - group["lr"] * scale * group["weight_decay"] * group["wd_ratio"]
        return keep

    def _part(self, group: dict[str, Any]) -> Part:
        """The weights of a group that have gradients, with their state and the step's options."""
        params, grads, states = [], [], []
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients, but a "
                    f"parameter of shape {tuple(p.shape)} has one; make it dense"
                )
            state = self.state.get(p)
            if not state:
                check_not_flattened(p, group.get("view"))
                state = self._init_state(p, group)
                if state:
                    self.state[p] = state
            params.append(p)
            grads.append(grad)
            states.append(state)
        rule, decay_scale = self._rule(group)
        in_kernel = self._unscales_in_kernel()
        step = Step.of(
            group,
            rule,
            decay_scale=decay_scale,
            grad_scale=getattr(self, "grad_scale", None) if in_kernel else None,
            found_inf=getattr(self, "found_inf", None) if in_kernel else None,
        )
        keeps = not (isinstance(rule, SGDRule) and rule.momentum == 0)
        lists = [_column(states, key) if keeps else [None] * len(states) for key in self._form.keys]
        return Part(params, grads, tuple(lists), step, group, AT_ONCE)

    def _step_parts(self, parts: list[Part], number: int) -> None:
        """Step some parts, all those together that a fused step takes.

        Args:
            parts: with one ending.
            number: tells them from the parts of another call in the same step.
        """
        every = [p for part in parts for p in part.params]
        fused: list[Part] = []
        plain: list[Part] = []
        for part in parts:
            takes = part.ending.may_be_fused(part.params)
            (fused if takes and use_fused(part.group, part.params, every) else plain).append(part)
        if fused:
            plans: list[FusedPlans] = self.__dict__.setdefault("_plans", [])
            plans += [FusedPlans() for _ in range(number + 1 - len(plans))]
            for part, members in plans[number].step_(fused):
                left = part.only(members)
                self._functional(
                    *left.tensors, left.step, foreach=not _is_negative(left), ending=left.ending
                )
        for part in plain:
            self._functional(
                *part.tensors, part.step, foreach=_use_foreach(part), ending=part.ending
            )

    def _step_sharded(self, parts: list[Part]) -> Exchange:
        """Step DTensors, alone or among others, as far as it goes without the exchange."""
        if self.defaults["differentiable"]:
            raise RuntimeError("differentiable=True cannot be had with DTensor parameters")
        exchange = Exchange(self.__dict__.setdefault("_layouts", {}))
        pairs = [pair for part in parts for pair in zip(part.params, part.grads, strict=True)]
        summed = iter(summed_gradients(pairs))
        number = 0
        for part in parts:
            grads = [next(summed) for _ in part.grads]
            for shards in exchange.parts(part, grads):
                self._step_parts([shards], number)
                number += 1
        return exchange

    def _unscales_in_kernel(self) -> bool:
        """Whether the kernels do, without a wait, what a GradScaler leaves to a fused step."""
        if getattr(self, "found_inf", None) is None or torch.compiler.is_compiling():
            return False
        if self._families:  # what ends the step would decay the weights of one that is skipped
            return False
        return all(
            group["fused"] and takes_scaler(p)
            for group in self.param_groups
            for p in group["params"]
        )

    def _unscale(self) -> bool:
        """Do what a GradScaler leaves to a fused step; return whether all gradients are finite."""
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if found_inf is not None and self._unscales_in_kernel():
            return True
        if found_inf is not None and found_inf.item() != 0:
            return False
        if grad_scale is not None:
            grads = [p.grad for p in params_of(self.param_groups)]
            torch._foreach_div_([local(grad) for grad in grads if grad is not None], grad_scale)
        return True

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with views written as strings, so that ``weights_only=True`` loads it."""
        state_dict: dict[str, Any] = super().state_dict()
        for group in state_dict["param_groups"]:
            if isinstance(group.get("view"), View):
                group["view"] = str(group["view"])
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer, of the official code, or of the torch optimizer.

        Options that the checkpoint does not have, such as the views in one of ``torch.optim``,
        keep the values that the groups have now.

        Raises:
            ValueError: if the state is of a run that this optimizer cannot continue.
        """
        saved_groups = state_dict["param_groups"]
        groups = [
            self._form.group(saved, current, list(self.defaults))
            for saved, current in zip(saved_groups, self.param_groups, strict=False)
        ]
        groups += saved_groups[len(groups) :]  # torch tells of a wrong number of groups
        state = {key: self._form.state(value) for key, value in state_dict["state"].items()}
        for group in saved_groups:
            self._adapt_state(group, [state[key] for key in group["params"] if key in state])
        pairs = [
            (state.get(saved_id, {}), p)
            for saved_id, p in zip(params_of(groups), params_of(self.param_groups), strict=False)
        ]
        for saved, p in pairs:
            self._form.place_(saved, p)
        super().load_state_dict({**state_dict, "param_groups": groups, "state": state})
        for saved, p in pairs:
            if saved:
                self.state[p].update(self._form.widened(saved, p))

    def _adapt_state(self, saved: dict[str, Any], states: list[dict[str, Any]]) -> None:
        """Convert the states of a saved group, where its options say that they mean another."""

    def _along_families(self, rule: UpdateRule, p: Tensor | None) -> UpdateRule:
        """The rule of a weight whose steps lose their part along symmetries of several weights."""
        if p is None or not any(p is q for family in self._families for q in family.params):
            return rule
        return replace(
            rule,
            view=None,
            wd_ratio=1.0,
            weight_decay=rule.weight_decay * rule.wd_ratio,
            rate=rule.rate * rule.wd_ratio,
            decay_per_step=rule.decay_per_step * rule.wd_ratio,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_families": self._families}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_families", [])
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group.update(_with_view(group))
            for p in group["params"]:
                p_state = self.state.get(p, {})
                if "step" in p_state and not isinstance(p_state["step"], Tensor):
                    step = float(p_state["step"])
                    p_state["step"] = new_step(p, group["capturable"]).fill_(step)


_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def new_step(p: Tensor, capturable: bool) -> Tensor:
    """A step count of 0: on the host, where it costs nothing, or for CUDA graphs beside ``p``."""
    return torch.zeros((), dtype=torch.float32, device=p.device if capturable else "cpu")


def new_moment(p: Tensor) -> Tensor:
    """A zero moment for ``p``: of its shape and strides, in float32 or better."""
    return torch.zeros_like(p, dtype=computing_dtype(p.dtype), memory_format=torch.preserve_format)


def _column(states: list[dict[str, Tensor]], key: str) -> list[Tensor | None]:
    return [state[key] for state in states]


def _with_view(group: dict[str, Any]) -> dict[str, Any]:
    return {**group, "view": as_view_option(group["view"])} if "view" in group else group


def _use_foreach(part: Part) -> bool:
    """Whether to take the multi-tensor step: as asked for, else where torch would."""
    if part.group["foreach"] is None:
        return _default_to_fused_or_foreach(
            part.params, part.group["differentiable"], use_fused=False
        )[1]
    return bool(part.group["foreach"]) and not _is_negative(part)


def _is_negative(part: Part) -> bool:
    """Whether there are negative views, to which multi-tensor operators refuse to write."""
    if torch.compiler.is_compiling():
        return False
    return any(t is not None and t.is_neg() for tensors in part.tensors for t in tensors)
