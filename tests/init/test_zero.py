"""ZerO: its matrices, and the rank that they give to training."""

import math

import pytest
import torch
from torch import nn

from normwise.geometry import View, norms
from normwise.init import hadamard, zero_, zero_init


def filled(*shape, **options):
    return zero_(torch.full(shape, torch.nan, dtype=torch.float64), **options)


@pytest.mark.parametrize("k", range(5))
def test_hadamard_matrices_are_of_signs_and_orthogonal(k):
    h = hadamard(k, torch.float64)
    assert set(h.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(h @ h.T, 2.0**k * torch.eye(2**k, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 3), (3, 7), (1, 4)])
def test_a_layer_that_does_not_widen_is_a_partial_identity(shape):
    assert torch.equal(filled(*shape), torch.eye(*shape, dtype=torch.float64))


@pytest.mark.parametrize(("shape", "k"), [((4, 3), 2), ((8, 1), 3), ((16, 8), 4)])
def test_to_a_power_of_two_the_columns_are_orthonormal(shape, k):
    """With the code's factor 2^(−k/2); the paper's text gives √2 in place of 1."""
    w = filled(*shape)
    assert set(w.abs().flatten().tolist()) == {2 ** (-k / 2)}
    ones = torch.ones(shape[1], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(w), ones)
    paper = w * 2 ** (-(k - 1) / 2) / 2 ** (-k / 2)
    torch.testing.assert_close(torch.linalg.svdvals(paper), math.sqrt(2) * ones)


def test_truncation_shrinks_singular_values():
    expected = torch.tensor([1.0, math.sqrt(3) / 2, math.sqrt(0.5)], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(filled(6, 3)), expected)


@pytest.mark.parametrize("shape", [(6, 3), (16, 5), (9, 8)])
def test_a_widening_layer_has_rows_of_one_norm(shape):
    """c·√in each: no slice starts with a larger effective learning rate than another."""
    c = 2 ** (-math.ceil(math.log2(shape[0])) / 2)
    rows = torch.full((shape[0],), c * math.sqrt(shape[1]), dtype=torch.float64)
    torch.testing.assert_close(norms(filled(*shape), View.channel()), rows)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_has_the_matrix_at_its_centre_and_zeros_around(dims):
    w = filled(6, 3, *[3] * dims)
    centre = w[(slice(None), slice(None), *[1] * dims)]
    assert torch.equal(centre, filled(6, 3))
    assert int(w.count_nonzero()) == 18


def test_a_network_starts_without_random_numbers_and_without_biases():
    def network():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))

    first, second = network(), network()
    assert zero_init(first, zero=["1"]) == ["0", "1", "3"]
    zero_init(second, zero=["1"])
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    assert int(first[1].weight.count_nonzero()) == 0
    assert all(int(first[i].bias.count_nonzero()) == 0 for i in (0, 1, 3))


def rank_of_what_is_learned(widening):
    """rank(W − I) of the middle layer of a 6-16-16-10 network of ReLUs, trained on noise."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False).double() for a, b in ((6, 16), (16, 16), (16, 10))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    zero_init(model, widening=widening)
    x = torch.randn(64, 6, dtype=torch.float64)
    y = torch.randn(64, 10, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - y).square().mean().mul(5).backward()
        optimizer.step()
    learned = layers[1].weight.detach() - torch.eye(16, dtype=torch.float64)
    return int(torch.linalg.matrix_rank(learned, rtol=1e-9))


def test_with_identities_a_wide_layer_learns_no_more_than_the_inputs_dimensions():
    """Theorem 1 of the paper: rank(W − I) ≤ the input's dimension, whatever the width."""
    assert rank_of_what_is_learned("identity") == 6


def test_a_hadamard_matrix_on_the_widening_layer_breaks_that_bound():
    assert rank_of_what_is_learned("hadamard") > 6


def test_what_it_is_not_defined_for_is_told_and_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(4, 4, 3, groups=2))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="ZerO is not defined for 1"):
        zero_init(model)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match=r"kernel of shape \(2,\); its sizes must be odd"):
        zero_init(nn.Conv1d(2, 2, 2))
    with pytest.raises(ValueError, match="zero names 'last', which is no linear"):
        zero_init(nn.Sequential(nn.Linear(2, 2)), zero=["last"])
    with pytest.raises(ValueError, match="finds no linear or convolutional layer"):
        zero_init(nn.ReLU())
    with pytest.raises(ValueError, match="Invalid widening: 'random'"):
        filled(3, 2, widening="random")
    with pytest.raises(ValueError, match="must have 2 dimensions"):
        filled(3)
    with pytest.raises(ValueError, match="Invalid k: -1"):
        hadamard(-1)
