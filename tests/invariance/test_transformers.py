"""Networks that nobody here wrote: transformers' configurations at random weights.

The expected answers are derived by hand from the architectures, as the comments tell.
"""

import pytest
import torch

from normwise.invariance import analyze

transformers = pytest.importorskip("transformers", reason="the networks come from transformers")
transformers.utils.logging.set_verbosity_error()

LANGUAGE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tokens():
    return {"input_ids": torch.randint(0, 50, (2, 8))}


def images(size):
    return torch.randn(2, 3, size, size)


def verdicts(report, *, matrices=False):
    return {row.name: row.verdict for row in report if not (matrices and row.is_vector)}


def families(report):
    """The symmetries of more than one weight, as the report prints them."""
    return {str(symmetry) for symmetry in report.symmetries if not symmetry.is_view}


def scale_sets(report):
    return [set(s.parameters) for s in report.symmetries if s.is_scale and not s.is_view]


def resnet_families(depths, sizes, embedding):
    """The families of a bottleneck ResNet, channel by channel, from its structure.

    conv–bn–relu–conv–bn–relu–conv–bn, plus the shortcut, relu. A ReLU lets scale pass: a channel's
    gain and bias against the column of the next convolution. The last norms of a stage's blocks and
    its shortcut's are summed into one stream, which the convolutions of the next blocks and stage
    read; the last stage's is read by the classifier.
    """
    parts = ("weight", "bias")
    found = []

    def add(norms, readers, units):
        up = sorted(f"{norm}.{part}" for norm in norms for part in parts)
        down = sorted(f"{reader}.weight columns" for reader in readers)
        found.append((up, down, units))

    def stage(s):
        return f"resnet.encoder.stages.{s}.layers"

    for s, depth in enumerate(depths):
        for b in range(depth):
            block = f"{stage(s)}.{b}.layer"
            for i in (0, 1):
                add([f"{block}.{i}.normalization"], [f"{block}.{i + 1}.convolution"], sizes[s] // 4)
        norms = [f"{stage(s)}.{b}.layer.2.normalization" for b in range(depth)]
        norms.append(f"{stage(s)}.0.shortcut.normalization")
        readers = [f"{stage(s)}.{b}.layer.0.convolution" for b in range(1, depth)]
        if s + 1 < len(depths):
            readers.append(f"{stage(s + 1)}.0.layer.0.convolution")
            readers.append(f"{stage(s + 1)}.0.shortcut.convolution")
        else:
            readers.append("classifier.1")
        add(norms, readers, sizes[s])
    first = [f"{stage(0)}.0.layer.0.convolution", f"{stage(0)}.0.shortcut.convolution"]
    add(["resnet.embedder.embedder.normalization"], first, embedding)
    return sorted(found)


def check_resnet(config, size, convolutions):
    model = transformers.ResNetForImageClassification(config)
    report = analyze(model, images(size))
    found = verdicts(report, matrices=True)
    assert found.pop("classifier.1.weight") == "balanced"  # against the last stage's gains
    assert report["classifier.1.bias"].verdict == "none"
    assert len(found) == convolutions
    assert set(found.values()) == {"channel"}
    for name in found:
        norm = name.replace("convolution.weight", "normalization")
        assert report[name].why == f"feeds `{norm}` (BatchNorm2d)"
    found = []
    for symmetry in report.symmetries:
        if not symmetry.is_view:
            up, down = ([str(t) for t in symmetry.terms if t.exponent == a] for a in (1, -1))
            found.append((sorted(up), sorted(down), symmetry.units))
    assert sorted(found) == resnet_families(
        config.depths, config.hidden_sizes, config.embedding_size
    )


def test_small_resnet():
    """A bottleneck ResNet of 2 + 1 blocks: stem, 3 convolutions a block, a shortcut a stage."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], num_labels=5
    )
    check_resnet(config, 32, 1 + 3 * 3 + 2)


@pytest.mark.slow
def test_resnet_50():
    """1 + 3·(3 + 4 + 6 + 3) + 4 = 53 convolutions, each before a batch norm; the classifier not."""
    check_resnet(transformers.ResNetConfig(), 64, 53)


def test_bit_with_weight_standardized_convolutions():
    """Each convolution standardizes its own weight, by output channel."""
    config = transformers.BitConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4
    )
    report = analyze(transformers.BitForImageClassification(config), images(32))
    found = verdicts(report, matrices=True)
    assert found.pop("classifier.1.weight") == "balanced"  # against the last norm's gains
    assert len(found) == 1 + 2 * 4  # the stem; three convolutions and a shortcut a block
    assert set(found.values()) == {"channel"}
    for name in found:
        convolution = name.removesuffix(".weight")
        assert report[name].why == f"normalized inside `{convolution}` (WeightStandardizedConv2d)"


def test_group_norm():
    """MaskFormer's feature pyramid: each convolution, without a bias, before a GroupNorm(32)."""
    from transformers.models.maskformer.modeling_maskformer import MaskFormerFPNModel

    model = MaskFormerFPNModel(8, [4, 6], feature_size=64)
    features = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2)]
    report = analyze(model, lambda model: model(features))
    found = verdicts(report, matrices=True)
    assert len(found) == 5  # the stem; a projection and a block for each of two levels
    assert set(found.values()) == {"blocks(32)"}
    why = report["stem.0.weight"].why
    assert why == "each block of 2 rows feeds `stem.1` (GroupNorm)"


