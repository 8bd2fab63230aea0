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
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["SHRINK", "Call", "Exact", "wide"]

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
_ROOTS = frozenset({"sqrt", "rsqrt", "sqrt_", "rsqrt_"})
_POWERS = frozenset({"pow", "__pow__", "float_power", "pow_", "__ipow__"})
_QUOTIENTS = frozenset({"div", "__truediv__", "true_divide", "divide", "__div__"}) | frozenset(
    {"div_", "__itruediv__", "__idiv__"}
)
_RECIPROCALS = frozenset({"__rtruediv__", "__rdiv__", "reciprocal", "reciprocal_"})
# A number no larger than this, added just before a root or a division, guards against zero.
_SMALL = 1e-2

# What only lays the entries of a tensor out anew: a parameter is still itself behind it.
_LAYOUTS = frozenset(
    {"t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "contiguous"}
    | {"chunk", "split", "tensor_split", "unbind", "narrow", "select", "squeeze", "unsqueeze"}
    | {"expand", "expand_as", "view_as", "movedim", "swapaxes", "swapdims", "repeat_interleave"}
    | {"to", "type", "type_as", "double", "clone", "T", "mT", "H", "mH"}
)

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"}) | frozenset(
    {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)

_STATISTIC, _LENGTH = 1, 2


@dataclass(frozen=True)
class Call:
    """An operation that used parameters.

    Args:
        name: of the operation.
        parameters: the ids of the parameters.
        taken: its other arguments, if a gradient reaches them.
        returned: what it returned.
    """

    name: str
    parameters: list[int]
    taken: list[Tensor]
    returned: list[Tensor]


class Exact(TorchFunctionMode):
    """Inside, torch computes in float64 and adds ``shrink`` times each normalization's epsilon.

    Requests for a narrower floating type are answered with float64, and narrower tensors are
    widened where they meet an operation. Epsilons are those of torch's own normalizations over
    batch statistics, and hand-written ones: a number added to a statistic (what a reduction
    returned, and functions of such values alone) just before a square root, or to a length (a norm,
    a standard deviation) just before a division.

    Args:
        shrink: the factor on every epsilon; 1 leaves them as they are (default: :data:`SHRINK`).
        constants: the ids of tensors that hold no data of the batch, such as buffers.
        calls: where to note the operations that use parameters (default: nowhere).
    """

    def __init__(
        self,
        shrink: float = SHRINK,
        constants: frozenset[int] = frozenset(),
        calls: list[Call] | None = None,
    ) -> None:
        super().__init__()
        self.calls = calls
        self.shrink = shrink
        self.constants = constants
        #: The ids of the parameters that the forward used, in the order of their first use.
        self.used: dict[int, None] = {}
        #: The groups of the convolutions that used a parameter as their kernel, by its id.
        self.kernels: dict[int, int] = {}
        #: The operations that used each parameter, and as which argument, in order. What is made
        #: of parameters alone, such as a normalized weight, stands for all of them.
        self.uses: list[tuple[int, str, int | str]] = []
        #: The parameters of which something was made before it met the batch.
        self.combined: set[int] = set()
        #: The numbers that the forward adds to each parameter before any other use of it.
        self.shifts: dict[int, set[float]] = {}

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
            result = func(*args, **kwargs)
            getter = getattr(getattr(func, "__self__", None), "__name__", "")
            if name == "__get__" and getter in _LAYOUTS:
                _follow(args[0], result)
            return result
        if name in _CASTS:
            return args[0].to(_CASTS[name])
        args = (*args[:1], *wide(args[1:])) if _writes_into_first(name) else wide(args)
        kwargs = {key: value if key == "out" else wide(value) for key, value in kwargs.items()}
        before = len(self.uses)
        shifted = self._record(name, args, kwargs)
        used = [key for key, _, _ in self.uses[before:]]
        if name in _CONVOLUTIONS and len(args) > 1:
            groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
            self.kernels[id(args[1])] = groups if isinstance(groups, int) else 1
        if func is torch.conv2d:
            func = _conv2d
        if self.shrink == 1:
            result = func(*args, **kwargs)
        else:
            args, kwargs = self._shrunk(func, name, args, kwargs)
            summands = _statistic_and_number(name, args, kwargs)
            result = func(*args, **kwargs)
            _mark(name, args, kwargs, result, summands)
        if args and _only_lays_out(name, args):
            _follow(args[0], result)
        elif (made := self._made_of(args, kwargs)) is not None and shifted is None:
            for output in _tensors((result,)):
                output._normwise_made = made  # type: ignore[attr-defined]  # a mark of ours
        elif shifted is not None:
            t, number = shifted
            _follow(t, result, float(number))
        if used and self.calls is not None:
            taken = [t for t in _tensors((*args, *kwargs.values())) if self._is_data(t)]
            self.calls.append(Call(name, used, taken, list(_tensors((result,)))))
        return result

    def _is_data(self, t: Tensor) -> bool:
        """Whether a tensor depends on more than single parameters."""
        return t.requires_grad and _source(t) is None and not hasattr(t, "_normwise_made")

    def _record(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | float] | None:
        """Note the parameters that an operation uses; of ``parameter + number`` both of these."""
        for t in _tensors((*args, *kwargs.values())):
            if isinstance(t, nn.Parameter):
                self.used.setdefault(id(t))
        if _only_lays_out(name, args):
            return None
        if name in _SUMS and len(args) == 2 and not _writes_into_first(name):
            for t, number in (args, args[::-1]):
                source = _source(t)
                if source is not None and source[1] == 0 and _is_number(number) and not kwargs:
                    return t, number
        combined = self._made_of(args, kwargs) is not None
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for key, value in places:
            for t in _tensors((value,)):
                if (source := _source(t)) is not None:
                    self.shifts.setdefault(source[0], set()).add(source[1])
                parts = frozenset({source[0]}) if source else getattr(t, "_normwise_made", ())
                if combined:
                    self.combined.update(parts)
                else:
                    self.uses += [(part, name, key) for part in sorted(parts)]
        return None

    def _made_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int] | None:
        """The parameters that the arguments consist of; None where there is anything else."""
        parts: set[int] = set()
        for t in _tensors((*args, *kwargs.values())):
            if (source := _source(t)) is not None:
                parts.add(source[0])
            elif made := getattr(t, "_normwise_made", None):
                parts |= made
            elif id(t) not in self.constants:
                return None
        return frozenset(parts) or None

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
        is_root = name in _ROOTS or (
            name in _POWERS and len(args) > 1 and _is_number(args[1]) and args[1] in (0.5, -0.5)
        )
        if is_root or name in _RECIPROCALS:
            value = self._without(args[0], _STATISTIC if is_root else _LENGTH)
            if value is not args[0] and _writes_into_first(name):
                value = args[0].copy_(value)
            return (value, *args[1:]), kwargs
        if name in _QUOTIENTS and len(args) > 1:
            return (args[0], self._without(args[1], _LENGTH), *args[2:]), kwargs
        return args, kwargs

    def _epsilon(self, eps: float | None) -> float:
        # torch.rms_norm takes None for the epsilon of the input's dtype, which we have widened.
        return self.shrink * (torch.finfo(torch.float32).eps if eps is None else eps)

    def _without(self, value: Any, needed: int) -> Any:
        """``statistic + ε·shrink`` for a value that was made as ``statistic + ε``."""
        statistic, eps, version = getattr(value, "_normwise_sum", (None, 0.0, -1))
        if statistic is None or value._version != version:
            return value
        if _rank(statistic) < needed and not (statistic.requires_grad and 0 < eps <= _SMALL):
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


