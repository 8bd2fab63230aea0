"""Run a forward in float64, and with the epsilons of its normalizations all but gone.

A normalization divides by √(variance + ε), so a weight that feeds it is scale-invariant only up to
ε. Multiplying that weight by c is the same as replacing ε by ε/c²:

    f(c·w; ε) = f(w; ε/c²).

So every weight is brought to the limit of large norms, where invariance is exact, not by changing
the weights (which would saturate a softmax on the way) but by shrinking every ε, at the place where
the forward adds it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["SHRINK", "Exact", "wide"]

# ε/c² for c = 2^40: below the rounding of float64 for variances down to about 1e-12, while a slice
# of constant activations, whose variance is rounding (1e-32), still finds a larger ε to divide by.
SHRINK = 2.0**-80

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_CASTS = {"float": torch.float64, "half": torch.float64, "bfloat16": torch.float64}
_CASTS |= {"cfloat": torch.complex128, "chalf": torch.complex128}

# Where each function takes its epsilon, and whether it normalizes at all (batch statistics).
_NORMALIZATIONS: dict[Callable[..., Any], tuple[int, int | None]] = {
    torch.batch_norm: (7, 5),
    torch.instance_norm: (7, 5),
    torch.layer_norm: (4, None),
    torch.group_norm: (4, None),
    torch.rms_norm: (3, None),
    torch.native_layer_norm: (4, None),
}
_FUNCTIONAL: dict[Callable[..., Any], str | None] = {
    F.batch_norm: "training",
    F.instance_norm: "use_input_stats",
    F.layer_norm: None,
    F.group_norm: None,
    F.rms_norm: None,
}
_SIGNATURES = {function: inspect.signature(function) for function in _FUNCTIONAL}

_REDUCTIONS = frozenset(
    {"mean", "sum", "var", "std", "norm", "var_mean", "std_mean", "nanmean", "amax", "einsum"}
    | {"vector_norm", "linalg_vector_norm", "linalg_norm"}
)
_LENGTHS = frozenset(
    {"std", "norm", "vector_norm", "linalg_vector_norm", "linalg_norm", "sqrt", "std_mean"}
)
_SUMS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
_POWERS = frozenset({"pow", "__pow__", "float_power"})
_QUOTIENTS = frozenset({"div", "__truediv__", "true_divide", "divide", "__div__"})
_RECIPROCALS = frozenset({"__rtruediv__", "__rdiv__", "reciprocal"})

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"}) | frozenset(
    {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)

_STATISTIC, _LENGTH = 1, 2


class Exact(TorchFunctionMode):
    """Inside, torch computes in float64 and adds ``shrink`` times each normalization's epsilon.

    Requests for a narrower floating type are answered with float64, and narrower tensors are
    widened where they meet an operation. Epsilons are those of torch's own normalizations over
    batch statistics, and hand-written ones: a number added to a statistic (what a reduction
    returned, and functions of such values alone) just before a square root, or to a length (a norm,
    a standard deviation) just before a division.

    Args:
        shrink: the factor on every epsilon; 1 leaves them as they are (default: :data:`SHRINK`).
    """

    def __init__(self, shrink: float = SHRINK) -> None:
        super().__init__()
        self.shrink = shrink
        #: The ids of the parameters that the forward used, in the order of their first use.
        self.used: dict[int, None] = {}
        #: The groups of the convolutions that used a parameter as their kernel, by its id.
        self.kernels: dict[int, int] = {}
        #: The operations that used each parameter, and as which argument, in order.
        self.uses: list[tuple[int, str, int | str]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        if name in _CASTS:
            return args[0].to(_CASTS[name])
        args = (*args[:1], *wide(args[1:])) if _writes_into_first(name) else wide(args)
        kwargs = {key: value if key == "out" else wide(value) for key, value in kwargs.items()}
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for key, value in places:
            for t in _tensors((value,)):
                if isinstance(t, nn.Parameter):
                    self.used.setdefault(id(t))
                    self.uses.append((id(t), name, key))
        if name in _CONVOLUTIONS and len(args) > 1:
            groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
            self.kernels[id(args[1])] = groups if isinstance(groups, int) else 1
        if func is torch.conv2d:
            func = _conv2d
        if self.shrink == 1:
            return func(*args, **kwargs)
        args, kwargs = self._shrunk(func, name, args, kwargs)
        result = func(*args, **kwargs)
        _mark(name, args, kwargs, result)
        return result

    def _shrunk(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with the epsilon that they carry shrunk."""
        if func in _FUNCTIONAL:
            call = _SIGNATURES[func].bind(*args, **kwargs)
            call.apply_defaults()
            flag = _FUNCTIONAL[func]
            if flag is None or call.arguments[flag]:
                call.arguments["eps"] = self._epsilon(call.arguments["eps"])
            return call.args, call.kwargs
        if func in _NORMALIZATIONS:
            at, switch = _NORMALIZATIONS[func]
            if len(args) > at and (switch is None or args[switch]):
                args = (*args[:at], self._epsilon(args[at]), *args[at + 1 :])
            elif "eps" in kwargs:
                kwargs = {**kwargs, "eps": self._epsilon(kwargs["eps"])}
            return args, kwargs
        if not args:
            return args, kwargs
        is_root = name in ("sqrt", "rsqrt") or (
            name in _POWERS and len(args) > 1 and _is_number(args[1]) and args[1] in (0.5, -0.5)
        )
        if is_root or name in _RECIPROCALS:
            return (self._without(args[0], _STATISTIC if is_root else _LENGTH), *args[1:]), kwargs
        if name in _QUOTIENTS and len(args) > 1:
            return (args[0], self._without(args[1], _LENGTH), *args[2:]), kwargs
        return args, kwargs

    def _epsilon(self, eps: float | None) -> float:
        # torch.rms_norm takes None for the epsilon of the input's dtype, which we have widened.
        return self.shrink * (torch.finfo(torch.float32).eps if eps is None else eps)

    def _without(self, value: Any, needed: int) -> Any:
        """``statistic + ε·shrink`` for a value that was made as ``statistic + ε``."""
        statistic, eps, version = getattr(value, "_normwise_sum", (None, 0.0, -1))
        if statistic is None or value._version != version or _rank(statistic) < needed:
            return value
        return statistic + eps * self.shrink


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """torch.conv2d, as one matrix product where that is faster and costs no more memory.

    On the CPU torch has no fast float64 convolution, and reads the weight again for every sample.
    With a 1×1 kernel, or where the unfolded input is no larger than the weight, the product of both
    takes half the time or less.
    """
    if groups == 1 and input.ndim == 4 and input.device.type == "cpu" and padding != "same":
        steps, pads, gaps = (
            _pair(value) for value in (stride, 0 if padding == "valid" else padding, dilation)
        )
        kernel = tuple(weight.shape[2:])
        height, width = (
            (size + 2 * pad - gap * (k - 1) - 1) // step + 1
            for size, pad, gap, k, step in zip(
                input.shape[2:], pads, gaps, kernel, steps, strict=True
            )
        )
        x = None
        if kernel == (1, 1) and pads == (0, 0):
            x = input[:, :, :: steps[0], :: steps[1]].flatten(2)
        elif 0 < len(input) * height * width <= len(weight):
            x = F.unfold(input, kernel, gaps, pads, steps)
        if x is not None:
            y = F.linear(x.transpose(1, 2), weight.flatten(1), bias)
            return y.transpose(1, 2).contiguous().view(len(input), len(weight), height, width)
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _pair(value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    return pair if len(pair) == 2 else (pair[0], pair[0])


def wide(value: Any) -> Any:
    """``value`` with every floating dtype and tensor in it, at any depth, in float64."""
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    if isinstance(value, Tensor):
        return value.to(_WIDE[value.dtype]) if value.dtype in _WIDE else value
    if type(value) in (list, tuple):
        return type(value)(wide(item) for item in value)
    return value


def _writes_into_first(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name != "__invert__")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value)


