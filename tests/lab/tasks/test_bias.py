"""Biased-MNIST's colours, and the estimate of dependence against its definition written out."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from normwise.lab.dependence import hsic
from normwise.lab.errors import UsageError
from normwise.lab.tasks import bias
from normwise.lab.tasks.bias import COLOURS, Bias, BiasOptions, coloured, colours


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("correlation", [0.1, 0.9, 0.99, 0.999, 1.0])
def test_of_each_digit_the_share_rho_has_its_colour_and_the_others_are_shared_evenly(
    correlation: float,
) -> None:
    labels = torch.randint(10, (5000,))
    given = colours(labels, correlation, draw())
    for digit in range(10):
        counts = torch.bincount(given[labels == digit], minlength=10)
        n = int(counts.sum())
        # The number of own colours is ρn as an exact fraction, rounded down.
        assert int(counts[digit]) == round(1000 * correlation) * n // 1000
        others = torch.cat([counts[:digit], counts[digit + 1 :]])
        assert int(others.max() - others.min()) <= 1


def test_a_share_that_floats_cannot_hold_is_not_rounded_down_to_one_image_less() -> None:
    labels = torch.arange(10).repeat(100)
    assert 0.29 * 100 < 29
    assert int((colours(labels, 0.29, draw()) == labels).sum()) == 290


def test_without_bias_the_colour_says_nothing_of_the_digit() -> None:
    labels = torch.arange(10).repeat(90)
    given = colours(labels, 0.1, draw())
    table = torch.zeros(10, 10).index_put_((labels, given), torch.ones(()), accumulate=True)
    assert torch.equal(table, torch.full((10, 10), 9.0))


def test_the_colours_are_drawn_from_the_generator_alone() -> None:
    labels = torch.randint(10, (300,))
    first = colours(labels, 0.5, draw())
    torch.rand(3)
    assert torch.equal(colours(labels, 0.5, draw()), first)
    assert not torch.equal(colours(labels, 0.5, draw(1)), first)


def test_ink_is_white_and_the_background_has_the_colour() -> None:
    images = torch.tensor([[[[0, 1], [255, 0]]]], dtype=torch.uint8).repeat(10, 1, 1, 1)
    pixels = ((coloured(images, torch.arange(10)) + 1) * 127.5).round().long()
    for k, colour in enumerate(COLOURS):
        assert pixels[k, :, 0, 0].tolist() == pixels[k, :, 1, 1].tolist() == list(colour)
        assert pixels[k, :, 0, 1].tolist() == pixels[k, :, 1, 0].tolist() == [255] * 3
    half = coloured(images, torch.arange(10), shrink=2)
    torch.testing.assert_close(half, coloured(images, torch.arange(10)).mean((2, 3), keepdim=True))


def by_definition(x: Tensor, y: Tensor) -> float:
    """Song et al. (2012), Eq. 3, with each expectation over distinct examples alone:
    E k(a,b)l(a,b) + E k(a,b) E l(c,d) − 2 E k(a,b)l(a,c)."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / 2)

    n = len(x)
    k = [[kernel(a, b) for b in x] for a in x]
    m = [[kernel(a, b) for b in y] for a in y]
    pairs = [k[a][b] * m[a][b] for a, b in itertools.permutations(range(n), 2)]
    triples = [k[a][b] * m[a][c] for a, b, c in itertools.permutations(range(n), 3)]
    quadruples = [k[a][b] * m[c][d] for a, b, c, d in itertools.permutations(range(n), 4)]
    return (
        sum(pairs) / len(pairs)
        + sum(quadruples) / len(quadruples)
        - 2 * sum(triples) / len(triples)
    )


@pytest.mark.parametrize("n", [4, 5, 9])
def test_hsic_is_its_definition_over_distinct_examples(n: int) -> None:
    x = torch.randn(n, 3, dtype=torch.float64)
    y = torch.cat([x[:, :1], torch.randn(n, 1, dtype=torch.float64)], dim=1)
    assert float(hsic(x, y)) == pytest.approx(by_definition(x, y), abs=1e-14)