def _mark(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    summands: tuple[Tensor, float] | None,
) -> None:
    """Remember of a result whether it is a statistic or a length, and what was added to it."""
    inputs = list(_tensors((*args, *kwargs.values())))
    rank = min(map(_rank, inputs), default=0)
    if summands is not None:
        rank = _rank(summands[0])
        result._normwise_sum = (*summands, result._version)
    if name in _REDUCTIONS or (name in ("sqrt", "__pow__", "pow") and rank):
        rank = max(rank, _LENGTH if name in _LENGTHS else _STATISTIC)
    if rank:
        for output in _tensors((result,)):
            output._normwise_rank = rank  # type: ignore[attr-defined]  # a mark of ours


def _statistic_and_number(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, float] | None:
    """Split the arguments of an addition of a constant to a statistic, or of a small one to any."""
    if name not in _SUMS or len(args) != 2 or not kwargs.keys() <= {"alpha"}:
        return None
    for t, number in (args, args[::-1]):
        if not isinstance(t, Tensor) or not _is_number(number):
            continue
        eps = float(number)
        if t is args[0]:
            eps *= kwargs.get("alpha", 1)
        if _rank(t) or (t.requires_grad and 0 < eps <= _SMALL):
            # What is written over is kept as it was.
            kept = t.clone() if _writes_into_first(name) else t
            if _rank(t):
                kept._normwise_rank = _rank(t)
            return kept, eps
    return None


def _only_lays_out(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the operation moves the entries of its first argument and does nothing else."""
    if name != "__getitem__":
        return name in _LAYOUTS
    # An index that is a tensor looks rows of a table up, or takes a matrix from a stack.
    return args[0].ndim > 2 or not any(isinstance(t, Tensor) for t in _tensors(args[1:]))


def _source(t: Any) -> tuple[int, float] | None:
    """The parameter whose entries a tensor holds, and what was added to them."""
    if isinstance(t, nn.Parameter):
        return id(t), 0.0
    return getattr(t, "_normwise_source", None)


def _follow(t: Any, result: Any, shift: float = 0.0) -> None:
    """Remember that ``result`` has the entries of ``t``, plus a number."""
    source, made = _source(t), getattr(t, "_normwise_made", None)
    for output in _tensors((result,)):
        if isinstance(output, nn.Parameter):
            continue
        if source is not None:
            output._normwise_source = (source[0], source[1] + shift)  # type: ignore[attr-defined]  # ours
        elif made is not None:
            output._normwise_made = made  # type: ignore[attr-defined]  # a mark of ours
