"""Merges: what an average does to norms, and where a scale matters."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from normwise.balancing import expected_shrink, learn_gamma, merge


def perturbed(model, count=3, size=0.3):
    """Copies with noise, in which each parameter has the norm that it had."""
    models = [copy.deepcopy(model) for _ in range(count)]
    with torch.no_grad():
        for m in models:
            for p in m.parameters():
                p.add_(size * p.norm() / math.sqrt(p.numel()) * torch.randn_like(p))
            for name, p in m.named_parameters():
                if p.any():  # a bias of zeros, to which the noise is in proportion, has none
                    p.mul_(model.get_parameter(name).norm() / p.norm())
    return models


def test_the_plain_average_is_fedavg(network):
    model, _, report = network("convolutions")
    models = perturbed(model)
    merged = merge(models, report, weights=[0.5, 0.3, 0.2], how="average", align=False).model
    for name, p in merged.named_parameters():
        a, b, c = (m.get_parameter(name) for m in models)
        torch.testing.assert_close(p, 0.5 * a + 0.3 * b + 0.2 * c)


@pytest.mark.parametrize("how", ["average", "sphere"])
def test_copies_merge_to_what_they_are(network, how):
    model, x, report = network("convolutions")
    merged = merge([model] * 3, report, how=how)
    torch.testing.assert_close(merged.model(x), model(x), rtol=1e-10, atol=1e-12)
    assert all(s.measured == pytest.approx(1, rel=1e-12) for s in merged.shrinks.values())


def test_rescaled_copies_merge_to_the_same_function_only_when_aligned(network):
    model, x, report = network("mlp")
    other = copy.deepcopy(model)
    report.rescale_(other, seed=8)
    aligned = merge([model, other], report).model
    torch.testing.assert_close(aligned(x), model(x), rtol=1e-9, atol=1e-10)
    plain = merge([model, other], report, align=False).model
    assert not torch.allclose(plain(x), model(x), rtol=1e-2)


def test_on_the_sphere_directions_are_averaged_and_norms_do_not_shrink(network):
    model, _, report = network("convolutions")
    models = perturbed(model)
    rows = torch.stack([m[0].weight.detach().flatten(1) for m in models])
    lengths = rows.norm(dim=2)
    direction = F.normalize((rows / lengths[..., None]).mean(0))
    merged = merge(models, report, align=False)
    found = merged.model[0].weight.detach().flatten(1)
    torch.testing.assert_close(F.normalize(found), direction)
    torch.testing.assert_close(found.norm(dim=1), lengths.mean(0))
    plain = merge(models, report, how="average", align=False).model[0].weight.detach()
    assert (plain.flatten(1).norm(dim=1) < lengths.mean(0)).all()


def test_the_mean_of_equal_norms_shrinks_as_its_cosines_say():
    for count in (2, 5):
        basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:count]
        shared = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][0]
        vectors = F.normalize(basis + 0.7 * shared)
        gram = vectors @ vectors.T
        c = float((gram.sum() - count) / (count * (count - 1)))
        assert expected_shrink(c, count) == pytest.approx(float(vectors.mean(0).norm()), rel=1e-12)


def test_the_report_of_a_merge_tells_the_shrink_and_where_scale_matters(network):
    model, _, report = network("convolutions")
    shrinks = merge(perturbed(model), report, align=False).shrinks
    assert not shrinks["0.weight"].matters
    assert all(shrinks[name].matters for name in ("1.weight", "3.weight", "6.weight", "8.weight"))
    for name in ("0.weight", "1.weight", "3.weight", "6.weight", "8.weight"):
        assert shrinks[name].measured < 1
        assert shrinks[name].measured == pytest.approx(shrinks[name].expected, rel=1e-12)


def test_gamma_scales_what_matters_and_nothing_else(network):
    model, _, report = network("convolutions")
    plain = merge([model] * 2, report, align=False).model
    scaled = merge([model] * 2, report, align=False, gamma=0.5).model
    assert torch.equal(scaled[0].weight, plain[0].weight)
    for name, p in scaled.named_parameters():
        if name not in ("0.weight",):
            torch.testing.assert_close(p, 0.5 * plain.get_parameter(name))


def test_the_derivative_by_log_gamma_is_that_of_euler(network):
    """∂L/∂y = ⟨∇L, w⟩, to which invariant weights contribute nothing."""
    model, x, report = network("convolutions")
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 2)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    parts = {
        name: (p.detach() * g).sum().item()
        for (name, p), g in zip(model.named_parameters(), grads, strict=True)
    }
    assert abs(parts["0.weight"]) < 1e-4 * max(abs(v) for v in parts.values())

    def at(gamma):
        with torch.no_grad():
            merged = merge([model] * 2, report, align=False, gamma=gamma).model
            return float(F.cross_entropy(merged(x), torch.arange(len(x)) % 2))

    h = 1e-4
    numeric = (at(math.exp(h)) - at(math.exp(-h))) / (2 * h)
    analytic = sum(value for name, value in parts.items() if name != "0.weight")
    assert numeric == pytest.approx(analytic, rel=1e-5)


def test_the_learned_gamma_is_where_the_loss_is_least_along_the_scale(network):
    """A regression whose targets are the outputs at γ = 0.8 is solved by it."""
    model, x, report = network("convolutions")
    saved = copy.deepcopy(model.state_dict())
    target = merge([model] * 2, report, align=False, gamma=0.8).model(x).detach()
    gamma = learn_gamma(model, report, lambda m: F.mse_loss(m(x), target), steps=200)
    assert gamma == pytest.approx(0.8, abs=2e-3)
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())


def test_models_are_only_read(network):
    model, _, report = network("mlp")
    saved = copy.deepcopy(model.state_dict())
    merge([model, copy.deepcopy(model)], report)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


def test_bad_arguments_are_refused(network):
    model, _, report = network("mlp")
    for models, options in (
        ([model], {}),
        ([model] * 2, {"weights": [0.5, 0.6]}),
        ([model] * 2, {"how": "median"}),
        ([model] * 2, {"gamma": 0.0}),
    ):
        with pytest.raises(ValueError, match="Invalid"):
            merge(models, report, **options)
