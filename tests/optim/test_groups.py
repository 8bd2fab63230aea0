"""Each parameter goes to the optimizer that its role asks for; together they are one optimizer."""

import copy
import functools
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn

import normwise as nw
from normwise.optim.by_role import ByRole

transformers = pytest.importorskip("transformers", reason="its networks are what people train")

if not hasattr(torch.optim, "Muon"):
    pytest.skip("Muon came with torch 2.9", allow_module_level=True)
MUON = functools.partial(torch.optim.Muon, lr=0.02, weight_decay=0.1)
ROOT = Path(__file__).parent.parent.parent
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_embd=32,
        n_head=4,
        vocab_size=64,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    batch = {"input_ids": torch.randint(0, 64, (2, 10))}
    return model, batch, nw.analyze(model, batch)


def fresh(gpt2, **options):
    model, batch, report = gpt2
    model = copy.deepcopy(model)
    optimizer = nw.groups(report, matrices=MUON, others=ADAMW, model=model, **options)
    return model, batch["input_ids"], optimizer


def train(model, tokens, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_hidden_matrices_go_to_one_optimizer_and_tables_gains_and_biases_to_the_other(gpt2):
    _, _, optimizer = fresh(gpt2)
    matrices = {r.name for r in optimizer.routes if r.destination == "matrices"}
    block = "transformer.h.0."
    assert matrices == {
        block + name
        for name in (
            "attn.c_attn.weight",
            "attn.c_proj.weight",
            "mlp.c_fc.weight",
            "mlp.c_proj.weight",
        )
    }
    (row,) = (line for line in optimizer.account().splitlines() if "c_attn.weight" in line)
    assert "matrices (" in row
    assert row.endswith("hidden: a matrix used in addmm, as 3 matrices")


def test_it_trains_to_the_same_bits_as_two_optimizers_by_hand(gpt2):
    model, tokens, optimizer = fresh(gpt2, fused="whole")
    by_hand = copy.deepcopy(model)
    block = by_hand.transformer.h[0]
    hidden = [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
    weights = [m.weight for m in hidden]
    ids = set(map(id, weights))
    rest = [p for p in by_hand.parameters() if id(p) not in ids]
    pair = [
        MUON(weights),
        ADAMW(
            [
                {"params": [p for p in rest if p.ndim > 1]},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ]
        ),
    ]
    for _ in range(3):
        by_hand.zero_grad()
        by_hand(tokens, labels=tokens).loss.backward()
        for one in pair:
            one.step()
    assert_same(train(model, tokens, optimizer), dict(by_hand.named_parameters()))


def test_fused_blocks_and_heads_are_stepped_as_matrices_of_their_own(gpt2):
    model, tokens, optimizer = fresh(gpt2, heads="split")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    name = "transformer.h.0.attn.c_attn.weight"
    fused = model.get_parameter(name)
    (route,) = [r for r in optimizer.routes if r.name == name]
    assert [(b.dim, b.start, b.length) for b in route.blocks] == [(1, 8 * i, 8) for i in range(12)]
    for i in range(12):  # a step of Muon's own on each head of each part
        columns = slice(8 * i, 8 * i + 8)
        alone = nn.Parameter(before[name][:, columns].clone())
        alone.grad = fused.grad[:, columns].clone()
        MUON([alone]).step()
        assert torch.equal(alone, fused[:, columns])


def test_grouped_queries_and_a_fused_gate_are_split_where_they_are():
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    model = transformers.Phi3ForCausalLM(config)
    report = nw.analyze(model, {"input_ids": torch.randint(0, 64, (2, 10))})
    optimizer = nw.groups(report, matrices=MUON, others=ADAMW)
    starts = {
        r.name.split(".")[-2]: [b.start for b in r.blocks]
        for r in optimizer.routes
        if r.destination == "matrices"
    }
    assert starts == {
        "qkv_proj": [0, 32, 48],
        "gate_up_proj": [0, 48],
        "o_proj": [],
        "down_proj": [],
    }
    split = nw.groups(report, matrices=MUON, others=ADAMW, heads="split")
    starts = {r.name.split(".")[-2]: [b.start for b in r.blocks] for r in split.routes}
    assert starts["qkv_proj"] == [8 * i for i in range(8)]  # 4 of queries, 2 of keys, 2 of values
    assert starts["o_proj"] == [8 * i for i in range(4)]


def test_experts_are_matrices_one_by_one_and_kernels_are_flattened():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, bias=False)
            self.experts = nn.Parameter(torch.randn(2, 8, 8) / 3)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = self.conv(x).relu().mean((2, 3))
            return self.head(torch.einsum("bi,eio->ebo", x, self.experts).relu().sum(0))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 6, 6)
    model.conv.to(memory_format=torch.channels_last)
    report = nw.analyze(model, x)
    optimizer = nw.groups(report, matrices=MUON, others=ADAMW)
    before = copy.deepcopy(model)
    model(x).square().mean().backward()
    optimizer.step()
    for i in range(2):
        alone = nn.Parameter(before.experts[i].detach().clone())
        alone.grad = model.experts.grad[i].clone()
        MUON([alone]).step()
        assert torch.equal(alone, model.experts[i])
    flat = nn.Parameter(before.conv.weight.detach().flatten(1).clone())
    flat.grad = model.conv.weight.grad.flatten(1).clone()
    MUON([flat]).step()
    # bfloat16 sums over the columns in another order
    torch.testing.assert_close(flat, model.conv.weight.flatten(1), rtol=0, atol=2e-4)
    shapes = [tuple(s["momentum_buffer"].shape) for s in optimizer.state.values() if len(s) == 1]
    assert sorted(shapes) == [(2, 8, 8), (8, 3, 3, 3)]


