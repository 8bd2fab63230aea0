"""Scale maps against registries that quantizers keep by architecture, written by other people.

What ``AWQ`` lists is restated from llm-compressor (``AWQ_MAPPING_REGISTRY`` at ab1ba3e),
``SMOOTHQUANT`` from its ``MAPPINGS_REGISTRY`` (0e3e8bd), ``AUTOAWQ`` from AutoAWQ's
``get_layers_for_scaling`` (88e4c76): which module's outputs are scaled, and which modules' inputs
take it back. Modules are named as in transformers 5, which stacks experts in one parameter.
"""

import copy

import pytest
import torch
from small_transformers import SIZES

from normwise.invariance import analyze

transformers = pytest.importorskip("transformers", reason="the networks come from transformers")
transformers.utils.logging.set_verbosity_error()

HEADS = SIZES | {"head_dim": 8}
# All experts are chosen, so that each sees tokens.
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 4}
GROUPED = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
GROUPED |= {"moe_intermediate_size": 24, "first_k_dense_replace": 0}
LATENT = SIZES | GROUPED | {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
GPT = {"vocab_size": 50, "n_layer": 1, "n_head": 4, "bos_token_id": None, "eos_token_id": None}

CONFIGURATIONS = {
    "Afmoe": HEADS | EXPERTS | {"num_dense_layers": 0, "n_group": 1, "topk_group": 1},
    "Bloom": GPT | {"hidden_size": 32, "pad_token_id": None},
    "Cohere": SIZES,
    "Cohere2": SIZES,
    "DeepseekV3": LATENT,
    "Ernie4_5_Moe": SIZES
    | {"moe_num_experts": 4, "moe_k": 4, "moe_intermediate_size": 24, "moe_layer_start_index": 0},
    "Exaone4": SIZES,
    "Falcon": SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "GPTBigCode": GPT | {"n_embd": 32, "n_positions": 32},
    "GPTJ": GPT | {"n_embd": 32, "n_positions": 32, "rotary_dim": 4},
    "GPTNeoX": SIZES,
    "Gemma2": HEADS,
    "Gemma3Text": HEADS,
    "Glm4Moe": HEADS | GROUPED,
    "Glm4MoeLite": LATENT | {"mlp_layer_types": ["sparse"]},
    "Granite": SIZES,
    "Llama": SIZES,
    "Llama4Text": HEADS
    | {"num_local_experts": 4, "num_experts_per_tok": 4, "interleave_moe_layer_step": 1},
    "Mistral": SIZES,
    "Mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 4},
    "Mpt": {"vocab_size": 50, "d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 32},
    "OPT": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Olmo": SIZES,
    "Olmo3": SIZES,
    "Phi3": SIZES,
    "Qwen2": SIZES,
    "Qwen2Moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 40},
    "Qwen3": HEADS,
    "Qwen3Moe": HEADS | EXPERTS,
    "SeedOss": HEADS,
    "StableLm": SIZES,
    "Starcoder2": SIZES,
}

QKV = "q_proj k_proj v_proj"
STACK = "experts.gate_up_proj"
VALUES = {"v_proj": "o_proj"}
DEFAULT = {"input_layernorm": QKV, "post_attention_layernorm": "gate_proj up_proj"}
DEFAULT |= VALUES | {"up_proj": "down_proj"}
AFTER = VALUES | {"up_proj": "down_proj"}
MOE = {"input_layernorm": QKV, "post_attention_layernorm": f"mlp.gate {STACK}"} | VALUES
MOE |= {STACK: "experts.down_proj"}
LOW_RANK = {
    "input_layernorm": "q_a_proj kv_a_proj_with_mqa",
    "q_a_layernorm": "q_b_proj",
    "kv_a_layernorm": "kv_b_proj",
    "post_attention_layernorm": f"{STACK} shared_experts.gate_proj shared_experts.up_proj",
    "shared_experts.up_proj": "shared_experts.down_proj",
    STACK: "experts.down_proj",
}
COHERE = {"input_layernorm": f"{QKV} gate_proj up_proj"} | AFTER
SHARED = {"shared_experts.up_proj": "shared_experts.down_proj"}

AWQ = {
    "Afmoe": VALUES
    | SHARED
    | {
        "input_layernorm": f"{QKV} self_attn.gate_proj",
        "pre_mlp_layernorm": f"router.gate {STACK} shared_experts.gate_proj shared_experts.up_proj",
        STACK: "experts.down_proj",
    },
    "Bloom": {"input_layernorm": "query_key_value", "post_attention_layernorm": "dense_h_to_4h"},
    "Cohere": COHERE,
    "Cohere2": COHERE,
    "DeepseekV3": LOW_RANK
    | {"post_attention_layernorm": "mlp.gate " + LOW_RANK["post_attention_layernorm"]},
    "Exaone4": AFTER,
    "Gemma2": AFTER | {"input_layernorm": QKV, "pre_feedforward_layernorm": "gate_proj up_proj"},
    "Gemma3Text": AFTER | {"pre_feedforward_layernorm": "gate_proj up_proj"},
    "Glm4Moe": MOE | SHARED,
    "Glm4MoeLite": LOW_RANK,
    "Granite": DEFAULT,
    "Llama": DEFAULT,
    "Llama4Text": VALUES
    | {
        "input_layernorm": QKV,
        "post_attention_layernorm": (
            f"router {STACK} shared_expert.gate_proj shared_expert.up_proj"
        ),
        "shared_expert.up_proj": "shared_expert.down_proj",
        STACK: "experts.down_proj",
    },
    "Mistral": DEFAULT,
    "Olmo": AFTER,
    "Olmo3": AFTER,
    "Phi3": {
        "input_layernorm": "qkv_proj",
        "qkv_proj": "o_proj",
        "post_attention_layernorm": "gate_up_proj",
        "gate_up_proj": "down_proj",
    },
    "Qwen2": DEFAULT,
    "Qwen2Moe": MOE | {"shared_expert.up_proj": "shared_expert.down_proj"},
    "Qwen3": DEFAULT,
    "Qwen3Moe": MOE,
    "SeedOss": DEFAULT,
    "Ernie4_5_Moe": VALUES
    | SHARED
    | {
        "input_layernorm": QKV,
        "post_attention_layernorm": f"{STACK} shared_experts.gate_proj shared_experts.up_proj",
        STACK: "experts.down_proj",
    },
}
SMOOTHQUANT = {
    "Mixtral": {"input_layernorm": QKV, "post_attention_layernorm": "mlp.gate"},
}
# An activation without weights, such as a GELU, is scaled by a module that is put in; it is no
# symmetry of the network, and left out here.
AUTOAWQ = {
    "Falcon": {"ln_attn": "query_key_value", "ln_mlp": "dense_h_to_4h"},
    "GPTBigCode": {"ln_1": "c_attn", "ln_2": "c_fc"},
    "GPTJ": {"ln_1": f"{QKV} fc_in", "v_proj": "out_proj"},
    "GPTNeoX": {"input_layernorm": "query_key_value", "post_attention_layernorm": "dense_h_to_4h"},
    "Mixtral": {"input_layernorm": QKV, "post_attention_layernorm": STACK}
    | VALUES
    | {STACK: "experts.down_proj"},
    "Mpt": {"norm_1": "Wqkv", "Wqkv": "out_proj", "norm_2": "up_proj"},
    "OPT": {
        "self_attn_layer_norm": QKV,
        "v_proj": "out_proj",
        "final_layer_norm": "fc1",
        "fc1": "fc2",
    },
    "StableLm": DEFAULT,
    "Starcoder2": {"input_layernorm": QKV, "post_attention_layernorm": "c_fc"} | VALUES,
}
REGISTRIES = {"AWQ": AWQ, "SmoothQuant": SMOOTHQUANT, "AutoAWQ": AUTOAWQ}

# Readers that a registry leaves out of a mapping: what it scales reaches them all the same, so that
# the mapping as it stands changes what the network computes.
LEFT_OUT = {
    # The shared experts and the gate on them.
    ("AWQ", "Qwen2Moe"): {
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert_gate",
    },
    ("AWQ", "Glm4Moe"): {"mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"},
    # The router.
    ("AWQ", "Ernie4_5_Moe"): {"mlp.gate"},
    ("AWQ", "Glm4MoeLite"): {"mlp.gate"},
    ("AutoAWQ", "Mixtral"): {"mlp.gate"},
    # The experts.
    ("SmoothQuant", "Mixtral"): {"mlp.experts.gate_up_proj"},
}
# Maps that a registry does not list though the network has them. Besides these, the last norm is
# found against a head that is not tied.
UNLISTED = {
    # The values' part of a fused projection.
    ("AWQ", "Bloom"): {"self_attention.query_key_value"},
    ("AWQ", "DeepseekV3"): {"self_attn.kv_b_proj"},
    ("AWQ", "Glm4MoeLite"): {"self_attn.kv_b_proj"},
    ("AutoAWQ", "Falcon"): {"self_attention.query_key_value"},
    ("AutoAWQ", "GPTBigCode"): {"attn.c_attn"},
    ("AutoAWQ", "GPTNeoX"): {"attention.query_key_value"},
    # Left out since it made results worse: queries and keys have norms of their own.
    ("AWQ", "Gemma3Text"): {"input_layernorm"},
    # Only norms are smoothed there.
    ("SmoothQuant", "Mixtral"): {"self_attn.v_proj", "mlp.experts.gate_up_proj"},
}
FAST = {"Gemma3Text", "Qwen2Moe", "Falcon", "Llama4Text", "OPT", "DeepseekV3", "Mixtral"}


@pytest.fixture(scope="module")
def analyzed():
    made = {}

    def analysis(name):
        if name not in made:
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**CONFIGURATIONS[name])
            model = transformers.AutoModelForCausalLM.from_config(config)
            ids = torch.randint(0, 50, (2, 12))
            made[name] = model, ids, analyze(model, {"input_ids": ids})
        return made[name]

    return analysis


def within_layer(name):
    """The name without what leads to the one layer."""
    return name.partition(".0.")[2]


def maps_of(report):
    """Producers and readers of the layer's scale maps, by the names that they have there."""
    return [
        tuple({within_layer(name) for name in side} for side in (m.smooth_layers, m.balance_layers))
        for m in report.scale_maps()
        if within_layer(m.smooth_layers[0])
    ]


def ends(name, wanted):
    return name == wanted or name.endswith(f".{wanted}")


CASES = [
    pytest.param(registry, name, marks=[] if name in FAST else pytest.mark.slow)
    for registry, mappings in REGISTRIES.items()
    for name in mappings
]


@pytest.mark.parametrize(("registry", "name"), CASES)
def test_every_mapping_of_a_registry_is_found_and_what_is_found_beyond_is_known(
    registry, name, analyzed
):
    _, _, report = analyzed(name)
    maps = maps_of(report)
    beyond, matched = set(), []
    for producer, readers in REGISTRIES[registry][name].items():
        (found,) = (
            (i, read)
            for i, (made, read) in enumerate(maps)
            if any(ends(n, producer) for n in made)
            and all(any(ends(n, reader) for n in read) for reader in readers.split())
        )
        matched.append(found[0])
        listed = readers.split()
        beyond |= {n for n in found[1] if not any(ends(n, reader) for reader in listed)}
    assert beyond == LEFT_OUT.get((registry, name), set())
    unlisted = {n for i, (made, _) in enumerate(maps) if i not in matched for n in made}
    assert unlisted == UNLISTED.get((registry, name), set())


@pytest.mark.parametrize(
    ("registry", "name"),
    [pytest.param(*case, marks=[] if case[1] in FAST else pytest.mark.slow) for case in LEFT_OUT],
)
def test_a_mapping_without_a_reader_changes_the_function_and_the_whole_one_does_not(
    registry, name, analyzed
):
    model, ids, report = analyzed(name)
    left_out = LEFT_OUT[registry, name]
    family = next(
        family
        for family in report.symmetries
        if left_out & {within_layer(n).removesuffix(".weight") for n in family.parameters}
        and any(len(term.shape) == 1 for term in family.terms)
    )
    wide = copy.deepcopy(model).double()
    wide.config._experts_implementation = "eager"  # grouped products take no float64
    before = wide(ids).logits.detach()
    factors = family.factors(torch.linspace(0.5, 2, family.units, dtype=torch.float64))

    def changed(without):
        old = {n: p.detach().clone() for n, p in wide.named_parameters()}
        with torch.no_grad():
            for n, factor in factors.items():
                if within_layer(n).removesuffix(".weight") not in without:
                    wide.get_parameter(n).mul_(factor)
            after = wide(ids).logits
            for n, p in old.items():
                wide.get_parameter(n).copy_(p)
        return float((after - before).norm() / before.norm())

    assert changed(set()) < 1e-5  # up to the norms' epsilons
    assert changed(left_out) > 1e-4
