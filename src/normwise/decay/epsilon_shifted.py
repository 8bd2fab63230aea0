"""ε-shifted L2 (arXiv 1911.05920, "[ES]"): decay that draws a norm to ε instead of to zero.

Plain L2 on a weight whose norm the forward pass divides out only shrinks it, and the gradient of
the loss grows as one over the norm until it overflows. The shifted penalty has its minimum at ε.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from normwise.checks import check_number
from normwise.decay.attached import check_acts, check_unscheduled, split_groups
from normwise.decay.fused import Shift, take_, takes
from normwise.geometry import View, at_least_float32, unit
from normwise.sharding import Layout, is_sharded, lay_out, local, sum_over_ranks_
from normwise.updates import Coupling, UpdateRule, attached_to

__all__ = [
    "AttachedRegularizer",
    "DecayGroup",
    "EpsilonShiftedL2",
    "shifted_decay",
    "shifted_penalty",
]

Scale = Literal["norm", "std"]
Modules = nn.Module | Iterable[nn.Module]


def shifted_penalty(w: Tensor, view: View, scale: Scale, eps: float) -> Tensor:
    """Half the sum over slices of (‖W‖ − ε)², or of n·(m² + (v − ε)²) ([ES] Eqs. 25 and 26).

    Args:
        w: a weight whose slices the forward pass divides by their norm or by their std.
        view: the slices; each has n entries of mean m and biased std v.
        scale: ``"norm"`` for the first form (WN, CWN), ``"std"`` for the second (WS).
        eps: ε, a norm in the first form and a std in the second.

    Returns:
        A scalar in float32 or better. Its gradient is finite everywhere, at zero slices too.
    """
    slices = view.slices(at_least_float32(w))
    if scale == "norm":
        return (unit(slices)[1] - eps).square().sum() / 2
    inner = tuple(range(1, slices.ndim))
    mean = slices.mean(inner, keepdim=True)
    n = math.prod(slices.shape[1:])
    std = unit(slices - mean)[1] / math.sqrt(n)
    return n * (mean.square() + (std - eps).square()).sum() / 2


def shifted_decay(w: Tensor, view: View, scale: Scale, eps: float) -> Tensor:
    """The gradient of :func:`shifted_penalty`, of the shape of ``w``, in float32 or better.

    (1 − ε/‖W‖)W for each slice, or (1 − ε/v)W + (ε/v)m ([ES] Eqs. 27 and 28): W less ε times its
    direction. A slice of root mean square below 1e-15, or that is constant in the second form, has
    no direction and decays as under plain L2.

    Args:
        w: a weight whose slices the forward pass divides by their norm or by their std.
        view: the slices; each has mean m and biased std v.
        scale: ``"norm"`` for the first form (WN, CWN), ``"std"`` for the second (WS).
        eps: ε, a norm in the first form and a std in the second.
    """
    decay = at_least_float32(w).clone()
    slices = view.slices(decay)
    slices.sub_(_direction(slices, scale), alpha=eps)
    return decay


def _direction(slices: Tensor, scale: Scale) -> Tensor:
    """W/‖W‖, or (W − m)/v, of each slice: the gradient of ‖W‖, or of n·v."""
    if slices.numel() == 0:  # a rank that has no slice of this weight
        return slices
    if scale == "norm":
        inner = tuple(range(1, slices.ndim))
        length = torch.linalg.vector_norm(slices, dim=inner, keepdim=True)
        return slices / torch.where(length > 0, length, torch.inf)
    # One group a slice: torch standardizes in one pass, which separate operations take five for.
    rows = slices.reshape(1, slices.shape[0], -1)
    return torch.group_norm(rows, slices.shape[0], eps=1e-30).view(slices.shape)


@dataclass(frozen=True)
class _Weight:
    """One normalized weight of a model, found by what its parametrization says of itself."""

    name: str
    stack: ParametrizationList
    attribute: str
    view: View
    groups: int
    scale: Scale

    @property
    def tensor(self) -> Tensor:
        return cast(Tensor, getattr(self.stack, self.attribute))

    @torch.no_grad()
    def scales(self) -> Tensor:
        """The norm or std of each slice, the quantity that ε is compared with."""
        found = []
        tensor = self.tensor
        for piece in (tensor.full_tensor() if is_sharded(tensor) else tensor).chunk(self.groups):
            slices = self.view.slices(at_least_float32(piece))
            if self.scale == "std":
                slices = slices - slices.mean(tuple(range(1, slices.ndim)), keepdim=True)
            root = math.sqrt(math.prod(slices.shape[1:])) if self.scale == "std" else 1.0
            found.append(unit(slices)[1].flatten() / root)
        return torch.cat(found)

    def penalty(self, eps: float) -> Tensor:
        pieces = self.tensor.chunk(self.groups)
        return torch.stack([shifted_penalty(p, self.view, self.scale, eps) for p in pieces]).sum()

    def layout(self) -> Layout | None:
        """Where the slices are, of a weight that is a DTensor.

        Raises:
            ValueError: for one that is normalized in groups and sharded.
        """
        if not is_sharded(self.tensor):
            return None
        if self.groups > 1:
            raise ValueError(
                f"EpsilonShiftedL2 cannot act on {self.name}: it is normalized in {self.groups} "
                "groups, whose slices cannot be told apart in the shards of a DTensor"
            )
        return lay_out(self.tensor, self.view)

    def shifts(
        self,
        w: Tensor,
        coupling: str,
        group: DecayGroup,
        lr: float | Tensor,
        *,
        maximize: bool,
    ) -> list[Shift]:
        """What a step adds to the gradient or the weight ``w``, group by group; [] if ``w`` is a
        DTensor or not on the CPU, where no number is read from a tensor."""
        if is_sharded(w) or w.device.type != "cpu" or w.grad is None:
            return []
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return []
        if coupling == "coupled":
            target, factor = w.grad, -group.weight_decay if maximize else group.weight_decay
        else:
            target, factor = w, -group.weight_decay * float(lr)
        pairs = zip(w.chunk(self.groups), target.chunk(self.groups), strict=True)
        if self.groups == 1:
            pairs = zip((w,), (target,), strict=True)
        return [Shift(a, b, self.view, self.scale, float(factor), group.eps) for a, b in pairs]

    def decay(self, eps: float) -> Tensor:
        if self.groups == 1:
            return shifted_decay(self.tensor, self.view, self.scale, eps)
        pieces = self.tensor.chunk(self.groups)
        return torch.cat([shifted_decay(p, self.view, self.scale, eps) for p in pieces])


@dataclass
class DecayGroup:
    """Weights that share λ and ε. Both may be changed between steps, by a schedule for example.

    Attributes:
        weight_decay: λ.
        eps: ε.
        names: the weights, by their names in the model.
    """

    weight_decay: float
    eps: float
    names: tuple[str, ...]


class EpsilonShiftedL2:
    """ε-shifted L2 on every weight-normalized and weight-standardized weight that it finds.

    ½λ(‖W‖ − ε)² for each slice of a weight that is divided by its norm, ½λn(m² + (v − ε)²) of one
    that is divided by its std; ε is a norm in the first and a std in the second. It finds weights
    by what their parametrization says of itself, so that nothing else is touched: batch
    normalization and the classifier keep the plain decay of the optimizer ([ES] section 5).

    Use it through an optimizer or as a term of the loss, not both::

        reg = nw.EpsilonShiftedL2(model, weight_decay=1e-4, eps=1e-3)
        print(reg.attach(optimizer))                     # or
        loss = criterion(model(x), y) + reg.penalty()    # and no weight decay on those weights

    Args:
        modules: a model; modules; or dicts with a key ``"modules"`` and, for that group, its own
            ``"weight_decay"`` and ``"eps"``.
        weight_decay: λ of every group that has none of its own.
        eps: ε of every group that has none of its own. [ES] takes 1e-3 on ImageNet and 1e-2 on
            CIFAR-100 for std.

    Raises:
        ValueError: for λ that is negative or not finite, ε that is not positive and finite, a group
            with no normalized weight, or a weight in two groups.

    Warns:
        UserWarning: where ε is above the weights' own scale, with the figures: it would make those
            weights grow.
    """

    def __init__(
        self,
        modules: Modules | Sequence[Mapping[str, Any]],
        *,
        weight_decay: float,
        eps: float,
    ) -> None:
        self.groups: list[DecayGroup] = []
        self._weights: list[list[_Weight]] = []
        self._attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        seen: set[Tensor] = set()
        for options in _as_groups(modules):
            weights = list(_find(options["modules"]))
            if not weights:
                raise ValueError(
                    "EpsilonShiftedL2 finds no normalized weight to act on; convert the model "
                    "first, with weight_normalize, center_weight_normalize or weight_standardize"
                )
            group = DecayGroup(
                options.get("weight_decay", weight_decay),
                options.get("eps", eps),
                tuple(w.name for w in weights),
            )
            _check(group)
            for w in weights:
                if w.tensor in seen:
                    raise ValueError(f"{w.name} is in more than one group of EpsilonShiftedL2")
                seen.add(w.tensor)
            self.groups.append(group)
            self._weights.append(weights)
        self._warn_of_large_eps()

    def penalty(self) -> Tensor:
        """The penalty as a scalar to add to the loss, in float32 or better, λ included."""
        terms = [
            group.weight_decay * w.penalty(group.eps)
            for group, weights in zip(self.groups, self._weights, strict=True)
            for w in weights
        ]
        # Of DTensors each rank gets the whole, and its backward pass the gradients of its shards.
        terms = [t.full_tensor() if is_sharded(t) else t for t in terms]
        return torch.stack([t.to(terms[0].device) for t in terms]).sum()

    def attach(
        self, optimizer: Optimizer, coupling: Literal["coupled", "decoupled"] = "coupled"
    ) -> AttachedRegularizer:
        """Act before every step of ``optimizer``, and take these weights out of its own decay.

        - ``"coupled"`` adds the penalty's gradient to ``.grad``, as [ES] does; moments see it.
          ``"decoupled"`` subtracts learning rate × gradient from the weight, as AdamW does.
        - Weights without a gradient are passed over, as the optimizer passes over them.
        - Clip gradients before the step, as usual: the hook runs after, so that the decay is not
          clipped, just as an optimizer's own decay is not.
        - ``torch.amp.GradScaler`` needs no care: it unscales before the step, or hands its scale to
          a fused optimizer, where the hook reads it; a step that it skips does not decay.
        - A group of the optimizer that mixes these weights with others is split, and the new group
          has ``weight_decay`` 0. So attach before making a learning-rate scheduler, and before
          loading the optimizer's state.

        Args:
            optimizer: any torch optimizer that takes its step without a closure.
            coupling: ``"coupled"`` (default) or ``"decoupled"``.

        Returns:
            A handle whose ``remove()`` ends it, and which prints what was done.

        Raises:
            ValueError: if the optimizer has none of these weights, or has this regularizer already,
                if a policy or a schedule acts on them, or if it fixes their norms. Of a coupled
                penalty on weights whose steps it projects, which takes it out again, it warns.
            RuntimeError: in a step with a closure, which would recompute the gradients.
        """
        if coupling not in ("coupled", "decoupled"):
            raise ValueError(f"Invalid coupling: {coupling!r}; must be 'coupled' or 'decoupled'")
        if optimizer in self._attached:
            raise ValueError("this EpsilonShiftedL2 is attached to the optimizer already")
        names = {w.tensor: w.name for weights in self._weights for w in weights}
        held = {p for group in optimizer.param_groups for p in group["params"]}
        present = [name for w, name in names.items() if w in held]
        if not present:
            raise ValueError(
                "the optimizer has none of the weights of EpsilonShiftedL2; make it after the "
                "model is converted, from model.parameters()"
            )
        for other in attached_to(optimizer):
            for p in names.keys() & set(other.params):
                raise ValueError(
                    f"{other.label} is attached to {names[p]} already; attach it after "
                    "EpsilonShiftedL2, which it then leaves alone, or to other weights"
                )
        check_acts(optimizer, names, "EpsilonShiftedL2", lambda _: coupling == "coupled")
        excluded = _exclude(optimizer, names)
        self._attached.add(optimizer)
        handle = optimizer.register_step_pre_hook(_Hook(self, coupling))
        missing = tuple(name for w, name in names.items() if w not in held)
        attached = AttachedRegularizer(
            coupling,
            tuple(present),
            excluded,
            missing,
            held & names.keys(),
            handle,
            self,
            weakref.ref(optimizer),
        )
        attached_to(optimizer).append(attached)
        return attached

    @torch.no_grad()
    def _apply(self, optimizer: Optimizer, coupling: str) -> None:
        """Add the gradients, or decay the weights, of what ``optimizer`` is about to step."""
        lr = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        ascending = {
            p for group in optimizer.param_groups if group.get("maximize") for p in group["params"]
        }
        # Set by GradScaler around the step of a fused optimizer, which unscales by itself.
        grad_scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        work = []
        for group, weights in zip(self.groups, self._weights, strict=True):
            _check(group)
            tensors = [(w, p) for w in weights if (p := w.tensor) in lr and p.grad is not None]
            if tensors and group.weight_decay != 0:
                work.append((group, tensors))
        if grad_scale is None and found_inf is None:
            shifts = [
                shift
                for group, tensors in work
                for w, p in tensors
                for shift in w.shifts(p, coupling, group, lr[p], maximize=p in ascending)
            ]
            if takes(shifts):
                take_(shifts)
                return
        of_all = iter(_decays([(w, group.eps) for group, ws in work for w, _ in ws]))
        for group, tensors in work:
            decays = [next(of_all) for _ in tensors]
            torch._foreach_mul_(decays, group.weight_decay)
            if coupling == "coupled":
                targets = [local(_placed_gradient(p)) for _, p in tensors]
                if grad_scale is not None:
                    decays = [d * grad_scale.to(d.device) for d in decays]
                # An optimizer that maximizes turns the gradient round, decay included.
                decays = [
                    -d if p in ascending else d for d, (_, p) in zip(decays, tensors, strict=True)
                ]
            else:
                targets = [local(p) for _, p in tensors]
                factors = [-lr[p] for _, p in tensors]
                if found_inf is not None:
                    factors = [f * (1 - found_inf) for f in factors]
                decays = [d * f for d, f in zip(decays, factors, strict=True)]
            torch._foreach_add_(
                targets, [d.to(t.dtype) for d, t in zip(decays, targets, strict=True)]
            )

    def _warn_of_large_eps(self) -> None:
        rows = []
        for group, weights in zip(self.groups, self._weights, strict=True):
            for w in weights:
                scales = w.scales()
                below = int((scales < group.eps).sum())
                if below:
                    rows.append(
                        f"{w.name}: {below} of {scales.numel()} slices, the smallest "
                        f"{w.scale} {scales.min():.3g} < ε = {group.eps:g}"
                    )
        if rows:
            more = f"\n... and {len(rows) - 5} more weights" if len(rows) > 5 else ""
            warnings.warn(
                "ε is above the weights' own scale, so the regularizer will make them grow:\n"
                + "\n".join(rows[:5])
                + more,
                stacklevel=3,
            )


@dataclass(frozen=True, eq=False)
class AttachedRegularizer:
    """What :meth:`EpsilonShiftedL2.attach` did; ``print`` it, ``remove()`` it.

    Attributes:
        coupling: ``"coupled"`` or ``"decoupled"``.
        weights: the names of the weights that it acts on in this optimizer.
        excluded: those that were taken out of the optimizer's own decay, and what that was.
        missing: the names of the weights of the regularizer that the optimizer does not have.
        params: the weights that it acts on.
    """

    coupling: str
    weights: tuple[str, ...]
    excluded: dict[str, float]
    missing: tuple[str, ...]
    params: Collection[Tensor]
    _handle: RemovableHandle
    _regularizer: EpsilonShiftedL2
    _optimizer: weakref.ref[Optimizer]

    def remove(self) -> None:
        """End it; the optimizer's own decay of the weights stays 0."""
        self._handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None and self in attached_to(optimizer):
            attached_to(optimizer).remove(self)
            self._regularizer._attached.discard(optimizer)

    @property
    def label(self) -> str:
        """The regularizer's name."""
        return "EpsilonShiftedL2"

    def changed_rule(self, rule: UpdateRule, group: dict[str, Any]) -> UpdateRule:
        """What becomes of the rule of a weight, for :func:`normwise.describe`.

        By which share it shortens a weight depends on the weight's norm over ε.

        Args:
            rule: of the weight without the regularizer.
            group: the group that it is of.
        """
        return replace(
            rule,
            coupling=Coupling.UNKNOWN,
            weight_decay=math.nan,
            decay_per_step=math.nan,
            changed_by=(*rule.changed_by, self.label),
        )

    def __str__(self) -> str:
        lines = []
        for group in self._regularizer.groups:
            count = len(set(group.names) & set(self.weights))
            lines.append(
                f"ε-shifted L2, {self.coupling}: {count} weights, "
                f"λ = {group.weight_decay:g}, ε = {group.eps:g}"
            )
        if self.excluded:
            values = ", ".join(f"{v:g}" for v in sorted(set(self.excluded.values())))
            lines.append(
                f"taken out of the optimizer's own weight_decay ({values}): "
                f"{len(self.excluded)} weights"
            )
        if self.missing:
            lines.append(f"not in this optimizer: {', '.join(self.missing)}")
        return "\n".join(lines)