def test_a_checkpoint_goes_on_to_the_same_bits_and_does_not_depend_on_blocks(gpt2):
    model, tokens, optimizer = fresh(gpt2, heads="split")
    train(model, tokens, optimizer)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    state = copy.deepcopy(model.state_dict())
    expected = train(model, tokens, optimizer)
    resumed, _, other = fresh(gpt2, heads="split")
    resumed.load_state_dict(state)
    other.load_state_dict(saved)
    assert_same(expected, train(resumed, tokens, other))
    _, _, plain = fresh(gpt2, fused="whole")
    with pytest.raises(ValueError, match="param"):  # groups differ, as for any torch optimizer
        plain.load_state_dict({**saved, "param_groups": saved["param_groups"][:1]})
    buffers = {tuple(s["momentum_buffer"].shape) for s in saved["state"].values() if len(s) == 1}
    assert buffers == {(32, 96), (32, 32), (32, 128), (128, 32)}


def test_schedulers_scalers_closures_and_hooks_see_one_optimizer(gpt2):
    model, tokens, optimizer = fresh(gpt2, heads="split")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=4)
    assert {g["lr"] for g in optimizer.param_groups} == {0.01, 0.0005}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scaler.scale(model(tokens, labels=tokens).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    assert calls == [1]

    reference, _, one = fresh(gpt2, heads="split")
    for group in one.param_groups:
        group["lr"] /= 2
    reference(tokens, labels=tokens).loss.backward()
    one.step()
    torch.testing.assert_close(
        dict(model.named_parameters()), dict(reference.named_parameters()), rtol=0, atol=1e-6
    )

    def closure():
        optimizer.zero_grad()
        calls.append("loss")
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert calls.count("loss") == 1


def test_it_is_copied_and_pickled_and_describes_what_each_group_does(gpt2):
    model, tokens, optimizer = fresh(gpt2, heads="split")
    copied_model, copied = copy.deepcopy((model, optimizer))
    assert_same(train(model, tokens, optimizer), train(copied_model, tokens, copied))
    assert isinstance(pickle.loads(pickle.dumps(optimizer)), ByRole)
    updates = {
        g["name"]: r.update.name
        for g, r in zip(optimizer.param_groups, nw.describe(optimizer), strict=True)
    }
    assert updates["matrices in blocks"] == updates["matrices"] == "ORTHOGONALIZED"
    assert updates["others"] == updates["vectors"] == "NORMALIZED"


def test_a_policy_of_decay_acts_on_all_of_it(gpt2):
    model, tokens, optimizer = fresh(gpt2, heads="split")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.1, 0.5
    model(tokens, labels=tokens).loss.backward()
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * 0.95)


def test_spheres_go_around_the_whole_and_not_inside(gpt2):
    """Each matrix keeps its norm, and the radii are saved with the rest of the state."""
    model, tokens, optimizer = fresh(gpt2)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    fixed = [p for p in optimizer.param_groups[0]["params"] if p.ndim == 2]
    norms = [p.norm().item() for p in fixed]
    optimizer = nw.sphere(optimizer, dict.fromkeys(fixed, "layer"))
    train(model, tokens, optimizer)
    assert [p.norm().item() for p in fixed] == pytest.approx(norms, rel=1e-6)
    saved = optimizer.state_dict()
    assert sum("radius" in state for state in saved["state"].values()) == len(fixed)
    _, _, report = gpt2
    with pytest.raises(TypeError, match=r"it made a Sphere, .* put it around the whole"):
        nw.groups(
            report,
            matrices=lambda g: nw.sphere(torch.optim.Muon(g, lr=0.02, weight_decay=0), "layer"),
            others=torch.optim.AdamW,
        )


