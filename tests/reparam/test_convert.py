"""Conversion by rules, and what the report says of them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from normwise.reparam import (
    CenteredWeightNorm,
    WeightNorm,
    center_weight_normalize,
    fold,
    reparametrize,
    weight_normalize,
    weight_standardize,
)


class Zoo(nn.Module):
    """One of everything that the rules speak of."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.thin = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.hidden = nn.Linear(4, 6)
        self.embedding = nn.Embedding(5, 6)
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.thin(self.depthwise(self.stem(x)))
        x = self.hidden(self.up(self.grouped(x)).mean((2, 3)))
        x = x[:, None] + self.embedding.weight
        return self.head(self.lstm(x)[0][:, -1])


def x():
    return torch.randn(2, 1, 6, 6)


def test_the_rules_are_in_the_report():
    report = weight_normalize(Zoo())
    assert report.converted == ("stem.weight", "grouped.weight", "up.weight", "hidden.weight")
    assert report.left_alone == {
        "depthwise.weight": "depthwise convolution",
        "thin.weight": "grouped convolution with 18 entries a slice, fewer than 32",
        "embedding.weight": "embedding; name it in only",
        "lstm.weight_ih_l0": "recurrent; name it in only",
        "lstm.weight_hh_l0": "recurrent; name it in only",
        "head.weight": "classifier: the last Linear",
    }
    table = str(report).splitlines()
    assert len(table) == 12
    assert "view channel(1)" in next(line for line in table if line.startswith("up.weight"))
    assert all(reason in str(report) for reason in report.left_alone.values())


def test_weight_normalization_leaves_the_outputs_as_they_were():
    model, data = Zoo(), x()
    before = model(data)
    weight_normalize(model, only=["*"])
    torch.testing.assert_close(model(data), before)


def test_centering_a_model_of_centered_weights_leaves_the_outputs_as_they_were():
    model, data = Zoo(), x()
    report = center_weight_normalize(model)
    fold(model)
    before = model(data)
    assert center_weight_normalize(model).converted == report.converted
    torch.testing.assert_close(model(data), before, rtol=1e-4, atol=1e-6)


def test_standardization_gives_every_output_channel_mean_0_and_std_1():
    model = Zoo()
    weight_standardize(model)
    for w in (model.stem.weight, model.grouped.weight, model.up.weight.transpose(0, 1)):
        std, mean = torch.std_mean(w.flatten(1), 1, correction=0)
        torch.testing.assert_close(std, torch.ones_like(std))
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)


def test_only_overrules_the_rules_and_skip_overrules_only():
    model = Zoo()
    report = weight_normalize(model, only=["head", "lstm", model.depthwise, "em*"], skip="em*")
    assert report.converted == (
        "depthwise.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "head.weight",
    )
    assert report.left_alone["embedding.weight"] == "named in skip"
    assert report.left_alone["stem.weight"] == "not named in only"


@pytest.mark.parametrize("argument", ["only", "skip"])
def test_a_name_that_matches_nothing_is_an_error(argument):
    with pytest.raises(ValueError, match=f"{argument} names 'haed', which matches no module"):
        weight_normalize(Zoo(), **{argument: ["haed"]})


def test_converting_twice_is_an_error_and_changes_nothing():
    model, data = Zoo(), x()
    weight_standardize(model, only=["hidden"])
    before = model(data)
    with pytest.raises(ValueError, match=r"hidden\.weight already has a WeightStandardization"):
        weight_normalize(model)
    assert not parametrize.is_parametrized(model.stem)
    torch.testing.assert_close(model(data), before)
    assert "hidden.weight" not in weight_normalize(model, skip=["hidden"]).converted


def test_nothing_to_convert_is_an_error_that_shows_the_reasons():
    with pytest.raises(ValueError, match="classifier: the last Linear"):
        weight_normalize(nn.Sequential(nn.Linear(3, 3)))


def test_shared_and_foreign_and_unknown_weights_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 6)
            self.decoder = nn.Linear(6, 4)
            self.decoder.weight = self.embedding.weight
            self.spectral = parametrizations.spectral_norm(nn.Linear(6, 6))
            self.attention = nn.MultiheadAttention(6, 2)
            self.lazy = nn.LazyLinear(3)
            self.point = nn.Conv2d(1, 3, 1)

    report = weight_standardize(Tied(), only=["*"])
    assert report.converted == ("attention.out_proj.weight",)
    assert report.left_alone["decoder.weight"] == "shared by embedding.weight and decoder.weight"
    assert report.left_alone["spectral.weight"] == "already parametrized by _SpectralNorm"
    assert "MultiheadAttention" in report.left_alone["attention.in_proj_weight"]
    assert report.left_alone["lazy.weight"] == "not initialized yet"
    assert "1 entries a slice are too few" in report.left_alone["point.weight"]


def test_an_invalid_eps_is_told_at_once():
    with pytest.raises(ValueError, match=r"^Invalid eps: -1"):
        weight_normalize(Zoo(), eps=-1)


def test_the_one_function_behind_them_takes_any_of_the_parametrizations():
    model = Zoo()
    reparametrize(model, CenteredWeightNorm, gain=False, eps=1e-6)
    owner = model.stem.parametrizations.weight[0]
    assert isinstance(owner, CenteredWeightNorm)
    assert (owner.gain, owner.eps) == (False, 1e-6)


def test_each_parametrization_says_of_itself_what_a_regularizer_needs():
    model = Zoo()
    weight_standardize(model, only=["stem"])
    weight_normalize(model, only=["up"])
    stem, up = model.stem.parametrizations.weight, model.up.parametrizations.weight
    assert (stem[0].divides_by, str(stem[0].view)) == ("std", "channel")
    assert (up[0].divides_by, str(up[0].view)) == ("norm", "channel(1)")
    assert getattr(up, up[0].normalized) is up.original1
    assert getattr(stem, stem[0].normalized) is stem.original


def test_a_frozen_weight_stays_frozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    weight_normalize(model)
    assert not any(p.requires_grad for p in model[0].parametrizations.parameters())
    fold(model)
    assert not model[0].weight.requires_grad
    assert isinstance(WeightNorm().view.dim, int)


def test_complex_layers_and_layers_without_outputs_are_left_alone_with_the_reason():
    model = nn.ModuleDict(
        {
            "complex": nn.Linear(3, 3, dtype=torch.complex64),
            "empty": nn.Linear(3, 0),
            "without inputs": nn.Linear(0, 3),
            "plain": nn.Linear(3, 3),
        }
    )
    for convert in (weight_normalize, center_weight_normalize, weight_standardize):
        report = convert(model, only=["*"])
        assert report.left_alone == {
            "complex.weight": "complex",
            "empty.weight": "has no entries",
            "without inputs.weight": "has no entries",
        }
        fold(model)