def _is_number(value: Any) -> bool:
    """Whether a value is one number, which no gradient reaches."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.requires_grad
    return isinstance(value, (int, float))


def _rank(t: Any) -> int:
    """0 for any tensor, 1 for a statistic, 2 for a length."""
    rank: int = getattr(t, "_normwise_rank", 0)
    return rank


def _mark(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Remember of a result whether it is a statistic or a length, and what was added to it."""
    inputs = list(_tensors((*args, *kwargs.values())))
    rank = min(map(_rank, inputs), default=0)
    if name in _SUMS and (parts := _statistic_and_number(args)) is not None:
        statistic, number = parts
        rank = _rank(statistic)
        if statistic is not result:
            result._normwise_sum = (statistic, number, result._version)
    if name in _REDUCTIONS or (name in ("sqrt", "__pow__", "pow") and rank):
        rank = max(rank, _LENGTH if name in _LENGTHS else _STATISTIC)
    if rank:
        for output in _tensors((result,)):
            output._normwise_rank = rank  # type: ignore[attr-defined]  # a mark of ours


def _statistic_and_number(args: tuple[Any, ...]) -> tuple[Tensor, Any] | None:
    """Split the arguments of an addition of a constant to a statistic."""
    if len(args) != 2:
        return None
    for statistic, number in (args, args[::-1]):
        if isinstance(statistic, Tensor) and _rank(statistic) and _is_number(number):
            return statistic, number
    return None
