"""What the norms of a checkpoint's weights say, one tensor in memory at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from normwise.checkpoint.stored import StoredTensor
from normwise.geometry import View, norms
from normwise.theory import adamw_equilibrium, norm_range

__all__ = ["Consensus", "State", "TensorNorms", "consensus", "initial_scales", "judged", "measure"]

# Standard deviations of sampling: what is further away has not been drawn from the law in question.
_SIGMAS = 5.0
# A law that leaves no more room than this does not fit a trained matrix by chance.
_SHARP = 0.01
# Weights at one equilibrium agree within this factor, in RMS of their entries.
_AGREE = 1.15
# The share of matrices, and of their entries, that must agree.
_MOST = 2 / 3
# Fewer entries say too little about the law that they were drawn from.
_ENOUGH = 64


class State(Enum):
    """What the norms of one weight look like.

    Attributes:
        DRAWN: as at random initialization; not trained, or hardly.
        CONSTRAINED: rows, columns or the whole have one norm, as nothing but a constraint leaves.
        SETTLED: at one RMS with matrices of other shapes, as decay and growth in balance leave.
        MOVING: neither: on its way to a balance, or a weight whose scale the loss decides.
        CONSTANT: all entries are equal, such as gains of 1 and biases of 0 that never moved.
        VECTOR: a bias or a gain, which has no equilibrium of its own.
        BROKEN: not all entries are finite.
    """

    DRAWN = "as drawn"
    CONSTRAINED = "constrained"
    SETTLED = "settled"
    MOVING = "not settled"
    CONSTANT = "constant"
    VECTOR = "vector"
    BROKEN = "not finite"


@dataclass(frozen=True)
class TensorNorms:
    """The norms of one tensor.

    Attributes:
        name: its key.
        shape: its shape.
        dtype: as it is stored.
        rms: the root mean square of its entries.
        largest: the largest magnitude.
        kurtosis: E w⁴/(E w²)²: 1.8 for entries drawn evenly, 3 for normal ones.
        rows: the norms of the slices along dimension 0, shape ``(shape[0],)``, float64.
        columns: those along dimension 1, of two or more dimensions; else empty.
        not_finite: how many entries are NaN or infinite; they count as 0 elsewhere.
        is_constant: whether all entries are equal.
        initial: its RMS at initialization, NaN where that is not known.
        state: what the norms look like.
        reason: in words.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rms: float
    largest: float
    kurtosis: float
    rows: Tensor
    columns: Tensor
    not_finite: int
    is_constant: bool
    initial: float = math.nan
    state: State = State.MOVING
    reason: str = ""

    @property
    def entries(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def fan_in(self) -> int:
        """The entries of a row."""
        return math.prod(self.shape[1:])

    @property
    def is_matrix(self) -> bool:
        """Whether it has two dimensions or more, and enough entries to say something."""
        return len(self.shape) > 1 and self.entries >= _ENOUGH

    @property
    def dead_rows(self) -> tuple[int, ...]:
        """Rows that are exactly zero, or a thousand times shorter than the median one."""
        if len(self.shape) < 2 or len(self.rows) < 2:
            return ()
        threshold = float(self.rows.median()) * 1e-3
        return tuple((self.rows <= threshold).nonzero().flatten().tolist())

    @property
    def rows_near_range(self) -> tuple[int, ...]:
        """Rows, not zero, whose norm is within 10 of the ends of what its dtype computes with."""
        smallest, largest = norm_range(self.dtype) if self.dtype.itemsize > 1 else (0.0, math.inf)
        near = (self.rows > 0) & ((self.rows < 10 * smallest) | (self.rows > largest / 10))
        return tuple(near.nonzero().flatten().tolist()) if len(self.shape) > 1 else ()


def measure(stored: StoredTensor, initial: float = math.nan) -> TensorNorms:
    """Read a tensor once, block by block.

    Args:
        stored: the tensor.
        initial: its RMS at initialization (default: not known).
    """
    rows, columns, fourth, largest, bad = [], None, 0.0, 0.0, 0
    least, most = math.inf, -math.inf
    for block in stored.blocks():
        finite = block.isfinite()
        bad += int((~finite).sum())
        block = torch.where(finite, block, 0.0)
        if not block.numel():
            continue
        rows.append(norms(block, View.channel(0)) if block.ndim > 1 else block.abs())
        if block.ndim > 1:
            part = norms(block, View.channel(1))
            columns = part if columns is None else torch.hypot(columns, part)
        # In units of the largest, whose fourth power would overflow first.
        top = float(block.abs().max())
        unit = max(top, largest) or 1.0
        fourth = fourth * (largest / unit) ** 4 + float((block / unit).pow(4).sum())
        largest = max(top, largest)
        least, most = min(least, float(block.min())), max(most, float(block.max()))
    count = max(1, math.prod(stored.shape))
    lengths = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64)
    rms = float(torch.linalg.vector_norm(lengths)) / math.sqrt(count)
    kurtosis = fourth / count * (largest / rms) ** 4 if rms else math.nan
    return TensorNorms(
        stored.name,
        stored.shape,
        stored.dtype,
        rms,
        largest,
        kurtosis,
        lengths,
        torch.zeros(0, dtype=torch.float64) if columns is None else columns,
        bad,
        bad == 0 and least == most,
        initial,
    )


