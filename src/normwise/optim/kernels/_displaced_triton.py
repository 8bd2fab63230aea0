# Triton types these functions itself. What it decides at compile time stands in an if of its own.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""What a wrapped optimizer did to many weights, turned into other steps, compiled by Triton.

As in ``_displaced_numba`` there is w of each weight from before the step, and x, which holds w + d
or d itself. These kernels share a list of chunks in the forms of tiles of ``_cuda_triton``:

``move``    sums ‖w‖², ⟨w, d⟩ and ‖d‖² of slices, makes a and b of them as
            :mod:`normwise.optim.motion` does, which is the ground truth, and writes
            w + (a − 1)·w + b·d while w and d are in registers.
``gather``  makes a and b of slices that several programs have shared,
``finish``  and writes these: the last ones first, which a cache may still hold.

Sums and the few numbers of a slice are float64: what is tangential of d is the small difference of
two of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.optim.kernels._cuda_triton import (
    ALIGNMENT,
    BEGIN,
    CHUNK_COLUMNS,
    END,
    NOISE,
    SLICE,
    TENSOR,
    _get,
    _places,
    _rounded,
    _set,
)
from normwise.optim.kernels._cuda_triton import STOCHASTIC as STOCHASTIC_ROUNDING

# Tables are int64; entries marked with ° are the bits of a float64. The state of a step begins with
# what _cuda_triton's has up to NOISE, the steps that were rounded at random; then the host sends
# three addresses for each tensor,
ADDRESSES = tl.constexpr(NOISE.value + 1)
BEFORE = tl.constexpr(0)
AFTER = tl.constexpr(1)
RADII = tl.constexpr(2)
ADDRESS_COLUMNS = tl.constexpr(3)
# and numbers ° of each group.
KEEP = tl.constexpr(0)
LR = tl.constexpr(1)
COS = tl.constexpr(2)
SIN = tl.constexpr(3)
FLOOR = tl.constexpr(4)
NUMBER_COLUMNS = tl.constexpr(5)
# Columns of the table of tensors.
SLICES = tl.constexpr(0)
INNER = tl.constexpr(1)
LENGTH = tl.constexpr(2)  # entries of a slice
IS_SHARED = tl.constexpr(3)  # whether several programs share a slice
SLOT = tl.constexpr(4)  # its slices in the table of slices, if so
NUMBERS = tl.constexpr(5)  # where in the state its group's numbers are
OUTCOME = tl.constexpr(6)
TENSOR_COLUMNS = tl.constexpr(7)
# What x holds, as of normwise.optim.motion.Outcome: w + d, or d; in place, the result is for w.
MOVED = tl.constexpr(0)
FROM_ZERO = tl.constexpr(1)
IN_PLACE = tl.constexpr(2)
# Columns of the table of chunks, after those of _cuda_triton: ° sums over the chunk.
WW = tl.constexpr(6)
WD = tl.constexpr(7)
DD = tl.constexpr(8)
# Columns of the table of slices °: a − 1 and b.
A = tl.constexpr(0)
B = tl.constexpr(1)
SLICE_COLUMNS = tl.constexpr(2)
# Paths; the names are those of normwise.optim.motion.KernelStep.
FREE = tl.constexpr(0)
FIXED = tl.constexpr(1)
RETRACT = tl.constexpr(2)
GEODESIC = tl.constexpr(3)
# Flags of ``how``, of which _rounded knows the last.
RELATIVE = tl.constexpr(1)  # updates are θR long
FLOORED = tl.constexpr(2)
STOCHASTIC = tl.constexpr(STOCHASTIC_ROUNDING.value)


@triton.jit
def _at(state, tensor, column, dtype: tl.constexpr, aligned: tl.constexpr):
    """The address of a tensor's memory, or of its radii."""
    address = tl.load(state + ADDRESSES + tensor * ADDRESS_COLUMNS + column)
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _read(w_at, x_at, mask, outcome, compute: tl.constexpr):
    """w and d."""
    w = tl.load(w_at, mask, other=0).to(compute)
    x = tl.load(x_at, mask, other=0).to(compute)
    return w, tl.where(outcome == MOVED, x - w, x)


@triton.jit
def _write(
    w_at,
    x_at,
    at,
    mask,
    w,
    d,
    a,
    b,
    outcome,
    state,
    tensor,
    seed,
    how: tl.constexpr,
    dtype: tl.constexpr,
    compute: tl.constexpr,
):
    """Put w + (a·w + b·d) where it belongs, a being what the factor of w is more than 1."""
    new = w + (a.to(compute) * w + b.to(compute) * d)
    new = _rounded(new, at, state, tensor, seed, how, dtype)
    if outcome == IN_PLACE:
        tl.store(w_at, new, mask)
        tl.store(x_at, tl.zeros_like(new), mask)  # for the next step
    else:
        tl.store(x_at, new, mask)


