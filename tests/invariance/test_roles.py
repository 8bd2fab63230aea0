"""Roles are told from what the network does: answers by hand for networks that others wrote."""

import pytest
import torch
import torch.nn.functional as F
from small_transformers import SIZES, pairs, tokens
from torch import nn
from torch.nn.utils import parametrizations

import normwise as nw
from normwise.invariance import analyze

transformers = pytest.importorskip("transformers", reason="most networks come from transformers")
transformers.utils.logging.set_verbosity_error()

GPT = {"vocab_size": 50, "n_layer": 1, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
IMAGE = {"image_size": 16, "patch_size": 4, "num_labels": 5}
GROUPED = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}
ENDS = {"embed_tokens": "embedding", "lm_head": "readout"}


def images(size=16):
    return {"pixel_values": torch.randn(2, 3, size, size)}


# For each network the matrices that are not just hidden, by the end of their module's name, and the
# heads. Everything else of two dimensions is hidden; vectors are gains and biases.
ANSWERS = {
    "Llama": ("CausalLM", SIZES, tokens, ENDS, GROUPED),
    "Qwen2": ("CausalLM", SIZES, tokens, ENDS, GROUPED),  # biases turn with queries and keys
    "Olmo2": ("CausalLM", SIZES, tokens, ENDS, GROUPED),  # heads behind a norm over all of them
    "Cohere": ("CausalLM", SIZES, tokens, {"embed_tokens": "tied"}, GROUPED),  # interleaved pairs
    "Gemma2": ("CausalLM", SIZES | {"head_dim": 8}, tokens, {"embed_tokens": "tied"}, GROUPED),
    "Falcon": (
        "CausalLM",
        SIZES,
        tokens,
        {"word_embeddings": "tied"},
        {},  # written as x @ weight.T; one head of keys and values, whose units all mix
    ),
    "Mixtral": (
        "CausalLM",
        SIZES | {"num_local_experts": 4, "num_experts_per_tok": 4},
        tokens,
        ENDS | {"gate": "router"},
        GROUPED,
    ),
    "GPT2": (
        "CausalLM",
        GPT | {"n_embd": 32, "n_positions": 16},
        tokens,
        {"wte": "tied", "wpe": "embedding"},
        {"c_attn": 4, "attn.c_proj": 4},
    ),
    "Bert": (
        "MaskedLM",
        SIZES,
        tokens,
        {
            "word_embeddings": "tied",
            "position_embeddings": "embedding",
            "token_type_embeddings": "embedding",
        },
        {"query": 4, "key": 4, "value": 4, "attention.output.dense": 4},
    ),
    "T5": (
        "Seq2SeqLM",
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        pairs,
        {"shared": "tied", "relative_attention_bias": "embedding"},
        {"q": 4, "k": 4, "v": 4, "o": 4},
    ),
    "Mamba": (
        "CausalLM",
        {"vocab_size": 50, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1},
        tokens,
        {"embeddings": "tied", "mixer.A_log": "gain"},
        {},
    ),
    "ViT": (
        "ImageClassification",
        SIZES | IMAGE,
        images,
        {"classifier": "readout", "position_embeddings": "bias"},
        {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4},
    ),
    "ResNet": (
        "ImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "num_labels": 5},
        lambda: images(32),
        {"classifier.1": "readout"},
        {},
    ),
    "ConvNext": (
        "ImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 5},
        lambda: images(32),
        {"classifier": "readout"},
        {},
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_roles_of_known_networks(name):
    task, sizes, batch, others, heads = ANSWERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    report = analyze(model, batch())

    def of(table, parameter, default):
        module = parameter.removesuffix(".weight")
        found = [v for end, v in table.items() if module == end or module.endswith(f".{end}")]
        return found[0] if found else default

    for row in report:
        if len([size for size in row.shape if size > 1]) > 1:
            assert (row.name, row.role.kind) == (row.name, of(others, row.name, "hidden"))
            fused = row.role.parts and row.role.kind == "hidden" and name == "Falcon"
            if not fused:
                assert (row.name, row.role.heads) == (row.name, of(heads, row.name, None))
        elif len(row.shape) == 1:
            assert row.role.kind in ("gain", "bias")
            assert (row.role.kind == "bias") == row.name.endswith("bias")
        assert row.role.evidence


class Adapted(nn.Module):
    """A low-rank addition to a weight, a masked weight, a normalized one, and two readouts."""

    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm((5, 6))
        self.position = nn.Parameter(torch.randn(5, 6))
        self.w, self.a = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(3, 6))
        self.b, self.masked = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(8, 8))
        self.register_buffer("mask", torch.ones(8, 8).tril())
        self.normalized = parametrizations.weight_norm(nn.Linear(8, 8))
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        y = torch.tanh(F.linear(self.ln(x + self.position), self.w + self.b @ self.a))
        y = torch.tanh(F.linear(y, self.masked * self.mask))
        y = torch.tanh(self.normalized(y))
        return self.first(y), self.second(y.mean(1))


