# Numba types these functions itself, and has no types of its own.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"
"""One step for many tensors on the CPU, compiled by Numba and run on torch's own threads.

A weight in memory order is an array ``(outer, slices, inner)``; slice s is ``[:, s, :]``. It is cut
into *chunks* of about one L2 cache, each some whole slices or a piece of one long slice. For a
chunk the kernel

1. updates the moments and writes the direction u to a scratch buffer that stays in cache,
2. sums ⟨w, u⟩, ‖w‖², … for each slice in float64, so that norms from 1e-30 to 1e30 hold, and
3. writes ``w ← α·w − σ·u`` with one α for each slice: decay and projection are both multiples of w.

So w, g, m, v are read from memory once and w, m, v written once. What cannot be finished in this
pass is left to a second one: slices longer than a chunk, and in ``"auto"`` what the gate decides
only when all of a weight has been seen. There the first pass acts on a guess, the decision of
earlier steps. Where it was wrong the second pass computes u again from the moments, and corrects

    w' = α'·w − σ·u = A·(α·w − σ·u) + (A − 1)·σ·u    with    A = α'/α,

which loses nothing as long as A is near 1; slices where it might not be (see ``_is_safe``) are not
written on a guess. A right guess, which is nearly every one, costs no second look.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from normwise.cpu_kernels import (
    CACHE_LINE,
    TYPES,
    _address,
    _array,
    _as_written,
    _carray,
    _inlined,
    _narrowed,
    _size_of,
    _take_number,
    _widened,
    compile_with_cache,
)

# A chunk has at most this many entries: five float32 arrays of it fill half of a 1 MiB L2 cache.
LONGEST = 1 << 15
# Chunks of shorter slices have about this many: long enough for a stream, many enough to share.
TYPICAL = 1 << 14
# Slices shorter than this share the loop that makes their directions.
SHORT = 48
# Sums in float32 have at most this many terms, in dozens of lanes, before float64 takes over.
SEGMENT = 1 << 10
# Below this many entries in all a second thread costs more than it saves.
PARALLEL_ENTRIES = 1 << 15

# Rules: how a direction is made from gradient and moments.
ADAM, SGD = 0, 1
# Modes: what a weight's slices are for.
FREE, EXPLICIT, FIXED, AUTO = 0, 1, 2, 3
# Decisions of the gate; NONE before the first.
NONE, SHUT, BY_CHANNEL, BY_LAYER = -1, 0, 1, 2

# Columns of the table of tensors.
(
    W,
    G,
    M,
    V,
    COUNT,
    OUTER,
    SLICES,
    INNER,
    MODE,
    FIRST,
    LAST,
    TOTALS,
    WHOLE,
    GROUP,
    GUESS,
    DECISION,
    DECISION_BEFORE,
    REVISIT,
) = range(18)
TENSOR_COLUMNS = 20
# Columns of the table of chunks; and of their sums, which follow the columns of the slices' sums.
TENSOR, OUTER_0, OUTER_1, SLICE_0, SLICE_1, INNER_0, INNER_1, SLOT = range(8)
# Sums of a slice: ⟨w, u⟩, ‖w‖²; in "auto" also ⟨w, g⟩, ‖g‖², else ⟨w, u⟩, ‖u‖² in their place.
WU, WW, WG, GG = range(4)
UU = GG
# Sums of a chunk: as above, then whether the channels of it open the gate, and are all safe.
OPEN, SAFE = 4, 5
# Factors of a tensor: the step σ, 1/√(1 − β2^t), the decay of a weight that is not or is projected,
# and the coefficient of the layer view.
STEP, DENOMINATOR, DECAY, DECAY_PROJECTED, BY_LAYER_COEFFICIENT = range(5)
# Options of a group's step: what kernels use entry by entry, then what makes the factors.
(
    GRAD,
    M_KEEP,
    M_ADD,
    V_KEEP,
    V_ADD,
    LOOK_AHEAD,
    EPS,
    GATE,
    GUARD,
    LR,
    BETA1,
    BETA2,
    DECAY_BY,
    WD_RATIO,
) = range(14)
# Entries of the argument block.
(
    TENSORS,
    CHUNKS,
    N_CHUNKS,
    FACTORS,
    SUMS,
    CHUNK_SUMS,
    OPTIONS,
    COUNTER,
    SCRATCH,
    RULE,
    PASS,
    THREADS,
) = range(12)


@_as_written
def _second_moment(v, gradient, keep, add):
    """keep·v + add·g², where g² alone may be beyond float32."""
    return keep * v + add * gradient * gradient


@_inlined
def _adam_directions(g, m, v, u, options, denominator, update):
    """u = m̂/(√v̂ + eps), with m̂ one step ahead for Nesterov; the step size has 1/(1 − β1^t)."""
    one = u.dtype.type
    grad, m_add, look_ahead = one(options[GRAD]), one(options[M_ADD]), one(options[LOOK_AHEAD])
    v_keep, v_add, eps = one(options[V_KEEP]), one(options[V_ADD]), one(options[EPS])
    scale = one(denominator)
    if update:
        for i in range(len(u)):
            gradient = grad * _widened(g[i])
            first = m[i] + m_add * (gradient - m[i])
            second = _second_moment(v[i], gradient, v_keep, v_add)
            m[i] = first
            v[i] = second
            u[i] = (first + look_ahead * (gradient - first)) / (math.sqrt(second) * scale + eps)
    else:
        for i in range(len(u)):
            gradient = grad * _widened(g[i])
            u[i] = (m[i] + look_ahead * (gradient - m[i])) / (math.sqrt(v[i]) * scale + eps)


@_inlined
def _sgd_directions(g, m, u, options, buffered, update):
    """u = p, or g + μp for Nesterov, with the buffer p ← μp + (1 − dampening)g."""
    one = u.dtype.type
    grad, m_keep, m_add = one(options[GRAD]), one(options[M_KEEP]), one(options[M_ADD])
    nesterov = options[LOOK_AHEAD] != 0
    if not buffered:
        for i in range(len(u)):
            u[i] = m_add * (grad * _widened(g[i]))
        return
    if update:
        for i in range(len(u)):
            m[i] = m_keep * m[i] + m_add * (grad * _widened(g[i]))
    if nesterov:
        for i in range(len(u)):
            u[i] = grad * _widened(g[i]) + m_keep * m[i]
    else:
        for i in range(len(u)):
            u[i] = m[i]


@_inlined
def _sums(w, u, g, options, gated):
    """⟨w, u⟩, ‖w‖² of a slice, and ⟨w, z⟩, ‖z‖² with z the gradient for the gate, else u."""
    grad = u.dtype.type(options[GRAD])
    wu = ww = wz = zz = 0.0
    for i in range(len(u)):
        z = grad * _widened(g[i]) if gated else u[i]
        x, y, z = np.float64(_widened(w[i])), np.float64(u[i]), np.float64(z)
        wu += x * y
        ww += x * x
        wz += x * z
        zz += z * z
    return wu, ww, wz, zz


@_inlined
def _adam_sums(w, g, m, v, u, options, denominator, gated):
    """:func:`_adam_directions` and :func:`_sums` in one loop, while the entries are at hand.

    The sums are made in the dtype of the moments, for speed; see :func:`_are_exact`.
    """
    one = u.dtype.type
    grad, m_add, look_ahead = one(options[GRAD]), one(options[M_ADD]), one(options[LOOK_AHEAD])
    v_keep, v_add, eps = one(options[V_KEEP]), one(options[V_ADD]), one(options[EPS])
    scale = one(denominator)
    wu = ww = wz = zz = one(0)
    for i in range(len(u)):
        gradient = grad * _widened(g[i])
        first = m[i] + m_add * (gradient - m[i])
        second = _second_moment(v[i], gradient, v_keep, v_add)
        direction = (first + look_ahead * (gradient - first)) / (math.sqrt(second) * scale + eps)
        m[i] = first
        v[i] = second
        u[i] = direction
        z = gradient if gated else direction
        x = _widened(w[i])
        wu += x * direction
        ww += x * x
        wz += x * z
        zz += z * z
    return wu, ww, wz, zz


@_inlined
def _sgd_sums(w, g, m, u, options, gated):
    """:func:`_sgd_directions` and :func:`_sums` in a loop; heavy ball's u is m, and not copied."""
    one = u.dtype.type
    grad, m_keep, m_add = one(options[GRAD]), one(options[M_KEEP]), one(options[M_ADD])
    nesterov = options[LOOK_AHEAD] != 0
    wu = ww = wz = zz = one(0)
    for i in range(len(u)):
        gradient = grad * _widened(g[i])
        first = m_keep * m[i] + m_add * gradient
        direction = gradient + m_keep * first if nesterov else first
        m[i] = first
        if nesterov:
            u[i] = direction
        z = gradient if gated else direction
        x = _widened(w[i])
        wu += x * direction
        ww += x * x
        wz += x * z
        zz += z * z
    return wu, ww, wz, zz