@triton.jit
def _inverse_root(x):
    """1/√x, but 1 of zero."""
    return tl.rsqrt(tl.where(x == 0, 1.0, x))


@triton.jit
def _coefficients(
    ww, wd, dd, radius, numbers, noise: tl.constexpr, path: tl.constexpr, how: tl.constexpr
):
    """a − 1 and b of slices; see normwise.optim.motion."""
    positive = tl.where(ww == 0, 1.0, ww)
    if path == FREE:
        a = _get(numbers, KEEP) - 1 - wd / positive
        b = tl.zeros_like(a) + 1
    else:
        inverse_norm = _inverse_root(ww)
        radial = wd * inverse_norm
        square = dd - radial * radial
        square = tl.where(square < 0, 0.0, square)
        if path == FIXED:
            b = tl.where(ww == 0, 0.0, tl.sqrt(positive / (positive + square)))
            a = (1 - wd / positive) * b - 1
        else:
            scale = tl.zeros_like(square) + 1
            if RELATIVE & how:
                scale = _get(numbers, LR) * radius * _inverse_root(dd)
            elif FLOORED & how:
                scale = _get(numbers, FLOOR) * radius * _inverse_root(dd)
                scale = tl.where(scale < 1, 1.0, scale)
            if path == RETRACT:
                along = scale * radial + tl.where(ww > 0, radius, 0.0)
                inverse = _inverse_root(along * along + scale * scale * square)
                b = radius * scale * inverse
                a = radius * inverse_norm * (radius * inverse) - 1
                stays = dd == 0
            else:
                inverse_tangential = _inverse_root(square)
                if RELATIVE & how:
                    cos, share = _get(numbers, COS), _get(numbers, SIN) * inverse_tangential
                else:
                    angle = scale * (square * inverse_tangential) / radius
                    cos, share = tl.cos(angle), tl.sin(angle) * inverse_tangential
                b = radius * share
                a = radius * (cos - share * radial) * inverse_norm - 1
                # Of what is not a number nothing stays.
                stays = square <= noise * noise * dd
            a = tl.where(stays, 0.0, a)
            b = tl.where(stays, 0.0, b)
    return a, b


