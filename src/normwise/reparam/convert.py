"""Put a parametrization on the weights of a model, by rules that the returned report states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normwise.checks import check_model
from normwise.figures.tables import Table
from normwise.reparam.checkpoint import LoadOtherFormats
from normwise.reparam.parametrizations import (
    CONVOLUTIONS,
    TRANSPOSED,
    CenteredWeightNorm,
    WeightNorm,
    WeightParametrization,
    WeightStandardization,
    originals,
    stacks,
)
from normwise.reparam.recurrent import ReleaseFlatWeights

__all__ = [
    "Conversion",
    "ConvertedWeight",
    "center_weight_normalize",
    "reparametrize",
    "weight_normalize",
    "weight_standardize",
]

# [ES] converts ResNeXt-50, whose 3×3 convolutions have 4·3·3 = 36 entries a slice, and gains
# (Table V); with the 9 of a depthwise 3×3 convolution accuracy drops (Table IX).
MIN_GROUPED_ENTRIES = 32

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class ConvertedWeight:
    """One weight of a model, and what was done with it.

    Attributes:
        name: its name in the model before the conversion, such as ``"layer1.0.conv1.weight"``.
        module: the class of the module that holds it.
        shape: its shape.
        view: the slices that are normalized, or ``None`` if it was left alone.
        reason: why it was left alone, or ``None`` if it was converted.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    view: str | None
    reason: str | None


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; ``print(report)`` is a table.

    Attributes:
        method: the class of the parametrization.
        weights: every weight of two or more dimensions, in the order of the model.
    """

    method: str
    weights: tuple[ConvertedWeight, ...]

    @property
    def converted(self) -> tuple[str, ...]:
        """The names of the weights that were converted."""
        return tuple(w.name for w in self.weights if w.reason is None)

    @property
    def left_alone(self) -> dict[str, str]:
        """The names of the weights that were not, and why."""
        return {w.name: w.reason for w in self.weights if w.reason is not None}

    def __str__(self) -> str:
        rows = (
            (
                w.name,
                w.module,
                "×".join(map(str, w.shape)),
                f"view {w.view}" if w.reason is None else f"left alone: {w.reason}",
            )
            for w in self.weights
        )
        return str(Table.of(("weight", "module", "shape", self.method), rows))


def weight_normalize(
    model: nn.Module,
    *,
    gain: bool = True,
    only: Iterable[str | nn.Module] | None = None,
    skip: Iterable[str | nn.Module] = (),
    eps: float | None = None,
) -> Conversion:
    """Put weight normalization, g·W/‖W‖ an output channel, on the weights of ``model``, in place.

    With the gain, which starts at ‖W‖, outputs do not change. Which weights are converted,
    :func:`reparametrize` says.

    Args:
        model: any module.
        gain: whether an output channel has a learnable gain, one number in the shape
            ``(out, 1, ...)`` (default: True). Without it, rows of norm 1: see
            :func:`condition_weights`.
        only: modules to convert, and no others: modules, names, or patterns of names (default:
            those that the rules choose).
        skip: modules to leave alone, in the same ways; it overrules ``only`` (default: none).
        eps: guard of the root mean square of a slice, which is divided by √(mean square + eps²)
            (default: 1e-8, in float64 1e-12, in float16 1e-3).

    Returns:
        What was done with each weight; ``print`` it.

    Raises:
        ValueError: as :func:`reparametrize`.

    Source: arXiv 1602.07868, Eq. 2.
    """
    return reparametrize(model, WeightNorm, gain=gain, only=only, skip=skip, eps=eps)


def center_weight_normalize(
    model: nn.Module,
    *,
    gain: bool = True,
    only: Iterable[str | nn.Module] | None = None,
    skip: Iterable[str | nn.Module] = (),
    eps: float | None = None,
) -> Conversion:
    """Put centered weight normalization, g·(W − W̄)/‖W − W̄‖, on ``model``, in place.

    Outputs change where an output channel's weights have a mean, which is taken away.

    Args:
        model: any module.
        gain: whether an output channel has a learnable gain, which starts at ‖W − W̄‖
            (default: True).
        only, skip: as for :func:`weight_normalize`.
        eps: guard of the std of a slice, which is divided by √(variance + eps²)
            (default: 1e-8, in float64 1e-12, in float16 1e-3).

    Returns:
        What was done with each weight; ``print`` it.

    Raises:
        ValueError: as :func:`reparametrize`.

    Source: Huang et al., "Centered weight normalization in accelerating training of deep neural
    networks", ICCV 2017.
    """
    return reparametrize(model, CenteredWeightNorm, gain=gain, only=only, skip=skip, eps=eps)


def weight_standardize(
    model: nn.Module,
    *,
    gain: bool = False,
    only: Iterable[str | nn.Module] | None = None,
    skip: Iterable[str | nn.Module] = (),
    eps: float | None = None,
) -> Conversion:
    """Put weight standardization, (W − W̄)/std(W) an output channel, on ``model``, in place.

    The std is the biased one. Outputs change: the mean and the scale of each output channel's
    weights are gone.

    Args:
        model: any module.
        gain: whether an output channel has a learnable gain, which starts at std(W)
            (default: False).
        only, skip: as for :func:`weight_normalize`.
        eps: guard of the std of a slice, which is divided by √(variance + eps²)
            (default: 1e-8, in float64 1e-12, in float16 1e-3).

    Returns:
        What was done with each weight; ``print`` it.

    Raises:
        ValueError: as :func:`reparametrize`.

    Source: arXiv 1903.10520.
    """
    return reparametrize(model, WeightStandardization, gain=gain, only=only, skip=skip, eps=eps)


def reparametrize(
    model: nn.Module,
    method: type[WeightParametrization],
    *,
    only: Iterable[str | nn.Module] | None = None,
    skip: Iterable[str | nn.Module] = (),
    **options: Any,
) -> Conversion:
    """Put a parametrization on the weights of ``model``, in place.

    Convolutions, transposed convolutions and linear layers are converted, each in the slices that
    the method says: one an output channel, unless its class says other. Left alone are, and the
    report says which and why:

    - depthwise convolutions, and grouped ones with fewer than 32 entries a slice
      (arXiv 1911.05920, section 6.7 and Table IX);
    - the classifier: the last ``nn.Linear`` in the order of ``model.modules()``;
    - embeddings (a row is a vector, not an output channel) and recurrent layers;
    - a weight that several modules share, that another parametrization owns, that is not
      initialized yet, that is complex, that has no entries or too few a slice, or that the method
      is not for.

    ``only`` overrules the first three, and so converts embeddings (rows) and recurrent layers
    (rows: one a gate and unit; how the gates are stacked does not matter).

    Make the optimizer after the conversion: a gain is a new parameter.

    Args:
        model: any module.
        method: a class of parametrizations, such as :class:`WeightNorm` or :class:`AOL`.
        only: modules to convert, and no others: modules of ``model``, their names, or patterns of
            names such as ``"layer4.*"`` (default: those that the rules choose).
        skip: modules to leave alone, in the same ways; it overrules ``only`` (default: none).
        **options: the class's own, such as ``gain`` and ``eps``; one that it does not have is a
            ``TypeError``.

    Returns:
        What was done with each weight.

    Raises:
        ValueError: for an invalid option, a name that matches no module, a model with nothing to
            convert, or a weight to convert that already has a parametrization of this library.
            The model is then as it was.
    """
    check_model(model)
    method(**options)  # tells of invalid options before anything else is looked at
    chosen = None if only is None else _matching(model, only, "only")
    skipped = _matching(model, skip, "skip")
    classifier = next(
        (m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None
    )
    shared = _shared_weights(model)

    def decide(
        full_name: str, module: nn.Module, name: str, w: Tensor, owner: nn.Module | None
    ) -> WeightParametrization | str:
        """The parametrization that a weight is to get, or the reason why it gets none."""
        if module in skipped:
            return "named in skip"
        if chosen is not None and module not in chosen:
            return "not named in only"
        if isinstance(owner, WeightParametrization):
            raise ValueError(
                f"{full_name} already has a {type(owner).__name__}; "
                "fold(model) first, or name the module in skip"
            )
        reason = _why_not(module, name, w, owner)
        if reason is None and w in shared:
            reason = f"shared by {' and '.join(shared[w])}"
        if reason is None and chosen is None:
            reason = _rule(module, module is classifier)
        if reason is not None:
            return reason
        if (unfit := method.why_not(module)) is not None:
            return unfit
        view, groups = method.slices_of(module)
        parametrization = method(view, groups=groups, **options)
        try:
            parametrization.right_inverse(w.detach())
        except ValueError as error:
            return str(error)
        return parametrization

    todo: list[tuple[nn.Module, str, WeightParametrization]] = []
    weights: list[ConvertedWeight] = []
    for module_name, module in model.named_modules():
        for name, w, owner in _weights(module):
            full_name = f"{module_name}.{name}" if module_name else name
            decision = decide(full_name, module, name, w, owner)
            view = reason = None
            if isinstance(decision, str):
                reason = decision
            else:
                todo.append((module, name, decision))
                view = str(decision.view)
                if decision.groups > 1:
                    view += f" in each of {decision.groups} groups"
            weights.append(
                ConvertedWeight(
                    full_name,
                    parametrize.type_before_parametrizations(module).__name__,
                    () if is_lazy(w) else tuple(w.shape),
                    view,
                    reason,
                )
            )
    report = Conversion(method.__name__, tuple(weights))
    if not todo:
        raise ValueError(f"{method.__name__} finds no weight to convert:\n{report}")
    for module, name, parametrization in todo:
        parametrization.siblings = tuple(module._parameters)
        if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
            module.register_forward_hook(ReleaseFlatWeights())
        parametrize.register_parametrization(module, name, parametrization)
        module.register_load_state_dict_pre_hook(LoadOtherFormats(name))
    return report


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module | None]]:
    """Name, tensor and owner (the parametrization, if any) of the weights a module holds itself."""
    if isinstance(module, (parametrize.ParametrizationList, WeightParametrization)):
        return
    for name, p in module._parameters.items():
        if p is not None and (is_lazy(p) or p.ndim >= 2):
            yield name, p, None
    for name, stack in stacks(module).items():
        w = originals(stack)[-1]
        if w.ndim >= 2:
            yield name, w, stack[0]


def _why_not(module: nn.Module, name: str, w: Tensor, owner: nn.Module | None) -> str | None:
    """Why a weight cannot be converted, whatever the user names."""
    if owner is not None:
        return f"already parametrized by {type(owner).__name__}"
    if is_lazy(w):
        return "not initialized yet"
    if w.is_complex():
        return "complex"
    if w.numel() == 0:
        return "has no entries"
    known = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *_EMBEDDINGS)
    if isinstance(module, _RECURRENT):
        return None if name.startswith("weight") else "not a weight of the recurrent layer"
    if not isinstance(module, known) or name != "weight":
        return f"not a weight that {type(module).__name__} is known to multiply its input with"
    return None


def _rule(module: nn.Module, is_classifier: bool) -> str | None:
    """Why a weight is left alone unless the user names it."""
    if isinstance(module, _EMBEDDINGS):
        return "embedding; name it in only"
    if isinstance(module, _RECURRENT):
        return "recurrent; name it in only"
    if is_classifier:
        return "classifier: the last Linear"
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and module.groups > 1:
        inputs = module.in_channels // module.groups
        if inputs == 1:
            return "depthwise convolution"
        entries = inputs * math.prod(module.kernel_size)
        if entries < MIN_GROUPED_ENTRIES:
            return (
                f"grouped convolution with {entries} entries a slice, "
                f"fewer than {MIN_GROUPED_ENTRIES}"
            )
    return None


def _matching(model: nn.Module, named: Iterable[str | nn.Module], argument: str) -> set[nn.Module]:
    """The modules that names, patterns and modules stand for; each must stand for one or more."""
    if isinstance(named, (str, nn.Module)):
        named = [named]
    if not isinstance(named, Iterable):
        raise TypeError(f"Invalid {argument}: {named!r}; must be modules, names or patterns")
    found: set[nn.Module] = set()
    for item in named:
        matches = {
            module
            for name, module in model.named_modules(remove_duplicate=False)
            if module is item or (isinstance(item, str) and fnmatchcase(name, item))
        }
        if not matches:
            shown = repr(item) if isinstance(item, str) else type(item).__name__
            raise ValueError(f"{argument} names {shown}, which matches no module of the model")
        found |= matches
    return found


def _shared_weights(model: nn.Module) -> dict[Tensor, list[str]]:
    """The names of each parameter that more than one module holds."""
    names: dict[Tensor, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                names.setdefault(p, []).append(f"{module_name}.{name}")
    return {p: of_p for p, of_p in names.items() if len(of_p) > 1}