def test_hsic_is_zero_on_average_where_there_is_no_dependence_and_above_it_where_there_is() -> None:
    def mean_and_error(dependence: float) -> tuple[float, float]:
        values = []
        for _ in range(400):
            x = torch.randn(12, 2, dtype=torch.float64)
            y = dependence * x + torch.randn(12, 2, dtype=torch.float64)
            values.append(hsic(x, y))
        every = torch.stack(values)
        return float(every.mean()), float(every.std()) / 20

    mean, error = mean_and_error(0.0)
    assert abs(mean) < 4 * error
    mean, error = mean_and_error(1.0)
    assert mean > 4 * error


def test_features_that_coincide_give_a_finite_gradient() -> None:
    x = torch.ones(6, 3, requires_grad=True)
    y = torch.randn(6, 3, requires_grad=True)
    gradients = torch.autograd.grad(hsic(x, y), (x, y))
    assert all(g.isfinite().all() for g in gradients)


def test_each_network_follows_its_own_part_of_the_loss() -> None:
    problem = object.__new__(Bias)  # without the data
    problem.options = BiasOptions(width=2, penalty=0.7)
    reference = _two_networks()
    problem.model = _two_networks()
    problem.model.load_state_dict(reference.state_dict())
    x, y = torch.randn(8, 3, 6, 6), torch.randint(10, (8,))
    problem.loss((x, y)).backward()

    for name, sign in (("f", 1), ("g", -1)):
        logits, _ = reference[name](x)
        dependence = hsic(reference["f"](x)[1], reference["g"](x)[1])
        own = nn.functional.cross_entropy(logits, y) + sign * 0.7 * dependence
        expected = torch.autograd.grad(own, list(reference[name].parameters()))
        for parameter, g in zip(problem.model[name].parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, g)


def _two_networks() -> nn.ModuleDict:
    from normwise.lab.tasks.bias import _Net

    return nn.ModuleDict({"f": _Net(2, 7), "g": _Net(2, 1)})


def test_the_biased_network_sees_no_shape() -> None:
    net = _two_networks()["g"].eval()
    x = torch.randn(4, 3, 6, 6)
    shuffled = x.flatten(2)[:, :, torch.randperm(36)].view_as(x)
    torch.testing.assert_close(net(x)[0], net(shuffled)[0])


def test_a_mistake_in_the_options_is_shown() -> None:
    with pytest.raises(UsageError, match=r"correlation 1\.5 is not allowed"):
        BiasOptions(correlation=1.5)
    with pytest.raises(UsageError, match=r"penalty -1 is not allowed"):
        BiasOptions(penalty=-1)
    with pytest.raises(UsageError, match=r"shrink 3 is not allowed: must divide 28"):
        BiasOptions(shrink=3)


def test_held_out_digits_are_of_the_training_ones_and_unbiased(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told apart by their ink: no digit is both trained on and tested on, and none is lost."""
    ink = torch.arange(1, 401)
    images = (torch.arange(28 * 28) < ink[:, None]).view(-1, 1, 28, 28).byte()
    labels = torch.arange(400) % 10
    data = SimpleNamespace(
        train=images.numpy(), train_labels=labels.numpy(), test=None, test_labels=None
    )
    data.test, data.test_labels = data.train[:10], data.train_labels[:10]
    monkeypatch.setattr(bias, "load", lambda *_: data)
    problem = Bias(BiasOptions(width=1, held_out=0.25), Path(), torch.device("cpu"))

    def inks(x: Tensor) -> list[int]:
        return [int(n) for n in (x == 1).all(1).flatten(1).sum(1)]

    assert (problem.examples, len(problem.test_labels)) == (300, 100)
    assert sorted(inks(problem.train) + inks(problem.unbiased)) == ink.tolist()
    of_own_colour = (problem.unbiased == problem.biased).flatten(1).all(1)
    assert of_own_colour.float().mean() == pytest.approx(0.1, abs=0.1)
