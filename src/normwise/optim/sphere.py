r"""Steps on spheres around any torch optimizer: norms are fixed, the learning rate is an angle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from normwise.checks import check_number, check_optimizer
from normwise.geometry import View, computing_dtype
from normwise.optim.displaced import Batch, Displaced, Displacements, Item
from normwise.optim.groups import names_of
from normwise.optim.joint import Family, Moves, Symmetries, check_fixable
from normwise.optim.motion import (
    WG,
    WW,
    KernelStep,
    LearnedNorm,
    Length,
    Motion,
    Path,
    RadialBrake,
    coefficients,
)
from normwise.optim.radii import Radius, joint_radii, new_state, radii_of, step_radius_
from normwise.optim.step import is_nonzero
from normwise.optim.sums import divisor
from normwise.optim.wrapping import Wrapper, resolve
from normwise.protocols import Views
from normwise.updates import Coupling, Update, UpdateRule, attached_to, own_rule, rule_of

__all__ = ["LearnedNorm", "RadialBrake", "Sphere", "sphere"]


class Sphere(Wrapper):
    """An optimizer whose steps keep the norms of slices, made by :func:`sphere`.

    It shares groups, state and defaults with the optimizer that it wraps. Its ``state_dict()`` is
    the wrapped one's, with the radii in the state of each weight on a sphere; those of units of
    several weights are in the state of the first of them.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        views: Mapping[Tensor, View],
        families: Sequence[Family],
        radii: Mapping[Tensor, Tensor],
        joint: Sequence[Tensor],
        motion: Motion,
        *,
        stochastic_rounding: bool,
    ) -> None:
        super().__init__(optimizer, views, families)
        self._motion = motion
        self._stochastic_rounding = stochastic_rounding
        self._norms = {p: new_state(radius, motion.norm) for p, radius in radii.items()}
        self._joint_norms = [new_state(radius, motion.norm) for radius in joint]
        self._own |= {"_motion", "_stochastic_rounding", "_norms", "_joint_norms"}

    @property
    def radii(self) -> dict[Tensor, Tensor]:
        """The radius of each slice of each weight on a sphere, shape ``(slices,)``.

        Of a sharded weight all ranks have the radii of the whole.
        """
        return {p: state["radius"] for p, state in self._norms.items()}

    @property
    def joint_radii(self) -> list[Tensor]:
        """The radius √Σ‖wₛ‖² of each unit of each family of weights, shape ``(units,)``."""
        return [state["radius"] for state in self._joint_norms]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer step, and move slices along their spheres instead.

        Weights without a gradient are left alone, families that have one are, and slices that the
        wrapped optimizer does not move.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss. It is
                called once, before the wrapped optimizer's step.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            engine = self._engine()
            taking = self._joint.taking(lambda p: p.grad is not None)
            together = {p for i in taking for p in self._families[i].params}
            work = [
                (p, group)
                for group in self.param_groups
                for p in group["params"]
                if p.grad is not None and (p in self._views or p in together)
            ]
            steps = engine.stepping(work, self._starts_from_zero)
            with steps as stepped, self._without_decay():
                self.optimizer.step()
            items = [Item(of, self._views[p]) for p, of in stepped.items() if p in self._views]
            moves = None
            if taking:
                moves = Moves(
                    self._joint.plan(taking),
                    stepped,
                    lambda number, sums: self._joint_coefficients(taking[number], stepped, sums),
                    with_gradients=isinstance(self._motion.norm, LearnedNorm),
                    stochastic_rounding=self._stochastic_rounding,
                )
            row = self._row if self._motion.fixes_norms else None
            engine.end_(items, self._coefficients, row, lambda p: self._norms[p]["radius"], moves)
        return loss

    def _engine(self) -> Displacements:
        if "_displacements" not in self.__dict__:
            self.__dict__["_displacements"] = Displacements(
                everywhere=not self._motion.fixes_norms,
                with_gradients=isinstance(self._motion.norm, LearnedNorm),
                stochastic_rounding=self._stochastic_rounding,
            )
        engine: Displacements = self.__dict__["_displacements"]
        return engine

    def _starts_from_zero(self, p: Tensor) -> bool:
        """Whether the wrapped optimizer steps from zero, so that it writes d itself.

        What it writes is then not rounded to the spacing of numbers near w. That matters where
        only its direction counts, and in half precision. Raw updates otherwise start from the
        weights, for optimizers whose steps are as long as those.
        """
        return self._motion.update == "relative" or computing_dtype(p.dtype) != p.dtype

    def _row(self, group: Mapping[str, Any]) -> KernelStep:
        relative = self._motion.update == "relative"
        lr = group["lr"] if relative else 0.0
        return KernelStep(self._motion.path, lr=lr, floor=self._motion.floor, is_relative=relative)

    def _coefficients(self, b: Batch) -> tuple[Tensor, Tensor]:
        states = [self._norms[p] for p in b.params]
        lr, noise = _number(b.group["lr"]), torch.finfo(b.params[0].dtype).eps
        radii = torch.stack([b.place.of_these(state["radius"]) for state in states], 1)
        return self._moved(states, b.sums, radii, lr, noise)

    def _joint_coefficients(
        self, number: int, displaced: Mapping[Tensor, Displaced], sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        params = self._families[number].params
        state = self._joint_norms[number]
        lr = _number(displaced[params[0]].group["lr"])
        noise = max(torch.finfo(p.dtype).eps for p in params)
        a, b = self._moved([state], sums.unsqueeze(1), state["radius"].unsqueeze(1), lr, noise)
        return a.squeeze(1), b.squeeze(1)

    def _moved(
        self,
        states: Sequence[dict[str, Tensor]],
        sums: Tensor,
        radii: Tensor,
        lr: float | Tensor,
        noise: float,
    ) -> tuple[Tensor, Tensor]:
        """a and b of slices, shape ``(slices, states)``; radii that change are changed."""
        radii, ends = radii.to(sums.dtype), None
        if isinstance(self._motion.norm, LearnedNorm):
            slopes = sums[..., WG] / divisor(sums[..., WW].sqrt())
            for state, slope in zip(states, slopes.unbind(1), strict=True):
                step_radius_(state, slope, self._motion.norm, lr)
            ends = torch.stack([state["radius"] for state in states], 1).to(sums.dtype)
        a, b, ends = coefficients(sums, radii, lr, self._motion, noise, ends)
        if isinstance(self._motion.norm, RadialBrake):
            for state, radius in zip(states, ends.unbind(1), strict=True):
                state["radius"].copy_(radius)
        return a, b

    def update_rule(self, group: dict[str, Any], p: Tensor | None = None) -> UpdateRule:
        """What a step does to the weights of a group that are on spheres, or to one weight of it.

        For :func:`normwise.describe`.
        """
        members = group["params"] if p is None else [p]
        member = next((q for q in members if q in self._changed), None)
        if member is None:
            return rule_of(self.optimizer, group, p)
        rule = own_rule(self.optimizer, group, p)
        update = rule.update
        if self._motion.update == "relative":
            update = Update.RELATIVE if self._motion.path == "retract" else Update.ROTATION
        return replace(
            rule,
            update=update,
            scale=1.0 if update.is_relative else rule.scale,
            coupling=Coupling.NONE,
            weight_decay=0.0,
            rate=1.0,
            decay_per_step=0.0,
            is_switch=False,
            view=self._changed[member],
            norm="fixed" if self._motion.fixes_norms else "free",
            changed_by=(*rule.changed_by, "sphere"),
        )

    def _states(self) -> dict[Tensor, dict[str, Tensor]]:
        """What a state dict has of each weight beside the wrapped optimizer's state."""
        states = {p: dict(state) for p, state in self._norms.items()}
        for number, (family, state) in enumerate(
            zip(self._families, self._joint_norms, strict=True)
        ):
            of_first = states.setdefault(family.members[0].p, {})
            of_first |= {f"joint_{key}.{number}": value for key, value in state.items()}
        return states

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with the radii beside the state of each weight on a sphere."""
        state_dict = self.optimizer.state_dict()
        saved, states = dict(state_dict["state"]), self._states()
        for index, p in self._numbered(state_dict):
            if p in states:
                saved[index] = {**saved.get(index, {}), **states[p]}
        return {**state_dict, "state": saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` has saved.

        Raises:
            ValueError: if it has no radii, or those of other slices. A state dict of the wrapped
                optimizer alone is to be loaded into it before it is wrapped.
        """
        saved = {key: dict(value) for key, value in state_dict["state"].items()}
        names, states = names_of(self.optimizer), self._states()
        loaded: list[tuple[Tensor, Tensor]] = []
        for index, p in self._numbered(state_dict):
            of_p = saved.get(index, {})
            label = names.get(p, f"a parameter of shape {tuple(p.shape)}")
            for key, value in states.get(p, {}).items():
                if key not in of_p:
                    raise ValueError(
                        f"the state dict has no {key} for {label}: it is not of this sphere. Load "
                        f"one of {type(self.optimizer).__name__} into that, before sphere()"
                    )
                loaded.append((value, of_p.pop(key)))
                if loaded[-1][1].shape != value.shape:
                    raise ValueError(
                        f"the {key} of {label} in the state dict has shape "
                        f"{tuple(loaded[-1][1].shape)}, but its view has {tuple(value.shape)}"
                    )
        kept = {key: value for key, value in saved.items() if value}
        self.optimizer.load_state_dict({**state_dict, "state": kept})
        for value, new in loaded:
            value.copy_(new.to(value.dtype))

    def _numbered(self, state_dict: dict[str, Any]) -> list[tuple[Any, Tensor]]:
        """The parameters with the keys under which a state dict has their states."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        return list(zip(keys, params, strict=False))  # torch tells of another number of them


def sphere(
    optimizer: Optimizer,
    views_or_report: Views | None,
    *,
    symmetries: Symmetries | None = None,
    radius: Radius | Mapping[Any, Radius] = "initial",
    update: Length = "relative",
    path: Path = "retract",
    gains: Iterable[Tensor] | Mapping[str, Any] | None = None,
    norm: Literal["fixed"] | RadialBrake | LearnedNorm = "fixed",
    floor: float = 0.0,
    stochastic_rounding: bool = False,
) -> Sphere:
    r"""Fix the norms of slices, so that the learning rate of any torch optimizer is an angle.

    Where the wrapped optimizer, without its decay, would move a slice w by d, the slice of radius R
    and direction ŵ moves by a step s and stays on its sphere:

    ======================== =============================== ===================================
    \                        ``path="retract"``              ``path="geodesic"``
    ======================== =============================== ===================================
    ``update="relative"``    R·unit(ŵ + θ d/‖d‖):            R(cos θ ŵ + sin θ t/‖t‖): the angle
                             hyperball, arXiv 2606.16899     is θ exactly
    ``update="raw"``         R·unit(Rŵ + d)                  the same with θ = ‖t‖/R
    ======================== =============================== ===================================

    with θ the learning rate of the group, in radians per step, and t = d − ŵ⟨ŵ, d⟩. A slice that
    does not move, or in ``"geodesic"`` only along ŵ, is left where it is.

    Radii are state, in float32 or better, saved and loaded with it: half precision lets no norm
    drift, and a resumed run takes none anew. With ``update="relative"``, and in half precision, the
    wrapped optimizer sees weights of zero while it steps, so that what it writes is d and no small
    step is lost to rounding; use it for optimizers whose direction depends on gradients alone, as
    it is with SGD, Adam, Lion, Muon, Shampoo and their kin, not with averages of weights.

    With ``symmetries``, slices that scale alike count as one slice, whichever weights they are in:
    R = √Σ‖wₛ‖² is kept, and θ is the angle by which they turn together. Symmetries along which some
    slices grow as others shrink have no norm to fix (what gradient flow conserves, Σ aₛ‖wₛ‖²,
    bounds none of them), and are refused; ``tangential`` takes them.

    Weight decay is refused: on a fixed norm it could only turn up the step size. A
    ``weight_decay`` that is the default of the optimizer's class, 0.1 of ``torch.optim.Muon`` for
    example, is left out for weights on spheres and acts on the others.

    Args:
        optimizer: any torch optimizer; the result shares its groups and its state.
        views_or_report: which weights, and their slices: a :class:`normwise.View`, or its
            spelling, for all weights of two dimensions or more; or a mapping from parameters, or
            from names if ``optimizer`` was made from named parameters; or a report of
            :func:`normwise.analyze`; or None, for symmetries alone.
        symmetries: slices of several weights that scale alike: some of a report's ``symmetries``,
            ``[s for s in report.symmetries if s.is_scale]``, if ``optimizer`` was made from named
            parameters. No entry may be on two spheres (default: None).
        radius: ``"initial"`` (the norms that slices have now), ``"unit"``, a number, or a mapping
            from parameters or names to one of these or to a tensor of shape ``(slices,)``. Slices
            are put on a radius that is not their own at once (default: ``"initial"``).
        update: ``"relative"``: steps of length θR; ``"raw"``: as the wrapped optimizer makes them
            (default: ``"relative"``).
        path: ``"retract"`` or ``"geodesic"`` (default: ``"retract"``).
        gains: parameters with a length to be learned, such as :func:`normwise.add_gains` returns,
            or a group of them with a learning rate of its own. They are added to the wrapped
            optimizer, unless it has them (default: None).
        norm: ``"fixed"``, or what else becomes of radii: :class:`RadialBrake` or
            :class:`LearnedNorm` (default: ``"fixed"``).
        floor: the least length of a raw update that is not zero, over R (default: 0).
        stochastic_rounding: round bfloat16 and float16 weights up or down at random, so that small
            steps count on average (default: False).

    Returns:
        An optimizer to use instead of the wrapped one, with schedulers and scalers too.

    Raises:
        ValueError: for an option out of its range, views that do not fit, slices that are zero and
            have no radius given, decay of weights on spheres, or an optimizer that needs a closure.
    """
    for name, value, known in (
        ("update", update, ("relative", "raw")),
        ("path", path, ("retract", "geodesic")),
    ):
        if value not in known:
            raise ValueError(f"Invalid {name}: {value!r}; must be {known[0]!r} or {known[1]!r}")
    if norm != "fixed" and not isinstance(norm, RadialBrake | LearnedNorm):
        raise ValueError(f"Invalid norm: {norm!r}; must be 'fixed', a RadialBrake or a LearnedNorm")
    check_number("floor", floor)
    if floor and update == "relative":
        raise ValueError("floor is for update='raw': a relative update is as long as lr says")
    check_optimizer(optimizer)
    _check_step(optimizer)
    if gains is not None:
        _add_gains(optimizer, gains)
    views, families = resolve(optimizer, views_or_report, symmetries, "sphere")
    check_fixable(families, "sphere")
    _check_one_rate(optimizer, families)
    _check_no_decay(optimizer, {*views, *(p for family in families for p in family.params)})
    with torch.no_grad():
        joint = joint_radii(families, radius)
        radii = radii_of(views, radius, names_of(optimizer))
    motion = Motion(update, path, norm, floor)
    return Sphere(
        optimizer, views, families, radii, joint, motion, stochastic_rounding=stochastic_rounding
    )


def _number(lr: float | Tensor) -> float | Tensor:
    return lr.squeeze() if isinstance(lr, Tensor) else lr


def _check_step(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer that evaluates a closure several times in a step."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss at several points in a step, which are "
            "not on the sphere; wrap an optimizer whose step needs no closure"
        )


def _check_one_rate(optimizer: Optimizer, families: Sequence[Family]) -> None:
    """Raise ValueError for units whose weights are in several groups: a step has one angle."""
    group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for family in families:
        if len({group_of[p] for p in family.params}) > 1:
            raise ValueError(
                f"the weights of {family.name} are in several parameter groups, but turn by one "
                "angle; put them in one"
            )


def _check_no_decay(optimizer: Optimizer, fixed: Collection[Tensor]) -> None:
    """Raise ValueError for decay of a weight on a sphere that somebody asked for."""
    parameter = inspect.signature(type(optimizer).__init__).parameters.get("weight_decay")
    default = None if parameter is None else parameter.default
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0.0)
        asked_for = is_nonzero(decay) and (isinstance(decay, Tensor) or decay != default)
        if asked_for and any(p in fixed for p in group["params"]):
            raise ValueError(
                f"weight_decay={decay} on weights whose norms are fixed: decay could not shorten "
                "them, it would only turn up their step size; put them in a group with "
                "weight_decay=0, and give a smaller lr if they are to turn more slowly"
            )
    for policy in attached_to(optimizer):
        if any(p in fixed for p in policy.params):
            raise ValueError(
                f"{policy.label} acts on weights whose norms are fixed, which it cannot change; "
                "attach it to others only"
            )


def _add_gains(optimizer: Optimizer, gains: Iterable[Tensor] | Mapping[str, Any]) -> None:
    """Let the wrapped optimizer step gains, unless it does so already."""
    group = dict(gains) if isinstance(gains, Mapping) else {"params": gains}
    known = {p for other in optimizer.param_groups for p in other["params"]}
    params = [p for p in group["params"] if p not in known]
    if not params:
        return
    if type(optimizer).__name__ == "Muon":
        raise ValueError(
            "Muon steps matrices alone; give the gains to another optimizer, such as "
            "torch.optim.Adam(gains, lr=...), which is stepped beside this one"
        )
    if "weight_decay" in optimizer.defaults:
        group.setdefault("weight_decay", 0.0)
    if names_of(optimizer):
        group["params"] = [(f"gain.{i}", p) for i, p in enumerate(params)]
    else:
        group["params"] = params
    optimizer.add_param_group(group)
