"""A problem of the user's own: from its file to the answer, by every way there is to ask."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import normwise
from normwise import cli, lab
from normwise.lab.contest import Contest
from normwise.lab.errors import UsageError
from normwise.lab.optimizers import Decay, OptimizerSpec, parse, split
from normwise.lab.recipes.schema import Training
from normwise.lab.report.code import code
from normwise.lab.running.events import Measured
from normwise.lab.running.invariant import invariant_views
from normwise.lab.running.pace import Pace, fitted
from normwise.lab.running.prepare import decay_within_window, make_optimizer
from normwise.lab.tasks.own import give
from normwise.lab.tasks.supervised import MEASURES, supervised

FILE = """
import random
import numpy as np
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

def optimizer(params, lr):
    return torch.optim.RMSprop(params, lr=lr)

class Noisy(torch.utils.data.Dataset):  # draws from every usual generator
    def __len__(self):
        return 32

    def __getitem__(self, number):
        return x[number, :4] + torch.rand(()) + random.random() + np.random.rand(), number % 3
"""
SOURCE = str(Path(normwise.__file__).parents[1])
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


def command(*words, **more):
    """A process that runs the command line in the current folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([SOURCE, *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-m", "normwise", *words], env=environment, text=True, **more
    )


@pytest.mark.slow
def test_the_same_numbers_with_two_jobs_and_killed_three_times(module, tmp_path, capsys):
    words = ["compare", f"{module}.py:problem", *QUICK, "--lr", "0.01,0.1", "--epochs", "30"]
    assert cli.main([*words, "--out", "a"]) == 0
    first = values(json.loads(capsys.readouterr().out))
    assert cli.main([*words, "--out", "b", "--jobs", "2"]) == 0
    assert values(json.loads(capsys.readouterr().out)) == first
    for finished in (1, 3, 5):  # of six trainings
        process = command(*words, stderr=subprocess.DEVNULL)
        while len([*tmp_path.glob("runs/*/cells/*/*/*/*/result.json")]) < finished:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
    again = command(*words, stdout=subprocess.PIPE)
    assert values(json.loads(again.communicate()[0])) == first
    assert len([*tmp_path.glob("runs/*")]) == 1


@pytest.mark.slow
def test_a_cluster_of_ray_gives_the_same_numbers(module, monkeypatch):
    ray = pytest.importorskip("ray", reason="compares on a local Ray cluster")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([SOURCE, *sys.path]))
    given = {"optimizers": ["sgd", "sgdp"], "seeds": 1}
    here = lab.compare(f"{module}:problem", **given, out="a")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        there = lab.compare(f"{module}:problem", **given, out="b", executor="ray")
    finally:
        ray.shutdown()
    assert values(there.summary) == values(here.summary)


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


def test_ctrl_c_keeps_every_step_that_was_taken(module):
    given = {"optimizers": ["sgdp"], "seeds": 1}
    whole = lab.compare(f"{module}:problem", **given, out="a")

    def press(event):
        if isinstance(event, Measured) and event.record["epoch"] == 1:
            signal.raise_signal(signal.SIGINT)

    # A process that a shell has put into the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            lab.compare(f"{module}:problem", **given, out="b", observe=press)
    finally:
        signal.signal(signal.SIGINT, before)
    again = lab.compare(f"{module}:problem", **given, out="b")
    assert values(again.summary) == values(whole.summary)
    (log,) = Path("b").glob("cells/*/*/*/*/log.txt")
    assert "resumed after epoch 1, step 1" in log.read_text()  # of six


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
    spec = "tangential(torch:NAdam)"
    result = lab.compare(f"{module}:problem", optimizers=[spec], seeds=1, out="a")
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
        data,
        data,
        loss="mse",
        batch_size=20,
        epochs=1,
    )
    result = lab.compare(problem, optimizers=["sgd"], seeds=2, lr=0.01, out=tmp_path / "a")
    assert result.headline.startswith("No weight of")
    assert "test root mean squared error" in result.headline
    assert any("Without a normalization" in text for text in result.summary["paragraphs"])


BAD = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from normwise.lab import supervised

x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
good = TensorDataset(x, y)

def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

def problem(make_model=network, train=good, test=good, **more):
    return lambda: supervised(make_model, train, test, **more)

def fails():
    raise KeyError("no column")

def no_network():
    raise OSError("no weights here")

