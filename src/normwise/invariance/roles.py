"""What each parameter is for: told from what the network does with it, never from its name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normwise.invariance.exact import Call, Exact
from normwise.invariance.replica import TOLERANCE, Replica
from normwise.invariance.symmetry import Slices, Symmetry

__all__ = ["Role", "find_roles"]

RoleKind = Literal["embedding", "readout", "tied", "hidden", "router", "gain", "bias", "other"]

# Where each operation takes its gain and its bias: by position, or by name.
_GAINS = {
    "layer_norm": (2, "weight"),
    "group_norm": (2, "weight"),
    "rms_norm": (2, "weight"),
    "batch_norm": (3, "weight"),
    "instance_norm": (3, "weight"),
}
_BIASES = {
    "layer_norm": (3, "bias"),
    "group_norm": (3, "bias"),
    "batch_norm": (4, "bias"),
    "instance_norm": (4, "bias"),
    "linear": (2, "bias"),
    "addmm": (0, "input"),
    "conv1d": (2, "bias"),
    "conv2d": (2, "bias"),
    "conv3d": (2, "bias"),
    "conv_transpose1d": (2, "bias"),
    "conv_transpose2d": (2, "bias"),
    "conv_transpose3d": (2, "bias"),
}
_SUMS = frozenset({"add", "__add__", "__radd__", "__iadd__", "add_"})
_PRODUCTS = frozenset({"mul", "__mul__", "__rmul__", "__imul__", "mul_"})
_LOOKUPS = frozenset({"embedding", "embedding_bag", "index_select", "__getitem__", "gather"})
_MATRIX_PRODUCTS = frozenset({"linear", "addmm", "matmul", "__matmul__", "mm", "bmm", "einsum"})


@dataclass(frozen=True)
class Role:
    """What a parameter is for, and how that was seen.

    Args:
        kind: ``"embedding"`` (rows are looked up), ``"readout"`` (a last matrix), ``"tied"``
            (both), ``"hidden"`` (any other matrix), ``"router"`` (chooses among a stack of
            matrices), ``"gain"``, ``"bias"``, or ``"other"``.
        evidence: what the network does with it, in words.
        heads: the number of attention heads that its rows or columns make, if that was seen.
        parts: the runs of indices of a fused projection that have symmetries of their own.
    """

    kind: RoleKind
    evidence: str
    heads: int | None = None
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        text: str = self.kind
        if self.heads:
            text += f", {self.heads} heads"
        if self.parts:
            text += f", fused: {'; '.join(self.parts)}"
        return text


def find_roles(
    replica: Replica, symmetries: Sequence[Symmetry], absorbers: Mapping[str, str | None]
) -> dict[str, Role]:
    """The role of each parameter, by name.

    Args:
        replica: at a generic point.
        symmetries: of the network.
        absorbers: the module that takes up the scale of a parameter, by name.
    """
    calls: list[Call] = []
    outputs = replica.run(graph=True, calls=calls)
    readouts = _readouts(replica, calls, symmetries)
    names = list(replica.params)
    grads = replica.gradients(outputs, replica.cotangents(outputs, -2), names)
    gradients = {name: g for name, g in zip(names, grads, strict=True) if g is not None}
    uses: dict[str, list[tuple[str, int | str]]] = defaultdict(list)
    for name, op, at in replica.uses():
        uses[name].append((op, at))
    heads = _heads(replica, symmetries, gradients)
    heads |= _heads_of_gains(replica, heads, absorbers)
    matrices = {name for name, p in replica.params.items() if sum(size > 1 for size in p.shape) > 1}
    told = {
        name: _told(uses[name], matrix=name in matrices, last=name in readouts)
        for name in replica.params
    }
    multiplied = {name for name, (kind, _) in told.items() if kind in ("hidden", "readout")}
    routers = _routers(symmetries, matrices & multiplied)
    roles = {}
    for name, (kind, evidence) in told.items():
        matrix = name in matrices
        if not matrix and kind in ("hidden", "other") and replica.combined(name):
            kind, evidence = "gain", "it goes into a weight together with others"
        if name in routers:
            kind, evidence = "router", routers[name]
        mine = heads.get(name) if matrix else None
        roles[name] = Role(kind, evidence, mine, _parts(name, symmetries))
    return roles


def _told(uses: list[tuple[str, int | str]], *, matrix: bool, last: bool) -> tuple[RoleKind, str]:
    """The role that the operations tell, and the evidence."""
    for op, at in uses:
        if at in _GAINS.get(op, ()):
            return "gain", f"the gain of a {op}"
        if at in _BIASES.get(op, ()):
            return "bias", f"the bias of a {op}"
    ops = [op for op, _ in uses]
    looked_up = any(op in _LOOKUPS for op in ops)
    if looked_up and last:
        return "tied", "its rows are looked up, and no other matrix product follows that with it"
    if looked_up:
        return "embedding", "its rows are looked up"
    if last:
        return "readout", "no other matrix product follows that with it"
    by_entry = all(op in _SUMS | _PRODUCTS for op in ops)
    if any(op in _PRODUCTS for op in ops) and (by_entry or not matrix):
        return "gain", "it multiplies what passes by"
    if any(op in _SUMS for op in ops) and (by_entry or not matrix):
        return "bias", "it is added to what passes by"
    if matrix and ops:
        return "hidden", f"a matrix used in {', '.join(dict.fromkeys(ops))}"
    if any(op in _MATRIX_PRODUCTS for op in ops):
        return "hidden", f"a matrix of one row or column used in {', '.join(dict.fromkeys(ops))}"
    return "other", f"used in {', '.join(dict.fromkeys(ops))}" if ops else "not used"


def _readouts(replica: Replica, calls: Sequence[Call], symmetries: Sequence[Symmetry]) -> set[str]:
    """The matrices whose products reach no other matrix product, and whose scale is not removed."""
    names = {id(p): name for name, p in replica.params.items()}
    products: list[tuple[list[str], Call]] = []
    for call in calls:
        used = [names[key] for key in call.parameters if key in names]
        matrices = [n for n in used if sum(size > 1 for size in replica.params[n].shape) > 1]
        if matrices and call.name not in _LOOKUPS | _SUMS | _PRODUCTS:
            products.append((matrices, call))
    taken = [t for _, call in products for t in call.taken]
    returned = [t for _, call in products for t in call.returned if t.requires_grad]
    reaching: set[int] = set()
    if taken and returned:
        with Exact():
            grads = torch.autograd.grad(
                [t.abs().sum() for t in taken], returned, retain_graph=True, allow_unused=True
            )
        reaching = {id(t) for t, g in zip(returned, grads, strict=True) if g is not None}
    normalized = {n for s in symmetries if s.is_scale for n in s.parameters}
    return {
        name
        for matrices, call in products
        for name in matrices
        if name not in normalized
        and any(t.requires_grad for t in call.returned)
        and not any(id(t) in reaching for t in call.returned)
    }


def _heads(
    replica: Replica, symmetries: Sequence[Symmetry], gradients: Mapping[str, Tensor]
) -> dict[str, int]:
    """The number of heads of the parameters of families whose units mix within heads.

    Units of one head can be mixed by any invertible matrix, not only scaled: if slice u of one
    side takes up ε times slice u', and slice u' of the other gives up ε times slice u, nothing
    changes, to first order. Units of two heads, or with an activation between, cannot.
    """
    found: dict[str, int] = {}
    for symmetry in symmetries:
        if symmetry.is_view:
            (term,) = symmetry.terms
            view = term.view
            if view is not None and view.kind == "blocks" and len(term.shape) == 2:
                found.setdefault(term.parameter, symmetry.units)
            continue
        if symmetry.units < 2 or any(abs(term.exponent) != 1 for term in symmetry.terms):
            continue
        mixed = torch.zeros(symmetry.units, symmetry.units, dtype=torch.float64)
        size = torch.zeros_like(mixed)
        for term in symmetry.terms:
            g = gradients.get(term.parameter)
            if g is None:
                continue
            w = replica.params[term.parameter].detach()
            if w.is_complex():
                continue
            products = (_by_unit(g, term.slices) @ _by_unit(w, term.slices).T).cpu()
            mixed += products if term.exponent > 0 else -products.T
            size += products.abs() if term.exponent > 0 else products.abs().T
        together = (mixed.abs() <= TOLERANCE * size) & (size > 0)
        heads, shared = _blocks(together), 1
        if heads is None and min(term.slices.per_unit for term in symmetry.terms) == 2:
            # A rotary embedding turns pairs: two indices a unit, and no two units mix.
            digits = {t.slices.units[0][0] for t in symmetry.terms if len(t.slices.units) == 2}
            if len(digits) == 1 and _turns(replica, symmetry, gradients):
                heads, shared = digits.pop(), 2
        if heads is not None:
            for term in symmetry.terms:
                # Indices of one unit beside these belong to heads that share it: grouped queries.
                found.setdefault(term.parameter, heads * term.slices.per_unit // shared)
    return found


def _turns(replica: Replica, symmetry: Symmetry, gradients: Mapping[str, Tensor]) -> bool:
    """Whether the two indices of a pair can be turned in a plane, on all sides by one angle.

    To first order turning takes up w₁ in slice 0 and gives up w₀ in slice 1. Biases turn with
    their matrices. Of vectors alone, which are gains behind a norm, only the scale of a pair is
    free, and nothing is asked.
    """
    terms = symmetry.terms if any(len(term.shape) > 1 for term in symmetry.terms) else ()
    total, size = torch.zeros(symmetry.units), torch.zeros(symmetry.units)
    for term in terms:
        g, w = gradients.get(term.parameter), replica.params[term.parameter].detach()
        if g is None or w.is_complex() or term.slices.per_unit % 2:
            return False
        pairs = (symmetry.units, term.slices.per_unit // 2, 2, -1)
        by_pair = [_by_unit(t, term.slices).view(pairs).cpu() for t in (g, w)]
        terms_of_sum = torch.stack(
            [by_pair[0][:, :, 0] * by_pair[1][:, :, 1], -by_pair[0][:, :, 1] * by_pair[1][:, :, 0]]
        )
        total = total + terms_of_sum.sum((0, 2, 3))
        size = size + terms_of_sum.abs().sum((0, 2, 3))
    return bool((total.abs() <= TOLERANCE * size).all())


def _heads_of_gains(
    replica: Replica, heads: Mapping[str, int], absorbers: Mapping[str, str | None]
) -> dict[str, int]:
    """The heads of matrices before a norm over all heads: those of the norm's gain."""
    found = {}
    for name, absorber in absorbers.items():
        p = replica.params[name]
        if absorber is None or name in heads or p.ndim != 2:
            continue
        for other, count in heads.items():
            gain = replica.params[other]
            if gain.ndim == 1 and gain.numel() == len(p) and other.startswith(f"{absorber}."):
                found[name] = count
    return found


