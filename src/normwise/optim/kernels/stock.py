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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C import _nn

from normwise.optim.kernels._layout import Mode, memory_layout, mode, slicing
from normwise.optim.step import AT_ONCE, AdamRule, Ending, SGDRule, Step
from normwise.optim.sums import GG, WG, WW, cosine, retraction_from_sums

# Entries of a piece: few enough that what is read twice is still in cache, many enough that the
# dozen calls a piece do not count.
PIECE = 1 << 18
# Pieces of so many entries together are taken as one array in float64: it is the calls that count.
FLAT = 1 << 14
# Slices of so many entries may be summed one after another in float32, in a dozen lanes.
SHORT = 1 << 13
# Squares in float32 add up well between these; beyond, sums are made in float64.
_LEAST, _MOST = 1e-20, 1e30
_TINY = torch.finfo(torch.float64).tiny
_tangential = torch.ops.aten._weight_norm_interface_backward
# Decisions of the gate.
_SHUT, _BY_CHANNEL, _BY_LAYER = range(3)


class _Weight:
    """Which weight, and that it is an array (outer, slices, inner) in memory order.

    It is taken in pieces: runs of memory of whole slices, of about ``PIECE`` entries.
    """

    def __init__(self, index: int, w: Tensor, outer: int, slices: int, inner: int) -> None:
        self.index, self.slices, self.length = index, slices, outer * inner
        # Its own shape, if that is the order in memory.
        self.size: tuple[int, ...] | None = w.shape if w.is_contiguous() else None
        # A weight in memory order: slices that are not scattered are its rows.
        self.is_rows = outer == 1
        self._shape = (slices, inner) if self.is_rows else (outer, slices, inner)
        self._strides = (inner, 1) if self.is_rows else (slices * inner, inner, 1)
        self._step = max(1, PIECE // self.length) if self.is_rows else slices
        self.whole = _Piece(self, 0, 0, slices)
        starts = range(0, slices, self._step)
        self.pieces = [
            _Piece(self, i, a, min(self._step, slices - a)) for i, a in enumerate(starts)
        ]

    def run(self, t: Tensor) -> Tensor:
        """A tensor that lies as the weight does, in memory order, an alias."""
        return t.as_strided(self._shape, self._strides, t.storage_offset())

    def cut(self, t: Tensor) -> Sequence[Tensor]:
        """The pieces of such a tensor, aliases."""
        run = self.run(t)
        return (run,) if self._step >= self.slices else torch.split(run, self._step)


class _Piece:
    """Some slices of a weight, one run of memory: ``number`` says which of the weight's pieces."""

    def __init__(self, weight: _Weight, number: int, first: int, count: int) -> None:
        self.weight, self.number, self.first, self.count = weight, number, first, count
        self.entries = count * weight.length
        self.shape = weight._shape if count == weight.slices else (count, weight.length)


class _Tensors:
    """The tensors of a step: weights, gradients and moments, cut into pieces once."""

    def __init__(self, lists: Sequence[Sequence[Tensor]]) -> None:
        self.lists = lists
        self._cut: list[dict[int, Sequence[Tensor]]] = [{} for _ in lists]
        self._flat: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def flat(self, kind: int, b: _Batch) -> Tensor:
        """Of one kind the pieces of a batch as one array in float64."""
        if not b.are_whole:
            return _nn.flatten_dense_tensors(self.of(kind, b)).double()
        key = (kind, b.indices)
        if key not in self._flat:
            self._flat[key] = _nn.flatten_dense_tensors(self.of(kind, b)).double()
        return self._flat[key]

    def of(self, kind: int, b: _Batch) -> list[Tensor]:
        """Of one kind the runs of memory of a batch's pieces."""
        tensors, cut = self.lists[kind], self._cut[kind]
        if b.are_whole:
            return [tensors[i] for i in b.indices]
        runs = []
        for piece in b.pieces:
            weight = piece.weight
            if piece is weight.whole:
                runs.append(weight.run(tensors[weight.index]))
                continue
            pieces = cut.get(weight.index)
            if pieces is None:
                pieces = cut[weight.index] = weight.cut(tensors[weight.index])
            runs.append(pieces[piece.number])
        return runs


class _Batch:
    """Pieces that are taken together.

    Attributes:
        pieces: these.
        indices, counts, sizes: of each the number of its weight, its slices, its entries.
        first: where its slices begin among all slices of a list of batches.
    """

    def __init__(self, pieces: list[_Piece], first: int) -> None:
        self.pieces, self.first = pieces, first
        self.indices = tuple(p.weight.index for p in pieces)
        self.counts = [p.count for p in pieces]
        self.sizes = [p.entries for p in pieces]
        self.count, self.entries = sum(self.counts), sum(self.sizes)
        self.are_rows = all(p.weight.is_rows for p in pieces)
        self.are_short = self.are_rows and all(p.weight.length <= SHORT for p in pieces)
        # Of short slices the lengths, if their pieces are to be taken as one array.
        self.lengths: Tensor | None = None
        if self.entries <= FLAT and self.are_rows:
            lengths = torch.tensor([p.weight.length for p in pieces])
            self.lengths = lengths.repeat_interleave(torch.tensor(self.counts))
        # The memory of a plan in the shapes of the pieces.
        self.layout: tuple[list[Tensor], list[Tensor]] | None = None
        # If they are whole weights in the order of memory, these need not be cut.
        self.are_whole = self.lengths is not None and all(
            p.count == p.weight.slices and p.weight.size is not None for p in pieces
        )

    def slices(self, runs: list[Tensor]) -> list[Tensor]:
        """Runs as aliases (slices, entries), or (slices, outer, inner) if they are scattered."""
        if self.are_rows:
            return runs
        return [
            run if p.weight.is_rows else run.transpose(0, 1)
            for p, run in zip(self.pieces, runs, strict=True)
        ]

    def laid_out(self, room: Tensor) -> list[Tensor]:
        """Some memory in the shapes of the runs of all pieces."""
        runs = torch.split(room[: self.entries], self.sizes)
        return [run.view(self._shape(p)) for run, p in zip(runs, self.pieces, strict=True)]

    def _shape(self, p: _Piece) -> tuple[int, ...]:
        return p.weight.size if self.are_whole and p.weight.size is not None else p.shape


def _batches(weights: Iterable[_Weight]) -> list[_Batch]:
    """Pieces of all weights, in batches of about ``PIECE`` entries."""
    batches: list[list[_Piece]] = []
    room = 0
    for weight in weights:
        for piece in weight.pieces:
            if piece.entries > room:
                batches.append([])
                room = PIECE
            batches[-1].append(piece)
            room -= piece.entries
    found, first = [], 0
    for pieces in batches:
        found.append(_Batch(pieces, first))
        first += found[-1].count
    return found


class _Gate:
    """The gated weights of a group: the sums of their channels, and what is decided by them."""

    def __init__(self, weights: list[_Weight], dtype: torch.dtype) -> None:
        self.weights = weights
        self.batches = _batches(weights)
        counts = torch.tensor([w.slices for w in weights])
        lengths = torch.tensor([float(w.length) for w in weights], dtype=torch.float64)
        self.counts = counts
        self._first = (counts.cumsum(0) - counts).tolist()
        of_channels, of_layers = lengths.repeat_interleave(counts), lengths * counts
        self._bounds = torch.cat([of_channels, of_layers]).rsqrt()
        self._gate = 1.0, self._bounds  # for the delta of the last step
        self.are_flat = all(b.lengths is not None for b in self.batches)
        # ‖w‖, ‖g‖, ⟨w, g⟩ of all channels, as they are summed.
        self.found = torch.ones(3, int(counts.sum()), dtype=dtype)
        self.places = [
            [of_sum.split(b.counts) for of_sum in self.found[:, b.first : b.first + b.count]]
            for b in self.batches
        ]
        self._ends: dict[tuple[int, ...], _Ends] = {}

    def decide(self, sums: Tensor, dtype: torch.dtype, delta: float, eps: float) -> list[int]:
        """What projection.gated_radial decides for each weight, from sums of its channels."""
        totals = _by_slice(sums, self.counts)
        if self._gate[0] != delta:
            self._gate = delta, delta * self._bounds
        opens = (cosine(torch.cat([sums, totals]), dtype, eps) < self._gate[1]).tolist()
        by_layer, decisions = opens[len(sums) :], []
        for i, (a, w, gg) in enumerate(
            zip(self._first, self.weights, totals[:, GG].tolist(), strict=True)
        ):
            by_channel = gg > 0 and all(opens[a : a + w.slices])
            decisions.append(
                _BY_CHANNEL if by_channel else _BY_LAYER if gg > 0 and by_layer[i] else _SHUT
            )
        return decisions

    def ends(self, decisions: list[int]) -> _Ends:
        """What is taken together of the weights whose gate is open."""
        key = tuple(decisions)
        if key not in self._ends:
            self._ends = {key: self._made(decisions)}
        return self._ends[key]

    def _made(self, decisions: list[int]) -> _Ends:
        chosen = list(zip(self.weights, decisions, self._first, strict=True))
        by_channel = [(w, first) for w, d, first in chosen if d == _BY_CHANNEL]
        slots = [torch.arange(first, first + w.slices) for w, first in by_channel]
        return _Ends(
            _batches([w for w, _ in by_channel]),
            torch.cat(slots) if slots else None,
            [(i, _Batch([w.whole], 0)) for i, (w, d, _) in enumerate(chosen) if d == _BY_LAYER],
            [w.index for w, d, _ in chosen if d == _SHUT],
        )


@dataclass(frozen=True)
class _Ends:
    """What is taken together of gated weights, as the gate has decided.

    Attributes:
        batches: of those that are projected channel by channel.
        slots: the channels of these, among those of all gated weights; None if there are none.
        layers: of those that are projected as one, which of the gated weights, and its batch.
        shut: which of all weights are not projected.
    """

    batches: list[_Batch]
    slots: Tensor | None
    layers: list[tuple[int, _Batch]]
    shut: list[int]


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
            members[group].setdefault(kind, []).append(_Weight(i, p, *layout))
        self.free = [[w.index for w in of_group.get("free", [])] for of_group in members]
        self.explicit = [
            _batches([*of_group.get("explicit", []), *of_group.get("fixed", [])])
            for of_group in members
        ]
        self.gates = [
            _Gate(of_group["auto"], self.dtype) if "auto" in of_group else None
            for of_group in members
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
            tensors = _Tensors((params, grads, *(moments if kept else ())))
            free = list(free)
            for b in explicit:
                self._end(b, tensors, move)
            if gate is not None:
                free += self._end_gated(gate, tensors, move)
            if free:
                move.whole_(free, *tensors.lists)
        torch.autograd.graph.increment_version(params)

    def _end_gated(self, gate: _Gate, tensors: _Tensors, move: _Move) -> list[int]:
        """End the step of gated weights; return those whose gate is shut, which are left."""
        step = move.step
        sums, exact = self._gate_sums(gate, tensors)
        ends = gate.ends(gate.decide(sums, self.dtype, step.delta, step.eps))
        if ends.slots is not None:
            squares = sums[:, WW] if len(ends.slots) == len(sums) else sums[ends.slots, WW]
            inverse = _inverse(squares, step.eps)
            # Batches that are flat have no use for norms.
            norms = inverse if gate.are_flat else inverse.rsqrt().to(self.dtype)
            counts = [b.count for b in ends.batches]
            of_batches = zip(_parts(inverse, counts), _parts(norms, counts), strict=True)
            for b, (own_inverse, own_norms) in zip(ends.batches, of_batches, strict=True):
                self._end(b, tensors, move, _Known(own_inverse, exact, own_norms))
        if ends.layers:
            totals = _by_slice(sums[:, WW], gate.counts)
            for i, b in ends.layers:
                self._end(b, tensors, move, _Known(_inverse(totals[i], step.eps), exact))
        return ends.shut

    def _gate_sums(self, gate: _Gate, tensors: _Tensors) -> tuple[Tensor, bool]:
        """⟨w, g⟩, ‖g‖², ‖w‖² of the channels of gated weights; shape ``(channels, 4)``, in float64.

        The second says whether sums in float32 were exact for all of them.
        """
        flat: list[tuple[_Batch, Tensor]] = []
        for b, (norms, lengths, products) in zip(gate.batches, gate.places, strict=True):
            if b.lengths is not None:
                w, g = tensors.flat(0, b), tensors.flat(1, b)
                square = w * w
                products_ = torch.stack([square, square, w * g, g * g], 1)
                flat.append((b, _by_slice(products_, b.lengths)))
                continue
            ws, gs = (b.slices(tensors.of(kind, b)) for kind in (0, 1))
            rooms = b.slices(self._layout(b)[1]) if b.entries <= len(self.product) else None
            for i, (w, g) in enumerate(zip(ws, gs, strict=True)):
                # What asks memory first had better not write.
                _norms(w, norms[i])
                _norms(g, lengths[i])
                self._products(w, g, None if rooms is None else rooms[i], products[i])
        if gate.are_flat:
            return _joined([own for _, own in flat]), True
        found = gate.found.double()
        found[:2].square_()
        sums = torch.stack([found[0], found[0], found[2], found[1]], 1)
        for b, own in flat:
            sums[b.first : b.first + b.count] = own
        exact = self._are_exact(found[:2], lambda: self._largest(gate, tensors))
        if not exact:
            for b in gate.batches:
                if b.lengths is None:
                    ws, gs = (b.slices(tensors.of(kind, b)) for kind in (0, 1))
                    for i, (x, y) in ((WW, (ws, ws)), (GG, (gs, gs)), (WG, (ws, gs))):
                        sums[b.first : b.first + b.count, i] = torch.cat(_wide_products(x, y))
        return sums, exact

    def _largest(self, gate: _Gate, tensors: _Tensors) -> Tensor:
        """The largest entries of the channels of gated weights and of their gradients."""
        largest = torch.ones_like(gate.found[:2])
        for b in gate.batches:
            if b.lengths is None:
                for kind in (0, 1):
                    found = [_largest(x) for x in b.slices(tensors.of(kind, b))]
                    largest[kind, b.first : b.first + b.count] = torch.cat(found)
        return largest

    def _layout(self, b: _Batch) -> tuple[list[Tensor], list[Tensor]]:
        """The room and the product in the shapes of a batch's pieces."""
        if b.layout is None:
            b.layout = b.laid_out(self.room), b.laid_out(self.product)
        return b.layout

    def _end(self, b: _Batch, tensors: _Tensors, move: _Move, known: _Known | None = None) -> None:
        """Take a batch's moments on, and project, decay, descend and retract its slices.

        Args:
            b: pieces of weights of one group.
            tensors: of the step.
            move: the step of the group.
            known: what the gate has found of the slices (default: they are not gated).
        """
        step = move.step
        room, products = self.room, None
        if b.entries <= len(room):
            moved, products = self._layout(b)
            run = room[: b.entries].zero_()
        else:
            run = room.new_zeros(b.entries)
            moved = b.laid_out(run)
        others = (tensors.of(kind, b) for kind in range(1, len(tensors.lists)))
        move.zeros_(moved, *others, indices=b.indices)
        decay = 1 - float(step.lr) * step.decay_scale * float(step.weight_decay) * step.wd_ratio
        if b.lengths is not None:
            self._end_flat(b, tensors, run, step, decay, known)
            return
        ws, ss = b.slices(tensors.of(0, b)), b.slices(moved)

        fixed = step.norm == "fixed"
        # What asks memory first had better not write: norms, then products.
        squares = _joined([_norms(w) for w in ws]) if known is None else None
        if (
            b.are_short
            and not fixed
            and self._end_short(ws, moved, b.counts, decay, known, squares)
        ):
            return
        rooms = [None] * len(ws) if products is None else b.slices(products)
        found = [self._products(w, s, x) for w, s, x in zip(ws, ss, rooms, strict=True)]
        sums = _joined(found).double()
        exact = known is not None and known.exact
        inverse = known.inverse if known is not None else None
        if squares is not None:
            ww = squares.double().square_()
            exact = self._are_exact(ww, lambda: torch.cat([_largest(w) for w in ws]))
            inverse = _inverse(ww)
        elif not exact:
            ww = torch.cat(_wide_products(ws, ws))
            exact = self._are_exact(ww, lambda: torch.cat([_largest(w) for w in ws]))
        if fixed:
            uu = _joined([_norms(s) for s in ss]).double().square_()
            exact = exact and self._are_exact(uu, lambda: torch.cat([_largest(s) for s in ss]))
        if known is not None and known.by_layer:
            sums = sums.sum().expand_as(sums)
        assert inverse is not None
        keep = decay - sums * inverse
        if not (exact and math.isfinite(keep.sum().item())):
            self._end_wide(ws, ss, step, decay, known)
            return
        if fixed:
            back = _back(sums, ww, uu)
            keep = keep * back
            _scale_(ss, back, b.counts)
        keeps = _parts(keep.to(self.dtype), b.counts)
        for w, s, factor in zip(ws, ss, keeps, strict=True):
            torch.addcmul(s, w, _beside(factor, w), out=w)

    def _end_short(
        self,
        ws: list[Tensor],
        ss: list[Tensor],
        counts: list[int],
        decay: float,
        known: _Known | None,
        norms: Tensor | None,
    ) -> bool:
        """The same for rows of some thousand entries; returns whether it could be done.

        What weight normalization lets through of a gradient is its tangential part, and torch has a
        kernel for that: s − w⟨w, s⟩/‖w‖², and ⟨w, s⟩/‖w‖.
        """
        if norms is None:
            assert known is not None
            norms = known.norms
            if norms is None or not known.exact:
                return False
        else:
            least, most = torch.aminmax(norms)
            if not (least.item() > _LEAST**0.5 and most.item() < _MOST**0.5):
                return False
        norms = norms.unsqueeze(1)
        of_each = _parts(norms, counts)
        parts = [_tangential(s, w, n, n, 0) for s, w, n in zip(ss, ws, of_each, strict=True)]
        if not math.isfinite(_joined([radial for _, radial in parts]).sum().item()):
            return False
        for (tangential, _), w in zip(parts, ws, strict=True):
            torch.add(tangential, w, alpha=decay, out=w)
        return True

    def _end_flat(
        self,
        b: _Batch,
        tensors: _Tensors,
        run: Tensor,
        step: Step,
        decay: float,
        known: _Known | None,
    ) -> None:
        """The same for short pieces, of which ``run`` has s, all as one array in float64."""
        assert b.lengths is not None
        w, s = tensors.flat(0, b), run.double()
        sums = _by_slice(w * s, b.lengths)
        if known is None:
            ww = _by_slice(w * w, b.lengths)
            inverse = _inverse(ww)
        else:
            inverse = known.inverse
            sums = sums.sum() if known.by_layer else sums
        keep = decay - sums * inverse
        if step.norm == "fixed":
            back = _back(sums, ww, _by_slice(s * s, b.lengths))
            keep = keep * back
            s = s * back.repeat_interleave(b.lengths)
        factors = keep if keep.ndim == 0 else keep.repeat_interleave(b.lengths)
        moved = torch.addcmul(s, w, factors).to(self.dtype)
        ws = tensors.of(0, b)
        torch._foreach_copy_(ws, _nn.unflatten_dense_tensors(moved, ws))

    def _end_wide(
        self, ws: list[Tensor], ss: list[Tensor], step: Step, decay: float, known: _Known | None
    ) -> None:
        """The same in float64: for slices whose sums are beyond float32."""
        counts = [len(w) for w in ws]
        sums = torch.cat(_wide_products(ws, ss))
        if known is None:
            ww = torch.cat(_wide_products(ws, ws))
            keep = decay - sums * _inverse(ww)
        else:
            sums = sums.sum().expand_as(sums) if known.by_layer else sums
            keep = decay - sums * known.inverse
        if step.norm == "fixed":
            back = _back(sums, ww, torch.cat(_wide_products(ss, ss)))
            keep = keep * back
            ss = [s * _beside(x, s) for s, x in zip(ss, torch.split(back, counts), strict=True)]
        for w, s, factor in zip(ws, ss, torch.split(keep, counts), strict=True):
            w.copy_(s.double() + w.double() * _beside(factor, w))

    def _products(
        self, x: Tensor, y: Tensor, room: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """The inner product of each slice; ``room`` is for products of entries."""
        if room is not None:
            product = torch.mul(x, y, out=room)
            return torch.sum(product, 1 if x.ndim == 2 else (1, 2), out=out)
        if x.ndim == 2 and len(x) == 1:
            pairs = zip(torch.split(x, PIECE, 1), torch.split(y, PIECE, 1), strict=True)
            sums = torch.stack([(a * b).sum(1) for a, b in pairs]).sum(0)
        elif x.ndim == 2:
            rows = max(1, PIECE // x.shape[1])
            pairs = zip(torch.split(x, rows), torch.split(y, rows), strict=True)
            sums = torch.cat([(a * b).sum(1) for a, b in pairs])
        else:
            sums = (x * y).flatten(1).sum(1)
        return sums if out is None else out.copy_(sums)

    def _are_exact(self, squares: Tensor, largest: Callable[[], Tensor]) -> bool:
        """Whether sums of squares of slices in float32 are as good as in float64.

        Args:
            squares: these sums.
            largest: gives the largest entry of each slice, in the shape of the sums.
        """
        if self.dtype == torch.float64:
            return True
        least, most = torch.aminmax(squares)
        if not most.item() < _MOST:
            return False
        # What is zero itself, as the gradient of an unused row, is not what has underflowed.
        return least.item() > _LEAST or not bool(largest()[squares <= _LEAST].any())


@dataclass(frozen=True)
class _Known:
    """What the gate has found of some slices.

    Attributes:
        inverse: 1/(‖w‖ + eps)² of each, or of all together if they are projected as one.
        exact: whether sums in float32 are as good as in float64.
        norms: ‖w‖ + eps of each; None if they are projected as one.
    """

    inverse: Tensor
    exact: bool
    norms: Tensor | None = None

    @property
    def by_layer(self) -> bool:
        """Whether they are projected as one."""
        return self.norms is None


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

    def zeros_(self, zeros: list[Tensor], *tensors: list[Tensor], indices: Sequence[int]) -> None:
        """Moments taken on, and zeros made −σu."""
        self._take(zeros, *tensors, indices=indices, weight_decay=0.0)

    def _take(
        self,
        targets: list[Tensor],
        grads: list[Tensor],
        *moments: list[Tensor],
        indices: Sequence[int],
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


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parts(x: Tensor, counts: list[int]) -> Sequence[Tensor]:
    return (x,) if len(counts) == 1 else torch.split(x, counts)


def _inverse(squares: Tensor, eps: float = 0.0) -> Tensor:
    """1/(‖w‖ + eps)² of slices, from ‖w‖²; finite for zero."""
    if eps:
        squares = squares.sqrt().add_(eps).square_()
    return squares.clamp_min(_TINY).reciprocal_()


def _by_slice(x: Tensor, lengths: Tensor) -> Tensor:
    sums: Tensor = torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True)
    return sums


def _norms(x: Tensor, out: Tensor | None = None) -> Tensor:
    dim = 1 if x.ndim == 2 else (1, 2)
    norms: Tensor = torch.linalg.vector_norm(x, dim=dim, out=out)
    return norms


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude in each slice."""
    return x.abs().amax(1 if x.ndim == 2 else (1, 2))


def _wide_products(xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
    return [(x.double() * y.double()).flatten(1).sum(1) for x, y in zip(xs, ys, strict=True)]


def _back(ws: Tensor, ww: Tensor, uu: Tensor) -> Tensor:
    """What puts slices back on their norm when s has been added."""
    zeros = torch.zeros_like(ws)
    sums = torch.stack([ws, ww, zeros, uu], 1)
    back: Tensor = retraction_from_sums(sums, 1.0)
    return back