def test_convnext_with_layer_norm_after_convolutions():
    """Every convolution here has a bias: (weight, bias) before a LayerNorm scale together.

    The patch embedding is absorbed by the norm right after it, and each depthwise convolution by
    its block's. Between them the stream: what the embedding's norm writes, and each block's layer
    scale and depthwise bias with it.
    """
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, layer_scale_init_value=1e-6
    )
    report = analyze(transformers.ConvNextForImageClassification(config), images(32))
    block = "convnext.encoder.stages.0.layers.0"
    sets = scale_sets(report)
    patch = "convnext.embeddings.patch_embeddings"
    assert {f"{patch}.weight", f"{patch}.bias"} in sets
    assert {f"{block}.dwconv.weight", f"{block}.dwconv.bias"} in sets
    assert {
        "convnext.embeddings.layernorm.weight",
        "convnext.embeddings.layernorm.bias",
        f"{block}.dwconv.bias",
        f"{block}.layer_scale_parameter",
    } in sets
    gain = f"{block}.pwconv2.weight rows, {block}.pwconv2.bias ↔ {block}.layer_scale_parameter"
    assert any(
        set(gain.split(" ↔ ")) == set(f.split(":")[0].split(" ↔ ")) for f in families(report)
    )
    assert not report.views()


def test_convnext_without_biases_is_invariant_by_layer():
    """Without their biases the convolutions are invariant alone, as whole tensors."""
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    model = transformers.ConvNextForImageClassification(config)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    for name in convolutions:
        model.get_submodule(name).bias = None
    views = analyze(model, images(32)).views()
    blocks = {"convnext.embeddings.patch_embeddings.weight"}
    blocks |= {f"convnext.encoder.stages.{s}.layers.0.dwconv.weight" for s in (0, 1)}
    assert {name: str(view) for name, view in views.items()} == dict.fromkeys(blocks, "layer")


def writers(report, *names):
    """Parameters of these endings, in both layers."""
    return {row.name for row in report if row.name.endswith(names)}


def llama_like(layer, *, readers="qkv", norms=True):
    """Families of a block of Llama with 4 heads of queries and 2 of keys and values, of 8 rows.

    A norm's gain against the columns of what reads it. Queries against keys: a rotary embedding
    turns rows j and j + 4 of a head together, and both query heads of a group see one key. Values
    against the output's columns in both query heads. The gated unit is linear in up alone.
    """
    start = f"model.layers.{layer}."
    attention, mlp = start + "self_attn", start + "mlp"
    found = {
        f"{attention}.v_proj.weight rows ↔ "
        f"{attention}.o_proj.weight columns, 2 at a time 8 apart: 16 units",
        f"{mlp}.up_proj.weight rows ↔ {mlp}.down_proj.weight columns: 48 units",
    }
    if norms:
        listed = ", ".join(f"{attention}.{x}_proj.weight columns" for x in "qkv")
        found |= {
            f"{start}input_layernorm.weight ↔ {listed}: 32 units",
            f"{start}post_attention_layernorm.weight ↔ "
            f"{mlp}.gate_proj.weight columns, {mlp}.up_proj.weight columns: 32 units",
        }
    return found


def rotary(layer):
    attention = f"model.layers.{layer}.self_attn"
    return (
        f"{attention}.q_proj.weight rows, 4 at a time 4 apart ↔ "
        f"{attention}.k_proj.weight rows, 2 at a time 4 apart: 8 units"
    )


