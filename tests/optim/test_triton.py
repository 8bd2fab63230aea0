"""What only the CUDA kernels have, in Triton's interpreter where there is no GPU."""

import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels are compiled by Triton")

import normwise
from normwise import View
from normwise.optim.kernels import cuda

SHAPES = [(5,), (3, 3), (40, 17), (300, 8), (6, 256), (2, 257), (2, 1200), (3, 4, 3, 3), (1, 5000)]


@pytest.mark.parametrize(
    "view", ["auto", None, *map(View.parse, ("channel", "channel(1)", "layer"))]
)
@pytest.mark.parametrize("log_block", [6, 8, 12])
def test_the_chunks_of_a_plan_hold_every_entry_once(view, log_block):
    params = [torch.zeros(s) for s in SHAPES if not isinstance(view, View) or len(s) > 1]
    plan = cuda.CUDAPlan(params, view, "free", log_block)
    held = [torch.zeros(p.numel(), dtype=torch.int64) for p in params]
    for tile, chunks in plan.launches:
        for chunk in chunks.tolist():
            t, first, begin, end = (
                chunk[i] for i in (cuda.k.TENSOR, cuda.k.SLICE, cuda.k.BEGIN, cuda.k.END)
            )
            row = plan.tensors[t]
            slices, inner = int(row[cuda.k.SLICES]), int(row[cuda.k.INNER])
            if tile.rows == 0:
                assert end - begin <= tile.columns
                held[t][begin:end] += 1
                continue
            assert tile.looped or end - begin <= tile.columns
            c = torch.arange(begin, end)
            for s in range(first, min(first + tile.rows, slices)):
                held[t][c // inner * slices * inner + s * inner + c % inner] += 1
    assert all((h == 1).all() for h in held)


@pytest.mark.parametrize("view", ["auto", View.channel(), None])
def test_the_number_of_launches_does_not_grow_with_the_model(view):
    few = [torch.zeros(64, n) for n in (9, 64, 576, 1000, 5000)]
    plans = [cuda.CUDAPlan(few * times, view, "free") for times in (1, 40)]
    assert len(plans[0].launches) == len(plans[1].launches) <= 5


def test_memory_is_of_the_order_of_slices_and_chunks():
    plan = cuda.CUDAPlan([torch.zeros(1000, 4608), torch.zeros(50_000, 768)], "auto", "free")
    tables = (plan.state, plan.tensors, plan.chunks, plan.runs, plan.slices)
    assert sum(t.nbytes for t in tables) < 0.04 * 4 * (1000 * 4608 + 50_000 * 768)


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5,), (6, 40), (2, 1100)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step + 1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_what_the_device_alone_knows(name, interpreted):
    """A learning rate, a decay, a loss scale and found_inf that are tensors; a step that is skipped
    leaves weights, moments, counts and gradients as they were."""
    ours, theirs = weights(), weights()
    lr, decay = (torch.tensor(x, dtype=torch.float64) for x in (1e-2, 0.1))
    options = {"view": "channel", **({"momentum": 0.9} if name == "SGDP" else {})}
    fused = getattr(normwise, name)(ours, lr=lr, weight_decay=decay, fused=True, **options)
    plain = getattr(normwise, name)(theirs, lr=1e-2, weight_decay=0.1, foreach=False, **options)
    fused.grad_scale = torch.tensor(64.0)
    for step, found_inf in enumerate((0.0, 1.0, 0.0)):
        set_gradients(theirs, step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad * 64
        fused.found_inf = torch.tensor(found_inf)
        before = [t.clone() for p in ours for t in (p.detach(), p.grad, *fused.state[p].values())]
        fused.step()
        after = [t for p in ours for t in (p.detach(), p.grad, *fused.state[p].values())]
        if found_inf:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        else:
            plain.step()
            for p, q in zip(ours, theirs, strict=True):
                assert torch.equal(p.grad, q.grad)
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [1.0, 3e-6])
def test_stochastic_rounding_is_unbiased(dtype, weight, interpreted):
    """A step of a small part of the spacing arrives in the mean, as near as chance allows."""
    if dtype == torch.bfloat16 and weight != 1.0:
        pytest.skip("bfloat16 has the range of float32")
    n = 4000
    w = torch.full((n,), weight, dtype=dtype)
    above = torch.nextafter(w[0], torch.tensor(math.inf, dtype=dtype)).double()
    spacing = (above - w[0].double()).item()
    p = w.clone().requires_grad_()
    p.grad = torch.full((n,), -1.0, dtype=dtype)
    normwise.SGDP([p], lr=0.3 * spacing, fused=True, stochastic_rounding=True).step()
    moved = (p.detach().double() - w.double()) / spacing
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert abs(moved.mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)