def test_with_options_it_gives_plain_groups(gpt2):
    _, _, report = gpt2
    made = nw.groups(report, matrices={"weight_decay": 0.1, "lr": 1e-3}, others={"lr": 1e-2})
    optimizer = torch.optim.AdamW(made)
    sizes = {g["name"]: (len(g["params"]), g["lr"]) for g in optimizer.param_groups}
    assert sizes == {"others": (2, 1e-2), "vectors": (10, 1e-2), "matrices": (4, 1e-3)}


def test_vectors_are_not_decayed_whatever_the_options_of_the_others(gpt2):
    _, _, report = gpt2
    made = nw.groups(report, matrices={"weight_decay": 0.1}, others={"weight_decay": 0.2})
    decay = {group["name"]: group["weight_decay"] for group in made}
    assert decay == {"others": 0.2, "vectors": 0.0, "matrices": 0.1}


def test_what_nothing_is_known_of_is_named_and_can_be_assigned():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.pooler = nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(x).relu())

    torch.manual_seed(0)
    model = Net()
    report = nw.analyze(model, torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"pooler\.weight \(not used\).*assign="):
        nw.groups(report, matrices=MUON, others=ADAMW)
    optimizer = nw.groups(report, matrices=MUON, others=ADAMW, assign={"pooler.*": "others"})
    assert {r.name for r in optimizer.routes if r.destination == "matrices"} == {"a.weight"}
    with pytest.raises(ValueError, match=r"\['x'\] match no parameter"):
        nw.groups(report, matrices=MUON, others=ADAMW, assign={"pooler.*": "others", "x": "others"})
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'extra\.weight'"):
        nw.groups(report, matrices=MUON, others=ADAMW, model=model)
    with pytest.raises(ValueError, match="is sent to matrices, but its shape"):
        nw.groups(report, matrices=MUON, others=ADAMW, assign={"pooler.*": "matrices"})
    with pytest.raises(TypeError, match="all of them options"):
        nw.groups(report, matrices=MUON, others={})
    with pytest.raises(ValueError, match="needs the key 'optimizer'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


QUICK = ("Mixtral", "Phi", "GPTNeoX", "Qwen2", "Glm", "Bloom", "OPT", "Roberta")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in ARCHITECTURES],
)
def test_no_parameter_of_known_architectures_is_misrouted(name):
    architecture = ARCHITECTURES[name]
    model, batch = architecture.made(name)
    report = nw.analyze(model, batch)
    optimizer = nw.groups(report, matrices=MUON, others=ADAMW, heads="split")
    assert {r.name for r in optimizer.routes} == {n for n, _ in model.named_parameters()}
    ends = set()
    for route in optimizer.routes:
        is_hidden, matrices = architecture.answer(route.name)
        assert (route.name, route.destination == "matrices") == (route.name, is_hidden)
        if matrices is not None:
            assert (route.name, len(route.blocks) or 1) == (route.name, matrices)
        module = f".{route.name.removesuffix('.weight')}"
        ends |= {end for end in architecture.matrices if is_hidden and module.endswith(f".{end}")}
    assert ends == set(architecture.matrices)  # no answer is of a matrix that is not there


def test_the_rules_by_name_that_the_benchmark_has_beside_ours_are_those_of_the_peers():
    """As their files say it: two dimensions or more, and what a name must not have in it."""
    spec = importlib.util.spec_from_file_location("roles", ROOT / "benchmarks" / "roles.py")
    roles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(roles)
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    for name, by_deepspeed, by_moonlight in (
        ("model.layers.0.mlp.up_proj.weight", True, True),
        ("model.embed_tokens.weight", False, False),
        ("lm_head.weight", False, False),
        ("bert.Embeddings.word.weight", False, True),
        ("transformer.wte.weight", True, True),
    ):
        assert roles.deepspeed(name, matrix) is by_deepspeed
        assert roles.moonlight(name, matrix) is by_moonlight
        assert not roles.deepspeed(name, vector)
        assert not roles.moonlight(name, vector)
