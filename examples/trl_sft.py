# pip install "normwise[transformers]" trl
"""TRL's SFTTrainer: Muon and AdamW by role, set on the trainer when it is made; norms in its log.

The same call serves DPO, GRPO and the others. The model is a tiny Qwen3 at random weights that
reads letters, so that nothing is downloaded.
"""

import argparse
import functools
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

import normwise as nw
from normwise.integrations.trl import MonitorCallback, set_optimizer


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *sorted(set(text))])}
    letters = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def network(vocabulary: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **ids, use_cache=False))


def make(model: torch.nn.Module, report: nw.Report) -> torch.optim.Optimizer:
    return nw.groups(
        report,
        matrices=functools.partial(torch.optim.Muon, lr=0.02, weight_decay=0.1),
        others=functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
        model=model,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", type=Path, default=Path(__file__), help="a text file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("sft"))
    arguments = parser.parse_args()

    text = arguments.text.read_text(encoding="utf-8")[:100_000]
    tokenizer = tokenizer_of(text)
    rows = [{"text": text[i : i + 64]} for i in range(0, len(text) - 64, 16)]
    trainer = SFTTrainer(
        network(len(tokenizer)),
        SFTConfig(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    set_optimizer(trainer, make)
    norms = MonitorCallback(
        lambda model, optimizer: nw.Monitor(model, optimizer, every=10), log=trainer.log
    )
    trainer.add_callback(norms)
    trainer.train()
    print(norms.monitor)
