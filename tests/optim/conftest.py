"""Both backends of the fused step, where there is no GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from normwise.optim import kernels

# For the table of optimizers that all tests share.
sys.path.append(str(Path(__file__).parent))


def use_triton_on_the_cpu(monkeypatch, log_block):
    """Run the CUDA kernels in Triton's interpreter, on CPU tensors and with small tiles."""
    import triton.language as tl
    from triton import knobs
    from triton.runtime import interpreter

    from normwise.optim.kernels import cuda, displaced_cuda

    if not knobs.runtime.interpret:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")
    monkeypatch.setitem(kernels._BACKENDS, "cpu", kernels._BACKENDS["cuda"])
    for plan in (cuda.CUDAPlan, displaced_cuda.DisplacedCUDAPlan):
        monkeypatch.setattr(plan.__init__, "__defaults__", (log_block,))

    # It cuts float32 off to bfloat16, where devices round to nearest even.
    convert = interpreter._convert_float

    def convert_rounded(x, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            x = torch.tensor(x).bfloat16().float().numpy()
        return convert(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert_rounded)

    # It patches the language again at each call of a function within a kernel, which
    # is most of the time it takes; once for each module that such functions are from will do.
    patch, patched = interpreter._patch_lang, {}

    class Patched:
        def __init__(self, fn):
            module = id(fn.__globals__)
            if module not in patched:
                patched[module] = patch(fn)

        def restore(self):
            while patched:
                patched.popitem()[1].restore()

    monkeypatch.setattr(interpreter, "_patch_lang", Patched)


def require(compiler):
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"{compiler} is not installed")


@pytest.fixture(params=["numba", "triton", "torch"])
def compiler(request, monkeypatch):
    """Whose kernels ``fused=True`` takes on CPU tensors."""
    require(request.param)
    if request.param == "torch":
        from normwise.optim.kernels import stock

        monkeypatch.setitem(kernels._BACKENDS, "cpu", kernels._STOCK["cpu"])
        # So that weights of a test have several pieces, and slices longer than one.
        monkeypatch.setattr(stock, "PIECE", 1 << 12)
        monkeypatch.setattr(stock, "FLAT", 1 << 9)
    if request.param == "triton":
        use_triton_on_the_cpu(monkeypatch, log_block=8)
    return request.param


@pytest.fixture(params=["numba", "triton"])
def kernel(request, monkeypatch):
    """Whose kernels change on CPU tensors what a wrapped optimizer did."""
    require(request.param)
    if request.param == "triton":
        use_triton_on_the_cpu(monkeypatch, log_block=8)
    return request.param


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels for CUDA on CPU tensors, with tiles of 256 entries."""
    require("triton")
    use_triton_on_the_cpu(monkeypatch, log_block=8)


@pytest.fixture
def numba():
    require("numba")
