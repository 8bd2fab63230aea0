"""Any trainer of TRL's trains as a plain loop does with the same groups."""

import copy
import functools

import pytest
import torch
from torch import nn

import normwise as nw

transformers = pytest.importorskip("transformers", reason="TRL's trainers are Trainers of it")
pytest.importorskip("accelerate", reason="a Trainer needs it")
if not hasattr(torch.optim, "Muon"):
    pytest.skip("Muon came with torch 2.9", allow_module_level=True)

from normwise.integrations.trl import set_optimizer, tokens_for  # noqa: E402 -- needs transformers

OPTIONS = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def rows():
    return torch.randint(3, 32, (12, 8), generator=torch.Generator().manual_seed(0))


def make(model, report):
    return nw.groups(
        report,
        matrices=functools.partial(torch.optim.Muon, lr=0.02),
        others=functools.partial(torch.optim.AdamW, lr=1e-2),
        model=model,
    )


def plain_loop(model):
    model = copy.deepcopy(model)
    optimizer = make(model, nw.analyze(model, tokens_for(model)))
    for part in rows().split(4):
        optimizer.zero_grad()
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
    return dict(model.named_parameters())


def assert_trained(model, expected):
    found = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_trainer_that_is_made_already_takes_any_optimizer(model, tmp_path):
    expected = plain_loop(model)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(tmp_path), **OPTIONS),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows()],
    )
    set_optimizer(trainer, make)
    with pytest.raises(ValueError, match="this Trainer has an optimizer already"):
        set_optimizer(trainer, make)
    trainer.train()
    assert_trained(model, expected)


def test_trls_sft_trainer_trains_as_a_plain_loop_does_with_its_loss(model, tmp_path):
    reason = "the trainer that is tested"
    trl = pytest.importorskip("trl", reason=reason)
    datasets = pytest.importorskip("datasets", reason=reason)

    def trainer_of(model):
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(output_dir=str(tmp_path), bf16=False, **OPTIONS),
            train_dataset=datasets.Dataset.from_list([{"input_ids": r.tolist()} for r in rows()]),
            processing_class=_tokenizer(),
        )

    by_hand = copy.deepcopy(model)
    optimizer = make(by_hand, nw.analyze(by_hand, tokens_for(by_hand)))
    losses = trainer_of(by_hand)
    for batch in losses.get_train_dataloader():
        optimizer.zero_grad()
        losses.compute_loss(by_hand, batch).backward()
        optimizer.step()

    trainer = trainer_of(model)
    set_optimizer(trainer, make)
    trainer.train()
    assert_trained(model, dict(by_hand.named_parameters()))


def _tokenizer():
    """Of 32 words that nobody reads: the data are tokens already."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(3, 32)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def test_random_tokens_are_of_the_vocabulary_and_touch_no_random_numbers(model):
    state = torch.get_rng_state()
    batch = tokens_for(model, rows=3, length=50)
    assert torch.equal(torch.get_rng_state(), state)
    assert batch["input_ids"].shape == (3, 50)
    assert 0 <= batch["input_ids"].min() <= batch["input_ids"].max() < 32
    with pytest.raises(ValueError, match=r"Linear has no config\.vocab_size"):
        tokens_for(nn.Linear(2, 2))
