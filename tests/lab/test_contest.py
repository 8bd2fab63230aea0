"""A problem of the user's own: from its file to the answer, by every way there is to ask."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import normwise
from normwise import cli, lab
from normwise.lab.contenders import Contender, parse
from normwise.lab.contest import Contest
from normwise.lab.errors import UsageError
from normwise.lab.running.invariant import invariant_views
from normwise.lab.tasks.supervised import MEASURES, supervised

FILE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from normwise.lab import supervised

x = torch.randn(160, 6, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())

def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

def problem():
    train, test = torch.utils.data.random_split(data, [120, 40])
    return supervised(network, train, test, batch_size=20, epochs=2)

def fails():
    raise KeyError("no column")

def optimizer(params, lr):
    return torch.optim.RMSprop(params, lr=lr)
"""
QUICK = ["--seeds", "1", "--quiet", "--json", "--optimizers", "sgd,sgdp"]


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """The name of a module in the current folder, another one for every test."""
    name = f"m_{abs(hash(request.node.name))}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(FILE))
    return name


def values(summary):
    """The numbers of each method, by metric and seed as a JSON file has them."""
    return {m["name"]: json.loads(json.dumps(m["values"])) for m in summary["methods"]}


def test_the_same_numbers_by_command_from_python_and_by_recipe(module, capsys):
    command = ["compare", f"{module}.py:problem", *QUICK]
    assert cli.main([*command, "--out", "a"]) == 0
    first = values(json.loads(capsys.readouterr().out))
    by_name = lab.compare(f"{module}:problem", optimizers=["sgd", "sgdp"], seeds=1, out="b")
    assert values(by_name.summary) == first
    made = __import__(module).problem
    torch.manual_seed(0)
    problem = made()
    given = lab.compare(problem, optimizers=["sgd", "sgdp"], seeds=1, out="c")
    assert values(given.summary) == first
    run = ["paper", "run", "a/recipe.yaml", "--scale", "paper", "--quiet", "--json", "--out", "d"]
    assert cli.main(run) == 2  # the recipe's code runs only if it is trusted
    assert f"--trust {module}" in capsys.readouterr().err
    assert cli.main([*run, "--trust", module]) == 0
    shown = json.loads(capsys.readouterr().out)
    accuracies = [row["values"] for row in shown if row["metric"] == "accuracy"]
    assert accuracies == [of["accuracy"] for of in first.values()]


@pytest.mark.slow
def test_two_jobs_give_the_same_numbers(module, capsys):
    command = ["compare", f"{module}.py:problem", *QUICK]
    assert cli.main([*command, "--out", "a"]) == 0
    first = values(json.loads(capsys.readouterr().out))
    assert cli.main([*command, "--out", "b", "--jobs", "2"]) == 0
    assert values(json.loads(capsys.readouterr().out)) == first


def test_an_interrupted_comparison_goes_on_to_the_same_numbers(module, monkeypatch):
    given = {"optimizers": ["sgd", "sgdp"], "seeds": 1, "lr": [0.01, 0.1]}
    whole = lab.compare(f"{module}:problem", **given, out="a")
    seen = []

    def stop(event):
        seen.append(event)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.compare(f"{module}:problem", **given, out="b", observe=stop)
    assert values(lab.compare(f"{module}:problem", **given, out="b").summary) == values(
        whole.summary
    )
    with pytest.raises(UsageError, match="another comparison"):
        lab.compare(f"{module}:problem", optimizers=["sgd"], seeds=1, out="b")


def test_each_method_takes_the_learning_rate_that_is_best_on_held_out_data(module):
    result = lab.compare(
        f"{module}:problem", optimizers=["sgd", "adamw"], seeds=1, lr=[1e-7, 0.05], out="a"
    )
    assert [m["lr"] for m in result.summary["methods"]] == [0.05, 0.05]
    (sweep,) = [text for text in result.summary["paragraphs"] if "held-out" in text]
    assert "SGD at 0.05" in sweep
    assert "end of its list for SGD (highest)" in sweep
    page = (result.folder / "report.html").read_text("utf-8")
    assert "over the learning rate" in page
    config = next(result.folder.glob("cells/*-sweep/*/sgd/seed-0/config.json"))
    assert json.loads(config.read_text())["options"]["held_out"] == 0.1


