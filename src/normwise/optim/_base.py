"""What the optimizers share: groups and their checks, the step's frame, state dicts, arithmetic."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _default_to_fused_or_foreach

from normwise.geometry import View, at_least_float32, computing_dtype
from normwise.optim.kernels import Fused, check_available, takes_scaler
from normwise.optim.projection import ViewOption, norms_by_slice, project_, retract_
from normwise.sharding import is_sharded, local, shard_like, summed_gradients

Tensors = list[Tensor] | tuple[Tensor, ...]

# What schedulers and users write into groups beside an optimizer's own options.
_ANNOTATIONS = frozenset({"params", "param_names", "name", "initial_lr", "lr_scale"})
# Options of torch's optimizers that a checkpoint may bring and ours do not have.
_FOREIGN = frozenset({"amsgrad", "fused", "decoupled_weight_decay"})


# Tells of a CUDA graph captured without capturable=True. Newer versions of torch have renamed it.
_check_capture: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None)
    or Optimizer._cuda_graph_capture_health_check
)


class NormwiseOptimizer(Optimizer):
    """Base of :class:`AdamP`, :class:`SGDP` and :class:`SGDW`. Not for direct use."""

    # The tensors of a parameter's state, and names that other code bases give them.
    _state_keys: tuple[str, ...]
    _state_aliases: dict[str, str] = {}  # noqa: RUF012 -- never written to
    # Whether weight_decay in a checkpoint of the torch optimizer of the same state is decoupled.
    _torch_decay_is_decoupled: bool

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        finish: Callable[..., None],
    ) -> None:
        """Step some parameters of a group; ``finish`` is :func:`take_step_` or stands in for it."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked, and a key that the optimizer lacks is an error."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        known = _ANNOTATIONS | self.defaults.keys()
        for key in param_group:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"Invalid option {key!r} in a parameter group of {type(self).__name__}{hint}"
                )
        group = {**self.defaults, **param_group}
        if "view" in group:
            group["view"] = as_view_option(group["view"])
        self._check_group(group)
        super().add_param_group(group)
        try:
            if group["fused"]:
                check_available(group["params"], stochastic_rounding=group["stochastic_rounding"])
            for p in group["params"]:
                check_not_flattened(p, group.get("view"))
                if isinstance(group.get("view"), View) and p.ndim > 1:
                    group["view"].check(p.shape)
        except (ValueError, RuntimeError, ImportError):
            self.param_groups.pop()
            raise

    def _fused(self, group: dict[str, Any]) -> Fused:
        """What the fused steps of a group remember; it is remade when this object is copied."""
        if "_plans" not in self.__dict__:
            self._plans: dict[Tensor, Fused] = {}
        fused = self._plans.setdefault(group["params"][0], Fused())
        in_kernel = self._unscales_in_kernel()
        fused.grad_scale = getattr(self, "grad_scale", None) if in_kernel else None
        fused.found_inf = getattr(self, "found_inf", None) if in_kernel else None
        return fused

    def _unscales_in_kernel(self) -> bool:
        """Whether the kernels do, without a wait, what a GradScaler leaves to a fused step."""
        return not torch.compiler.is_compiling() and all(
            group["fused"] and takes_scaler(p)
            for group in self.param_groups
            for p in group["params"]
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for an option that is out of its range."""
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(
                f"Tensor lr must be 1-element, but has shape {list(group['lr'].shape)}"
            )
        check_number("learning rate", group["lr"])
        check_number("weight_decay value", group["weight_decay"])
        for option in ("delta", "wd_ratio"):
            if option in group:
                check_number(option, group[option])
        if "eps" in group:
            check_number("epsilon value", group["eps"])
        if "norm" in group:
            check_norm_option(group["norm"], group["view"])
        if group["foreach"] and group["differentiable"]:
            raise ValueError("`foreach` and `differentiable` cannot be `True` together.")
        if group["fused"]:
            self._step_supports_amp_scaling = True
            for option in ("foreach", "differentiable"):
                if group[option]:
                    raise RuntimeError(f"`fused` and `{option}` cannot be `True` together.")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            RuntimeError: if a gradient is sparse.
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
            work = [self._work(group) for group in self.param_groups]
            if any(is_sharded(p) for _, params, _ in work for p in params):
                self._step_sharded(work)
            else:
                for group, params, grads in work:
                    if params:
                        states = [self.state[p] for p in params]
                        self._update(group, params, grads, states, take_step_)
        return loss

    def _work(self, group: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
        """The options of a group in this step, its parameters that have gradients, and those."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if p.grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients, but a "
                    f"parameter of shape {tuple(p.shape)} has one; make it dense"
                )
            if not self.state[p]:
                check_not_flattened(p, group.get("view"))
                self.state[p].update(self._init_state(p, group))
        scheduled = {key: _scheduled(group[key]) for key in ("lr", "weight_decay")}
        return {**group, **scheduled}, params, [p.grad for p in params]

    def _step_sharded(self, work: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        """Step DTensors, alone or among others, with one exchange for all groups."""
        from normwise.optim.sharded import Exchange

        if self.defaults["differentiable"]:
            raise RuntimeError("differentiable=True cannot be had with DTensor parameters")
        exchange = Exchange(self.__dict__.setdefault("_layouts", {}))
        pairs = [(p, g) for _, params, grads in work for p, g in zip(params, grads, strict=True)]
        summed = iter(summed_gradients(pairs))
        for group, params, grads in work:
            for part in exchange.parts(
                group, params, [next(summed) for _ in grads], [self.state[p] for p in params]
            ):
                self._update(*part)
        exchange.finish_()

    def _unscale(self) -> bool:
        """Do what a GradScaler leaves to a fused step; return whether all gradients are finite."""
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if found_inf is not None and self._unscales_in_kernel():
            return True
        if found_inf is not None and found_inf.item() != 0:
            return False
        if grad_scale is not None:
            grads = [p.grad for p in _flat(self.param_groups)]
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
            self._translated_group(saved, current)
            for saved, current in zip(saved_groups, self.param_groups, strict=False)
        ]
        groups += saved_groups[len(groups) :]  # torch tells of a wrong number of groups
        state = {key: self._translated_state(value) for key, value in state_dict["state"].items()}
        for group in saved_groups:
            self._adapt_state(group, [state[key] for key in group["params"] if key in state])
        pairs = list(zip(_flat(groups), _flat(self.param_groups), strict=False))
        for saved_id, p in pairs:
            for key in set(self._state_keys) - {"step"}:
                value = state.get(saved_id, {}).get(key)
                if value is not None and value.shape != p.shape:
                    raise ValueError(
                        f"{type(self).__name__} cannot continue this state dict: {key} of a "
                        f"parameter of shape {tuple(p.shape)} has shape {tuple(value.shape)}"
                    )
        for saved_id, p in pairs:
            for key in set(self._state_keys) - {"step"}:
                if state.get(saved_id, {}).get(key) is not None:
                    state[saved_id][key] = shard_like(state[saved_id][key], p)
        super().load_state_dict({**state_dict, "param_groups": groups, "state": state})

        # torch casts state to the parameter's dtype; ours is float32 or better.
        for saved_id, p in pairs:
            if computing_dtype(p.dtype) != p.dtype:
                for key in set(self._state_keys) - {"step"}:
                    value = state.get(saved_id, {}).get(key)
                    if value is not None:
                        self.state[p][key] = value.to(p.device, computing_dtype(p.dtype))

    def _translated_group(self, saved: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
        """A saved group with our options, and those that it lacks as they are now."""
        if saved.get("amsgrad"):
            raise ValueError(f"{type(self).__name__} cannot continue a run with amsgrad=True")
        ours = "delta" in saved or "variant" in saved
        decoupled = saved.get("decoupled_weight_decay", ours or self._torch_decay_is_decoupled)
        if saved.get("weight_decay") and not decoupled:
            warnings.warn(
                f"the loaded weight_decay of {saved['weight_decay']} was added to the gradient "
                f"(L2); {type(self).__name__} will apply it decoupled",
                stacklevel=3,
            )
        kept = {key: value for key, value in saved.items() if key not in _FOREIGN}
        return {**{key: current[key] for key in self.defaults}, **kept}

    def _translated_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """One parameter's state under our names, without entries that hold nothing."""
        renamed = {
            self._state_aliases.get(key, key): value
            for key, value in state.items()
            if value is not None
        }
        if renamed and not renamed.keys() >= set(self._state_keys):
            raise ValueError(
                f"{type(self).__name__} cannot continue this state dict: a parameter's state has "
                f"{sorted(renamed)}; must have {sorted(self._state_keys)}"
            )
        return renamed

    def _adapt_state(self, saved: dict[str, Any], states: list[dict[str, Any]]) -> None:
        """Convert the states of a saved group, where its options say that they mean another."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if "view" in group:
                group["view"] = as_view_option(group["view"])
            for p in group["params"]:
                p_state = self.state.get(p, {})
                if "step" in p_state and not isinstance(p_state["step"], Tensor):
                    step = float(p_state["step"])
                    p_state["step"] = new_step(p, group["capturable"]).fill_(step)


def _flat(groups: Sequence[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(group["params"] for group in groups)


def _scheduled(value: float | Tensor) -> float | Tensor:
    """An option that changes from step to step, in the form that arithmetic wants: 0-dim.

    Compilers are handed a tensor: torch's inductor keeps the first value of a Python float that it
    has made dynamic in fused foreach kernels (pytorch#194976 is one such report).
    """
    if isinstance(value, Tensor):
        return value.squeeze()
    if torch.compiler.is_compiling() and value != 0:
        return torch.full((), value, dtype=torch.float64)
    return value


def as_view_option(value: object) -> ViewOption:
    """A ``view`` option as users write it: ``"auto"``, a :class:`View` or its spelling, None."""
    if value is None or isinstance(value, View):
        return value
    if value == "auto":
        return "auto"
    if isinstance(value, str):
        return View.parse(value)
    raise ValueError(f"Invalid view: {value!r}; must be 'auto', a normwise.View or None")


def check_not_flattened(p: Tensor, view: object) -> None:
    """Raise ValueError if a view is to be taken of a parameter that FSDP1 has made flat."""
    if view is not None and p.ndim < 2 and getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"view {str(view)!r} is of a weight's slices, but FullyShardedDataParallel has made "
            f"this parameter flat: its shape is {tuple(p.shape)}. Shard the model with "
            "torch.distributed.fsdp.fully_shard, or give view=None, which never projects"
        )


def check_norm_option(norm: object, view: object) -> None:
    """Raise ValueError unless ``norm`` is "free", or "fixed" in a view that says whose norm."""
    if norm not in ("free", "fixed"):
        raise ValueError(f"Invalid norm: {norm!r}; must be 'free' or 'fixed'")
    if norm == "fixed" and not isinstance(view, View):
        raise ValueError(f"norm='fixed' needs a view that says which norms, but view is {view!r}")


def check_number(name: str, value: float | Tensor, below: float = math.inf) -> None:
    """Raise ValueError unless 0 <= value < below.

    Intentionally no look at the value of a tensor: that would wait for its device.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"Invalid {name}: a tensor of shape {tuple(value.shape)}; must have one element"
            )
    elif not 0 <= value < below:
        limit = "finite and 0 or more" if below == math.inf else f"at least 0 and below {below:g}"
        raise ValueError(f"Invalid {name}: {value}; must be {limit}")


def check_momentum(group: dict[str, Any]) -> None:
    """Raise ValueError for a momentum or dampening out of range, or Nesterov without momentum."""
    check_number("momentum value", group["momentum"], below=1)
    check_number("dampening value", group["dampening"])
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a step's 0-dim factors are computed: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def new_step(p: Tensor, capturable: bool) -> Tensor:
    """A step count of 0: on the host, where it costs nothing, or for CUDA graphs beside ``p``."""
    return torch.zeros((), dtype=torch.float32, device=p.device if capturable else "cpu")


def new_moment(p: Tensor) -> Tensor:
    """A zero moment for ``p``: of its shape and strides, in float32 or better."""
    return torch.zeros_like(p, dtype=computing_dtype(p.dtype), memory_format=torch.preserve_format)


def use_foreach(group: dict[str, Any], params: list[Tensor]) -> bool:
    """Whether to take the multi-tensor step: as asked for, else where torch would."""
    if group["foreach"] is None:
        return _default_to_fused_or_foreach(params, group["differentiable"], use_fused=False)[1]
    return bool(group["foreach"])


def real_alias(t: Tensor) -> Tensor:
    """``t`` itself, or for a complex tensor its real and imaginary parts in a last dimension."""
    return torch.view_as_real(t) if torch.is_complex(t) else t


def working(t: Tensor) -> Tensor:
    """``t`` as a real tensor in float32 or better: an alias, or a copy for half precision."""
    return at_least_float32(real_alias(t))


def sgd_updates(
    grads: Tensors,
    buffers: Tensors | None,
    *,
    momentum: float,
    dampening: float,
    nesterov: bool,
    foreach: bool,
) -> Tensors:
    """Put gradients into momentum buffers; return the directions, which alias no buffer.

    Dampening counts from the first step on. Without buffers the momentum is 0.
    """
    if not foreach:
        if buffers is None:
            return [grad * (1 - dampening) for grad in grads]
        for grad, buffer in zip(grads, buffers, strict=True):
            buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
        if nesterov:
            return [g + momentum * buffer for g, buffer in zip(grads, buffers, strict=True)]
        return [buffer.clone() for buffer in buffers]
    if buffers is None:
        return torch._foreach_mul(list(grads), 1 - dampening)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, grads, alpha=1 - dampening)
    if nesterov:
        return torch._foreach_add(grads, buffers, alpha=momentum)
    return [buffer.clone() for buffer in buffers]


