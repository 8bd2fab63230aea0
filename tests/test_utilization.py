"""The rank of a weight that its data use."""

import pytest
import torch
from torch import nn

from normwise.theory import utilization, utilized_ranks


def matrix(rows, columns):
    return torch.randn(rows, columns, dtype=torch.float64)


def test_inputs_of_rank_3_use_rank_3_and_lose_nothing():
    w, x = matrix(7, 9), matrix(40, 3) @ matrix(3, 9)
    used = utilization(w, x.T @ x, inputs=1.0, outputs=1.0)
    assert used.inputs == 3
    assert used.rank <= 3
    assert used.share == used.rank / 7
    torch.testing.assert_close(x @ used.projected.T, x @ w.T, rtol=1e-9, atol=1e-9)
    a, b = used.factors
    assert a.shape == (7, used.rank)
    torch.testing.assert_close(a @ b, used.projected)


def test_projecting_twice_is_projecting_once_and_more_share_is_more_rank():
    w, x = matrix(6, 8), matrix(100, 8) * torch.logspace(0, -3, 8, dtype=torch.float64)
    c = x.T @ x
    found = [utilization(w, c, inputs=e, outputs=e) for e in (0.5, 0.9, 0.99, 0.9999, 1.0)]
    ranks = [u.rank for u in found]
    assert ranks == sorted(ranks)
    assert [u.inputs for u in found] == sorted(u.inputs for u in found)
    for u in found:
        again = utilization(u.projected, c, inputs=1.0, outputs=1.0)
        torch.testing.assert_close(again.projected, u.projected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[-1].projected, w)
    assert found[-1].factors is None


def test_utilization_ignores_the_scale_of_the_weight_and_not_those_of_rows():
    w, x = matrix(6, 8), matrix(100, 8) * torch.logspace(0, -2, 8, dtype=torch.float64)
    c = x.T @ x
    plain, scaled = utilization(w, c), utilization(1e5 * w, 1e-3 * c)
    assert (plain.inputs, plain.outputs) == (scaled.inputs, scaled.outputs)
    rows = torch.logspace(0, -6, 6, dtype=torch.float64)
    assert utilization(rows.unsqueeze(1) * w, c).outputs < plain.outputs


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="Invalid shapes: weight"):
        utilization(matrix(2, 3), torch.eye(2))
    with pytest.raises(ValueError, match="Invalid inputs: 0"):
        utilization(matrix(2, 3), torch.eye(3), inputs=0)
    with pytest.raises(ValueError, match="finds no linear layer"):
        utilized_ranks(nn.ReLU(), [torch.randn(2)])


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "same", "dilation": 2},
        {"stride": 2},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_hooks_collect_the_patches_that_a_convolution_multiplies(options):
    """W·C·Wᵀ is Σ y·yᵀ over outputs without bias, whatever the geometry; batches add up."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False, **options), nn.ReLU()).double()
    batches = [torch.randn(4, 2, 7, 7, dtype=torch.float64) for _ in range(2)]
    used = utilized_ranks(model, batches, inputs=1.0, outputs=1.0)["0"]
    y = torch.cat([model[0](x).transpose(0, 1).flatten(1) for x in batches], 1).detach()
    w = model[0].weight.detach().flatten(1)
    torch.testing.assert_close(used.projected, w)
    assert used.rank == int(torch.linalg.matrix_rank(y))
    assert not model[0]._forward_pre_hooks


def test_the_layers_of_a_model_report_the_rank_of_what_reaches_them():
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 8), nn.Linear(8, 8)).double()
    found = utilized_ranks(model, [matrix(50, 6)], inputs=1.0, outputs=1.0)
    assert [used.inputs for used in found.values()] == [
        6,
        2,
        3,
    ]  # behind the second, 2 and its bias
    assert found["2"].share == 3 / 8
    named = utilized_ranks(
        model, [{"x": matrix(50, 6)}], call=lambda m, batch: m(batch["x"]), outputs=0.9
    )
    assert set(named) == {"0", "1", "2"}
