# Numba types these functions itself, and has no types of its own.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"
"""What the kernels of several rooms share on the CPU: compiling with Numba, and torch's threads.

Numba's cache looks at the file of a kernel alone: who changes what is in this one empties it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba.extending
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import overload

CACHE_LINE = 64
# How the entries of a dtype are seen by kernels; bfloat16 as its bits.
TYPES = {
    torch.float32: types.float32,
    torch.float64: types.float64,
    torch.bfloat16: types.uint16,
}
# Sums may be reordered and products contracted; nothing is assumed about NaN, infinity or zero.
OPTIONS_OF_COMPILER: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",  # x/0 is not an exception, which would keep loops from being vectorized
    "fastmath": {"reassoc", "contract"},
}
logger = logging.getLogger(__name__)


# What is only called from other kernels is kept with them. Numba's own types do not say what its
# decorators return.
_inlined: Any = functools.partial(numba.njit, **OPTIONS_OF_COMPILER)
# Products and differences that must stay grouped as they are written.
_as_written: Any = functools.partial(
    numba.njit, **{**OPTIONS_OF_COMPILER, "fastmath": {"contract"}}
)
_intrinsic: Any = numba.extending.intrinsic
_carray: Any = numba.carray


def compile_with_cache(compiler: Callable[..., Any], signature: Any, function: Any) -> Any:
    """Compile a function, or load it from Numba's cache; no fault of the cache is an error.

    Where there is no directory to write to, the disk is full, or a file is damaged, it is compiled
    anew, and a damaged index is emptied.

    Args:
        compiler: ``numba.njit`` or ``numba.cfunc``.
        signature: the types of the function, for which it is compiled at once.
        function: what to compile.
    """
    try:
        return compiler(signature, cache=True, **OPTIONS_OF_COMPILER)(function)
    except Exception as error:  # of reading: whatever a damaged pickle or machine code brings
        logger.warning(
            "Numba's cache cannot be used (%s: %s): compiling %s anew in this process; free its "
            "disk or set NUMBA_CACHE_DIR",
            type(error).__name__,
            str(error).partition("\n")[0],
            function.__name__.strip("_"),
        )
    with contextlib.suppress(Exception):
        numba.njit(cache=True)(function)._cache.flush()
    return compiler(signature, cache=False, **OPTIONS_OF_COMPILER)(function)


@_intrinsic
def _pointer(context: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to values of the type of ``like``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), generate


@_intrinsic
def _address(context: Any, pointer: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], context.get_value_type(types.int64))

    return types.int64(pointer), generate


@_intrinsic
def _take_number(context: Any, address: Any) -> Any:
    """Add 1 to the int64 at an address, atomically; return what was there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        int64 = context.get_value_type(types.int64)
        pointer = builder.inttoptr(arguments[0], int64.as_pointer())
        return builder.atomic_rmw("add", pointer, int64(1), "monotonic")

    return types.int64(address), generate


@_intrinsic
def _call(context: Any, function: Any, argument: Any) -> Any:
    """Call the function at an address with an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        int64 = context.get_value_type(types.int64)
        kind = ir.FunctionType(ir.VoidType(), [int64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(function, argument), generate


@_intrinsic
def _bits_to_float(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@_intrinsic
def _float_to_bits(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


def _widened(x):
    """A stored entry as a number to compute with; bfloat16 is stored as its bits, a uint16."""


@overload(_widened, inline="never")
def _overload_widened(x):
    if x == types.uint16:
        return lambda x: _bits_to_float(np.uint32(x) << np.uint32(16))
    return lambda x: x


def _narrowed(x, like):
    """A number as an entry to store, rounded to nearest even."""


@overload(_narrowed, inline="never")
def _overload_narrowed(x, like):
    if like != types.uint16:
        return lambda x, like: x

    def to_bfloat16(x, like):
        bits = _float_to_bits(x)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        if x != x:
            return np.uint16(0x7FC0)
        return np.uint16((bits + half) >> np.uint32(16))

    return to_bfloat16


@_inlined
def _array(address, length, like):
    return _carray(_pointer(address, like), length)


@_intrinsic
def _size_of(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size = context.get_abi_sizeof(context.get_value_type(signature.args[0]))
        return context.get_value_type(types.int64)(size)

    return types.int64(value), generate


@functools.cache
def openmp() -> Callable[..., None] | None:
    """``GOMP_parallel`` of the OpenMP library that torch runs on, if it has one.

    Threads of our own would compete with torch's, which spin for milliseconds after an operator.
    """
    for library in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / library
        if path.exists():
            try:
                start = ctypes.CDLL(str(path)).GOMP_parallel
            except (OSError, AttributeError):
                return None
            start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            start.restype = None
            return start
    return None


def _in_numbas_threads(function, argument, threads):
    for _ in numba.prange(threads):
        _call(function, argument)


@functools.cache
def in_numbas_threads() -> Callable[[int, int, int], None]:
    """What calls a compiled function by its address on some threads of Numba's own.

    Numba's simplest pool ends the process where two threads use it at once; so they take turns.
    """
    signature = types.void(types.int64, types.int64, types.int64)
    compiler = functools.partial(numba.njit, parallel=True)
    run = compile_with_cache(compiler, signature, _in_numbas_threads)
    turn = threading.Lock()

    def start(function: int, argument: int, threads: int) -> None:
        with turn:
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            run(function, argument, threads)

    return start


# ctypes lets go of the interpreter's lock during the call.
_DIRECTLY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_on_threads(function: int, argument: int, threads: int) -> None:
    """Call a compiled function on some threads at once, each with the same argument.

    The threads are torch's own, where they can be had, else Numba's.

    Args:
        function, argument: addresses, of a ``void (*)(void *)`` and of what it is given.
        threads: how many.
    """
    parallel = openmp() if threads > 1 else None
    if threads == 1:
        _DIRECTLY(function)(argument)
    elif parallel is None:
        in_numbas_threads()(function, argument, threads)
    else:
        parallel(function, argument, threads, 0)