def test_each_step_rounds_with_numbers_of_its_own(interpreted):
    p = torch.full((500,), 1.0, dtype=torch.bfloat16).requires_grad_()
    optimizer = normwise.SGDP([p], lr=2.0**-9, fused=True, stochastic_rounding=True)
    moves = []
    for _ in range(2):
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        moves.append(p.detach() != before)
    assert not torch.equal(*moves)


@pytest.mark.slow
@pytest.mark.parametrize("auto", [False, True])
def test_the_kernels_compile_for_a_gpu(auto):
    """To machine code for compute capability 8.0, which Triton can do without such a device."""
    code = f"""
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from normwise.optim.kernels import cuda

k, kernels = cuda.k, cuda.kernels
how = k.ADAM | k.BUFFERED | k.SCALED | {auto} * k.GATED
common = dict(how=how, dtype=tl.bfloat16, compute=tl.float32)
forms = dict(rows=16, columns=256, looped=False, strided=False, aligned=True)
for kernel, constants in (
    (kernels.prepare, dict(how=how, block=256)),
    (kernels.flat_pass, dict(**common, block=4096, aligned=True)),
    (kernels.first_pass, dict(**common, **forms)),
    (kernels.decide, dict(how=how, block=256)),
    (kernels.second_pass, dict(**common, block=4096)),
):
    numbers = dict(seed="i32", count="i32", scale_at="*fp32", found_inf_at="*fp32")
    signature = {{
        name: "constexpr" if name in constants else numbers.get(name, "*i64")
        for name in kernel.arg_names
    }}
    indexed = {{(kernel.arg_names.index(name),): x for name, x in constants.items()}}
    source = ASTSource(fn=kernel, signature=signature, constexprs=indexed)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
"""
    run_without_interpreter(code)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["FREE", "FIXED", "RETRACT", "GEODESIC"])
def test_the_kernels_around_another_optimizer_compile_for_a_gpu(path):
    code = f"""
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from normwise.optim.kernels import displaced_cuda

k, kernels = displaced_cuda.k, displaced_cuda.kernels
kind = dict(noise=1e-7, path=k.{path})
dtypes = dict(dtype=tl.bfloat16, compute=tl.float32)
short = dict(rows=16, columns=256, looped=False, strided=False, aligned=True)
long = dict(rows=16, columns=64, looped=True, strided=True, aligned=False)
for kernel, constants in (
    (kernels.move, dict(**short, **kind, how=k.RELATIVE | k.STOCHASTIC, **dtypes)),
    (kernels.move, dict(**long, **kind, how=k.FLOORED, **dtypes)),
    (kernels.gather, dict(**kind, how=0, compute=tl.float32, block=1024)),
    (kernels.finish, dict(aligned=True, how=0, **dtypes, block=4096)),
):
    signature = {{
        name: "constexpr" if name in constants else "i32" if name == "seed" else "*i64"
        for name in kernel.arg_names
    }}
    indexed = {{(kernel.arg_names.index(name),): x for name, x in constants.items()}}
    source = ASTSource(fn=kernel, signature=signature, constexprs=indexed)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
"""
    run_without_interpreter(code)


def run_without_interpreter(code):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
