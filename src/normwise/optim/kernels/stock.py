"""Steps on the CPU where no compiler is installed: torch's own fused kernels, a piece at a time.

torch's fused kernel, given zeros in place of a weight and no decay, leaves s = −σu there and takes
the moments on, in one pass. While a piece of a weight is in cache two reductions and

    w ← α·w + s,    α = decay − ⟨w, s⟩/‖w‖² for each slice,

end the step: what is projected and what decays are both multiples of w. Weights without a view, and
in ``"auto"`` those whose gate is shut, take torch's fused step and nothing else. The gate needs all
of a weight, so its sums are made before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.optim.kernels._layout import Mode, memory_layout, mode, slicing
from normwise.optim.step import AT_ONCE, AdamRule, Ending, SGDRule, Step
from normwise.optim.sums import GG, WG, WW, cosine, retraction_from_sums

# Entries of a piece: few enough that what is read twice is still in cache, many enough that the
# some thirty calls a piece do not count.
PIECE = 1 << 18
# Pieces of so many entries together are taken as one array in float64: it is the calls that count.
FLAT = 1 << 14
# Squares in float32 add up well between these; beyond, sums are made in float64.
_LEAST, _MOST = 1e-20, 1e30
_TINY = torch.finfo(torch.float64).tiny
# Decisions of the gate.
_SHUT, _BY_CHANNEL, _BY_LAYER = range(3)


@dataclass(frozen=True)
class _Weight:
    """Which weight, and that it is an array (outer, slices, inner) in memory order."""

    index: int
    outer: int
    slices: int
    inner: int

    @property
    def length(self) -> int:
        """Entries of a slice."""
        return self.outer * self.inner

    def pieces(self, entries: int) -> list[_Piece]:
        """Runs of memory of whole slices, of about so many entries."""
        step = self.slices if self.outer > 1 else max(1, entries // self.length)
        return [_Piece(self, a, min(step, self.slices - a)) for a in range(0, self.slices, step)]


class _Piece:
    """Some slices of a weight, one run of memory."""

    def __init__(self, weight: _Weight, first: int, count: int) -> None:
        self.weight, self.first, self.count = weight, first, count
        self.entries = count * weight.length
        self._start = first * weight.length
        # A run in memory order: slices that are not scattered are its rows.
        self.is_rows = weight.outer == 1
        self.shape = (count, weight.inner) if self.is_rows else (weight.outer, count, weight.inner)
        self._strides = (
            (weight.inner, 1) if self.is_rows else (count * weight.inner, weight.inner, 1)
        )

    def of(self, t: Tensor) -> Tensor:
        """This run of memory of a tensor that lies as the weight does, an alias."""
        return t.as_strided(self.shape, self._strides, t.storage_offset() + self._start)

    def slices(self, run: Tensor) -> Tensor:
        """A run as an alias (slices, entries), or (slices, outer, inner) if they are scattered."""
        return run if self.is_rows else run.transpose(0, 1)


class _Batch:
    """Pieces that are taken together.

    Attributes:
        pieces: these.
        indices, counts, sizes: of each the number of its weight, its slices, its entries.
    """

    def __init__(self, pieces: list[_Piece]) -> None:
        self.pieces = pieces
        self.indices = [p.weight.index for p in pieces]
        self.counts = [p.count for p in pieces]
        self.sizes = [p.entries for p in pieces]
        self.entries = sum(self.sizes)
        # Of short slices the lengths, if their pieces are to be taken as one array.
        self.lengths: Tensor | None = None
        if self.entries <= FLAT and all(p.is_rows for p in pieces):
            lengths = torch.tensor([p.weight.inner for p in pieces])
            self.lengths = lengths.repeat_interleave(torch.tensor(self.counts))

    def slices(self, runs: Sequence[Tensor]) -> list[Tensor]:
        """Of each piece its slices, from its run of memory."""
        return [p.slices(run) for p, run in zip(self.pieces, runs, strict=True)]

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The runs of memory of all pieces."""
        return [p.of(tensors[p.weight.index]) for p in self.pieces]