@_inlined
def _are_exact(ww, zz, wu, wz, like):
    """Whether sums in float32 are as good as those in float64: nothing over- or underflowed.

    Of ⟨w, u⟩ no look at what underflowed is needed: it is below 1e-37, so below 1e-17·‖w‖².
    """
    if _size_of(like) == 8:
        return True
    return 1e-20 < ww < 1e30 and 1e-20 < zz < 1e30 and abs(wu) < 1e30 and abs(wz) < 1e30


@_inlined
def _adam_free(w, g, m, v, options, denominator, keep, add):
    """The whole step of a weight without a view: nothing to sum, so nothing to keep in cache."""
    one = m.dtype.type
    grad, m_add, look_ahead = one(options[GRAD]), one(options[M_ADD]), one(options[LOOK_AHEAD])
    v_keep, v_add, eps = one(options[V_KEEP]), one(options[V_ADD]), one(options[EPS])
    scale, a, b = one(denominator), one(keep), one(add)
    for i in range(len(m)):
        gradient = grad * _widened(g[i])
        first = m[i] + m_add * (gradient - m[i])
        second = _second_moment(v[i], gradient, v_keep, v_add)
        m[i] = first
        v[i] = second
        ahead = first + look_ahead * (gradient - first)
        direction = ahead / (math.sqrt(second) * scale + eps)
        w[i] = _narrowed(a * _widened(w[i]) + b * direction, w[i])


