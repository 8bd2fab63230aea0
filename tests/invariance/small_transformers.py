"""Sizes and batches of small networks of transformers, for the tests of this folder."""

import torch

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tokens():
    return {"input_ids": torch.randint(1, 50, (2, 8))}


def pairs():
    return {**tokens(), "decoder_input_ids": torch.randint(1, 50, (2, 8))}
