"""Products of factors: least mass by scale, and for LoRA's pairs over all invertible matrices."""

import pytest
import torch

import normwise as nw
from normwise.balancing import balance_factors, balance_lora


def test_components_end_at_their_geometric_mean_and_the_tensor_stays():
    factors = [torch.randn(n, 3, dtype=torch.float64) * s for n, s in ((4, 9), (5, 1), (6, 0.1))]
    tensor = torch.einsum("ir,jr,kr->ijk", *factors)
    expected = torch.stack([f.norm(dim=0) for f in factors]).log().mean(0).exp()
    balance_factors(factors)
    for f in factors:
        torch.testing.assert_close(f.norm(dim=0), expected)
    torch.testing.assert_close(torch.einsum("ir,jr,kr->ijk", *factors), tensor)


def test_a_lora_pair_scaled_by_rank_is_what_symmetries_say(network):
    model, _, report = network("lora")
    a, b = model.a.detach().clone(), model.b.detach().clone()
    balance_factors([a, b], dims=[0, 1])
    nw.balance(model, report)
    torch.testing.assert_close(model.a.detach(), a)
    torch.testing.assert_close(model.b.detach(), b)


@pytest.mark.parametrize(("rank", "inner"), [(3, 6), (8, 6)])
def test_a_lora_pairs_least_mass_is_twice_the_nuclear_norm(rank, inner):
    a, b = torch.randn(rank, inner).double(), 7 * torch.randn(9, rank).double()
    product = b @ a
    after = balance_lora(a, b)
    torch.testing.assert_close(b @ a, product)
    assert after == pytest.approx(2 * float(torch.linalg.svdvals(product).sum()), rel=1e-12)
    torch.testing.assert_close(a @ a.T, b.T @ b)


def test_components_that_are_zero_stay_as_they_are():
    a, b = torch.randn(2, 5), torch.zeros(4, 2)
    b[:, 1] = 1
    row = a[0].clone()
    balance_factors([a, b], dims=[0, 1])
    assert torch.equal(a[0], row)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="components"):
        balance_factors([torch.ones(3, 2), torch.ones(3, 4)])
    with pytest.raises(ValueError, match="Invalid pair"):
        balance_lora(torch.ones(3, 2), torch.ones(4, 2))