@_inlined
def _sgd_free(w, g, m, options, keep, add):
    one = m.dtype.type
    grad, m_keep, m_add = one(options[GRAD]), one(options[M_KEEP]), one(options[M_ADD])
    nesterov = options[LOOK_AHEAD] != 0
    a, b = one(keep), one(add)
    for i in range(len(m)):
        gradient = grad * _widened(g[i])
        first = m_keep * m[i] + m_add * gradient
        m[i] = first
        direction = gradient + m_keep * first if nesterov else first
        w[i] = _narrowed(a * _widened(w[i]) + b * direction, w[i])


@_inlined
def _combine(w, u, keep, add):
    """w ← keep·w + add·u."""
    if abs(keep) > 1e30:
        # For a tiny weight the coefficient of the radial part is beyond float32; c·w is not.
        for i in range(len(u)):
            entry = keep * np.float64(_widened(w[i])) + add * np.float64(u[i])
            w[i] = _narrowed(u.dtype.type(entry), w[i])
        return
    one = u.dtype.type
    a, b = one(keep), one(add)
    for i in range(len(u)):
        w[i] = _narrowed(a * _widened(w[i]) + b * u[i], w[i])


@_inlined
def _cosine(wg, ww, gg, guard):
    """As projection._guarded_cosine: |⟨w, g⟩|/(max(‖w‖, eps)·max(‖g‖, eps))."""
    if ww == 0:
        return 0.0
    return abs(wg) / max(math.sqrt(gg), guard) / max(math.sqrt(ww), guard)


@_inlined
def _radial_coefficient(wu, ww, eps):
    """c such that c·w is the radial part of u, shrunk as projection._shrinkage does."""
    if ww == 0:
        return 0.0
    norm = math.sqrt(ww)
    left = norm / (norm + eps)
    return wu / ww * (left * left)


@_inlined
def _keep_of_gate(sums, factors, options, decision):
    """α of a slice in "auto", for a decision."""
    if decision == SHUT:
        return factors[DECAY]
    if decision == BY_LAYER:
        return factors[DECAY_PROJECTED] + factors[STEP] * factors[BY_LAYER_COEFFICIENT]
    coefficient = _radial_coefficient(sums[WU], sums[WW], options[EPS])
    return factors[DECAY_PROJECTED] + factors[STEP] * coefficient


@_inlined
def _is_safe(sums, factors, options, guess):
    """Whether a slice may be written on a guess: each decision's α is within a small factor.

    The layer's coefficient is a mean of the channels', so it needs no look of its own. A NaN is not
    safe. A guess of BY_LAYER cannot be acted on: its coefficient is not yet known.
    """
    if guess == BY_LAYER:
        return False
    shut, projected = factors[DECAY], _keep_of_gate(sums, factors, options, BY_CHANNEL)
    return 0.5 <= shut <= 2 and 0.5 <= projected <= 2