STREAM = ", ".join(
    ["model.embed_tokens.weight"]
    + [
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    ]
)
HEAD = "model.norm.weight ↔ lm_head.weight columns: 32 units"


def test_llama():
    """The embedding, o_proj and down_proj of every layer write the stream, and norms read it."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LANGUAGE))
    report = analyze(model, tokens())
    assert not report.views()
    blocks = llama_like(0) | llama_like(1) | {rotary(0), rotary(1)}
    assert families(report) == blocks | {STREAM, HEAD}
    assert {row.name for row in report if row.kind == "joint"} == set(STREAM.split(", "))
    roles = {row.name: str(row.role) for row in report}
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["lm_head.weight"] == "readout"
    assert roles["model.norm.weight"] == "gain"
    attention = "model.layers.1.self_attn"
    assert [roles[f"{attention}.{x}_proj.weight"] for x in "qkvo"] == [
        "hidden, 4 heads",
        "hidden, 2 heads",
        "hidden, 2 heads",
        "hidden, 4 heads",
    ]
    assert roles["model.layers.1.mlp.up_proj.weight"] == "hidden"


@pytest.mark.parametrize("tied", [False, True])
def test_gpt2(tied):
    """Embeddings and both c_proj, with their biases, write the stream.

    Tied to the head, the token embedding cannot grow without the logits growing, unless the last
    norm's gain and bias shrink: then they belong to the family, with exponent −1. A key's bias
    shifts all of a query's scores alike, so that softmax removes it: a third of c_attn.bias is
    without effect. The weights are stored with inputs first, so that what a norm feeds are rows.
    """
    config = transformers.GPT2Config(tie_word_embeddings=tied, **GPT2)
    report = analyze(transformers.GPT2LMHeadModel(config), tokens())
    assert not report.views()
    expected = set()
    stream = ["transformer.wte.weight", "transformer.wpe.weight"]
    for layer in (0, 1):
        start = f"transformer.h.{layer}."
        qkv, fc = f"{start}attn.c_attn", f"{start}mlp.c_fc"
        for norm, reader in ((f"{start}ln_1", qkv), (f"{start}ln_2", fc)):
            expected.add(f"{norm}.weight, {norm}.bias ↔ {reader}.weight rows: 32 units")
        expected |= {
            f"{qkv}.bias entries 0–31, {qkv}.weight columns 0–31 ↔ {qkv}.weight columns 32–63: "
            "32 units",
            f"{qkv}.bias entries 64–95, {qkv}.weight columns 64–95 ↔ "
            f"{start}attn.c_proj.weight rows: 32 units",
        }
        stream += [
            f"{start}{p}.c_proj.{kind}" for p in ("attn", "mlp") for kind in ("bias", "weight")
        ]
        assert report[f"{qkv}.bias"].why == "32 of 96 rows have zero gradient"
        assert report[f"{qkv}.weight"].role.heads == 4
        assert report[f"{qkv}.weight"].role.parts == (
            "columns 0–31",
            "columns 32–63",
            "columns 64–95",
        )
    last = "transformer.ln_f.weight, transformer.ln_f.bias"
    if tied:
        expected.add(f"{', '.join(stream)} ↔ {last}")
        assert report["lm_head.weight"].name == "transformer.wte.weight"
        assert report["lm_head.weight"].role.kind == "tied"
    else:
        expected |= {", ".join(stream), f"{last} ↔ lm_head.weight columns: 32 units"}
    assert families(report) == expected


def test_qwen3_with_a_norm_on_each_head_of_queries_and_keys():
    """4 heads of queries and 2 of keys, of 8 rows each, feed q_norm and k_norm.

    The gains of these are what is left to trade between queries and keys, one a rotated pair.
    """
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=8, **LANGUAGE))
    report = analyze(model, tokens())
    expected, gains = {}, set()
    for layer in (0, 1):
        attention = f"model.layers.{layer}.self_attn"
        expected[f"{attention}.q_proj.weight"] = "blocks(4)"
        expected[f"{attention}.k_proj.weight"] = "blocks(2)"
        why = report[f"{attention}.q_proj.weight"].why
        assert why == f"each block of 8 rows feeds `{attention}.q_norm` (Qwen3RMSNorm)"
        gains.add(
            f"{attention}.q_norm.weight entries, 2 at a time 4 apart ↔ "
            f"{attention}.k_norm.weight entries, 2 at a time 4 apart: 4 units"
        )
    assert {name: str(view) for name, view in report.views().items()} == expected
    assert families(report) == llama_like(0) | llama_like(1) | gains | {STREAM, HEAD}


def test_cohere_with_an_interleaved_rotary_embedding_and_grouped_heads():
    """The embedding turns rows 2j and 2j + 1 of each head; two heads of queries see one of keys."""
    model = transformers.CohereForCausalLM(transformers.CohereConfig(**LANGUAGE))
    report = analyze(model, tokens())
    attention = "model.layers.0.self_attn"
    assert (
        f"{attention}.q_proj.weight rows, 2 at a time 8 apart, in runs of 2 ↔ "
        f"{attention}.k_proj.weight rows, in runs of 2: 8 units"
    ) in families(report)


def test_falcon_with_one_head_of_keys_and_values_in_a_fused_projection():
    """Rows 0–31 are 4 heads of queries, 32–39 the keys, 40–47 the values; x @ weight.T."""
    sizes = {k: v for k, v in LANGUAGE.items() if k not in ("intermediate_size",)}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))
    report = analyze(model, tokens())
    fused, out = (
        f"transformer.h.0.self_attention.{x}.weight" for x in ("query_key_value", "dense")
    )
    queries, keys = "rows 0–31, 8 at a time 4 apart", "rows 32–39, 2 at a time 4 apart"
    assert {
        f"{fused} {queries} ↔ {fused} {keys}: 4 units",
        f"{fused} rows 40–47 ↔ {out} columns, 4 at a time 8 apart: 8 units",
    } <= families(report)


def test_gemma2_whose_gains_are_one_plus_a_weight():
    """Of 1 + weight the sum is traded; the stream is one family, the last norm in it."""
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(head_dim=8, **LANGUAGE))
    report = analyze(model, tokens())
    start = "model.layers.0."
    listed = ", ".join(f"{start}self_attn.{x}_proj.weight columns" for x in "qkv")
    found = {str(family) for family in report.shifted}
    assert f"(1 + {start}input_layernorm.weight) ↔ {listed}: 32 units" in found
    writers_of_stream = ", ".join(
        f"(1 + model.layers.{layer}.post_{branch}_layernorm.weight)"
        for layer in (0, 1)
        for branch in ("attention", "feedforward")
    )
    stream = f"model.embed_tokens.weight, {writers_of_stream} ↔ (1 + model.norm.weight)"
    assert stream in found
    assert len(found) == 5


@pytest.mark.parametrize("kind", ["Llama", "Qwen3Moe"])
def test_a_narrow_network_tells_the_families_of_one_on_meta(kind):
    """Heads of 4 rows serve heads of 16, rotary pairs, experts and blocks included."""

    def build(width):
        experts = {"moe_intermediate_size": width, "num_experts": 4, "num_experts_per_tok": 4}
        sizes = LANGUAGE | {"hidden_size": width, "intermediate_size": width * 3 // 2}
        sizes |= {"num_hidden_layers": 1, "head_dim": width // 4}
        sizes |= experts if kind == "Qwen3Moe" else {}
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**sizes)
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    batch = tokens()
    with torch.device("meta"):
        large = build(64)
    found = analyze(large, batch, factory=lambda: build(16))
    expected = analyze(build(64), batch)
    assert {str(s) for s in found.symmetries} == {str(s) for s in expected.symmetries}
    assert found.views() == expected.views()


def test_olmo2_with_norms_over_all_heads_and_after_each_branch():
    """q and k are normalized over all heads at once; o and down before they join the stream."""
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**LANGUAGE))
    report = analyze(model, tokens())
    expected = writers(
        report, "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"
    ) | writers(report, "up_proj.weight", "down_proj.weight")
    found = {name: str(view) for name, view in report.views().items()}
    assert found == dict.fromkeys(expected, "layer")


@pytest.mark.slow
def test_mobilenet_v2():
    """52 convolutions and the classifier's input: all before batch norms, the depthwise too."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.35)
    report = analyze(
        transformers.MobileNetV2ForImageClassification(config), images(96), joint=False
    )
    found = verdicts(report, matrices=True)
    assert found.pop("classifier.weight") == "none"
    assert len(found) == 52
    assert set(found.values()) == {"channel"}
    depthwise = [row for row in report if len(row.shape) == 4 and row.shape[1] == 1]
    assert len(depthwise) == 17
    for row in depthwise:
        norm = row.name.replace("convolution.weight", "normalization")
        assert row.why == f"feeds `{norm}` (BatchNorm2d)"
