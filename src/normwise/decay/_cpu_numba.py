# Numba types these functions itself, and has no types of its own.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"
"""Decay in one pass over the memory, compiled by Numba and run on torch's own threads.

``shift`` adds φ·(W − ε·D) to a target, where D is W/‖W‖ or (W − m)/v of each slice; sums are
float64. ``spare`` subtracts φ·w₀ from the entries of a weight that the step has moved towards zero,
or not at all.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from normwise.cpu_kernels import (
    TYPES,
    _address,
    _array,
    _as_written,
    _carray,
    _inlined,
    _pointer,
    _size_of,
    _take_number,
    compile_with_cache,
)

# What is done: ε-shift by the norm, by the standard deviation, or cautious decay.
BY_NORM, BY_STD, SPARE = range(3)
# Columns of the table of items: the addresses of what is read and what is written; slices, entries
# of each; what is done; how many slices make a chunk, and the number of its first chunk.
SOURCE, TARGET, SLICES, LENGTH, KIND, AT_ONCE, FIRST = range(7)
COLUMNS = 8
# Columns of the table of numbers.
FACTOR, EPS = range(2)
# Entries of the argument block.
ITEMS, N_ITEMS, N_CHUNKS, NUMBERS, COUNTER = range(5)
# Added to a variance, as in normwise.decay.epsilon_shifted: a constant slice has no direction.
_LEAST_VARIANCE = 1e-30


@_inlined
def _sum(w):
    total = 0.0
    for i in range(len(w)):
        total += np.float64(w[i])
    return total


@_inlined
def _squares_about(w, mean):
    total = 0.0
    for i in range(len(w)):
        apart = np.float64(w[i]) - mean
        total += apart * apart
    return total


@_as_written
def _apart(x, mean):
    """x − m, which is 0 in a constant slice, where ε/v is beyond all bounds."""
    return x - mean


@_inlined
def _add(w, target, factor, share, mean):
    one = w.dtype.type
    a, b, m = one(factor), one(-factor * share), one(mean)
    for i in range(len(w)):
        target[i] += a * w[i] + b * _apart(w[i], m)


@_inlined
def _add_to_itself(w, factor, share, mean):
    """The same in place: loops over memory that overlaps are not vectorized."""
    one = w.dtype.type
    a, b, m = one(1 + factor), one(-factor * share), one(mean)
    for i in range(len(w)):
        w[i] = a * w[i] + b * _apart(w[i], m)


@_inlined
def _shift(w, target, in_place, kind, factor, eps):
    """target ← target + φ(W − ε·D)."""
    mean = 0.0
    if kind == BY_STD:
        mean = _sum(w) / len(w)
        length = math.sqrt(_squares_about(w, mean) / len(w) + _LEAST_VARIANCE)
    else:
        length = math.sqrt(_squares_about(w, 0.0))
    share = eps / length if length > 0 else 0.0
    if in_place:
        _add_to_itself(w, factor, share, mean)
    else:
        _add(w, target, factor, share, mean)


@_inlined
def _spare(before, w, factor):
    """w ← w − φ·w₀ where u·w₀ ≥ 0, with u = w₀ − w, by signs: the product could vanish."""
    d = w.dtype.type(factor)
    for i in range(len(w)):
        was = before[i]
        up, down = w[i] > was, w[i] < was
        away = (up and was > 0) or (down and was < 0)
        w[i] -= w.dtype.type(0) if away else d * was


@_inlined
def _item_of(items, chunk):
    """The last item whose first chunk is not beyond this one."""
    low, high = 0, len(items)
    while high - low > 1:
        middle = (low + high) // 2
        if items[middle, FIRST] <= chunk:
            low = middle
        else:
            high = middle
    return low


def _take_chunks(pointer):
    """Take chunks until there are none left. The type of the pointer is that of the weights."""
    like = _carray(pointer, 1)[0]
    block = _array(_address(pointer), 8, np.int64(0))
    size = np.int64(_size_of(like))
    items = _carray(_pointer(block[ITEMS], np.int64(0)), (block[N_ITEMS], COLUMNS))
    while True:
        chunk = _take_number(block[COUNTER])
        if chunk >= block[N_CHUNKS]:
            break
        number = _item_of(items, chunk)
        item = items[number]
        numbers = _array(block[NUMBERS] + number * 2 * 8, 2, np.float64(0))
        factor, eps = numbers[FACTOR], numbers[EPS]
        first = (chunk - item[FIRST]) * item[AT_ONCE]
        slices = min(item[AT_ONCE], item[SLICES] - first)
        if item[KIND] == SPARE:
            at = first * size
            _spare(
                _array(item[SOURCE] + at, slices, like),
                _array(item[TARGET] + at, slices, like),
                factor,
            )
            continue
        length = item[LENGTH]
        in_place = item[SOURCE] == item[TARGET]
        for s in range(first, first + slices):
            source = _array(item[SOURCE] + s * length * size, length, like)
            target = _array(item[TARGET] + s * length * size, length, like)
            _shift(source, target, in_place, item[KIND], factor, eps)


@functools.cache
def kernel(dtype: torch.dtype) -> Any:
    """The compiled function for weights of a dtype; its ``address`` takes the block's."""
    return compile_with_cache(numba.cfunc, types.void(types.CPointer(TYPES[dtype])), _take_chunks)