@_inlined
def _explicit_factors(sums, factors, mode):
    """α and σ of a slice in a View, with the norm put back if it is fixed."""
    step = factors[STEP]
    coefficient = sums[WU] / sums[WW] if sums[WW] > 0 else 0.0 * sums[WW]
    keep = factors[DECAY_PROJECTED] + step * coefficient
    if mode == FIXED:
        # ‖w − σ(u − cw)‖² = ‖w‖² + σ²(‖u‖² − ⟨w, u⟩²/‖w‖²), as w and u − cw are orthogonal.
        ww = sums[WW]
        if ww == 0:
            return 0.0, 0.0
        moved = step * step * (sums[UU] - coefficient * sums[WU])
        if moved < 0:
            moved = 0.0
        back = math.sqrt(ww / (ww + moved))
        return keep * back, step * back
    return keep, step


def _take_chunks(pointer):
    """Take chunks until there are none left. The type of the pointer is that of the weights."""
    like = _carray(pointer, 1)[0]
    block = _array(_address(pointer), 16, np.int64(0))
    threads, count = block[THREADS], block[N_CHUNKS]
    self = _take_number(block[COUNTER])
    scratch = block[SCRATCH] + self * LONGEST * 8
    # Each thread has a range of its own, for memory is fastest in one long stream; then it helps
    # the others. Which thread does what changes no result.
    for i in range(threads):
        owner = (self + i) % threads
        counter = block[COUNTER] + (owner + 1) * CACHE_LINE
        end = count * (owner + 1) // threads
        while True:
            chunk = count * owner // threads + _take_number(counter)
            if chunk >= end:
                break
            _chunk(block, chunk, scratch, like)


