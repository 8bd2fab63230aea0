"""A float64 copy of a model that can be moved, scaled and run again, the original left alone."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normwise.invariance.exact import SHRINK, Call, Exact, wide

__all__ = ["Replica", "built"]

Forward = Callable[[nn.Module], Any]

# A tensor whose entries are this much smaller than usual, such as a layer scale that starts at
# 1e-6, is brought to the usual size: the rounding of all others would hide what it does.
_TINY = 1e-3

# Half of float64's digits. What agrees to this many is taken for equal, what keeps fewer of them
# for rounding: the largest distance from both kinds of error (docs/invariance.md derives the odds).
TOLERANCE = 2.0**-26


class Replica:
    """A copy of ``model`` in float64, with a forward that can be repeated exactly.

    Args:
        model: the model to copy; it is only read.
        batch_or_forward: see :func:`normwise.analyze`.
        seed: of the points, of the cotangents and of the forward's own random numbers.
        mode: ``"train"`` or ``"eval"``.

    Raises:
        ValueError: if there is nothing to analyze or the model cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_or_forward: Any,
        *,
        seed: int,
        mode: Literal["train", "eval"],
    ) -> None:
        self.forward = as_forward(batch_or_forward)
        self.seed = seed
        self.source = _floating_parameters(model)
        self.model = _copied(model)
        if mode == "eval":
            self.model.eval()
        elif not model.training:
            self.model.train()
        for module in self.model.modules():
            _settle(getattr(module, "config", None))
        self.params = _floating_parameters(self.model)
        for p in self.model.parameters():
            p.grad = None
            if p.is_floating_point() or p.is_complex():
                p.requires_grad_(True)
        self._used: dict[int, None] = {}
        self._kernels: dict[int, int] = {}
        self._uses: list[tuple[int, str, int | str]] = []
        self._shifts: dict[int, set[float]] = {}
        self._combined: set[int] = set()
        self._buffers = [
            (module, key, buffer.detach().clone())
            for module in self.model.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]

        # Statistics that are used as they are: at the start, a mean of zero hides what it does.
        trained = self._changed_by_training() if mode == "eval" else set()
        self._statistics = [
            (module, key, value)
            for module, key, value in self._buffers
            if value.is_floating_point()
            and (
                (module, key) in trained or (isinstance(module, _NormBase) and not module.training)
            )
        ]
        self._moved: dict[tuple[nn.Module, str], Tensor] = {}

    def move(self, point: int | None) -> None:
        """Set the parameters to a generic point near the model's own weights.

        Entries are multiplied by factors from [0.9, 1.1]; zeros, at which an invariance may hold
        by accident (a zero bias beside a weight) or not show (a zero gain behind it), become
        positive, and tensors of tiny entries larger. Running statistics that are used as they are
        move too. ``None`` sets the model's own weights.
        """
        generator = torch.Generator().manual_seed(self.seed * 7919 + (point or 0))
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(self.source[name])
                if point is not None:
                    _generic_(p, generator)
            for module, key, value in self._statistics:
                moved = value.clone()
                if point is not None:
                    _generic_(moved, generator)
                self._moved[module, key] = moved

    def _changed_by_training(self) -> set[tuple[nn.Module, str]]:
        """The buffers that a forward in training mode writes to."""
        self.model.train()
        try:
            with deterministic(self.seed, self.params), torch.no_grad():
                self.forward(self.model)
        except Exception:  # what cannot run in training is judged as it is
            return set()
        finally:
            self.model.eval()
        changed = {
            (module, key)
            for module, key, value in self._buffers
            if (now := module._buffers.get(key)) is None or not torch.equal(now, value)
        }
        for module, key, value in self._buffers:
            module._buffers[key] = value.clone()
        return changed

    @contextmanager
    def scaled(self, factors: Mapping[str, Tensor | float]) -> Iterator[None]:
        """Inside, the named parameters, each with its shift, are multiplied by these factors."""
        saved = {name: self.params[name].detach().clone() for name in factors}
        with torch.no_grad():
            for name, factor in factors.items():
                parameter, shift = self.params[name], self.shift(name)
                parameter.add_(shift).mul_(torch.as_tensor(factor).to(parameter)).sub_(shift)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    self.params[name].copy_(value)

    def run(
        self, *, shrink: float = SHRINK, graph: bool = False, calls: list[Call] | None = None
    ) -> list[Tensor]:
        """The differentiable outputs of one forward, always with the same random numbers.

        Args:
            shrink: the factor on every epsilon.
            graph: whether to keep the graph for :meth:`gradients`.
            calls: where to note the operations that use parameters (default: nowhere).

        Raises:
            RuntimeError: if the forward raises.
            ValueError: if it returns no differentiable tensor, or NaN.
        """
        for module, key, value in self._buffers:
            module._buffers[key] = self._moved.get((module, key), value).clone()
        buffers = frozenset(id(buffer) for buffer in self.model.buffers())
        with deterministic(self.seed, self.params), Exact(shrink, buffers, calls) as exact:
            try:
                result = self.forward(self.model)
            except Exception as error:
                text = (str(error).strip() or "no message").splitlines()[0]
                raise RuntimeError(
                    f"the forward of {type(self.model).__name__} raised "
                    f"{type(error).__name__}: {text}"
                ) from error
        self._used, self._kernels = exact.used, exact.kernels
        self._uses, self._shifts, self._combined = exact.uses, exact.shifts, exact.combined
        # Also where no graph is wanted, since models choose their path by whether gradients are on.
        outputs = [output for output in floating_tensors(result) if output.requires_grad]
        if not outputs:
            raise ValueError(
                f"the forward returned no differentiable tensor, but {_described(result)}; "
                "return a tensor that depends on the parameters"
            )
        if not any(output.numel() for output in outputs):
            raise ValueError(
                f"the forward returned empty outputs, of shape {tuple(outputs[0].shape)}; "
                "give a batch with samples"
            )
        for output in outputs:
            if output.isnan().any():
                count = int(output.isnan().sum())
                raise ValueError(
                    f"the forward returned NaN in {count} of {output.numel()} entries of an output "
                    f"of shape {tuple(output.shape)}"
                )
        return outputs if graph else [output.detach() for output in outputs]

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """The other names of tied parameters, by the first."""
        names: dict[int, list[str]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        return {first: tuple(others) for first, *others in names.values() if others}

    def in_order_of_use(self, names: Iterable[str]) -> list[str]:
        """The names, in the order in which the last forward first used the parameters."""
        order = {key: i for i, key in enumerate(self._used)}
        return sorted(names, key=lambda name: order.get(id(self.params[name]), len(order)))

    def groups(self, name: str) -> int | None:
        """The groups of the convolution that the last forward used a parameter in, if any."""
        return self._kernels.get(id(self.params[name]))

    def shift(self, name: str) -> float:
        """The number that the last forward added to a parameter before each use: 1 in ``1 + w``."""
        shifts = self._shifts.get(id(self.params[name]), {0.0})
        return next(iter(shifts)) if len(shifts) == 1 else 0.0

    def products(self, name: str, g: Tensor) -> Tensor:
        """Euler's products w·g of a parameter with its shift, entry by entry.

        For complex weights the real part of w̄·g.
        """
        w, shift = self.params[name].detach(), self.shift(name)
        w = w + shift if shift else w
        return (w.conj() * g).real if w.is_complex() else w * g

    def uses(self) -> list[tuple[str, str, int | str]]:
        """The operations of the last forward on parameters: (parameter, operation, argument)."""
        names = {id(p): name for name, p in self.params.items()}
        return [(names[key], op, at) for key, op, at in self._uses if key in names]

    def combined(self, name: str) -> bool:
        """Whether the last forward made something of a parameter and others, before other use."""
        return id(self.params[name]) in self._combined

    def cotangents(self, outputs: list[Tensor], draw: int) -> list[Tensor]:
        """Random normal upstream gradients; 0 where an output is infinite (masked)."""
        generator = torch.Generator().manual_seed(self.seed * 104729 + draw)
        return [
            torch.randn(output.shape, generator=generator, dtype=output.dtype)
            .to(output.device)
            .masked_fill_(~output.detach().isfinite(), 0)
            for output in outputs
        ]

    def gradients(
        self,
        outputs: list[Tensor],
        cotangents: list[Tensor],
        names: list[str],
        *,
        retain: bool = False,
        shrink: float = SHRINK,
    ) -> list[Tensor | None]:
        """∂⟨cotangents, outputs⟩/∂p for the named parameters; None where p is not used."""
        # Checkpointed modules run their forward again in the backward.
        with deterministic(self.seed, self.params), Exact(shrink):
            grads = torch.autograd.grad(
                outputs,
                [self.params[name] for name in names],
                cotangents,
                retain_graph=retain,
                allow_unused=True,
            )
        return [g.to_dense() if g is not None and g.is_sparse else g for g in grads]


def built(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What ``factory`` builds from random numbers of its own, in float64."""
    with deterministic(seed, {}):
        return factory()


def as_forward(batch_or_forward: Any) -> Forward:
    """A function of the model: as given, or one that calls the model with the batch."""
    if isinstance(batch_or_forward, Tensor):
        batch = wide(batch_or_forward)
        return lambda model: model(batch)
    if isinstance(batch_or_forward, Mapping):
        named = {key: wide(value) for key, value in batch_or_forward.items()}
        return lambda model: model(**named)
    if isinstance(batch_or_forward, (list, tuple)):
        values = wide(tuple(batch_or_forward))
        return lambda model: model(*values)
    if callable(batch_or_forward):
        try:
            inspect.signature(batch_or_forward).bind(None)
        except TypeError:
            raise ValueError(
                "Invalid forward: it must take the model as its one argument, such as "
                "`lambda model: model(x)`, since it runs on a copy"
            ) from None
        except ValueError:  # a builtin without a signature
            pass
        forward: Forward = batch_or_forward
        return forward
    raise ValueError(
        f"Invalid batch: {type(batch_or_forward).__name__}; must be a tensor, a tuple or list of "
        "arguments, a mapping of keyword arguments, or a function of the model"
    )


def floating_tensors(tree: Any) -> Iterator[Tensor]:
    """The floating tensors of nested lists, tuples, mappings and dataclasses, in order.

    Other objects are passed over: they are caches and the like, which no loss sees.
    """
    if isinstance(tree, Tensor):
        if tree.is_floating_point() or tree.is_complex():
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from floating_tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from floating_tensors(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from floating_tensors(getattr(tree, field.name))


@contextmanager
def deterministic(seed: int, params: Mapping[str, Tensor]) -> Iterator[None]:
    """Seeded generators, float64 by default, nothing compiled; on leaving all is as it was."""
    numpy = sys.modules.get("numpy")
    devices = {p.device.type for p in params.values()} - {"cpu", "meta"}
    modules = [torch.get_device_module(device) for device in sorted(devices)]
    states = [module.get_rng_state_all() for module in modules]
    cpu, python = torch.get_rng_state(), random.getstate()
    array_state = numpy.random.get_state() if numpy else None
    dtype = torch.get_default_dtype()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        torch.set_default_dtype(torch.float64)
        # Where nothing has loaded the compiler nothing is compiled, and to load it takes seconds.
        compiled = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(cpu)
        random.setstate(python)
        if numpy:
            numpy.random.set_state(array_state)
        for module, state in zip(modules, states, strict=True):
            module.set_rng_state_all(state)


def _floating_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    params = {
        name: p
        for name, p in model.named_parameters()
        if isinstance(p, nn.UninitializedParameter) or p.is_floating_point() or p.is_complex()
    }
    if not params:
        raise ValueError(f"{type(model).__name__} has no floating-point parameters to analyze")
    for name, p in params.items():
        if isinstance(p, nn.UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet; run a forward first")
        if p.device.type == "meta":
            raise ValueError(
                f"parameter {name!r} is on the meta device and has no values; give "
                "`factory=`, a function that builds the same network, at small width, with values"
            )
        if type(p) is not nn.Parameter and hasattr(p, "placements"):
            raise ValueError(
                f"parameter {name!r} is sharded (DTensor); give `factory=`, a function that "
                "builds the same network unsharded, at small width"
            )
    return params


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy in float64, on the model's device or, where that has no float64, on the CPU."""
    # What a forward left in a module (torch.nn.utils.weight_norm leaves its weight) is no leaf of
    # the graph, and deepcopy refuses it. The next forward writes it again.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        duplicate = copy.deepcopy(model, memo)
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({text}); give `factory=`, a function that "
            "builds the same network"
        ) from error
    if any(p.device.type == "mps" for p in model.parameters()):
        duplicate.to("cpu")
    for module in duplicate.modules():
        for p in module._parameters.values():
            if p is not None:
                p.data = wide(p.data)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = wide(buffer)
    return duplicate


def _settle(config: Any) -> None:
    """Turn off, in a configuration of transformers, what an analysis cannot look through."""
    # Keys and values cached for generation are not outputs that a loss sees.
    if getattr(config, "use_cache", False) is True:
        config.use_cache = False
    # Grouped matrix products take no float64; the plain loop over experts does.
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = "eager"


def _generic_(value: Tensor, generator: torch.Generator) -> None:
    """Move to a generic point nearby, in place."""
    noise = torch.empty(value.shape, dtype=torch.float32).uniform_(-1, 1, generator=generator)
    noise = noise.to(value.device)
    natural = 0.1 if value.ndim < 2 else 1 / math.sqrt(math.prod(value.shape[1:]) or 1)
    nonzero = int(value.count_nonzero())
    size = float(torch.linalg.vector_norm(value)) / math.sqrt(nonzero or 1)
    if size < _TINY * natural:
        value.mul_(natural / size if size else 0)
        size = natural
    if nonzero < value.numel():
        value.copy_(torch.where(value == 0, size * (1 + 0.5 * noise), value))
    value.addcmul_(value, noise.to(value.dtype), value=0.1)


def _described(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of shape {tuple(result.shape)} and {result.dtype} without a graph"
    return f"an object of type {type(result).__name__}"
