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


def scale_sets(report):
    return [set(joint.exponents) for joint in report.sets if joint.is_scale]


def resnet_sets(depths):
    """Joint scale sets of a bottleneck ResNet, from its structure.

    conv–bn–relu–conv–bn–relu–conv–bn, plus the shortcut, relu. A ReLU lets scale pass, and every
    convolution is followed by a batch norm. So the gain and bias of each of the first two norms of
    a block are absorbed by the next norm; those of the last norms of a stage's blocks, with its
    shortcut's, are summed into one stream, which the next stage's first norms absorb; the last
    stage's stream is read by the classifier, which absorbs nothing.
    """
    gains = ("weight", "bias")
    sets = [{f"resnet.embedder.embedder.normalization.{g}" for g in gains}]
    for s, depth in enumerate(depths):
        stage = f"resnet.encoder.stages.{s}.layers"
        for b in range(depth):
            sets += [{f"{stage}.{b}.layer.{i}.normalization.{g}" for g in gains} for i in (0, 1)]
        if s + 1 < len(depths):
            stream = {f"{stage}.{b}.layer.2.normalization.{g}" for b in range(depth) for g in gains}
            sets.append(stream | {f"{stage}.0.shortcut.normalization.{g}" for g in gains})
    return sets


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
    key = sorted
    expected = resnet_sets(config.depths)
    assert sorted(map(key, scale_sets(report))) == sorted(map(key, expected))
    (trade,) = (joint for joint in report.sets if not joint.is_scale)
    assert trade.exponents["classifier.1.weight"] == -1
    last = len(config.depths) - 1
    assert all(
        name.startswith(f"resnet.encoder.stages.{last}.") for name in list(trade.exponents)[:-1]
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


def test_llama():
    """The embedding, o_proj and down_proj of every layer write the stream, and norms read it.

    The rest trade scale: q with k, v with o and up with down, which enter as products; the gain of
    a norm with the projections that read it.
    """
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LANGUAGE))
    report = analyze(model, tokens())
    assert not report.views()
    (stream,) = scale_sets(report)
    assert stream == writers(report, "embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    assert len(stream) == 5
    trades = [joint.exponents for joint in report.sets if not joint.is_scale]
    assert len(trades) == 2 * 5 + 1
    for layer in (0, 1):
        start = f"model.layers.{layer}."
        q, k, v, o = (f"{start}self_attn.{x}_proj.weight" for x in "qkvo")
        gate, up, down = (f"{start}mlp.{x}_proj.weight" for x in ("gate", "up", "down"))
        assert {q: 1, k: -1} in trades
        assert {v: 1, o: -1} in trades
        assert {up: 1, down: -1} in trades
        assert {f"{start}input_layernorm.weight": -1, q: 1, k: 1, v: 1} in trades
        assert {f"{start}post_attention_layernorm.weight": -1, gate: 1, up: 1} in trades
    assert {"model.norm.weight": 1, "lm_head.weight": -1} in trades
    assert {row.name for row in report if row.kind == "joint"} == stream


@pytest.mark.parametrize("tied", [False, True])
def test_gpt2(tied):
    """Embeddings and both c_proj, with their biases, write the stream.

    Tied to the head, the token embedding cannot grow without the logits growing, unless the last
    norm's gain and bias shrink: then they belong to the set, with exponent −1. A key's bias shifts
    all of a query's scores alike, so that softmax removes it: a third of c_attn.bias is without
    effect.
    """
    config = transformers.GPT2Config(tie_word_embeddings=tied, **GPT2)
    report = analyze(transformers.GPT2LMHeadModel(config), tokens())
    assert not report.views()
    stream = writers(report, "wte.weight", "wpe.weight", "c_proj.weight", "c_proj.bias")
    assert len(stream) == 2 + 2 * 4
    last = {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    largest = max(report.sets, key=lambda joint: len(joint.exponents))
    expected = dict.fromkeys(stream, 1) | (dict.fromkeys(last, -1) if tied else {})
    assert largest.exponents == expected
    assert largest.is_scale == (not tied)
    if tied:
        assert report["lm_head.weight"].name == "transformer.wte.weight"
    others = [joint.exponents for joint in report.sets if joint is not largest]
    for layer in (0, 1):
        start = f"transformer.h.{layer}."
        for norm, reader in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            exponents = {f"{start}{norm}.weight": 1, f"{start}{norm}.bias": 1}
            assert exponents | {f"{start}{reader}.weight": -1} in others
        row = report[f"{start}attn.c_attn.bias"]
        assert row.why == "32 of 96 rows have zero gradient"
    head = [dict.fromkeys(sorted(last, reverse=True), 1) | {"lm_head.weight": -1}]
    assert len(others) == (4 if tied else 5)
    assert tied or head[0] in others


def test_qwen3_with_a_norm_on_each_head_of_queries_and_keys():
    """4 heads of queries and 2 of keys, of 8 rows each, feed q_norm and k_norm."""
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=8, **LANGUAGE))
    report = analyze(model, tokens())
    expected = {}
    for layer in (0, 1):
        attention = f"model.layers.{layer}.self_attn"
        expected[f"{attention}.q_proj.weight"] = "blocks(4)"
        expected[f"{attention}.k_proj.weight"] = "blocks(2)"
        why = report[f"{attention}.q_proj.weight"].why
        assert why == f"each block of 8 rows feeds `{attention}.q_norm` (Qwen3RMSNorm)"
    assert {name: str(view) for name, view in report.views().items()} == expected
    (stream,) = scale_sets(report)
    assert stream == writers(report, "embed_tokens.weight", "o_proj.weight", "down_proj.weight")


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