def take_step_(
    params: Tensors,
    weights: Tensors,
    updates: Tensors,
    grads: Tensors,
    step_sizes: Sequence[float | Tensor],
    *,
    view: ViewOption,
    delta: float,
    eps: float,
    decay_lr: float | Tensor,
    weight_decay: float | Tensor,
    wd_ratio: float,
    norm: str,
    stochastic_rounding: bool,
    foreach: bool,
) -> None:
    """Project the updates, decay the weights, subtract, retract: where every optimizer ends.

    ``weights`` and ``grads`` are ``params`` and their gradients as :func:`working` gives them;
    ``updates`` are overwritten. The decay is 1 − decay_lr·weight_decay, times ``wd_ratio`` where
    projected. A weight whose norm is fixed is not decayed: it would only turn the step size up.
    """
    views = [view if p.ndim > 1 else None for p in params]
    fixed = norms_by_slice(weights, views) if norm == "fixed" else None
    projected = project_(updates, weights, grads, views, delta=delta, eps=eps)
    descend_(
        weights,
        updates,
        projected,
        step_sizes,
        decay_lr=decay_lr,
        weight_decay=weight_decay,
        wd_ratio=wd_ratio if fixed is None else 0.0,
        foreach=foreach,
    )
    if fixed is not None:
        retract_(weights, views, fixed)
    round_back_(params, weights, stochastic_rounding)