@dataclass(frozen=True)
class Consensus:
    """The RMS at which matrices of different shapes have come to rest together.

    Attributes:
        rms: of entries, the median of the matrices that agree.
        low: the least of them.
        high: the largest of them.
        names: of the matrices that agree.
        share: of the entries of all matrices that are neither as drawn nor constrained.
    """

    rms: float
    low: float
    high: float
    names: tuple[str, ...]
    share: float

    @property
    def lr_over_decay(self) -> float:
        """η/λ of AdamW at which this is the equilibrium (arXiv 2305.17212): ‖w‖² = ηC/(2λ)."""
        # At η = λ the norm for one entry; its square is in proportion to η/λ.
        return (self.rms / adamw_equilibrium(1e-3, 1e-3, 1).norm) ** 2


def judged(
    tensors: Iterable[TensorNorms], invariant: Collection[str] = ()
) -> tuple[list[TensorNorms], Consensus | None]:
    """Say of each tensor what its norms look like, and where the settled ones have settled.

    Args:
        tensors: as :func:`measure` gives them.
        invariant: the names of those that are scale-invariant, of which alone the equilibrium is
            sure; empty if that is not known, and then all are asked.

    Returns:
        The tensors with ``state`` and ``reason``, and the consensus; None where matrices of too
        few shapes agree to tell a balance from chance.
    """
    alone = [_judged_alone(t) for t in tensors]
    alone = _marked(alone, State.CONSTRAINED, _alike([t for t in alone if t.state is State.MOVING]))
    alone = _marked(alone, State.DRAWN, _drawn([t for t in alone if t.state is State.MOVING]))
    asked = [t for t in alone if t.state is State.MOVING and (not invariant or t.name in invariant)]
    found = consensus(asked, sure=bool(invariant))
    if found is None:
        return alone, None
    names = set(found.names)
    return [
        replace(t, state=State.SETTLED, reason=f"RMS {t.rms / found.rms:.2f} of the common one")
        if t.name in names
        else replace(t, reason=f"RMS {t.rms / found.rms:.2f} of the common one")
        if t.state is State.MOVING
        else t
        for t in alone
    ], found


def _marked(
    tensors: Sequence[TensorNorms], state: State, reasons: Mapping[str, str]
) -> list[TensorNorms]:
    return [
        replace(t, state=state, reason=reasons[t.name]) if t.name in reasons else t for t in tensors
    ]


def consensus(matrices: Sequence[TensorNorms], sure: bool = False) -> Consensus | None:
    """The largest set of matrices whose RMS agree within 15%, if it is large enough.

    An equilibrium of normalized updates has one RMS whatever the shape, while what was drawn goes
    with the shape: so the set must hold two thirds of the matrices and of their entries, three
    or more, with rows of lengths that differ by 2 or more.

    Args:
        matrices: that have moved.
        sure: whether they are known to be scale-invariant; then their shapes may be alike.
    """
    total = sum(t.entries for t in matrices)
    best: list[TensorNorms] = []
    ordered = sorted(matrices, key=lambda t: t.rms)
    for i, first in enumerate(ordered):
        group = [t for t in ordered[i:] if t.rms <= first.rms * _AGREE**2]
        if sum(t.entries for t in group) > sum(t.entries for t in best):
            best = group
    entries = sum(t.entries for t in best)
    if len(best) < max(3, _MOST * len(matrices)) or entries < _MOST * total:
        return None
    if not sure and max(t.fan_in for t in best) < 2 * min(t.fan_in for t in best):
        return None
    values = [t.rms for t in best]
    return Consensus(
        statistics.median(values),
        min(values),
        max(values),
        tuple(t.name for t in best),
        entries / total,
    )