a_number = lambda: 3
makes_number = problem(a_number)
makes_fail = problem(no_network)
no_weights = problem(nn.ReLU)
is_network = problem(network())
too_wide = problem(lambda: nn.Linear(5, 3))
wrong_loss = problem(loss="mse")
odd_loss = problem(loss=lambda out, target: out)
empty = problem(train=TensorDataset(x[:0], y[:0]))
small = problem(train=TensorDataset(x[:8], y[:8]))
high = problem(train=TensorDataset(x, y + 1))
low = problem(test=TensorDataset(x, y - 1))
missing = problem(train=TensorDataset(x / 0, y))
real = problem(train=TensorDataset(x, y.float()))
alone = problem(train=[x[0]] * 64)
endless = problem(train=iter([]))
spelt = problem(loss="crossentropy")
judged = problem(metrics="acuracy")
torn = problem(train=[(x[0], 1), (x[1][:2], 2)] * 16)
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("problm", "has no 'problm': did you mean 'problem'"),
        ("fails", "raised KeyError: 'no column'"),
        ("network", "returned an object of type Sequential; must return .* --data"),
        ("a_number", "returned an object of type int"),
        ("good", "is of type TensorDataset; must be a function"),
        ("makes_number", "make_model returned an object of type int"),
        ("makes_fail", "make_model raised OSError: no weights here"),
        ("no_weights", "no parameters to train"),
        ("is_network", "must be a function that makes a network"),
        ("too_wide", "fails on a batch of .* cannot be multiplied"),
        ("wrong_loss", r"does not fit the loss .*\(32, 3\)"),
        ("odd_loss", r"the loss returned \(32, 3\) float32; must be a scalar"),
        ("empty", "train data are empty"),
        ("small", "batch size 32 .* 8 training examples"),
        ("high", "labels go from 1 to 3, .* has 3 outputs"),
        ("low", "labels go from -1 to 1"),
        ("missing", "train data hold NaN or infinity"),
        ("real", "cross-entropy needs whole numbers"),
        ("alone", "no target"),
        ("endless", "have no length"),
        ("spelt", "did you mean 'cross-entropy'"),
        ("judged", "did you mean 'accuracy'"),
        ("torn", "cannot be made a batch .*: give a collate"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(
    tmp_path, monkeypatch, capsys, name, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bad", raising=False)
    (tmp_path / "bad.py").write_text(BAD)
    assert cli.main(["compare", f"bad.py:{name}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"normwise: error: .*{words}.*\n", err)
    assert not (tmp_path / "runs").exists()
    assert cli.main(["compare", f"bad.py:{name}", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


X, Y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Counting(Dataset):
    """Counts the examples that it has given and those that are still held, and is never copied."""

    def __init__(self):
        self.given, self.held, self.most = 0, 0, 0

    def __len__(self):
        return len(X)

    def __getitem__(self, number):
        x = X[number].clone()
        self.given, self.held = self.given + 1, self.held + 1
        self.most = max(self.most, self.held)
        weakref.finalize(x, self.release)
        return x, Y[number]

    def release(self):
        self.held -= 1

    def __reduce__(self):
        raise AssertionError("the data are copied")


def test_data_stream_and_nothing_is_copied_for_a_method(tmp_path):
    data = Counting()
    problem = supervised(network, data, TensorDataset(X, Y), batch_size=8, epochs=2)
    lab.compare(problem, optimizers=["sgd", "sgdp", "adamw"], seeds=1, out=tmp_path / "a")
    assert data.most == 8  # a batch
    assert data.given >= 3 * 2 * len(X)
    assert data.held == 0


def test_workers_make_the_same_batches(module):
    noisy = __import__(module).Noisy()

    def batches(workers):
        problem = supervised(network, noisy, noisy, workers=workers, batch_size=16)
        problem = problem.fresh(torch.device("cpu"))
        steps = problem.batches(16, torch.Generator().manual_seed(0))
        draws = [torch.Generator().manual_seed(i) for i in range(len(steps))]
        learned = [args[0] for args, _, _ in problem.stream(steps, draws)]
        return torch.stack([*learned, *(args[0] for _, (args, _, _) in problem._tests())])

    assert torch.equal(batches(0), batches(1))
    here = [(x, y) for x, y in zip(X, Y, strict=True)]
    problem = supervised(network, here, here, workers=1, collate=lambda rows: rows)
    with pytest.raises(UsageError, match=r"cannot be sent to workers .* or ask for no workers"):
        problem.fresh(torch.device("cpu")).evaluate()


class Arrow(Dataset):
    """As a dataset of Hugging Face's: lists, until tensors are asked for; a column of texts."""

    features = ("input", "text", "label")

    def __init__(self, tensors=False):
        self.format = {"type": "torch" if tensors else None}

    def with_format(self, kind):
        assert kind == "torch"
        return Arrow(tensors=True)

    def __len__(self):
        return len(X)

    def __getitem__(self, number):
        x = X[number] if self.format["type"] else X[number].tolist()
        return {"input": x, "text": "as read", "label": int(Y[number])}


class Named(nn.Sequential):
    def forward(self, input):
        return super().forward(input)


def test_a_dataset_of_hugging_face_gives_what_the_network_takes():
    problem = supervised(lambda: Named(*network()), Arrow(), Arrow(), batch_size=16)
    args, named, target = problem.fresh(torch.device("cpu")).batch(
        torch.arange(4), torch.Generator().manual_seed(0)
    )
    assert args == ()
    assert list(named) == ["input"]
    assert torch.equal(named["input"], X[:4])
    assert torch.equal(target, Y[:4])


class Stream(IterableDataset):
    """Examples one after the other, as dicts."""

    def __len__(self):
        return len(X)

    def __iter__(self):
        return ({"input": x, "label": y} for x, y in zip(X, Y, strict=True))


def test_an_iterable_of_dicts_is_read_from_where_a_run_goes_on():
    problem = supervised(lambda: Named(*network()), Stream(), Stream(), batch_size=16)
    problem = problem.fresh(torch.device("cpu"))
    steps = problem.batches(16, torch.Generator())
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    for batch, expected in zip(problem.stream(steps[2:], draws), X.split(16)[2:], strict=True):
        assert torch.equal(batch[1]["input"], expected)
    assert set(problem.evaluate().metrics) == {"accuracy", "cross-entropy"}
    assert set(invariant_views(problem, 16).views) == {"0.weight"}


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
    ("text", "spec"),
    [
        ("SGDP", OptimizerSpec("sgdp")),
        ("torch:NAdam", OptimizerSpec("torch:NAdam")),
        ("sub/mine.py:make", OptimizerSpec("sub.mine:make")),
        ("tangential( torch:NAdam )", OptimizerSpec("torch:NAdam", ("tangential",))),
        ("sgd + early(0.25)", OptimizerSpec("sgd", (), (Decay("early", 0.25),))),
        ("sphere(adamw)+cautious", OptimizerSpec("adamw", ("sphere",), (Decay("cautious"),))),
    ],
)
def test_optimizers_are_read_from_their_names(text, spec):
    assert parse(text) == spec
    assert parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("admp", "did you mean 'adamp'"),
        ("torch:NAdm", "did you mean 'NAdam'"),
        ("torch:LBFGS", "needs a closure"),
        ("tangental(sgd)", "did you mean 'tangential'"),
        ("tangential(sgdd)", "did you mean 'sgd'"),
        ("/abs/mine.py:make", "unknown optimizer"),
        ("sgd+erly", "did you mean 'early'"),
        ("sgd+early(2)", "a share of the steps"),
        ("sgd+cautious(0.5)", "takes nothing"),
        ("sphere(sgd+early)", r"write the decay last, sphere\(sgd\)\+early"),
    ],
)
def test_optimizers_that_are_none_are_refused(text, words):
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


def test_an_optimizer_of_the_users_is_described_and_compared(module):
    name = f"{module}.py:optimizer"
    contest = Contest(f"{module}:problem", ("sgd", name), seeds=1)
    made = contest.methods[f"{module}-optimizer"]
    assert made.rules[0].name == "RMSprop"
    result = contest.run()
    (_, mine) = result.summary["methods"]
    assert mine["does"].startswith("RMSprop: update normalized")


@pytest.mark.parametrize(
    "text",
    [
        "sgd",
        "adamw+corrected+cosine",
        "sphere(torch:Muon)",
        "tangential(torch:NAdam)+scheduled+early(0.5)",
        "sphere(adamw)",
    ],
)
def test_the_code_to_copy_makes_the_optimizer_that_was_trained(text):
    data = TensorDataset(X, Y)
    problem = supervised(network, data, data, epochs=2)
    contest = Contest(give("p", problem), (text,), weight_decays=(0.01,))
    (method,) = contest.methods.values()
    (setting,) = method.settings
    model = contest._problem.model
    namespace = {"model": model, "x": X[:4], "steps": 4}
    exec(code(method, setting, contest.inspected), namespace)

    def decays(rules):
        found = []
        for rule in rules:
            fields = (rule.name, rule.view, rule.norm, rule.coupling, rule.changed_by)
            found.append((*map(str, fields), rule.momentum))
        return sorted(found)

    assert decays(normwise.describe(namespace["optimizer"])) == decays(method.rules)
    ours = {p: g["weight_decay"] for g in namespace["optimizer"].param_groups for p in g["params"]}
    training = Training(2, 32, text, lr=setting.lr, weight_decay=setting.weight_decay)
    views = {
        p: contest._analyzed.views[n]
        for n, p in model.named_parameters()
        if n in contest._analyzed.views
    }
    made = make_optimizer(model, training, views, contest._analyzed.report)
    decay_within_window(made, training, 4)
    assert ours == {p: g["weight_decay"] for g in made.param_groups for p in g["params"]}


def test_early_decay_ends_at_its_share_of_the_steps():
    training = Training(1, 1, "sgd+early(0.3)", lr=0.1, weight_decay=0.01)
    optimizer = make_optimizer(network(), training)
    decay_within_window(optimizer, training, 10)
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["weight_decay"])
        optimizer.step()
    assert seen == [0.01] * 3 + [0.0] * 7


def test_a_list_of_optimizers_is_cut_outside_parentheses():
    assert split("sgd, a(b,c(d,e)),adamw+early(0.3)", ",") == [
        "sgd",
        "a(b,c(d,e))",
        "adamw+early(0.3)",
    ]


@pytest.mark.parametrize(
    ("budget", "plan"),
    [(100, (5, 10)), (30, (5, 6)), (20, (4, 5)), (10, (2, 5)), (4, (2, 2)), (1, (1, 1))],
)
def test_a_budget_takes_epochs_then_seeds_then_epochs(budget, plan):
    assert fitted(budget, 5, 10, lambda seeds, epochs: seeds * epochs) == plan
    with pytest.raises(UsageError, match="too little: one epoch with one seed takes 1 s"):
        fitted(0.5, 5, 10, lambda seeds, epochs: seeds * epochs)


def test_a_budget_is_kept_said_and_gone_on_with(module, monkeypatch, capsys):
    # Two seconds a step: twelve for an epoch, of which two methods have two each and three seeds.
    timed = Pace(start=0.0, step=2.0, test=0.0, steps=6)
    monkeypatch.setattr("normwise.lab.contest.pace", lambda *_: timed)
    words = ["compare", f"{module}.py:problem", "--optimizers", "sgd,sgdp", "--budget", "1m"]
    assert cli.main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "4 trainings, about 48 s" in err
    assert "to fit the budget: 2 seeds instead of 3, 1 epochs instead of 2" in err
    summary = json.loads(out)
    assert [len(v["accuracy"]) for v in values(summary).values()] == [2, 2]
    folder = Path(summary["folder"])
    timed = Pace(start=0.0, step=0.1, test=0.0, steps=6)  # another machine's
    (folder / "summary.json").unlink()
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary


def test_an_edited_module_begins_anew_and_is_refused_in_the_old_folder(module, tmp_path, capsys):
    words = ["compare", f"{module}.py:problem", *QUICK]
    assert cli.main([*words, "--out", "runs/compare-1"]) == 0
    (tmp_path / "runs/compare-1/summary.json").unlink()
    with (tmp_path / f"{module}.py").open("a") as file:
        file.write("\n# edited\n")
    capsys.readouterr()
    assert cli.main([*words, "--out", "runs/compare-1"]) == 2
    assert "has been edited since" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["folder"] != "runs/compare-1"


def test_a_network_by_name_on_a_table_by_name_and_as_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [f"{x[0]},{x[1]},{'abc'[y]}" for x, y in zip(X.tolist(), Y.tolist(), strict=True)]
    Path("t.csv").write_text("\n".join(["u,v,kind", *lines]), "utf-8")
    words = ["compare", "--data", "csv:t.csv:kind", *QUICK, "--epochs", "1", "--batch-size", "16"]
    assert cli.main([*words, "--out", "a"]) == 0
    first = values(json.loads(capsys.readouterr().out))
    run = ["paper", "run", "a/recipe.yaml", "--scale", "paper", "--quiet", "--json", "--out", "d"]
    assert cli.main(run) == 0
    shown = json.loads(capsys.readouterr().out)
    accuracies = [row["values"] for row in shown if row["metric"] == "accuracy"]
    assert accuracies == [of["accuracy"] for of in first.values()]
    assert cli.main(["compare", "hf:gpt2"]) == 2
    assert "is only a network: give --data" in capsys.readouterr().err