@_inlined
def _chunk(block, number, scratch, like):
    chunk = _array(block[CHUNKS] + number * 8 * 8, 8, np.int64(0))
    tensor = _array(
        block[TENSORS] + chunk[TENSOR] * TENSOR_COLUMNS * 8, TENSOR_COLUMNS, np.int64(0)
    )
    first_pass = block[PASS] == 1
    if not first_pass and tensor[REVISIT] == 0:
        return
    chunk_sums = _array(block[CHUNK_SUMS] + number * 8 * 8, 8, np.float64(0))
    mode, whole, guess, decision = tensor[MODE], tensor[WHOLE], tensor[GUESS], tensor[DECISION]
    if not first_pass and whole != 0 and decision == guess and chunk_sums[SAFE] != 0:
        return
    factors = _array(block[FACTORS] + chunk[TENSOR] * 8 * 8, 8, np.float64(0))
    options = _array(block[OPTIONS] + tensor[GROUP] * 16 * 8, 16, np.float64(0))

    size = np.int64(_size_of(like))
    compute = _widened(like)
    compute_size = np.int64(_size_of(compute))
    inner = tensor[INNER]
    stride = tensor[SLICES] * inner
    slices = chunk[SLICE_1] - chunk[SLICE_0]
    part = chunk[INNER_1] - chunk[INNER_0]
    run = (slices - 1) * inner + part
    rows = chunk[OUTER_1] - chunk[OUTER_0]
    start = chunk[OUTER_0] * stride + chunk[SLICE_0] * inner + chunk[INNER_0]

    adam, buffered = block[RULE] == ADAM, tensor[M] != 0
    if mode == FREE and (adam or buffered):
        for row in range(rows):
            at = start + row * stride
            w, g = (
                _array(tensor[W] + at * size, run, like),
                _array(tensor[G] + at * size, run, like),
            )
            m = _array(tensor[M] + at * compute_size, run, compute)
            if adam:
                v = _array(tensor[V] + at * compute_size, run, compute)
                _adam_free(
                    w, g, m, v, options, factors[DENOMINATOR], factors[DECAY], -factors[STEP]
                )
            else:
                _sgd_free(w, g, m, options, factors[DECAY], -factors[STEP])
        return

    # Loops over short slices would be all beginning and end; their directions are made in one go.
    at_once = part < SHORT or not first_pass or not (adam or buffered)
    if at_once:
        for row in range(rows):
            at = start + row * stride
            g = _array(tensor[G] + at * size, run, like)
            m = _array(tensor[M] + at * compute_size, run, compute)
            u = _array(scratch + row * run * compute_size, run, compute)
            if adam:
                v = _array(tensor[V] + at * compute_size, run, compute)
                _adam_directions(g, m, v, u, options, factors[DENOMINATOR], first_pass)
            else:
                _sgd_directions(g, m, u, options, buffered, first_pass)

    if mode == FREE:
        for row in range(rows):
            w = _array(tensor[W] + (start + row * stride) * size, run, like)
            u = _array(scratch + row * run * compute_size, run, compute)
            _combine(w, u, factors[DECAY], -factors[STEP])
        return

    if first_pass:
        sums = block[SUMS] + chunk[SLOT] * 4 * 8
    else:
        sums = block[SUMS] + (tensor[TOTALS] + chunk[SLICE_0]) * 4 * 8
    in_place = not (at_once or adam) and options[LOOK_AHEAD] == 0
    is_open, is_safe = 1.0, 1.0
    layer_wu = layer_ww = layer_wg = layer_gg = 0.0
    for s in range(slices):
        slice_sums = _array(sums + s * 4 * 8, 4, np.float64(0))
        if first_pass:
            wu = ww = wg = gg = 0.0
            for row in range(rows):
                for begin in range(0, part, SEGMENT):
                    n = min(SEGMENT, part - begin)
                    at = start + row * stride + s * inner + begin
                    w = _array(tensor[W] + at * size, n, like)
                    g = _array(tensor[G] + at * size, n, like)
                    at_u = row * run + s * inner * at_once + begin
                    u = _array(scratch + at_u * compute_size, n, compute)
                    exact = not at_once
                    if not at_once:
                        m = _array(tensor[M] + at * compute_size, n, compute)
                        if adam:
                            v = _array(tensor[V] + at * compute_size, n, compute)
                            scale = factors[DENOMINATOR]
                            x = _adam_sums(w, g, m, v, u, options, scale, mode == AUTO)
                        else:
                            x = _sgd_sums(w, g, m, u, options, mode == AUTO)
                            if in_place:
                                u = m
                        a, b, c, d = (
                            np.float64(x[0]),
                            np.float64(x[1]),
                            np.float64(x[2]),
                            np.float64(x[3]),
                        )
                        exact = _are_exact(b, d, a, c, compute)
                    if not exact:
                        a, b, c, d = _sums(w, u, g, options, mode == AUTO)
                    wu += a
                    ww += b
                    wg += c
                    gg += d
            slice_sums[WU], slice_sums[WW], slice_sums[WG], slice_sums[GG] = wu, ww, wg, gg
            layer_wu += wu
            layer_ww += ww
            layer_wg += wg
            layer_gg += gg
            if whole == 0:
                continue

        if mode == AUTO:
            safe = whole != 0 and _is_safe(slice_sums, factors, options, guess) and size > 2
            if first_pass:
                gate = options[GATE] / math.sqrt(np.float64(inner * tensor[OUTER]))
                if not _cosine(wg, ww, gg, options[GUARD]) < gate:
                    is_open = 0.0
                if not safe:
                    is_safe = 0.0
                    continue
                keep = _keep_of_gate(slice_sums, factors, options, guess)
                add = -factors[STEP]
            else:
                keep = _keep_of_gate(slice_sums, factors, options, decision)
                add = -factors[STEP]
                if safe:
                    keep /= _keep_of_gate(slice_sums, factors, options, guess)
                    add = (keep - 1) * factors[STEP]
        else:
            keep, step = _explicit_factors(slice_sums, factors, mode)
            add = -step
        for row in range(rows):
            at = start + row * stride + s * inner
            w = _array(tensor[W] + at * size, part, like)
            from_scratch = scratch + (row * run + s * inner * at_once) * compute_size
            from_buffer = tensor[M] + at * compute_size
            u = _array(from_buffer if in_place else from_scratch, part, compute)
            _combine(w, u, keep, add)

    if first_pass:
        chunk_sums[WU], chunk_sums[WW] = layer_wu, layer_ww
        chunk_sums[WG], chunk_sums[GG] = layer_wg, layer_gg
        chunk_sums[OPEN], chunk_sums[SAFE] = is_open, is_safe


def _prepare(tensors, factors, options, is_adam):
    """Count the steps, make the factors of weights, and expect of the gate what it did before.

    The last decision is expected if it was made twice or is the first: a random gradient passes the
    layer gate now and then, and that says nothing of the next.
    """
    for t in range(len(tensors)):
        tensor, own = tensors[t], options[tensors[t, GROUP]]
        factors[t, STEP] = own[LR]
        if is_adam:
            count = _array(tensor[COUNT], 1, np.float32(0))
            count[0] += np.float32(1)
            steps = np.float64(count[0])
            factors[t, STEP] = own[LR] / (1 - own[BETA1] ** steps)
            factors[t, DENOMINATOR] = 1 / math.sqrt(1 - own[BETA2] ** steps)
        factors[t, DECAY] = 1 - own[DECAY_BY]
        factors[t, DECAY_PROJECTED] = 1 - own[DECAY_BY] * own[WD_RATIO]
        if tensor[DECISION] != NONE:
            if tensor[DECISION_BEFORE] in (NONE, tensor[DECISION]):
                tensor[GUESS] = tensor[DECISION]
            tensor[DECISION_BEFORE] = tensor[DECISION]