@triton.jit(do_not_specialize=["seed"])
def move(
    state,
    tensors,
    chunks,
    seed,
    rows: tl.constexpr,
    columns: tl.constexpr,
    looped: tl.constexpr,
    strided: tl.constexpr,
    aligned: tl.constexpr,
    noise: tl.constexpr,
    path: tl.constexpr,
    how: tl.constexpr,
    dtype: tl.constexpr,
    compute: tl.constexpr,
):
    """Move some slices, the rows of one tile or, if ``looped``, of several; sum if shared."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_COLUMNS
    tensor = tl.load(chunk + TENSOR)
    about = tensors + tensor * TENSOR_COLUMNS
    begin, end = tl.load(chunk + BEGIN), tl.load(chunk + END)
    length, inner, n = tl.load(about + LENGTH), tl.load(about + INNER), tl.load(about + SLICES)
    if aligned:
        begin, end = tl.multiple_of(begin, ALIGNMENT), tl.multiple_of(end, ALIGNMENT)
        length = tl.multiple_of(length, ALIGNMENT)
    s = tl.load(chunk + SLICE) + tl.arange(0, rows)
    row = s < n
    w_at = _at(state, tensor, BEFORE, dtype, aligned)
    x_at = _at(state, tensor, AFTER, dtype, aligned)
    outcome, numbers = tl.load(about + OUTCOME), state + tl.load(about + NUMBERS)
    radius = tl.zeros([rows], tl.float64) + 1
    if path >= RETRACT:  # these have radii
        radii = _at(state, tensor, RADII, compute, False)
        radius = tl.load(radii + s, row, other=1).to(tl.float64)

    if looped:
        ww = tl.zeros([rows], tl.float64)
        wd = tl.zeros([rows], tl.float64)
        dd = tl.zeros([rows], tl.float64)
        for start in range(begin, end, columns):
            c = start + tl.arange(0, columns)
            at = _places(s, c, length, inner, n, strided)
            mask = row[:, None] & (c < end)[None, :]
            w, d = _read(w_at + at, x_at + at, mask, outcome, compute)
            x, y = w.to(tl.float64), d.to(tl.float64)
            ww += tl.sum(x * x, 1)
            wd += tl.sum(x * y, 1)
            dd += tl.sum(y * y, 1)
        if tl.load(about + IS_SHARED) != 0:
            _set(chunk, WW, tl.sum(ww, 0))
            _set(chunk, WD, tl.sum(wd, 0))
            _set(chunk, DD, tl.sum(dd, 0))
            return
        a, b = _coefficients(ww, wd, dd, radius, numbers, noise, path, how)
        for start in range(begin, end, columns):
            c = start + tl.arange(0, columns)
            at = _places(s, c, length, inner, n, strided)
            mask = row[:, None] & (c < end)[None, :]
            w, d = _read(w_at + at, x_at + at, mask, outcome, compute)
            _write(
                w_at + at,
                x_at + at,
                at,
                mask,
                w,
                d,
                a[:, None],
                b[:, None],
                outcome,
                state,
                tensor,
                seed,
                how,
                dtype,
                compute,
            )
    else:
        c = tl.arange(0, columns)
        at = _places(s, c, length, inner, n, strided)
        mask = row[:, None] & (c < end)[None, :]
        w, d = _read(w_at + at, x_at + at, mask, outcome, compute)
        x, y = w.to(tl.float64), d.to(tl.float64)
        ww, wd, dd = tl.sum(x * x, 1), tl.sum(x * y, 1), tl.sum(y * y, 1)
        a, b = _coefficients(ww, wd, dd, radius, numbers, noise, path, how)
        _write(
            w_at + at,
            x_at + at,
            at,
            mask,
            w,
            d,
            a[:, None],
            b[:, None],
            outcome,
            state,
            tensor,
            seed,
            how,
            dtype,
            compute,
        )


@triton.jit
def gather(
    state,
    tensors,
    chunks,
    shared,
    slices,
    noise: tl.constexpr,
    path: tl.constexpr,
    how: tl.constexpr,
    compute: tl.constexpr,
    block: tl.constexpr,
):
    """a and b of a slice that several programs have summed, from the sums of its chunks."""
    own = shared + tl.program_id(0).to(tl.int64) * CHUNK_COLUMNS
    tensor, number = tl.load(own + TENSOR), tl.load(own + SLICE)
    about = tensors + tensor * TENSOR_COLUMNS
    first, last = tl.load(own + BEGIN), tl.load(own + END)
    ww = tl.zeros([block], tl.float64)
    wd = tl.zeros([block], tl.float64)
    dd = tl.zeros([block], tl.float64)
    for start in range(first, last, block):
        i = start + tl.arange(0, block)
        mask = i < last
        sums = (chunks + i * CHUNK_COLUMNS).to(tl.pointer_type(tl.float64), bitcast=True)
        ww += tl.load(sums + WW, mask, other=0)
        wd += tl.load(sums + WD, mask, other=0)
        dd += tl.load(sums + DD, mask, other=0)
    ww, wd, dd = tl.sum(ww, 0), tl.sum(wd, 0), tl.sum(dd, 0)
    radius = 0.0 * ww + 1
    if path >= RETRACT:  # these have radii
        radius = tl.load(_at(state, tensor, RADII, compute, False) + number).to(tl.float64)
    numbers = state + tl.load(about + NUMBERS)
    a, b = _coefficients(ww, wd, dd, radius, numbers, noise, path, how)
    at = slices + (tl.load(about + SLOT) + number) * SLICE_COLUMNS
    _set(at, A, a)
    _set(at, B, b)


@triton.jit(do_not_specialize=["seed"])
def finish(
    state,
    tensors,
    runs,
    slices,
    seed,
    aligned: tl.constexpr,
    how: tl.constexpr,
    dtype: tl.constexpr,
    compute: tl.constexpr,
    block: tl.constexpr,
):
    """Move a run of memory of a slice that several programs share."""
    run = runs + tl.program_id(0).to(tl.int64) * CHUNK_COLUMNS
    tensor, number = tl.load(run + TENSOR), tl.load(run + SLICE)
    about = tensors + tensor * TENSOR_COLUMNS
    begin, end, length = tl.load(run + BEGIN), tl.load(run + END), tl.load(about + LENGTH)
    if aligned:
        begin, end = tl.multiple_of(begin, ALIGNMENT), tl.multiple_of(end, ALIGNMENT)
        length = tl.multiple_of(length, ALIGNMENT)
    w_at = _at(state, tensor, BEFORE, dtype, aligned)
    x_at = _at(state, tensor, AFTER, dtype, aligned)
    outcome = tl.load(about + OUTCOME)
    own = slices + (tl.load(about + SLOT) + number) * SLICE_COLUMNS
    a, b = _get(own, A), _get(own, B)
    for start in range(begin, end, block):
        c = start + tl.arange(0, block)
        at, mask = number * length + c, c < end
        w, d = _read(w_at + at, x_at + at, mask, outcome, compute)
        _write(
            w_at + at,
            x_at + at,
            at,
            mask,
            w,
            d,
            a,
            b,
            outcome,
            state,
            tensor,
            seed,
            how,
            dtype,
            compute,
        )