def test_held_out_examples_are_a_tenth_of_the_training_data_and_never_learned_from():
    data = TensorDataset(torch.arange(100.0)[:, None], torch.zeros(100).long())
    problem = supervised(lambda: nn.Linear(1, 2), data, data).fresh(torch.device("cpu"), 0.1)
    draw = torch.Generator().manual_seed(0)
    ((learned,), _, _) = problem.batch(torch.arange(problem.examples), draw)
    held = torch.cat([x for _, ((x,), _, _) in problem._tests()])
    assert (len(learned), len(held)) == (90, 10)
    assert sorted([*learned.flatten().tolist(), *held.flatten().tolist()]) == list(range(100))


def test_the_headline_says_share_norms_and_the_best_and_the_code_runs(module):
    contender = "tangential(torch:NAdam)"
    result = lab.compare(f"{module}:problem", optimizers=[contender], seeds=1, out="a")
    model = __import__(module).network()
    sizes = [p.numel() for p in model.parameters()]
    assert f"{100 * 48 / sum(sizes):.0f}% of the weights" in result.headline
    assert "multiplied the learning rate by" in result.headline
    assert result.summary["invariant"] == {"0.weight": "channel"}
    namespace = {"model": model}
    exec(result.summary["code"], namespace)
    (rule, _) = normwise.describe(namespace["optimizer"])
    assert (rule.name, str(rule.view)) == ("NAdam", "channel")