class _Hook:
    """The optimizer's pre-step hook."""

    def __init__(self, regularizer: EpsilonShiftedL2, coupling: str) -> None:
        self.regularizer, self.coupling = regularizer, coupling

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is self
        if closure is not None:
            raise RuntimeError(
                "EpsilonShiftedL2 is attached to an optimizer that is stepped with a closure, "
                "which would recompute the gradients; add reg.penalty() to the loss instead"
            )
        self.regularizer._apply(optimizer, self.coupling)


def _as_groups(
    modules: Modules | Sequence[Mapping[str, Any]],
) -> Iterator[Mapping[str, Any]]:
    if isinstance(modules, nn.Module):
        yield {"modules": [modules]}
        return
    items = list(modules) if isinstance(modules, Iterable) else [modules]
    if not items:
        raise ValueError("EpsilonShiftedL2 was given no module; give it a model, or modules")
    if not all(isinstance(item, Mapping) for item in items):
        for item in items:
            if not isinstance(item, nn.Module):
                raise TypeError(f"Invalid modules: {item!r} is neither a module nor a group")
        yield {"modules": items}
        return
    for item in items:
        options = cast("Mapping[str, Any]", item)
        unknown = set(options) - {"modules", "weight_decay", "eps"}
        if unknown or "modules" not in options:
            raise ValueError(
                f"Invalid group of EpsilonShiftedL2: {sorted(options)}; its keys are 'modules' "
                "and, if wanted, 'weight_decay' and 'eps'"
            )
        of_group = options["modules"]
        yield {**options, "modules": [of_group] if isinstance(of_group, nn.Module) else of_group}