def _judged_alone(t: TensorNorms) -> TensorNorms:
    """What can be said of a tensor without looking at the others."""
    if t.not_finite:
        return replace(t, state=State.BROKEN, reason=f"{t.not_finite:,} entries are not finite")
    if t.is_constant:
        return replace(t, state=State.CONSTANT, reason="all entries are equal: it never moved")
    if not t.is_matrix:
        return replace(t, state=State.VECTOR)
    constraint = _constraint(t)
    if constraint:
        return replace(t, state=State.CONSTRAINED, reason=constraint)
    return t


def _constraint(t: TensorNorms) -> str:
    for lengths, what, size in (
        (t.rows, "rows", t.fan_in),
        (t.columns, "columns", t.entries // max(1, t.shape[1])),
    ):
        longest = float(lengths.max())
        if len(lengths) < 3 or not longest > 0:
            continue
        # Each entry was rounded; the norm of a slice by as much, less what averages out.
        tolerance = max(1e-5, 6 * torch.finfo(t.dtype).eps / math.sqrt(4 * size))
        at_top = int((lengths >= longest * (1 - tolerance)).sum())
        if at_top == len(lengths):
            return f"all {len(lengths)} {what} have norm {longest:.4g}"
        if at_top >= max(3, len(lengths) // 20):
            return f"{at_top} of {len(lengths)} {what} are at one largest norm, {longest:.4g}"
    return ""


def _alike(tensors: Iterable[TensorNorms]) -> dict[str, str]:
    """Matrices of one shape with one norm, as when whole weights are held on a sphere."""
    shapes: dict[tuple[int, ...], list[TensorNorms]] = {}
    for t in tensors:
        shapes.setdefault(t.shape, []).append(t)
    found = {}
    for group in shapes.values():
        middle = statistics.median(t.rms for t in group)
        tolerance = max(1e-5, 4 * torch.finfo(group[0].dtype).eps / math.sqrt(group[0].entries))
        same = [t for t in group if abs(t.rms / middle - 1) <= tolerance]
        if len(same) >= 3:
            norm = middle * math.sqrt(group[0].entries)
            text = f"{len(same)} matrices of this shape have norm {norm:.4g}"
            found.update({t.name: text for t in same})
    return found


def _drawn(tensors: Sequence[TensorNorms]) -> dict[str, str]:
    """The matrices that look as they were drawn, and from what.

    Where the initialization is not known, the usual laws are tried. One of them fits a small matrix
    by chance: its word counts if it fits half of all entries, or a matrix large enough to tell.
    """
    found = {
        t.name: f"RMS {t.rms:.4g}, that of its initialization"
        for t in tensors
        if abs(t.rms / t.initial - 1) <= _sampling(t)
    }
    unknown = [t for t in tensors if math.isnan(t.initial)]
    total = sum(t.entries for t in unknown)
    fits = [(t, law) for t in unknown for law in _laws(t)]
    for law in {law for _, law in fits}:
        mine = [t for t, other in fits if other == law]
        common = 2 * sum(t.entries for t in mine) >= total
        found |= {
            t.name: f"as drawn by {law}, RMS {t.rms:.4g}"
            for t in mine
            if common or _sampling(t) <= _SHARP
        }
    return found


def _sampling(t: TensorNorms) -> float:
    """How far the RMS of entries that were drawn may be from that of their law, relatively."""
    return _SIGMAS / math.sqrt(2 * t.entries)


def _laws(t: TensorNorms) -> list[str]:
    """The usual laws of initialization that its entries look drawn from."""
    fan_out = t.shape[0] * math.prod(t.shape[2:])
    he, glorot = math.sqrt(2 / t.fan_in), math.sqrt(2 / (t.fan_in + fan_out))
    uniform = {"torch's default": 1 / math.sqrt(3 * t.fan_in), "Glorot": glorot, "He": he}
    normal = {
        "N(0, 0.02²)": 0.02,
        "N(0, 0.01²)": 0.01,
        "N(0, 1)": 1.0,
        "N(0, 1/fan_in)": 1 / math.sqrt(t.fan_in),
        "He": he,
        "Glorot": glorot,
    }
    # The kurtosis of a sample of each law, and its variance times the number of entries.
    for laws, kurtosis, variance in ((uniform, 1.8, 2.0), (normal, 3.0, 24.0)):
        if abs(t.kurtosis - kurtosis) <= _SIGMAS * math.sqrt(variance / t.entries):
            return [law for law, rms in laws.items() if abs(t.rms / rms - 1) <= _sampling(t)]
    return []


def initial_scales(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The RMS of each tensor of a network at initialization."""
    return {
        name: float(t.detach().double().square().mean().sqrt())
        for name, t in tensors.items()
        if t.is_floating_point() and t.numel()
    }
