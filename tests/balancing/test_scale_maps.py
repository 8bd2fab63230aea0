"""Scale maps from symmetries, beside those that a quantizer's registry lists by name."""

import pytest
import torch

import normwise as nw


def as_sets(report):
    return {(frozenset(m.smooth_layers), frozenset(m.balance_layers)) for m in report.scale_maps()}


def test_a_gated_block_is_smoothed_at_its_norm_and_at_up(network):
    _, _, report = network("gated")
    assert as_sets(report) == {
        (frozenset({"norm"}), frozenset({"up", "gate"})),
        (frozenset({"up"}), frozenset({"down"})),
    }


def test_queries_and_keys_trade_scale_and_are_no_map(network):
    _, _, report = network("attention")
    assert as_sets(report) == {
        (frozenset({"norm"}), frozenset({"q", "k", "v"})),
        (frozenset({"v"}), frozenset({"o"})),
    }


def test_summed_branches_share_their_scales_and_fit_no_single_layer(network):
    _, _, report = network("residual")
    (shared,) = [m for m in report.scale_maps() if len(m.smooth_layers) > 1]
    assert set(shared.smooth_layers) == {"a", "c"}
    assert set(shared.balance_layers) == {"b", "d"}
    assert shared.scales == 6
    with pytest.raises(ValueError, match="share their scales"):
        shared.as_mapping()


def test_llama_has_the_four_maps_of_the_published_registry_and_the_heads():
    """The registry of llm-compressor for AWQ, as its README prints it for Llama."""
    transformers = pytest.importorskip("transformers", reason="the network comes from there")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = transformers.LlamaForCausalLM(config)
    report = nw.analyze(model, {"input_ids": torch.randint(0, 50, (2, 8))})
    found = [m.as_mapping() for m in report.scale_maps()]
    assert len(found) == 4 * 2 + 1
    for i in range(2):
        block = f"model.layers.{i}"
        for smooth, balance in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("self_attn.v_proj", ("self_attn.o_proj",)),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ("mlp.up_proj", ("mlp.down_proj",)),
        ):
            (entry,) = [m for m in found if m["smooth_layer"] == f"{block}.{smooth}"]
            assert sorted(entry["balance_layers"]) == sorted(f"{block}.{b}" for b in balance)
    assert {"smooth_layer": "model.norm", "balance_layers": ["lm_head"]} in found
