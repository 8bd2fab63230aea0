"""Recipes: checked to the last key before anything is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from normwise.geometry import View
from normwise.lab.errors import UsageError
from normwise.lab.networks import build
from normwise.lab.recipes import find, ids, parse, read
from normwise.lab.running.prepare import (
    decay_within_window,
    decayed_lrs,
    make_optimizer,
    normalize_weights,
)

GOOD = """
schema: 1
id: mine
title: Mine
question: Which?
task: classification
paper: {source: none, metric: accuracy, rows: {digits: {sgd: 1.5}}}
methods:
  sgd: {label: SGD, settings: {optimizer: sgd, lr: 0.1}}
  adam: {label: Adam, baseline: sgd, settings: {optimizer: adam, lr: 1e-3}}
settings: {data: digits, network: resnet8, batch_size: 64}
scales:
  paper: {settings: {epochs: 30}, rows: {digits: {}}}
  small: {seeds: 2, settings: {epochs: 3}, rows: {digits: {}, wide: {width: 32, epochs: 4}}}
"""


def test_a_cell_takes_its_settings_from_all_levels():
    recipe = read(GOOD, "mine.yaml")
    cells = recipe.cells("small")
    names = [(c.row, c.seed, c.method) for c in cells]
    assert names[:4] == [(r, s, m) for r in ("digits",) for s in (0, 1) for m in ("sgd", "adam")]
    assert len(names) == 8
    last = cells[-1]
    assert (last.training.epochs, last.options.width, last.training.lr) == (4, 32, 1e-3)
    assert last.folder == "mine-small/wide/adam/seed-1"
    assert len({c.folder for c in cells}) == 8
    assert [c.seed for c in recipe.cells("small", 3, ["sgd"], ["wide"])] == [0, 1, 2]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("schema: 1", "schema: 0", ["schema 0", "reads 1", "older"]),
        ("schema: 1", "schema: 2", ["schema 2", "newer"]),
        ("schema: 1\n", "", ["schema None"]),
        ("epochs: 3}", "epocs: 3}", ["'epocs'", "did you mean 'epochs'", "scale 'small'"]),
        ("title: Mine", "titel: Mine", ["'titel'", "did you mean 'title'"]),
        ("network: resnet8", "network: 8", ["network is 8", "type str"]),
        ("epochs: 30", "epochs: many", ["epochs is 'many'", "type int"]),
        ("epochs: 30", "epochs: 1.5", ["epochs is 1.5", "type int"]),
        ("epochs: 30", "epochs: 0", ["epochs 0", "1 or more"]),
        ("lr: 1e-3", "lr: -1", ["lr -1.0", "0 or more"]),
        ("lr: 1e-3", "lr: .nan", ["lr is nan", "finite"]),
        ("lr: 1e-3", "lr: 1, normalization_eps: -1", ["normalization_eps -1.0", "0 or more"]),
        ("lr: 1e-3", "lr: 1, coupling: lose", ["'lose'", "own, l2, decoupled, schedule"]),
        ("lr: 1e-3", "lr: 1, coupling: schedule, weight_decay: 1", ["must be below 1"]),
        ("lr: 1e-3", "lr: 1, decay_window: [0.5, 0.5]", ["decay_window [0.5, 0.5]", "rising"]),
        ("lr: 1e-3", "lr: 1, decay_window: [0, 1.5]", ["decay_window [0.0, 1.5]"]),
        ("lr: 1e-3", "lr: 1, decay_window: [0.5]", ["decay_window [0.5]", "two shares"]),
        (
            "lr: 1e-3",
            "lr: 1, decay_window: [0, 0.5], normalization: WS, epsilon_shift: 1",
            ["epsilon_shift goes with"],
        ),
        (
            "lr: 1e-3",
            "lr: 1, normalization: WS, normalize_depthwise: true, epsilon_shift: 1, "
            "decay_on: no-depthwise",
            ["decay_on is no-depthwise, but epsilon_shift"],
        ),
        ("lr: 1e-3", "lr: 1, normalize_depthwise: true", ["normalize_depthwise", "is none"]),
        ("lr: 1e-3", "lr: 1, normalization_skip: [head]", ["normalization_skip", "is none"]),
        ("lr: 1e-3", "lr: fast", ["lr is 'fast'", "finite number"]),
        ("batch_size: 64", "augment: [turn], batch_size: 1", ["'turn'", "choose from crop, flip"]),
        ("batch_size: 64", "augment: [mixup, cutmix], batch_size: 1", ["both mixup and cutmix"]),
        (", batch_size: 64", "", ["'batch_size' is missing"]),
        ("optimizer: adam", "optimizer: adamm", ["'adamm'", "did you mean 'adam'"]),
        ("task: classification", "task: clasification", ["did you mean 'classification'"]),
        ("baseline: sgd", "baseline: sdg", ["baseline of method 'adam'", "did you mean 'sgd'"]),
        ("{sgd: 1.5}", "{sgdp: 1.5}", ["paper's row 'digits'", "'sgdp'"]),
        ("  paper: {", "  big: {", ["lacks scale 'paper'"]),
        ("id: mine", "id: [mine", ["not YAML"]),
        ("id: mine", "id: ../../mine", ["id '../../mine'", "letters, digits"]),
        ("id: mine", "id: mine\nid: again", ["line 4", "'id' is given twice"]),
        ("baseline: sgd", "baseline: adam", ["'adam' is its own baseline"]),
        ("lr: 1e-3", "lr: true", ["lr is True", "type float"]),
        ("lr: 1e-3", "lr: 1, clip: -1", ["clip -1.0", "above 0"]),
        ("lr: 1e-3", "lr: 1, clip: 0", ["clip 0.0", "above 0"]),
        ("lr: 1e-3", "lr: 1, clip: .inf", ["clip is inf", "finite"]),
        ("lr: 1e-3", "lr: 1, warmup: 2", ["warmup 2.0", "below 1"]),
        ("lr: 1e-3", "lr: 1, momentum: 5", ["momentum 5.0", "below 1"]),
        ("lr: 1e-3", "lr: 1, drops: [5]", ["drops [5.0]", "between 0 and 1"]),
        ("lr: 1e-3", "lr: 1, drops: [0.6, 0.3]", ["drops [0.6, 0.3]", "rising"]),
        ("lr: 1e-3", "lr: 1, betas: [0.9, 0.99, 0.9]", ["betas [0.9, 0.99, 0.9]", "two numbers"]),
        ("lr: 1e-3", "lr: 1, betas: [0.9, 1]", ["betas [0.9, 1.0]", "below 1"]),
        ("lr: 1e-3", "lr: 1, betas: [0.9, .nan]", ["betas is nan", "finite"]),
        ("lr: 1e-3", "lr: 1, width: 0", ["width 0", "1 or more"]),
        ("lr: 1e-3", "lr: 1, label_smoothing: 2", ["label_smoothing 2.0", "1 at most"]),
        ("lr: 1e-3", "lr: 1, epsilon_shift: -1", ["epsilon_shift -1.0", "0 or more"]),
        ("rows: {digits: {}}", "rows: {}", ["there are no rows"]),
        ("rows: {digits: {}}", "rows: {a/b: {}}", ["row 'a/b'", "letters, digits"]),
        ("rows: {digits: {}}", "seeds: 1000000000, rows: {digits: {}}", ["seeds", "10000 at most"]),
        ("lr: 1e-3", "lr: 1, initial_scale: 0", ["initial_scale 0.0", "above 0"]),
        (
            "lr: 1e-3",
            "lr: 1, norm_correction: some",
            ["'some'", "none, fixed, projected, rescaled"],
        ),
        (
            "lr: 1e-3",
            "lr: 1, norm_correction: fixed, weight_decay: 0.1",
            ["norm_correction fixed goes with no weight_decay"],
        ),
        ("rows: {digits: {sgd", "claims: {digits: {sgd", ["'sgd' has a claim", "no baseline"]),
        ("rows: {digits: {sgd", "claims: {digits: {adm", ["claims of 'digits'", "'adam'"]),
        ("title: Mine", "title: !!python/object/apply:os.getcwd []", ["not YAML", "python/object"]),
    ],
)
def test_a_wrong_recipe_says_what_and_where(old, new, words):
    assert old in GOOD
    with pytest.raises(UsageError) as error:
        read(GOOD.replace(old, new, 1), "mine.yaml")
    for word in words:
        assert word in str(error.value)


def test_what_is_no_recipe_is_refused():
    for text in ("", "- 1\n- 2", "just words"):
        with pytest.raises(UsageError, match=r"mine\.yaml is no recipe"):
            read(text, "mine.yaml")


def test_unknown_names_get_a_suggestion(tmp_path):
    recipe = read(GOOD, "mine.yaml")
    for arguments, word in (
        (("smal",), "'small'"),
        (("small", 1, ["sdg"]), "'sgd'"),
        (("small", 1, [], ["digit"]), "'digits'"),
    ):
        with pytest.raises(UsageError, match=f"did you mean {word}"):
            recipe.cells(*arguments)
    with pytest.raises(UsageError, match="did you mean 'adamp-imagenet'"):
        find("adamp-imagnet")
    with pytest.raises(UsageError, match="cannot read recipe"):
        find(str(tmp_path / "none.yaml"))


def test_a_claim_is_the_difference_of_the_papers_numbers_or_stated():
    both = GOOD.replace("{sgd: 1.5}", "{sgd: 1.5, adam: 2.0}")
    assert read(both, "mine.yaml").claimed("digits", "adam") == 0.5
    assert read(GOOD, "mine.yaml").claimed("digits", "adam") is None
    stated = both.replace("rows: {digits", "claims: {wide: {adam: -0.2}}, rows: {digits", 1)
    recipe = read(stated, "mine.yaml")
    assert (recipe.claimed("digits", "adam"), recipe.claimed("wide", "adam")) == (0.5, -0.2)
    assert recipe.claimed("digits", "sgd") is None


@pytest.mark.parametrize("name", ids())
def test_every_recipe_of_the_library_is_whole(name):
    recipe = find(name)
    assert recipe.id == name
    assert recipe.question.endswith("?")
    for scale in ("paper", "small"):
        assert recipe.cells(scale)
    if recipe.paper.rows:
        # Every number stands beside a row of ours, or the recipe says why there is none.
        beside = set(recipe.scales["small"].rows) & set(recipe.paper.rows)
        assert beside or recipe.paper.note


@pytest.mark.parametrize("name", [name for name in ids() if find(name).task == "classification"])
def test_every_cell_can_take_a_step(name):
    for cell in find(name).cells("small", 1):
        options = cell.options
        channels = 1 if options.data in ("fsdd", "speech-commands", "esc10", "digits") else 3
        network = build(options.network, channels, 10, options.width)
        normalize_weights(network, cell.training)
        filters = {p: View.channel() for p in network.parameters() if p.ndim == 4}
        optimizer = make_optimizer(network, cell.training, filters)
        decay_within_window(optimizer, cell.training, 100)
        before = [p.detach().clone() for p in network.parameters()]
        loss = network(torch.randn(2, channels, 40, 16)).square().mean()
        loss.backward()
        optimizer.step()
        assert loss.isfinite(), cell.folder
        after = list(network.parameters())
        assert not all(map(torch.equal, before, after)), cell.folder


def test_translated_decay_needs_sgd_and_weights_to_translate():
    wrong = GOOD.replace("lr: 0.1}", "lr: 0.1, coupling: translated}")
    with pytest.raises(UsageError, match="translated needs optimizer sgd without nesterov"):
        read(wrong, "mine.yaml")
    right = GOOD.replace("lr: 0.1}", "lr: 0.1, coupling: translated, decay_on: invariant}")
    (cell,) = read(right, "mine.yaml").cells("small", 1, ["sgd"], ["digits"])
    with pytest.raises(UsageError, match="there are none"):
        make_optimizer(torch.nn.Linear(2, 2), cell.training)
    with pytest.raises(UsageError, match="float32"):
        decayed_lrs(replace(cell.training, weight_decay=0.02), 10**6)


def test_methods_of_a_pair_differ_in_the_optimizer_alone():
    for name in ids():
        recipe = find(name)
        for method in recipe.methods.values():
            optimizer = method.settings.get("optimizer")
            if optimizer in ("sgdp", "adamp") and method.baseline is not None:
                theirs = dict(recipe.methods[method.baseline].settings)
                ours = dict(method.settings)
                assert ours.pop("optimizer")[:-1] in theirs.pop("optimizer")
                assert ours == theirs


def test_a_file_of_the_user_is_found_by_its_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(GOOD)))
    assert find(str(path)).id == "mine"


def test_a_recipe_without_methods_is_refused():
    content = yaml.safe_load(GOOD)
    content["methods"], content["paper"]["rows"] = {}, {}
    with pytest.raises(UsageError, match="there are no methods"):
        parse(content, "mine.yaml")


def test_what_one_method_sets_at_one_scale_overrules_what_it_sets_at_all():
    content = yaml.safe_load(GOOD)
    name = list(content["methods"])[-1]
    content["methods"][name]["settings"]["weight_decay"] = 0.1
    content["scales"]["small"]["methods"] = {name: {"weight_decay": 0.01}}
    recipe = parse(content, "mine.yaml")
    found = {
        scale: {c.method: c.training.weight_decay for c in recipe.cells(scale, 1)}
        for scale in ("paper", "small")
    }
    assert (found["paper"][name], found["small"][name]) == (0.1, 0.01)
    others = [{k: v for k, v in f.items() if k != name} for f in found.values()]
    assert others[0] == others[1]
    content["scales"]["small"]["methods"] = {"nobody": {}}
    with pytest.raises(UsageError, match="unknown method of scale 'small' 'nobody'"):
        parse(content, "mine.yaml")


def test_merged_keys_may_be_overruled():
    """YAML's << gives defaults, and what is written beside it overrules them."""
    row = "rows: {a: &a {epochs: 1}, b: &b {<<: *a, epochs: 2}, c: {<<: *b, epochs: 3}}"
    recipe = read(GOOD.replace("rows: {digits: {}}", row, 1), "mine.yaml")
    (scale,) = (s for s in recipe.scales.values() if "b" in s.rows)
    assert [scale.rows[name]["epochs"] for name in "abc"] == [1, 2, 3]
