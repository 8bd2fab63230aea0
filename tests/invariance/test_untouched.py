"""The model comes back bit-identical, and bad input is told in one line."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from normwise.invariance import analyze


class Everything(nn.Module):
    """Dropout, batch statistics, a tied weight, a frozen one, hooks, parametrizations, a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.frozen = nn.Linear(8, 8, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.empty = nn.Identity()
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.mix.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, ids):
        self.calls += 1
        x = self.drop(self.spectral(self.mix(self.embed(ids))))
        x = self.norm(self.frozen(x).flatten(0, 1))
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002 -- as old code does
        return {"logits": self.head(torch.tanh(x) * noise), "extra": [None, ids]}


def state_of(model):
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "flags": {n: (p.requires_grad, p.dtype, id(p)) for n, p in model.named_parameters()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
        },
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a is b or (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)


def random_state():
    numpy_state = np.random.get_state()  # noqa: NPY002 -- as old code uses
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_a_model_with_everything_is_bit_identical_afterwards(training):
    model = Everything().train(training)
    model.norm.eval()
    ids = torch.randint(0, 11, (4, 6))
    model(ids)["logits"].sum().backward()
    before, seeds = copy.deepcopy(state_of(model)), random_state()
    before["flags"] = {n: (p.requires_grad, p.dtype, id(p)) for n, p in model.named_parameters()}
    before["gradients"] = {n: p.grad for n, p in model.named_parameters()}
    values = {n: None if g is None else g.clone() for n, g in before["gradients"].items()}
    report = analyze(model, ids)
    assert same(before, state_of(model))
    assert same(values, {n: p.grad for n, p in model.named_parameters()})
    assert seeds == random_state()
    assert torch.get_default_dtype() == torch.float32
    assert report["embed.weight"].aliases == ("head.weight",)
    assert report["head.weight"].name == "embed.weight"
    assert report["frozen.weight"].frozen
    # A batch norm that was set to evaluation in a model in training stays so; in a model in
    # evaluation everything is switched, as model.train() does. The scale of the first can be traded
    # against what is before it; that its norm's mean is still 0, against which its own rows and the
    # gain could be traded too, is an accident, and not made use of.
    assert report["frozen.weight"].verdict == ("balanced" if training else "channel")
    gains = [s for s in report.symmetries if "norm.weight" in s.parameters]
    assert not gains
    assert report["spectral.parametrizations.weight.original"].verdict == "layer"
    assert report["mix.parametrizations.weight.original1"].verdict == "channel"


def test_the_same_seed_gives_the_same_report_whatever_was_drawn_before():
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.LayerNorm(8), nn.Linear(8, 2))
    x = torch.randn(5, 6)
    first = analyze(net, x, seed=3)
    torch.rand(7)
    assert str(analyze(net, x, seed=3)) == str(first)


def test_inside_no_grad_and_inference_mode():
    net, x = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8)), torch.randn(5, 6)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert analyze(net, x)["0.weight"].verdict == "layer"


def test_old_style_weight_norm_whose_deepcopy_torch_refuses():
    net = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 2))
    net(torch.randn(5, 6))
    with pytest.raises(RuntimeError):
        copy.deepcopy(net)
    report = analyze(net, torch.randn(5, 6))
    assert report["0.weight_v"].verdict == "channel"
    assert report["0.weight_v"].why == "normalized inside `0` (Linear)"


def test_forms_of_batches():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8, bias=False)

        def forward(self, x, scale):
            return [nn.functional.layer_norm(self.a(x), (8,)) * scale]

    net, x = Net(), torch.randn(5, 6)
    forms = [(x, 2.0), [x, 2.0], {"x": x, "scale": 2.0}, lambda model: model(x, scale=2.0)]
    for form in forms:
        assert analyze(net, form)["a.weight"].verdict == "layer"


def test_a_model_on_meta_needs_a_factory():
    def build(width):
        return nn.Sequential(
            nn.Linear(6, width, bias=False), nn.GroupNorm(4, width), nn.GELU(), nn.Linear(width, 2)
        )

    with torch.device("meta"):
        model = build(1024)
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device.*factory="):
        analyze(model, torch.randn(5, 6))
    x, seeds = torch.randn(5, 6), random_state()
    report = analyze(model, x, factory=lambda: build(16))
    assert random_state() == seeds
    assert report["0.weight"].verdict == "blocks(4)"
    assert report["0.weight"].shape == (1024, 6)
    groups = report.param_groups(weight_decay=0.1)
    assert groups[0]["params"][0] is model[0].weight
    with pytest.raises(ValueError, match="not in the model"):
        analyze(model, torch.randn(5, 6), factory=lambda: nn.Linear(6, 2))


class Broken(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.linear = nn.Linear(6, 2)
        self.count = [0]
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def counted(self, x):
    self.count[0] += 1
    return self.linear(x) * self.count[0]


def raises(self, x):
    raise KeyError("deep inside")


BAD = {
    "empty": (lambda self, x: self.linear(x[:0]), ValueError, r"empty outputs, of shape \(0, 2\)"),
    "raises": (raises, RuntimeError, "forward of Broken raised KeyError: 'deep inside'"),
    "not differentiable": (
        lambda self, x: self.linear(x).argmax(1),
        ValueError,
        r"no differentiable tensor, but a tensor of shape \(5,\)",
    ),
    "no tensor": (lambda self, x: "text", ValueError, "an object of type str"),
    "detached": (lambda self, x: self.linear(x).detach(), ValueError, "no differentiable tensor"),
    "NaN": (
        lambda self, x: self.linear(x) / torch.zeros_like(x[:, :1]) * 0,
        ValueError,
        "NaN in 10 of 10 entries",
    ),
    "not deterministic": (counted, ValueError, "not deterministic: .* differ by 1.0e"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_forward_is_told_in_one_line_and_leaves_the_model_alone(name):
    function, error, match = BAD[name]
    model = Broken(function)
    before, seeds = copy.deepcopy(model.state_dict()), random_state()
    with pytest.raises(error, match=match) as caught:
        analyze(model, torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))
    assert "\n" not in str(caught.value)
    assert same(dict(before), dict(model.state_dict()))
    assert seeds == random_state()
    assert torch.get_default_dtype() == torch.float32
    assert model.count == [0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((nn.ReLU(), torch.randn(2)), "ReLU has no floating-point parameters"),
        ((nn.Linear(2, 2), 3), "Invalid batch: int"),
        ((nn.Linear(2, 2), lambda: None), "must take the model as its one argument"),
        ((nn.LazyLinear(2), torch.randn(2, 2)), "'weight' has no shape yet"),
    ],
)
def test_what_cannot_be_analyzed(arguments, match):
    with pytest.raises(ValueError, match=match):
        analyze(*arguments)


def test_options_out_of_range():
    for options, match in (({"draws": 0}, "draws: 0"), ({"mode": "both"}, "mode: 'both'")):
        with pytest.raises(ValueError, match=match):
            analyze(nn.Linear(2, 2), torch.randn(2, 2), **options)
