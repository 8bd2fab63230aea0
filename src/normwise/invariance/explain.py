"""Say where a change of scale is absorbed, by scaling and looking.

A module absorbs the scale of a weight if scaling the weight changes what the module is given, or
a parameter of its own, and leaves what it returns as it was. What is said of a weight is what such
a run showed; where no module absorbs, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from normwise.invariance.specimen import TOLERANCE, Specimen, floating_tensors

__all__ = ["Explainer"]


@dataclass(frozen=True)
class _Call:
    """One call of a module: its name, and fingerprints of what it took and returned."""

    module: str
    taken: list[Tensor]
    returned: list[Tensor]


class _Absorbed(BaseException):
    """Ends a forward once the absorbing module is known; no ``except Exception`` stops it."""


class Explainer:
    """Finds the modules of a specimen that absorb a change of scale.

    Args:
        specimen: at the point where it will be scaled.
    """

    def __init__(self, specimen: Specimen) -> None:
        self.specimen = specimen
        self.names = {module: name for name, module in specimen.model.named_modules()}
        self._inside = {
            name: {id(p) for p in module.parameters()} for module, name in self.names.items()
        }
        self._before: list[_Call] = []
        with self._watching(self._before):
            specimen.run()

    def absorbers(self, factors: Mapping[str, Tensor | float], *, first: bool) -> list[str]:
        """Names of the modules that absorb these factors, in the order in which they return.

        Args:
            factors: what to multiply parameters by, by name.
            first: end at the first one.
        """
        scaled = {id(self.specimen.params[name]) for name in factors}
        after: list[_Call] = []
        found: dict[str, None] = {}

        def look() -> None:
            before, now = self._before[len(after) - 1], after[-1]
            if before.module != now.module or _changed(before.returned, now.returned):
                return
            if scaled & self._inside[now.module] or _changed(before.taken, now.taken):
                found.setdefault(now.module)
                if first:
                    raise _Absorbed

        with self.specimen.scaled(factors), self._watching(after, look):
            try:
                self.specimen.run()
            except _Absorbed:
                pass
        return list(found)

    def contains(self, module_name: str, parameters: Iterable[str]) -> bool:
        """Whether a module or what is in it owns one of the parameters."""
        return any(id(self.specimen.params[p]) in self._inside[module_name] for p in parameters)

    def described(self, module_name: str) -> str:
        """``name`` (Class)."""
        module = self.specimen.model.get_submodule(module_name)
        return f"`{module_name or 'the model'}` ({type(module).__name__})"

    def sentence(self, parameter: str, absorber: str) -> str:
        """What it means for a parameter that this module absorbs its scale."""
        module = self.specimen.model.get_submodule(absorber)
        if isinstance(module, ParametrizationList):
            kinds = " and ".join(type(part).__name__ for part in module)
            return f"normalized by its parametrization {kinds}"
        if not self.contains(absorber, [parameter]):
            return f"feeds {self.described(absorber)}"
        if parameter.rpartition(".")[0] == absorber:
            return f"normalized inside {self.described(absorber)}"
        return f"normalized within the forward of {self.described(absorber)}"

    @contextmanager
    def _watching(self, calls: list[_Call], look: Any = None) -> Iterator[None]:
        """Record the calls of all modules while the specimen runs."""
        pending: list[list[Tensor]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            pending.append(_fingerprints((args, kwargs)))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            calls.append(_Call(self.names[module], pending.pop(), _fingerprints(output)))
            if look is not None and len(calls) <= len(self._before):
                look()

        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _fingerprints(tree: Any) -> list[Tensor]:
    with torch._C.DisableTorchFunction(), torch.no_grad():
        return [_fingerprint(t.detach()) for t in floating_tensors(tree)]


def _fingerprint(t: Tensor) -> Tensor:
    """The norm of a tensor and its inner product with a ramp of about unit norm."""
    flat = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).flatten().double()
    flat = flat.masked_fill(~flat.isfinite(), 0)
    ramp = torch.linspace(-1, 1, max(flat.numel(), 1), dtype=flat.dtype, device=flat.device)
    ramp = ramp[: flat.numel()] * (3 / max(flat.numel(), 1)) ** 0.5
    return torch.stack([torch.linalg.vector_norm(flat), flat @ ramp])


def _changed(before: list[Tensor], after: list[Tensor]) -> bool:
    if len(before) != len(after):
        return True
    for old, new in zip(before, after, strict=True):
        if bool(((old - new).abs() > TOLERANCE * torch.maximum(old[0], new[0])).any()):
            return True
    return False
