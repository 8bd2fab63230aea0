"""The definition, for networks of today: rescaled along what a report says, they are the same."""

import copy
import functools

import pytest
import torch
from small_transformers import SIZES, pairs, tokens

from normwise.balancing import balance, equalize
from normwise.invariance import Report, analyze
from normwise.invariance.exact import Exact

transformers = pytest.importorskip("transformers", reason="the networks come from transformers")
transformers.utils.logging.set_verbosity_error()

GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}


def images(size):
    return {"pixel_values": torch.randn(2, 3, size, size)}


NETWORKS = {
    "GPT2": ("CausalLM", GPT | {"bos_token_id": None, "eos_token_id": None}, tokens),
    "Llama": ("CausalLM", SIZES, tokens),
    "Qwen3Moe": (
        "CausalLM",
        SIZES
        | {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 4},
        tokens,
    ),
    "Gemma2": ("CausalLM", SIZES | {"head_dim": 8}, tokens),
    "Olmo2": ("CausalLM", SIZES, tokens),
    "Falcon": ("CausalLM", SIZES, tokens),
    "Cohere": ("CausalLM", SIZES, tokens),
    "Mamba": ("CausalLM", {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}, tokens),
    "T5": (
        "Seq2SeqLM",
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
        | {"dropout_rate": 0.0},
        pairs,
    ),
    "ViT": (
        "ImageClassification",
        SIZES | {"image_size": 16, "patch_size": 4},
        lambda: images(16),
    ),
    "ConvNext": (
        "ImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        lambda: images(32),
    ),
    "ResNet": (
        "ImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]},
        lambda: images(32),
    ),
}


def outputs(model, batch):
    """In float64, with the epsilons of norms all but gone: what a limit of large weights gives."""
    with Exact(1e-25), torch.no_grad():
        return model(**batch).logits


def difference(a, b):
    return float((a - b).norm() / b.norm())


def rank(report):
    """The number of independent scale freedoms, from the logarithms of all factors."""
    families = (*report.symmetries, *report.shifted)
    names = list(dict.fromkeys(name for family in families for name in family.parameters))
    rows = []
    for family in families:
        for unit in range(family.units):
            values = torch.ones(family.units, dtype=torch.float64)
            values[unit] = 2.0
            factors = family.factors(values)
            rows.append(
                torch.cat(
                    [
                        factors[n].log2().expand(report[n].shape).flatten()
                        if n in factors
                        else torch.zeros(report[n].entries, dtype=torch.float64)
                        for n in names
                    ]
                )
            )
    matrix = torch.stack(rows)
    return int(torch.linalg.matrix_rank(matrix @ matrix.T)), len(rows)


@functools.cache
def analyzed(name):
    """A network without dropout, in float64 and away from its start; its batch and its report."""
    task, sizes, batch = NETWORKS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config).double().train()
    config._experts_implementation = "eager"  # grouped products take no float64
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for p in model.parameters():  # biases that start at 0 hide what they do
        p.data.add_(0.02 * torch.randn_like(p))
    batch = batch()
    return model, batch, analyze(model, batch)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_random_rescaling_keeps_the_outputs_and_one_beside_it_does_not(name):
    original, batch, report = analyzed(name)
    model = copy.deepcopy(original)
    before = outputs(model, batch)
    report.rescale_(model, seed=3)
    assert difference(outputs(model, batch), before) < 1e-9
    in_families = {n for f in (*report.symmetries, *report.shifted) for n in f.parameters}
    for n in in_families:
        assert difference(model.get_parameter(n), original.get_parameter(n)) > 0.01
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):  # each by a factor of its own
            p.mul_(1.1 + 0.1 * k)
    assert difference(outputs(model, batch), before) > 1e-3


@pytest.mark.parametrize("choose", [balance, equalize])
@pytest.mark.parametrize("name", NETWORKS)
def test_least_mass_and_equal_ranges_keep_the_outputs(name, choose):
    original, batch, report = analyzed(name)
    model = copy.deepcopy(original)
    before = outputs(model, batch)
    report.rescale_(model, seed=4)
    choose(model, report)
    assert difference(outputs(model, batch), before) < 1e-9
    for family in report.symmetries:
        if not family.is_scale:  # balance and equalize move what trades scale
            name = family.terms[0].parameter
            assert not torch.equal(model.get_parameter(name), original.get_parameter(name))


@pytest.mark.parametrize("name", ["Olmo2", "Gemma2", "Falcon", "Qwen3Moe"])
def test_families_are_independent_of_one_another(name):
    """No freedom is told twice: where both of two weights are invariant, their trade makes one."""
    task, sizes, batch = NETWORKS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    report = analyze(getattr(transformers, f"AutoModelFor{task}").from_config(config), batch())
    found, told = rank(report)
    assert found == told


def test_shifted_gains_are_read_back_from_json():
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=8))
    report = analyze(model, tokens())
    assert {str(f).partition(" ↔")[0] for f in report.shifted if f.units > 1} == {
        "(1 + model.layers.0.input_layernorm.weight)",
        "(1 + model.layers.0.pre_feedforward_layernorm.weight)",
    }
    assert not any(term.shift for family in report.symmetries for term in family.terms)
    again = Report.from_json(report.to_json())
    assert again.shifted == report.shifted
    assert str(again.freedom()) == str(report.freedom())
