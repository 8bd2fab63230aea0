"""Say where a change of scale is absorbed, by scaling and looking.

A module absorbs the scale of a weight if scaling the weight changes what the module is given, or
a parameter of its own, and leaves what it returns as it was. What is said of a weight is what such
a run showed; where no module absorbs, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from normwise.invariance.replica import TOLERANCE, Replica, floating_tensors

__all__ = ["Explainer"]


Factors = Mapping[str, Tensor | float]


@dataclass(frozen=True)
class _Call:
    """One call of a module: its name, and fingerprints of what it took and returned.

    Two calls are told apart by norms and sums, since activations would take too much memory.
    """

    module: str
    taken: list[Tensor]
    returned: list[Tensor]


@dataclass(frozen=True)
class _Run:
    """What a run with the claims of ``scaled`` changed, call by call."""

    scaled: frozenset[int]
    taken: list[bool]
    returned: list[bool]


class Explainer:
    """Finds the modules of a replica that absorb a change of scale.

    Args:
        replica: at the point where it will be scaled.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.names = {module: name for name, module in replica.model.named_modules()}
        self._inside = {
            name: {id(p) for p in module.parameters()} for module, name in self.names.items()
        }
        self._before = self._calls()

    def absorbers(self, claim: Factors) -> list[str]:
        """The modules that absorb a claim, in the order in which they return.

        Args:
            claim: what to multiply parameters by, by name, without a change of the outputs.
        """
        run = self._run([claim], frozenset({0}))
        return self._absorbing(0, claim, [run]) if run else []

    def one_absorber(self, claims: Sequence[Factors]) -> list[str | None]:
        """For each claim a module that absorbs it, or None.

        Many claims are told apart in few runs: each of 2·log₂(claims) runs scales half of them. A
        claim does not reach what some run with it left unchanged; it does reach what a run changed
        in which no other claim reaches it. A claim that this does not settle gets a run of its own.
        """
        runs = [run for half in _halves(len(claims)) if (run := self._run(claims, half))]
        found = []
        for i, claim in enumerate(claims):
            names = self._absorbing(i, claim, runs) or self.absorbers(claim)
            found.append(names[0] if names else None)
        return found

    def _absorbing(self, i: int, claim: Factors, runs: list[_Run]) -> list[str]:
        """The modules of which the runs show that they absorb claim ``i``."""
        own = {id(self.replica.params[name]) for name in claim}
        mine = [run for run in runs if i in run.scaled]
        names: dict[str, None] = {}
        for at, call in enumerate(self._before):
            # What returns nothing that depends on a parameter (positions, masks) absorbs nothing.
            if not call.returned or all(run.returned[at] for run in mine):
                continue
            innocent = {j for run in runs if not run.taken[at] for j in run.scaled}
            reached = any(run.scaled - innocent == {i} for run in mine)
            if reached or own & self._inside[call.module]:
                names.setdefault(call.module)
        return list(names)

    def _run(self, claims: Sequence[Factors], scaled: frozenset[int]) -> _Run | None:
        """A run with some claims scaled; None if it called other modules than the first one."""
        factors: dict[str, Tensor | float] = {}
        for i in scaled:
            for name, factor in claims[i].items():
                factors[name] = factors.get(name, 1.0) * factor
        with self.replica.scaled(factors):
            after = self._calls()
        if [call.module for call in after] != [call.module for call in self._before]:
            return None
        both = list(zip(self._before, after, strict=True))
        return _Run(
            scaled,
            [_changed(old.taken, new.taken) for old, new in both],
            [_changed(old.returned, new.returned) for old, new in both],
        )

    def contains(self, module_name: str, parameters: Iterable[str]) -> bool:
        """Whether a module or what is in it owns one of the parameters."""
        return any(id(self.replica.params[p]) in self._inside[module_name] for p in parameters)

    def described(self, module_name: str) -> str:
        """``name`` (Class)."""
        module = self.replica.model.get_submodule(module_name)
        return f"`{module_name or 'the model'}` ({type(module).__name__})"

    def sentence(self, parameter: str, absorber: str) -> str:
        """What it means for a parameter that this module absorbs its scale."""
        model, around = self.replica.model, absorber.rpartition(".")[0]
        if isinstance(model.get_submodule(around), ParametrizationList):
            kind = type(model.get_submodule(absorber)).__name__
            return f"normalized by its parametrization {kind}"
        if not self.contains(absorber, [parameter]):
            return f"feeds {self.described(absorber)}"
        if parameter.rpartition(".")[0] == absorber:
            return f"normalized inside {self.described(absorber)}"
        return f"normalized within the forward of {self.described(absorber)}"

    def _calls(self) -> list[_Call]:
        """Run the replica and list the calls of its modules, in the order of their return."""
        calls: list[_Call] = []
        pending: list[list[Tensor]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            pending.append(_fingerprints((args, kwargs)))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            returned = _fingerprints(output, differentiable=True)
            calls.append(_Call(self.names[module], pending.pop(), returned))

        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            self.replica.run()
        finally:
            for handle in handles:
                handle.remove()
        return calls


def _halves(claims: int) -> list[frozenset[int]]:
    """For each binary digit of their numbers the claims that have it set, and those that do not.

    Few claims are taken one by one.
    """
    digits = max(claims - 1, 0).bit_length()
    if claims <= 2 * digits:
        return [frozenset({i}) for i in range(claims)]
    return [
        frozenset(i for i in range(claims) if (i >> digit) % 2 == value)
        for digit in range(digits)
        for value in (0, 1)
    ]


def _fingerprints(tree: Any, *, differentiable: bool = False) -> list[Tensor]:
    """Norm and sum of every floating tensor, or only of those that depend on a parameter."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        return [
            _fingerprint(t.detach())
            for t in floating_tensors(tree)
            if t.numel() and (t.requires_grad or not differentiable)
        ]


def _fingerprint(t: Tensor) -> Tensor:
    flat = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).flatten().double()
    fingerprint = torch.stack([torch.linalg.vector_norm(flat), flat.sum() / flat.numel() ** 0.5])
    if fingerprint.isfinite().all() or flat.isfinite().all():
        return fingerprint
    return _fingerprint(flat.nan_to_num(0.0, 0.0, 0.0))  # masked entries


def _changed(before: list[Tensor], after: list[Tensor]) -> bool:
    if len(before) != len(after):
        return True
    return any(
        bool(((old - new).abs() > TOLERANCE * torch.maximum(old[0], new[0])).any())
        for old, new in zip(before, after, strict=True)
    )
