# Numba types these functions itself, and has no types of its own.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"
r"""What a wrapped optimizer did to many weights, turned into steps on spheres, compiled by Numba.

Of each weight there is w from before the step, and x, which holds w + d, or d itself. For a chunk
of about an L2 cache the kernel sums ‖w‖², ⟨w, d⟩ and ‖d‖² of each slice in float64, makes a and b
of them as :mod:`normwise.optim.motion` does, which is the ground truth, and writes w + (a − 1)·w +
b·d: so both are read once. Slices longer than a chunk need a second look. The result takes the
place of x, or of w, and then zeros are left in x for the next step.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload

from normwise.cpu_kernels import (
    CACHE_LINE,
    _address,
    _array,
    _carray,
    _inlined,
    _narrowed,
    _size_of,
    _take_number,
    _widened,
    compile_with_cache,
)
from normwise.optim.kernels._cpu_numba import (
    INNER_0,
    INNER_1,
    OUTER_0,
    OUTER_1,
    SLICE_0,
    SLICE_1,
    SLOT,
    TENSOR,
)

# What is made of a displacement; the names are those of normwise.optim.motion.
FREE, FIXED, RETRACT, GEODESIC = range(4)
# What x holds: w + d, or d; in place, the result is for w. See normwise.optim.motion.Outcome.
MOVED, FROM_ZERO, IN_PLACE = range(3)
# Columns of the table of tensors.
(BEFORE, AFTER, OUTER, SLICES, INNER, WHOLE, TOTALS, RADII, FIRST, LAST, PATH, RESULT) = range(12)
# Columns of the table of options: numbers of each tensor's step.
KEEP, LR, COS, SIN, FLOOR, NOISE, IS_RELATIVE = range(7)
# Columns of the tables of sums: ‖w‖², ⟨w, d⟩, ‖d‖², then a − 1 and b.
WW, WD, DD, A, B = range(5)
SUM_COLUMNS = 8
# Entries of the argument block.
TENSORS, CHUNKS, N_CHUNKS, OPTIONS, SUMS, RADIUS, COUNTER, PASS, THREADS = range(9)


def _as(number, like):
    """A float64 in the type of another number."""


@overload(_as, inline="always")
def _overload_as(number, like):
    return (lambda number, like: number) if like == types.float64 else _to_float32


def _to_float32(number, like):
    return np.float32(number)


@_inlined
def _sums(w, x, from_zero):
    """‖w‖², ⟨w, d⟩ and ‖d‖² of a piece of a slice."""
    ww = wd = dd = 0.0
    if from_zero:
        for i in range(len(w)):
            a, b = np.float64(_widened(w[i])), np.float64(_widened(x[i]))
            ww += a * a
            wd += a * b
            dd += b * b
    else:
        for i in range(len(w)):
            old = _widened(w[i])
            a, b = np.float64(old), np.float64(_widened(x[i]) - old)
            ww += a * a
            wd += a * b
            dd += b * b
    return ww, wd, dd


@_inlined
def _combine(w, x, a, b, result):
    """w + (a·w + b·d), where a is what the factor of w is more than 1."""
    a, b = _as(a, _widened(w[0])), _as(b, _widened(w[0]))
    if result == FROM_ZERO:
        for i in range(len(w)):
            old = _widened(w[i])
            x[i] = _narrowed(old + (a * old + b * _widened(x[i])), w[i])
    elif result == IN_PLACE:
        for i in range(len(w)):
            old = _widened(w[i])
            w[i] = _narrowed(old + (a * old + b * _widened(x[i])), w[i])
            x[i] = 0
    else:
        for i in range(len(w)):
            old = _widened(w[i])
            x[i] = _narrowed(old + (a * old + b * (_widened(x[i]) - old)), w[i])


@_inlined
def _ratio(a, b):
    """a/b, but zero of zero."""
    return a / b if b != 0 else a


@_inlined
def _coefficients(sums, path, options, radius):
    """a − 1 and b of a slice; see normwise.optim.motion."""
    ww, wd, dd = sums[WW], sums[WD], sums[DD]
    if path == FREE:
        return options[KEEP] - 1 - _ratio(wd, ww), 1.0
    norm = math.sqrt(ww)
    radial = _ratio(wd, norm)
    square = dd - radial * radial
    tangential = math.sqrt(square) if square > 0 else 0.0 * square
    if path == FIXED:
        back = _ratio(norm, math.hypot(norm, tangential))
        return (1 - _ratio(wd, ww)) * back - 1, back
    length = math.sqrt(dd)
    scale = 1.0
    if options[IS_RELATIVE] != 0:
        scale = options[LR] * _ratio(radius, length)
    elif options[FLOOR] != 0:
        scale = max(1.0, options[FLOOR] * _ratio(radius, length))
    if path == RETRACT:
        if length == 0:
            return 0.0, 0.0
        along = scale * radial + (radius if norm > 0 else 0.0)
        reached = math.hypot(along, scale * tangential)
        return radius * _ratio(_ratio(radius, norm), reached) - 1, radius * _ratio(scale, reached)
    if not tangential > options[NOISE] * length and square == square:
        return 0.0, 0.0
    cos, sin = options[COS], options[SIN]
    if options[IS_RELATIVE] == 0:
        angle = scale * tangential / radius
        cos, sin = math.cos(angle), math.sin(angle)
    share = _ratio(sin, tangential)
    return radius * _ratio(cos - share * radial, norm) - 1, radius * share


def _take_chunks(pointer):
    """Take chunks until there are none left, as ``_cpu_numba`` does."""
    like = _carray(pointer, 1)[0]
    block = _array(_address(pointer), 16, np.int64(0))
    threads, count = block[THREADS], block[N_CHUNKS]
    self = _take_number(block[COUNTER])
    for i in range(threads):
        owner = (self + i) % threads
        counter = block[COUNTER] + (owner + 1) * CACHE_LINE
        end = count * (owner + 1) // threads
        while True:
            chunk = count * owner // threads + _take_number(counter)
            if chunk >= end:
                break
            _chunk(block, chunk, like)


@_inlined
def _chunk(block, number, like):
    chunk = _array(block[CHUNKS] + number * 8 * 8, 8, np.int64(0))
    tensor = _array(block[TENSORS] + chunk[TENSOR] * 16 * 8, 16, np.int64(0))
    first_pass, whole = block[PASS] == 1, tensor[WHOLE] != 0
    if not first_pass and whole:
        return
    options = _array(block[OPTIONS] + chunk[TENSOR] * 8 * 8, 8, np.float64(0))
    size, result, path = np.int64(_size_of(like)), tensor[RESULT], tensor[PATH]
    inner = tensor[INNER]
    stride = tensor[SLICES] * inner
    slices = chunk[SLICE_1] - chunk[SLICE_0]
    part = chunk[INNER_1] - chunk[INNER_0]
    rows = chunk[OUTER_1] - chunk[OUTER_0]
    start = chunk[OUTER_0] * stride + chunk[SLICE_0] * inner + chunk[INNER_0]
    first = chunk[SLOT] if first_pass else tensor[TOTALS] + chunk[SLICE_0]
    sums = _array(block[SUMS] + first * SUM_COLUMNS * 8, slices * SUM_COLUMNS, np.float64(0))

    if first_pass:
        for s in range(slices):
            sums[s * SUM_COLUMNS + WW] = 0.0
            sums[s * SUM_COLUMNS + WD] = 0.0
            sums[s * SUM_COLUMNS + DD] = 0.0
        for row in range(rows):
            for s in range(slices):
                at = (start + row * stride + s * inner) * size
                w = _array(tensor[BEFORE] + at, part, like)
                x = _array(tensor[AFTER] + at, part, like)
                ww, wd, dd = _sums(w, x, result != MOVED)
                sums[s * SUM_COLUMNS + WW] += ww
                sums[s * SUM_COLUMNS + WD] += wd
                sums[s * SUM_COLUMNS + DD] += dd
        if not whole:
            return
        radii = _array(block[RADIUS] + (tensor[RADII] + chunk[SLICE_0]) * 8, slices, np.float64(0))
        for s in range(slices):
            own = sums[s * SUM_COLUMNS : (s + 1) * SUM_COLUMNS]
            own[A], own[B] = _coefficients(own, path, options, radii[s])
    for row in range(rows):
        for s in range(slices):
            at = (start + row * stride + s * inner) * size
            w = _array(tensor[BEFORE] + at, part, like)
            x = _array(tensor[AFTER] + at, part, like)
            _combine(w, x, sums[s * SUM_COLUMNS + A], sums[s * SUM_COLUMNS + B], result)


def _decide(tensors, chunks, options, sums, radii, first_tensor, last_tensor):
    """Add up what chunks have summed of slices that are longer, and make a and b of it."""
    for t in range(first_tensor, last_tensor):
        tensor = tensors[t]
        if tensor[WHOLE] != 0:
            continue
        totals = sums[tensor[TOTALS] : tensor[TOTALS] + tensor[SLICES]]
        totals[:] = 0
        for chunk in range(tensor[FIRST], tensor[LAST]):
            first = chunks[chunk, SLICE_0]
            for s in range(first, chunks[chunk, SLICE_1]):
                for column in range(DD + 1):
                    totals[s, column] += sums[chunks[chunk, SLOT] + s - first, column]
        for s in range(tensor[SLICES]):
            total = totals[s]
            radius = radii[tensor[RADII] + s]
            total[A], total[B] = _coefficients(total, tensor[PATH], options[t], radius)


_TYPES = {
    torch.float32: types.float32,
    torch.float64: types.float64,
    torch.bfloat16: types.uint16,
}
_INT = types.int64
_INT_TABLE, _TABLE = types.int64[:, ::1], types.float64[:, ::1]


@functools.cache
def kernels(dtype: torch.dtype) -> tuple[Any, Any]:
    """What takes chunks of weights of a dtype, a C function, and what decides between passes."""
    signature = types.void(types.CPointer(_TYPES[dtype]))
    task = compile_with_cache(numba.cfunc, signature, _take_chunks)
    return task, _compiled_decide()


@functools.cache
def _compiled_decide() -> Any:
    signature = types.void(_INT_TABLE, _INT_TABLE, _TABLE, _TABLE, types.float64[::1], _INT, _INT)
    return compile_with_cache(numba.njit, signature, _decide)