def _batches(weights: Iterable[_Weight]) -> list[_Batch]:
    """Pieces of all weights, in batches of about ``PIECE`` entries."""
    batches: list[list[_Piece]] = []
    room = 0
    for weight in weights:
        for piece in weight.pieces(PIECE):
            if piece.entries > room:
                batches.append([])
                room = PIECE
            batches[-1].append(piece)
            room -= piece.entries
    return [_Batch(pieces) for pieces in batches]


class _Gate:
    """The gated weights of a group: the sums of their channels, and what is decided by them."""

    def __init__(self, weights: list[_Weight]) -> None:
        self.weights = weights
        self.batches = _batches(weights)
        counts = torch.tensor([w.slices for w in weights])
        lengths = torch.tensor([float(w.length) for w in weights], dtype=torch.float64)
        self.counts = counts.tolist()
        self.owner = torch.repeat_interleave(torch.arange(len(weights)), counts)
        self.by_channel = lengths.rsqrt()[self.owner]
        self.by_layer = (lengths * counts).rsqrt()
        self.ends: dict[tuple[int, ...], list[tuple[int, list[_Batch]]]] = {}

    def decide(self, sums: Tensor, dtype: torch.dtype, delta: float, eps: float) -> list[int]:
        """What projection.gated_radial decides for each weight, from sums of its channels."""
        shut = ~(cosine(sums, dtype, eps) < delta * self.by_channel)
        count = len(self.weights)
        shut_in = sums.new_zeros(count).index_add_(0, self.owner, shut.to(sums.dtype))
        totals = sums.new_zeros(count, sums.shape[1]).index_add_(0, self.owner, sums)
        opens = torch.where(cosine(totals, dtype, eps) < delta * self.by_layer, _BY_LAYER, _SHUT)
        opens = torch.where(shut_in == 0, _BY_CHANNEL, opens)
        decisions: list[int] = torch.where(totals[:, GG] > 0, opens, _SHUT).tolist()
        return decisions