def _decide(tensors, chunks, factors, sums, chunk_sums, all_options):
    """Add up what the first pass found of each weight; decide its gate; say if a second is needed.

    The decision is that of projection.gated_radial.
    """
    again = False
    for t in range(len(tensors)):
        tensor = tensors[t]
        tensor[REVISIT] = 0
        options = all_options[tensor[GROUP]]
        if tensor[MODE] == FREE:
            continue
        if tensor[WHOLE] == 0:
            _add_up(tensor, chunks, sums, chunk_sums)
            tensor[REVISIT] = 1
        if tensor[MODE] == AUTO:
            wu = ww = wg = gg = 0.0
            channels_open, safe = True, True
            for chunk in range(tensor[FIRST], tensor[LAST]):
                wu += chunk_sums[chunk, WU]
                ww += chunk_sums[chunk, WW]
                wg += chunk_sums[chunk, WG]
                gg += chunk_sums[chunk, GG]
                channels_open &= chunk_sums[chunk, OPEN] != 0
                safe &= chunk_sums[chunk, SAFE] != 0
            entries = np.float64(tensor[INNER] * tensor[OUTER])
            if tensor[WHOLE] == 0:
                for s in range(tensor[SLICES]):
                    row = sums[tensor[TOTALS] + s]
                    cosine = _cosine(row[WG], row[WW], row[GG], options[GUARD])
                    channels_open &= cosine < options[GATE] / math.sqrt(entries)
            cosine = _cosine(wg, ww, gg, options[GUARD])
            gate = options[GATE] / math.sqrt(entries * tensor[SLICES])
            decision = SHUT
            if gg > 0 and channels_open:
                decision = BY_CHANNEL
            elif gg > 0 and cosine < gate:
                decision = BY_LAYER
                factors[t, BY_LAYER_COEFFICIENT] = _radial_coefficient(wu, ww, options[EPS])
            tensor[DECISION] = decision
            if decision != tensor[GUESS] or not safe:
                tensor[REVISIT] = 1
        again |= tensor[REVISIT] != 0
    return again


@_inlined
def _add_up(tensor, chunks, sums, chunk_sums):
    totals = sums[tensor[TOTALS] : tensor[TOTALS] + tensor[SLICES]]
    totals[:] = 0
    for chunk in range(tensor[FIRST], tensor[LAST]):
        first = chunks[chunk, SLICE_0]
        for s in range(first, chunks[chunk, SLICE_1]):
            for column in range(4):
                totals[s, column] += sums[chunks[chunk, SLOT] + s - first, column]


_INT_TABLE, _TABLE = types.int64[:, ::1], types.float64[:, ::1]


@dataclass(frozen=True)
class Kernels:
    """What is compiled, in this order of a step: prepare, take chunks, decide, take chunks again.

    Attributes:
        prepare: of tensors, factors, options, and whether the rule is Adam's.
        take_chunks: the address of a function that takes the argument block's.
        decide: of tensors, chunks, factors, sums, sums of chunks, options; says whether a second
            pass is needed.
    """

    prepare: Callable[..., None]
    take_chunks: int
    decide: Callable[..., bool]
    _owner: Any


@functools.cache
def kernels(dtype: torch.dtype) -> Kernels:
    """The kernels for weights of a dtype. The compiler is only now asked to work."""
    prepare, decide = _for_all_dtypes()
    task = compile_with_cache(numba.cfunc, types.void(types.CPointer(TYPES[dtype])), _take_chunks)
    return Kernels(prepare, task.address, decide, task)


@functools.cache
def _for_all_dtypes() -> tuple[Any, Any]:
    tables = (_INT_TABLE, _INT_TABLE, _TABLE, _TABLE, _TABLE, _TABLE)
    return (
        compile_with_cache(
            numba.njit, types.void(_INT_TABLE, _TABLE, _TABLE, types.boolean), _prepare
        ),
        compile_with_cache(numba.njit, types.boolean(*tables), _decide),
    )