def _by_unit(t: Tensor, slices: Slices) -> Tensor:
    """The entries of each unit in a row."""
    t = t.reshape(1) if t.ndim == 0 else t
    flat = t.movedim(slices.dims, tuple(range(len(slices.dims)))).flatten(0, len(slices.dims) - 1)
    return flat[slices.indices().to(t.device)].flatten(1)


def _blocks(together: Tensor) -> int | None:
    """The number of equal diagonal blocks, if two or more of more than one unit each."""
    units = len(together)
    first = together[0].nonzero().flatten()
    length = len(first)
    if length < 2 or length == units or units % length:
        return None
    block = torch.arange(units) // length
    return units // length if torch.equal(together, block.unsqueeze(1) == block) else None


def _routers(symmetries: Sequence[Symmetry], matrices: Collection[str]) -> dict[str, str]:
    """Matrices that read what a stack of as many matrices reads as they have rows.

    Gains and biases of three dimensions (one number for each channel of an image) are no stacks.
    """
    found = {}
    for symmetry in symmetries:
        terms = [term for term in symmetry.terms if term.parameter in matrices]
        stacks = {term.shape[0] for term in terms if len(term.shape) == 3}
        for term in terms:
            if len(term.shape) == 2 and term.shape[0] in stacks:
                found[term.parameter] = (
                    f"reads what a stack of {term.shape[0]} matrices reads, and has as many rows"
                )
    return found


def _parts(name: str, symmetries: Sequence[Symmetry]) -> tuple[str, ...]:
    """The parts of a matrix along one dimension that are in families of their own."""
    parts = []
    for symmetry in symmetries:
        for term in symmetry.terms:
            total = 1
            for d in term.slices.dims:
                total *= term.shape[d] if term.shape else 1
            covered = term.slices.count * term.slices.per_unit
            if term.parameter == name and len(term.shape) > 1 and covered < total:
                plain = Slices(term.slices.dims, term.slices.start, term.slices.units)
                words = (plain if not term.slices.within else term.slices).words(term.shape)
                if words not in parts:
                    parts.append(words)
    return tuple(parts)
