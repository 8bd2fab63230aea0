"""Small networks of transformers' configurations, and by hand what their hidden matrices are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "num_hidden_layers": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "n_layer": 1, "n_head": 4}
QUERIES = SIZES | {"num_key_value_heads": 2}
OF_HEADS = QUERIES | {"head_dim": 8}

ATTENTION = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}
FULL = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "out_proj": 4}
GATED = {"gate_proj": 1, "up_proj": 1, "down_proj": 1}
BERT = {
    "query": 4,
    "key": 4,
    "value": 4,
    "attention.output.dense": 4,
    "intermediate.dense": 1,
    "output.dense": 1,
}
NEOX = {"query_key_value": 12, "dense": 4, "dense_h_to_4h": 1, "dense_4h_to_h": 1}


@dataclass(frozen=True)
class Architecture:
    """One network.

    Args:
        sizes: of its configuration.
        matrices: its hidden matrices, from its source: by the end of their module's name, and how
            many matrices each is where fused parts, heads and experts count one by one; None where
            docs/groups.md says that they are not told apart.
        task: what transformers calls it.
    """

    sizes: dict[str, Any]
    matrices: dict[str, int | None]
    task: str = "CausalLM"

    def made(self, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
        """The network at random weights, and a batch."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**self.sizes)
        model = getattr(transformers, f"AutoModelFor{self.task}").from_config(config)
        batch = {"input_ids": torch.randint(3, 64, (2, 8))}
        if self.task == "Seq2SeqLM":
            batch["decoder_input_ids"] = torch.randint(3, 64, (2, 8))
        return model, batch

    def answer(self, parameter: str) -> tuple[bool, int | None]:
        """Whether a parameter is a hidden matrix, and how many."""
        module = f".{parameter.removesuffix('.weight')}"
        ends = [end for end in self.matrices if module.endswith(f".{end}")]
        if parameter.endswith("bias") or not ends:
            return False, None
        return True, self.matrices[max(ends, key=len)]


ARCHITECTURES = {
    "Llama": Architecture(QUERIES, ATTENTION | GATED),
    "Mistral": Architecture(QUERIES, ATTENTION | GATED),
    "Qwen2": Architecture(QUERIES, ATTENTION | GATED),
    "Qwen3": Architecture(OF_HEADS, ATTENTION | GATED),
    "Gemma": Architecture(OF_HEADS, ATTENTION | GATED),
    "Gemma2": Architecture(OF_HEADS, ATTENTION | GATED),
    "Gemma3Text": Architecture(OF_HEADS, ATTENTION | GATED),
    "Olmo": Architecture(QUERIES, ATTENTION | GATED),
    "Olmo2": Architecture(QUERIES, ATTENTION | GATED),
    "Cohere": Architecture(QUERIES, ATTENTION | GATED),
    "Granite": Architecture(QUERIES, ATTENTION | GATED),
    "StableLm": Architecture(QUERIES, ATTENTION | GATED),
    "SmolLM3": Architecture(QUERIES, ATTENTION | GATED),
    "Helium": Architecture(OF_HEADS, ATTENTION | GATED),
    "Ernie4_5": Architecture(OF_HEADS, ATTENTION | GATED),
    "Glm": Architecture(OF_HEADS, ATTENTION | {"gate_up_proj": 2, "down_proj": 1}),
    "Nemotron": Architecture(QUERIES, ATTENTION | {"up_proj": 1, "down_proj": 1}),
    "Arcee": Architecture(QUERIES, ATTENTION | {"up_proj": 1, "down_proj": 1}),
    "Starcoder2": Architecture(QUERIES, ATTENTION | {"c_fc": 1, "c_proj": 1}),
    "Phi": Architecture(  # a rotary embedding of half of each head
        QUERIES, {"q_proj": 4, "k_proj": 2, "v_proj": 2, "dense": 4, "fc1": 1, "fc2": 1}
    ),
    "Phi3": Architecture(QUERIES, {"qkv_proj": 8, "o_proj": 4, "gate_up_proj": 2, "down_proj": 1}),
    "Mixtral": Architecture(
        QUERIES | {"num_local_experts": 4, "num_experts_per_tok": 4},
        ATTENTION | {"gate_up_proj": 4, "down_proj": 4},
    ),
    "Qwen3Moe": Architecture(
        OF_HEADS | {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 48},
        ATTENTION | {"gate_up_proj": 4, "down_proj": 4},
    ),
    "Olmoe": Architecture(
        QUERIES | {"num_experts": 4, "num_experts_per_tok": 4},
        ATTENTION | {"gate_up_proj": 4, "down_proj": 4},
    ),
    "GPT2": Architecture(
        GPT | {"n_embd": 32, "n_positions": 16},
        {"c_attn": 12, "attn.c_proj": 4, "c_fc": 1, "mlp.c_proj": 1},
    ),
    "GPTNeo": Architecture(
        {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "vocab_size")}
        | {"num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}
        | {"max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2},
        FULL | {"c_fc": 1, "c_proj": 1},
    ),
    "GPTJ": Architecture(
        GPT | {"n_embd": 32, "n_positions": 32, "rotary_dim": 4}, FULL | {"fc_in": 1, "fc_out": 1}
    ),
    "GPTNeoX": Architecture(SIZES, NEOX),  # q, k and v of a head lie side by side
    "Bloom": Architecture(GPT | {"hidden_size": 32}, NEOX),
    "Falcon": Architecture(  # one head of keys and values, whose units all mix
        SIZES, {"query_key_value": None, "dense": None, "dense_h_to_4h": 1, "dense_4h_to_h": 1}
    ),
    "Mpt": Architecture(
        {"d_model": 32, "n_heads": 4, "n_layers": 1, "expansion_ratio": 2, "max_seq_len": 32}
        | {"vocab_size": 64},
        {"Wqkv": 12, "out_proj": 4, "up_proj": 1, "down_proj": 1},
    ),
    "OPT": Architecture(
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}, FULL | {"fc1": 1, "fc2": 1}
    ),
    "Bert": Architecture(SIZES, BERT | {"predictions.transform.dense": 1}, "MaskedLM"),
    "Roberta": Architecture(SIZES, BERT | {"lm_head.dense": 1}, "MaskedLM"),
    "DistilBert": Architecture(
        {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 1, "vocab_size": 64},
        {"q_lin": 4, "k_lin": 4, "v_lin": 4, "out_lin": 4}
        | {"lin1": 1, "lin2": 1, "vocab_transform": 1},
        "MaskedLM",
    ),
    "T5": Architecture(
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        {"q": 4, "k": 4, "v": 4, "o": 4, "wi": 1, "wo": 1},
        "Seq2SeqLM",
    ),
    "Bart": Architecture(
        {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32},
        FULL | {"fc1": 1, "fc2": 1},
        "Seq2SeqLM",
    ),
}