def descend_(
    weights: Tensors,
    updates: Tensors,
    projected: Sequence[Tensor | bool],
    step_sizes: Sequence[float | Tensor],
    *,
    decay_lr: float | Tensor,
    weight_decay: float | Tensor,
    wd_ratio: float,
    foreach: bool,
) -> None:
    """Decay the weights, less where projected, and subtract step size × update."""
    if is_nonzero(weight_decay):
        scale_(weights, decay_factors(projected, decay_lr, weight_decay, wd_ratio), foreach)
    scale_(updates, step_sizes, foreach)
    if foreach:
        torch._foreach_sub_(weights, updates)
    else:
        for weight, update in zip(weights, updates, strict=True):
            weight.sub_(update)


def round_back_(params: Tensors, weights: Tensors, stochastic_rounding: bool) -> None:
    """Put weights that are float32 copies back into parameters of half precision."""
    for p, weight in zip(params, weights, strict=True):
        if computing_dtype(p.dtype) != p.dtype:
            p.copy_(round_stochastically(weight, p.dtype) if stochastic_rounding else weight)


def decay_factors(
    projected: Sequence[Tensor | bool],
    lr: float | Tensor,
    weight_decay: float | Tensor,
    wd_ratio: float,
) -> list[float | Tensor]:
    """1 − lr·wd·ratio for each weight, where ratio is ``wd_ratio`` if it was projected, else 1."""
    gates = [gate for gate in projected if isinstance(gate, Tensor)]
    gated: Iterator[Tensor] = iter(())
    if gates:
        open_ = torch.stack(gates).to(scalar_dtype(gates[0].device))
        gated = iter((1 - lr * weight_decay * (1 + (wd_ratio - 1) * open_)).unbind())
    return [
        next(gated)
        if isinstance(gate, Tensor)
        else 1 - lr * weight_decay * (wd_ratio if gate else 1)
        for gate in projected
    ]