def test_a_network_without_normalization_is_told_what_to_expect(tmp_path):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sum(1))
    problem = lab.supervised(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        data, data, loss="mse", batch_size=20, epochs=1,
    )  # fmt: skip
    result = lab.compare(problem, optimizers=["sgd"], seeds=2, lr=0.01, out=tmp_path / "a")
    assert result.headline.startswith("None of the weights")
    assert "test root mean squared error" in result.headline
    assert any("Without a normalization" in text for text in result.summary["paragraphs"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("problm", ["has no 'problm'", "did you mean 'problem'?"]),
        ("fails", ["raised KeyError", "no column"]),
        ("network", ["of type Sequential", "supervised"]),
        ("data", ["TensorDataset", "must be a function"]),
    ],
)
def test_a_factory_that_is_none_is_one_line_and_exit_code_2(module, capsys, name, words):
    assert cli.main(["compare", f"{module}:{name}"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert all(word in err for word in words)
    with pytest.raises(UsageError):
        cli.main(["compare", f"{module}:{name}", "--debug"])


X, Y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"make_model": lambda: 3}, "returned an object of type int"),
        ({"make_model": nn.ReLU}, "no parameters to train"),
        ({"make_model": lambda: nn.Linear(5, 3)}, "fails on a batch of .* cannot be multiplied"),
        ({"train": TensorDataset(X[:0], Y[:0])}, "train data are empty"),
        ({"train": TensorDataset(X[:8], Y[:8])}, "batch size 32 .* 8 training examples"),
        ({"train": TensorDataset(X, Y + 1)}, "labels go from 1 to 3, .* has 3 outputs"),
        ({"test": TensorDataset(X, Y - 1)}, "labels go from -1 to 1"),
        ({"train": TensorDataset(X / 0, Y)}, "NaN or infinity"),
        ({"train": TensorDataset(X, Y.float())}, "cross-entropy needs whole numbers"),
        ({"loss": "mse"}, r"does not fit the loss .*\(32, 3\)"),
        ({"loss": "crossentropy"}, "did you mean 'cross-entropy'"),
        ({"metrics": "acuracy"}, "did you mean 'accuracy'"),
        ({"train": [X[0]] * 64}, "no target"),
        ({"train": iter([])}, "have no length"),
        ({"make_model": nn.Linear(4, 3)}, "must be a function"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(tmp_path, change, words):
    given = {"make_model": network, "train": TensorDataset(X, Y), "test": TensorDataset(X, Y)}
    with pytest.raises(UsageError, match=words):
        lab.compare(lab.supervised(**{**given, **change}), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Stream(IterableDataset):
    """Examples one after the other, as dicts."""

    def __len__(self):
        return len(X)

    def __iter__(self):
        return ({"input": x, "label": y} for x, y in zip(X, Y, strict=True))


def test_an_iterable_of_dicts_is_read_from_where_a_run_goes_on():
    class Named(nn.Sequential):
        def forward(self, input):
            return super().forward(input)

    problem = supervised(lambda: Named(*network()), Stream(), Stream(), batch_size=16)
    problem = problem.fresh(torch.device("cpu"))
    steps = problem.batches(16, torch.Generator())
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    for batch, expected in zip(problem.stream(steps[2:], draws), X.split(16)[2:], strict=True):
        assert torch.equal(batch[1]["input"], expected)
    assert set(problem.evaluate().metrics) == {"accuracy", "cross-entropy"}
    assert set(invariant_views(problem, 16)[0]) == {"0.weight"}


def test_next_token_predicts_each_token_from_those_before_it():
    class Counts(nn.Module):
        """Knows that 2 follows 1 follows 0 follows 2."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(50.0))

        def forward(self, ids):
            return self.scale * nn.functional.one_hot((ids + 1) % 3, 3)

    sequences = [torch.arange(i, i + 8) % 3 for i in range(6)]
    problem = supervised(Counts, sequences, sequences, loss="next-token", batch_size=2)
    metrics = problem.fresh(torch.device("cpu")).evaluate().metrics
    assert metrics == {"perplexity": pytest.approx(1.0), "accuracy": 1.0}


def test_measures_are_those_of_their_closed_forms():
    output, target = torch.tensor([[0.0], [3.0]]), torch.tensor([1.0, 1.0])
    assert MEASURES["mse"].of(output, target).tolist() == [1.0, 4.0]
    assert MEASURES["mae"].of(output, target).tolist() == [1.0, 2.0]
    logits, labels = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    assert MEASURES["accuracy"].of(logits, labels).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "contender"),
    [
        ("SGDP", Contender("sgdp")),
        ("torch:NAdam", Contender("torch:NAdam")),
        ("sub/mine.py:make", Contender("sub.mine:make")),
        ("tangential( torch:NAdam )", Contender("torch:NAdam", ("tangential",))),
    ],
)
def test_contenders_are_read_from_their_names(text, contender):
    assert parse(text) == contender
    assert parse(str(contender)) == contender


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("admp", "did you mean 'adamp'"),
        ("torch:NAdm", "did you mean 'NAdam'"),
        ("torch:LBFGS", "needs a closure"),
        ("tangental(sgd)", "did you mean 'tangential'"),
        ("tangential(sgdd)", "did you mean 'sgd'"),
        ("/abs/mine.py:make", "unknown optimizer"),
    ],
)
def test_contenders_that_are_none_are_refused(text, words):
    with pytest.raises(UsageError, match=words):
        parse(text)


def test_a_sphere_is_made_on_the_invariant_weights_without_their_decay(monkeypatch):
    seen = {}

    def sphere(optimizer, views):
        seen.update(optimizer=optimizer, views=views)
        return optimizer

    monkeypatch.setattr(normwise, "sphere", sphere, raising=False)
    on, off, gain = (nn.Parameter(torch.ones(n)) for n in ((2, 2), (3, 2), (2,)))
    groups = [{"params": [on, off], "weight_decay": 0.1}, {"params": [gain], "weight_decay": 0.0}]
    views = {on: normwise.View.channel(), gain: normwise.View.layer()}
    parse("sphere(torch:AdamW)").make(lambda name, own: None, groups, 0.01, views)
    assert seen["views"] == {on: normwise.View.channel()}
    decays = {p: g["weight_decay"] for g in seen["optimizer"].param_groups for p in g["params"]}
    assert decays == {on: 0.0, off: 0.1, gain: 0.0}
    monkeypatch.delattr(normwise, "sphere")
    with pytest.raises(UsageError, match="has no 'sphere'"):
        parse("sphere(torch:AdamW)")


def test_a_contender_of_the_users_is_described_and_compared(module):
    name = f"{module}.py:optimizer"
    contest = Contest(f"{module}:problem", ("sgd", name), seeds=1)
    made = contest.methods[f"{module}-optimizer"]
    assert made.rule.name == "RMSprop"
    result = contest.run()
    (_, mine) = result.summary["methods"]
    assert mine["does"].startswith("update normalized")