class StockPlan:
    """The pieces of one list of tensors, and room for one of them.

    Args:
        params: dense CPU tensors of float32 or float64, all of one dtype, none empty.
        steps: the options of some groups; of them only the views and norms matter here.
        groups: for each tensor, which of these are its.
        split: not to be had here (default: False).
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        steps: Sequence[Step],
        groups: Sequence[int],
        *,
        split: bool = False,
    ) -> None:
        assert not split
        self.dtype = params[0].dtype
        members: list[dict[Mode, list[_Weight]]] = [{} for _ in steps]
        for i, (p, group) in enumerate(zip(params, groups, strict=True)):
            layout = memory_layout(p, slicing(p, steps[group].view))
            assert layout is not None
            kind = mode(p, steps[group].view, steps[group].norm)
            members[group].setdefault(kind, []).append(_Weight(i, *layout))
        self.free = [[w.index for w in of_group.get("free", [])] for of_group in members]
        self.explicit = [
            _batches([*of_group.get("explicit", []), *of_group.get("fixed", [])])
            for of_group in members
        ]
        self.gates = [
            _Gate(of_group["auto"]) if "auto" in of_group else None for of_group in members
        ]
        batches = [b for of_group in self.explicit for b in of_group]
        batches += [b for gate in self.gates if gate for b in gate.batches]
        largest = max((b.entries for b in batches), default=0)
        self.room, self.product = params[0].new_empty(2, min(largest, PIECE)).unbind()

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor] | None,
        exp_avg_sqs: Sequence[Tensor] | None,
        state_steps: Sequence[Tensor] | None,
        steps: Sequence[Step],
        ending: Ending = AT_ONCE,
    ) -> None:
        """Update moments, step counts and weights, in place; arguments as of ``cpu.CPUPlan``."""
        assert ending is AT_ONCE
        if state_steps is not None:
            torch._foreach_add_(list(state_steps), 1)
        moments = [t for t in (exp_avgs, exp_avg_sqs) if t is not None]
        for step, free, explicit, gate in zip(
            steps, self.free, self.explicit, self.gates, strict=True
        ):
            move = _Move(step, state_steps)
            kept = not (isinstance(step.rule, SGDRule) and step.rule.momentum == 0)
            tensors = (params, grads, *(moments if kept else ()))
            free = list(free)
            for b in explicit:
                self._end(b, tensors, move)
            if gate is not None:
                free += self._end_gated(gate, tensors, move)
            if free:
                move.whole_(free, *tensors)
        torch.autograd.graph.increment_version(params)

    def _end_gated(
        self, gate: _Gate, tensors: Sequence[Sequence[Tensor]], move: _Move
    ) -> list[int]:
        """End the step of gated weights; return those whose gate is shut, which are left."""
        step = move.step
        sums = torch.cat([self._gate_sums(b, *tensors[:2]) for b in gate.batches])
        decisions = gate.decide(sums, self.dtype, step.delta, step.eps)
        if (key := tuple(decisions)) not in gate.ends:
            gate.ends = {key: _ends(gate.weights, decisions)}
        squares = dict(zip(gate.weights, torch.split(sums[:, WW], gate.counts), strict=True))
        for decision, batches in gate.ends[key]:
            for b in batches:
                of_slices = [squares[p.weight][p.first : p.first + p.count] for p in b.pieces]
                self._end(b, tensors, move, of_slices, by_layer=decision == _BY_LAYER)
        return [w.index for w, d in zip(gate.weights, decisions, strict=True) if d == _SHUT]

    def _gate_sums(self, b: _Batch, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        """⟨w, g⟩, ‖g‖², ‖w‖² of the channels of a batch; shape ``(channels, 4)``, in float64."""
        if b.lengths is not None:
            w, g = _flat(b.of(params)), _flat(b.of(grads))
            wg, gg, ww = (_by_slice(x, b.lengths) for x in (w * g, g * g, w * w))
            return torch.stack([ww, ww, wg, gg], 1)
        ws, gs = b.slices(b.of(params)), b.slices(b.of(grads))
        products = [self._products(w, g) for w, g in zip(ws, gs, strict=True)]
        norms = [*map(_norms, ws), *map(_norms, gs)]
        of_kind = torch.cat([*norms, *products]).double().view(3, -1)
        of_kind[:2].square_()
        sums = torch.zeros(of_kind.shape[1], 4, dtype=torch.float64)
        sums[:, WW], sums[:, GG], sums[:, WG] = of_kind.unbind()
        if not (self._are_exact(of_kind[0], ws) and self._are_exact(of_kind[1], gs)):
            for i, (x, y) in ((WW, (ws, ws)), (GG, (gs, gs)), (WG, (ws, gs))):
                sums[:, i] = torch.cat(_wide_products(x, y))
        return sums

    def _end(
        self,
        b: _Batch,
        tensors: Sequence[Sequence[Tensor]],
        move: _Move,
        squares: list[Tensor] | None = None,
        *,
        by_layer: bool = False,
    ) -> None:
        """Take a batch's moments on, and project, decay, descend and retract its slices.

        Args:
            b: pieces of weights of one group.
            tensors: weights, gradients, moments.
            move: the step of the group.
            squares: ‖w‖² of the slices, if they are known, as in ``"auto"`` (default: unknown).
            by_layer: whether the slices are projected as one (default: each by itself).
        """
        step = move.step
        room = self.room if b.entries <= len(self.room) else self.room.new_empty(b.entries)
        runs = torch.split(room[: b.entries].zero_(), b.sizes)
        moved = [run.view(p.shape) for run, p in zip(runs, b.pieces, strict=True)]
        move.zeros_(moved, *(b.of(t) for t in tensors[1:]), indices=b.indices)
        ws, ss = b.slices(b.of(tensors[0])), b.slices(moved)
        if b.lengths is not None:
            self._end_flat(b, ws, room[: b.entries], step, squares, by_layer=by_layer)
            return

        fixed = step.norm == "fixed"
        norms = [*map(_norms, ws if squares is None else ()), *map(_norms, ss if fixed else ())]
        products = [self._products(w, s) for w, s in zip(ws, ss, strict=True)]
        ws_sum, *rest = torch.split(torch.cat([*products, *norms]).double(), sum(b.counts))
        ww, *rest = [torch.cat(squares)] if squares is not None else [x.square() for x in rest]
        keep = self._keep(ws_sum, ww, step, gated=squares is not None, by_layer=by_layer)
        exact = self._are_exact(ww, ws) and (not fixed or self._are_exact(rest[0], ss))
        if not (exact and math.isfinite(keep.sum().item())):
            self._end_wide(ws, ss, step, gated=squares is not None, by_layer=by_layer)
            return
        if fixed:
            back = _back(ws_sum, ww, rest[0])
            keep = keep * back
            _scale_(ss, back, b.counts)
        keeps = torch.split(keep.to(self.dtype), b.counts)
        for w, s, factor in zip(ws, ss, keeps, strict=True):
            torch.addcmul(s, w, _beside(factor, w), out=w)

    def _keep(self, ws: Tensor, ww: Tensor, step: Step, *, gated: bool, by_layer: bool) -> Tensor:
        """α of slices, from ⟨w, s⟩ and ‖w‖²."""
        decay = 1 - float(step.lr) * step.decay_scale * float(step.weight_decay) * step.wd_ratio
        if by_layer:
            ws, ww = ws.sum(0, keepdim=True).expand_as(ws), ww.sum(0, keepdim=True).expand_as(ww)
        if gated:
            ww = (ww.sqrt() + step.eps).square()
        return decay - ws / ww.clamp_min(_TINY)  # zero of zero

    def _end_flat(
        self,
        b: _Batch,
        ws: list[Tensor],
        run: Tensor,
        step: Step,
        squares: list[Tensor] | None,
        *,
        by_layer: bool,
    ) -> None:
        """The same for short pieces, of which ``run`` has s, all as one array in float64."""
        assert b.lengths is not None
        w, s = _flat(ws), run.double()
        sums = _by_slice(w * s, b.lengths)
        ww = torch.cat(squares) if squares is not None else _by_slice(w * w, b.lengths)
        keep = self._keep(sums, ww, step, gated=squares is not None, by_layer=by_layer)
        if step.norm == "fixed":
            back = _back(sums, ww, _by_slice(s * s, b.lengths))
            keep = keep * back
            s = s * back.repeat_interleave(b.lengths)
        moved = torch.addcmul(s, w, keep.repeat_interleave(b.lengths)).to(self.dtype)
        pieces = [x.view(w.shape) for x, w in zip(torch.split(moved, b.sizes), ws, strict=True)]
        torch._foreach_copy_(ws, pieces)

    def _end_wide(
        self, ws: list[Tensor], ss: list[Tensor], step: Step, *, gated: bool, by_layer: bool
    ) -> None:
        """The same in float64: for slices whose sums are beyond float32."""
        counts = [len(w) for w in ws]
        ww, sums = (torch.cat(_wide_products(ws, x)) for x in (ws, ss))
        keep = self._keep(sums, ww, step, gated=gated, by_layer=by_layer)
        if step.norm == "fixed":
            back = _back(sums, ww, torch.cat(_wide_products(ss, ss)))
            keep = keep * back
            ss = [s * _beside(x, s) for s, x in zip(ss, torch.split(back, counts), strict=True)]
        for w, s, factor in zip(ws, ss, torch.split(keep, counts), strict=True):
            w.copy_(s.double() + w.double() * _beside(factor, w))

    def _products(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner product of each slice."""
        if x.numel() > len(self.product):
            if x.ndim == 2 and len(x) == 1:
                columns = zip(torch.split(x, PIECE, 1), torch.split(y, PIECE, 1), strict=True)
                return torch.stack([self._products(a, b) for a, b in columns]).sum(0)
            if x.ndim == 2:
                rows = max(1, PIECE // x.shape[1])
                return torch.cat(
                    [
                        self._products(a, b)
                        for a, b in zip(torch.split(x, rows), torch.split(y, rows), strict=True)
                    ]
                )
            return (x * y).flatten(1).sum(1)
        product = self.product[: x.numel()].view(x.shape)
        torch.mul(x, y, out=product)
        return product.sum(1) if x.ndim == 2 else product.flatten(1).sum(1)

    def _are_exact(self, squares: Tensor, xs: list[Tensor]) -> bool:
        """Whether sums of squares of slices in float32 are as good as in float64."""
        if self.dtype == torch.float64:
            return True
        least, most = (x.item() for x in squares.aminmax())
        if not most < _MOST:
            return False
        if least > _LEAST:
            return True
        # What is zero itself, as the gradient of an unused row, is not what has underflowed.
        largest = torch.cat([x.flatten(1).abs().amax(1) for x in xs])
        return not bool(largest[squares <= _LEAST].any())


def _ends(weights: list[_Weight], decisions: list[int]) -> list[tuple[int, list[_Batch]]]:
    """What is taken together of the weights whose gate is open."""
    chosen = list(zip(weights, decisions, strict=True))
    ends = [(_BY_CHANNEL, _batches([w for w, d in chosen if d == _BY_CHANNEL]))]
    ends += [(_BY_LAYER, [_Batch([_Piece(w, 0, w.slices)])]) for w, d in chosen if d == _BY_LAYER]
    return ends


@dataclass(frozen=True)
class _Move:
    """torch's fused kernels, with the options of a group."""

    step: Step
    counts: Sequence[Tensor] | None

    def whole_(self, indices: list[int], *tensors: Sequence[Tensor]) -> None:
        """The whole step of weights that are not projected."""
        decay = float(self.step.weight_decay) * self.step.decay_scale
        chosen = [[of_kind[i] for i in indices] for of_kind in tensors]
        if self.counts is None and decay != 0:
            torch._foreach_mul_(chosen[0], 1 - float(self.step.lr) * decay)
        self._take(*chosen, indices=indices, weight_decay=decay)

    def zeros_(self, zeros: list[Tensor], *tensors: list[Tensor], indices: list[int]) -> None:
        """Moments taken on, and zeros made −σu."""
        self._take(zeros, *tensors, indices=indices, weight_decay=0.0)

    def _take(
        self,
        targets: list[Tensor],
        grads: list[Tensor],
        *moments: list[Tensor],
        indices: list[int],
        weight_decay: float,
    ) -> None:
        rule, lr = self.step.rule, float(self.step.lr)  # no wait: on the CPU
        if isinstance(rule, AdamRule):
            assert self.counts is not None
            torch._fused_adamw_(
                targets,
                grads,
                moments[0],
                moments[1],
                [],
                [self.counts[i] for i in indices],
                amsgrad=False,
                lr=lr,
                beta1=rule.beta1,
                beta2=rule.beta2,
                weight_decay=weight_decay,
                eps=self.step.eps,
                maximize=self.step.maximize,
            )
            return
        buffers = moments[0] if moments else []
        torch._fused_sgd_(
            targets,
            grads,
            buffers,
            weight_decay=0.0,
            momentum=rule.momentum,
            lr=lr if buffers else lr * (1 - rule.dampening),
            dampening=rule.dampening,
            nesterov=rule.nesterov,
            maximize=self.step.maximize,
            is_first_step=False,
        )


def _beside(factor: Tensor, slices: Tensor) -> Tensor:
    """A factor for each slice, in a shape that multiplies them."""
    return factor.view(-1, *(1 for _ in slices.shape[1:]))


def _scale_(slices: list[Tensor], factors: Tensor, counts: list[int]) -> None:
    for x, factor in zip(slices, torch.split(factors, counts), strict=True):
        x.mul_(_beside(factor.to(x.dtype), x))


def _flat(runs: list[Tensor]) -> Tensor:
    return torch.cat([run.view(-1) for run in runs]).double()


def _by_slice(x: Tensor, lengths: Tensor) -> Tensor:
    sums: Tensor = torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True)
    return sums


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x if x.ndim == 2 else x.flatten(1), dim=1)
    return norms


def _wide_products(xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
    return [(x.double() * y.double()).flatten(1).sum(1) for x, y in zip(xs, ys, strict=True)]


def _back(ws: Tensor, ww: Tensor, uu: Tensor) -> Tensor:
    """What puts slices back on their norm when s has been added."""
    zeros = torch.zeros_like(ws)
    sums = torch.stack([ws, ww, zeros, uu], 1)
    back: Tensor = retraction_from_sums(sums, 1.0)
    return back
