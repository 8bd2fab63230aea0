"""torch.compile, torch.export, torch.func, autocast and ONNX over converted models."""

import importlib.util
import shutil

import pytest
import torch
from torch import nn

from normwise.reparam import center_weight_normalize, weight_normalize, weight_standardize


@pytest.fixture(autouse=True)
def _compile_afresh():
    torch._dynamo.reset()


CONVERSIONS = [weight_normalize, center_weight_normalize, weight_standardize]


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(144, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


def converted(convert):
    model = network()
    convert(model, only=["0", "2", "4"])
    return model


def x():
    return torch.randn(2, 2, 6, 6)


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_one_graph_whose_values_and_gradients_are_those_of_eager(convert, gain):
    model, data = network().double(), x().double()
    convert(model, gain=gain, only=["0", "2", "4"])
    model(data).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    compiled(data).square().sum().backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_inductor_computes_the_same(convert):
    model, data = converted(convert).double(), x().double()
    model(data).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True)(data).square().sum().backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_export_computes_the_same(convert):
    model, data = converted(convert).eval(), x()
    program = torch.export.export(model, (data,))
    torch.testing.assert_close(program.module()(data), model(data))


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_onnx_computes_the_same(convert, tmp_path):
    import onnxruntime

    model, data = converted(convert).eval(), x()
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (data,), path, dynamo=True)
    session = onnxruntime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: data.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_functional_call_and_per_sample_gradients(convert):
    model, data = converted(convert).double(), x().double()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, sample):
        return torch.func.functional_call(model, params, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, data)
    model(data).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad)


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_the_weight(convert, dtype):
    model = converted(convert)
    with torch.autocast("cpu", dtype=dtype):
        assert model[0].weight.dtype == torch.float32
        out = model(x())
        assert out.dtype == dtype
        out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    half = converted(convert).to(dtype)
    assert half[0].weight.dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        assert half[0].weight.dtype == dtype
