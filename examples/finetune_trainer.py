# pip install "normwise[lab,transformers]" accelerate
"""Fine-tuning with transformers' Trainer: AdamP with groups from the analysis, norms in a file.

The model is a tiny Qwen3 at random weights, so that nothing is downloaded. For one of your own:
`AutoModelForCausalLM.from_pretrained(...)` and your tokenized data.
"""

import argparse
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

import normwise as nw
from normwise.integrations.transformers import MonitorCallback
from normwise.monitor import JsonLines

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("finetuned"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            use_cache=False,
        )
    )
    text = torch.tensor(list(Path(__file__).read_bytes()))
    windows = [{"input_ids": w, "labels": w} for w in text.unfold(0, 64, 8)]

    # joint=False: which weights are invariant alone, without the longer search for trades.
    report = nw.analyze(model, {"input_ids": windows[0]["input_ids"][None]}, joint=False)
    print(report.summary())
    optimizer = nw.AdamP(report.param_groups(weight_decay=0.1), lr=1e-3)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        model,
        TrainingArguments(
            use_cpu=not torch.cuda.is_available(),
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=windows,
        optimizers=(optimizer, None),  # Trainer makes its usual learning-rate schedule
        callbacks=[
            MonitorCallback(
                lambda model, optimizer: nw.Monitor(
                    model, optimizer, every=10, writers=[JsonLines(arguments.out / "norms.jsonl")]
                )
            )
        ],
    )
    trainer.train()
    print(arguments.out / "norms.jsonl")