def _find(modules: Iterable[nn.Module]) -> Iterator[_Weight]:
    """Every weight whose parametrization says that it is divided, and by what, once each."""
    seen: set[nn.Module] = set()
    for root in modules:
        for name, stack in root.named_modules():
            if not isinstance(stack, ParametrizationList) or stack in seen:
                continue
            seen.add(stack)
            says = stack[0]
            view, scale = getattr(says, "view", None), getattr(says, "divides_by", None)
            if isinstance(view, View) and scale in ("norm", "std"):
                yield _Weight(
                    name.replace("parametrizations.", ""),
                    stack,
                    cast(str, getattr(says, "normalized", "original")),
                    view,
                    cast(int, getattr(says, "groups", 1)),
                    "norm" if scale == "norm" else "std",
                )


def _decays(weights: Sequence[tuple[_Weight, float]]) -> list[Tensor]:
    """The gradients of the penalties with these ε; of DTensors, this rank's shards of them.

    Slices that are split over ranks are summed in one collective a process group.
    """
    decays: list[Tensor] = []
    split: list[tuple[int, Layout, Tensor]] = []
    for w, eps in weights:
        layout = w.layout()
        if layout is None:
            decays.append(w.decay(eps))
        elif layout.whole is not None:
            decays.append(shifted_decay(local(w.tensor), layout.whole, w.scale, eps))
        else:
            shard = at_least_float32(local(w.tensor))
            wide = layout.channels.slices(shard).flatten(1).double()
            sums = torch.stack([wide.square().sum(1), wide.sum(1)], 1)
            split.append((len(decays), layout, layout.by_slice(sums)))
            decays.append(shard.clone())
    sum_over_ranks_([sums for _, _, sums in split], [layout for _, layout, _ in split])
    for i, layout, sums in split:
        w, eps = weights[i]
        squares, means = sums.unbind(1)
        if w.scale == "norm":
            means, lengths = torch.zeros_like(means), squares.sqrt()
        else:
            entries = layout.shape.numel() // layout.slices
            means = means / entries
            lengths = (squares / entries - means.square()).clamp_min(0).add(1e-30).sqrt()
        lengths = torch.where(lengths > 0, lengths, torch.inf)
        slices = layout.channels.slices(decays[i])
        means, lengths = (
            layout.by_channel(t).to(slices.dtype).view(-1, *(1 for _ in slices.shape[1:]))
            for t in (means, lengths)
        )
        slices.sub_((slices - means) / lengths, alpha=eps)
    return decays


def _placed_gradient(p: Tensor) -> Tensor:
    """The gradient of a weight, which for a DTensor must be placed as it is."""
    grad = cast(Tensor, p.grad)
    if is_sharded(grad) and is_sharded(p) and grad.placements != p.placements:
        grad = p.grad = grad.redistribute(p.device_mesh, p.placements)
    return grad


def _check(group: DecayGroup) -> None:
    check_number("weight_decay value", group.weight_decay)
    if isinstance(group.eps, int | float) and group.eps == 0:
        raise ValueError(
            f"Invalid eps: {group.eps}; must be finite and above 0 (at 0 this is plain L2)"
        )
    check_number("eps", group.eps, positive=True)


def _exclude(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, float]:
    """Set the optimizer's own decay of these weights to 0; return what it was, where it was not."""
    decayed = {
        p: float(decay)
        for group in optimizer.param_groups
        if (decay := group.get("weight_decay", 0)) != 0
        for p in group["params"]
        if p in names
    }
    if decayed:
        check_unscheduled(optimizer, "attach EpsilonShiftedL2")
    for group in split_groups(optimizer, decayed.keys()):
        group["weight_decay"] = 0.0
    return {names[p]: decay for p, decay in decayed.items()}
