"""What holds for every parametrization: it compiles, exports, and says what regularizers need."""

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.reparam import (
    AOL,
    BinaryConnect,
    CenteredWeightNorm,
    ColumnConditioning,
    RowColumnConditioning,
    StatsQ,
    WeightNorm,
    WeightStandardization,
    reparametrize,
)
from normwise.reparam.functional import weight_norm

METHODS = [
    AOL,
    BinaryConnect,
    CenteredWeightNorm,
    ColumnConditioning,
    RowColumnConditioning,
    StatsQ,
    WeightNorm,
    WeightStandardization,
]


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.mark.parametrize("method", METHODS)
def test_it_compiles_to_one_graph_with_the_same_gradients(method):
    model, x = network().eval(), torch.randn(2, 2, 4, 4)
    reparametrize(model, method, only=["*"], skip=["1"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for f in (model, compiled):
        model.zero_grad()
        f(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, of_graph in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, of_graph)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_half_and_are_finite(method, dtype):
    w = torch.randn(6, 5).to(dtype)
    out = method()(*w_and_gain(method(), w))
    assert out.dtype == dtype
    assert out.isfinite().all()


def w_and_gain(parametrization, w):
    originals = parametrization.right_inverse(w)
    return originals if isinstance(originals, tuple) else (originals,)


@pytest.mark.parametrize("method", METHODS)
def test_the_shifted_decay_acts_where_a_scale_is_divided_out_and_nowhere_else(method):
    model = network()
    reparametrize(model, method, only=["0"])
    if method.divides_by is None:
        with pytest.raises(ValueError, match="finds no normalized weight"):
            nw.EpsilonShiftedL2(model, weight_decay=0.1, eps=1e-3)
    else:
        regularizer = nw.EpsilonShiftedL2(model, weight_decay=0.1, eps=1e-3)
        assert regularizer.groups[0].names == ("0.weight",)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", METHODS)
def test_the_memory_format_changes_nothing(method, memory_format):
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    expected = method()(*w_and_gain(method(), w))
    laid_out = w.contiguous(memory_format=memory_format)
    torch.testing.assert_close(method()(*w_and_gain(method(), laid_out)), expected)


def test_a_weight_of_each_sample_is_normalized_under_vmap():
    generated = torch.randn(5, 4, 3, dtype=torch.float64)
    found = torch.vmap(lambda w: weight_norm(w, nw.View.channel()))(generated)
    torch.testing.assert_close(found, generated / generated.norm(dim=2, keepdim=True))