def scale_(tensors: Sequence[Tensor], factors: Sequence[float | Tensor], foreach: bool) -> None:
    """Multiply each tensor by its factor."""
    if not foreach:
        for t, factor in zip(tensors, factors, strict=True):
            t.mul_(factor)
        return
    numbers = {i: factor for i, factor in enumerate(factors) if not isinstance(factor, Tensor)}
    scalars = {i: factor for i, factor in enumerate(factors) if isinstance(factor, Tensor)}
    if numbers:
        torch._foreach_mul_([tensors[i] for i in numbers], list(numbers.values()))
    if scalars:
        torch._foreach_mul_([tensors[i] for i in scalars], list(scalars.values()))


def round_stochastically(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 up or down to bfloat16 or float16, so that the expectation is ``w``.

    A random number below the last bit that is kept is added to the bits that are dropped. The
    subnormal numbers of float16 have a fixed spacing of 2⁻²⁴ and are rounded to its multiples.
    """
    kept = 10 if dtype == torch.float16 else 7
    dropped = 23 - kept
    bits = w.view(torch.int32)
    noise = torch.randint_like(bits, 1 << dropped)
    rounded = ((bits + noise) & -(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:
        spacing = 2.0**-24
        subnormal = torch.floor(w / spacing + torch.rand_like(w)) * spacing
        rounded = torch.where(w.abs() < torch.finfo(dtype).tiny, subnormal, rounded)
    return torch.where(torch.isfinite(w), rounded, w).to(dtype)


def is_nonzero(value: float | Tensor) -> bool:
    """Whether an option does anything; of a tensor that is taken for granted, not looked up."""
    return isinstance(value, Tensor) or value != 0


def by_device_and_dtype(*lists: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Split parallel lists of tensors by the device and dtype of those in the first."""
    grouped = Optimizer._group_tensors_by_device_and_dtype([list(tensors) for tensors in lists])
    for same, _ in grouped.values():
        yield [[t for t in tensors if t is not None] for tensors in same]