def test_what_is_made_of_several_parameters_stands_for_them_all():
    torch.manual_seed(0)
    report = analyze(Adapted(), torch.randn(20, 5, 6))
    kinds = {row.name: row.role.kind for row in report}
    hidden = {name for name, kind in kinds.items() if kind == "hidden"}
    assert hidden == {"w", "a", "b", "masked", "normalized.parametrizations.weight.original1"}
    assert kinds["normalized.parametrizations.weight.original0"] == "gain"
    assert (kinds["first.weight"], kinds["second.weight"]) == ("readout", "readout")
    assert (kinds["position"], kinds["ln.weight"], kinds["ln.bias"]) == ("bias", "gain", "bias")


def test_groups_leave_gains_and_biases_of_any_shape_undecayed_and_take_options_by_role():
    torch.manual_seed(0)
    model = Adapted()
    report = analyze(model, torch.randn(20, 5, 6))
    groups = report.param_groups(
        weight_decay=0.1, overrides={"readout": {"lr": 5.0}, "first.*": {"lr": 7.0}}
    )
    by_name = {group["name"]: group for group in groups}
    vectors = {id(p) for p in by_name["vector"]["params"]}
    assert by_name["vector"]["weight_decay"] == 0
    for p in (model.ln.weight, model.ln.bias, model.position):  # of two dimensions
        assert id(p) in vectors
    assert (by_name["readout"]["lr"], by_name["first.*"]["lr"]) == (5.0, 7.0)
    assert [id(p) for p in by_name["readout"]["params"]] == [id(model.second.weight)]
    with pytest.raises(ValueError, match="no role and no parameter"):
        report.param_groups(weight_decay=0.1, overrides={"router": {}})


def test_a_last_product_that_is_normalized_away_is_no_readout():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5))
    report = analyze(net, torch.randn(9, 6))
    assert report["2.weight"].role.kind == "hidden"


def test_a_gain_or_bias_of_three_dimensions_makes_no_router_of_a_matrix_with_as_many_rows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.position = nn.Parameter(torch.randn(8, 4, 4))
            self.first, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 1, 1))
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = (self.norm(self.conv(x)) + self.position).relu().mean((2, 3))
            return self.head((self.first(x)[..., None, None] * self.scale).flatten(1).relu())

    torch.manual_seed(0)
    report = analyze(Net(), torch.randn(9, 3, 6, 6))
    kinds = {row.name: row.role.kind for row in report if not row.name.endswith("bias")}
    assert kinds.pop("conv.weight") == kinds.pop("first.weight") == "hidden"
    assert kinds == {
        "norm.weight": "gain",
        "position": "bias",
        "scale": "gain",
        "head.weight": "readout",
    }


def test_all_of_falcons_matrices_go_to_muon():
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES))
    report = analyze(model, tokens())
    optimizer = nw.groups(report, matrices={"lr": 1.0}, others={"lr": 2.0})
    (matrices,) = (group for group in optimizer if group["name"] == "matrices")
    assert len(matrices["params"]) == 4
