"""Grids in recipes: each point a cell, the best of each, what it costs to carry it, and tuning."""

from __future__ import annotations

import hashlib
import json
import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

from normwise import cli
from normwise.figures import Heat, Lines
from normwise.lab.data.texts import EncodedText
from normwise.lab.errors import Damaged, UsageError
from normwise.lab.recipes import read
from normwise.lab.report.runs import picture, render
from normwise.lab.report.sweeps import sweep_charts
from normwise.lab.running.cell import config_of, run_cell
from normwise.lab.running.export import as_csv, as_json, as_latex, as_markdown, read_json
from normwise.lab.running.results import Entry, read_cells, tables
from normwise.lab.running.sweeps import Sweep, chosen, read_tuned, sweeps
from normwise.lab.store import seal_json
from normwise.lab.tasks import language
from normwise.lab.tasks.classification import Classification, ClassificationOptions, load
from normwise.lab.tasks.language import Language, LanguageOptions
from normwise.lab.tasks.problem import Metric

SWEPT = """
schema: 1
id: swept
title: Swept
question: Where is the best learning rate?
task: classification
paper: {source: none, metric: accuracy}
methods:
  sgd: {label: SGD, settings: {optimizer: sgd}, grid: {lr: [0.4, 1e-1, 0.2]}}
  adam: {label: Adam, baseline: sgd, settings: {optimizer: adam}, grid: {lr: [1.0e-3, 0.01]}}
  fixed: {label: Fixed, settings: {optimizer: sgd, lr: 0.1}}
settings: {data: digits, network: resnet8, width: 4, batch_size: 256, epochs: 1, lr: 1}
scales:
  paper: {settings: {}, rows: {small: {}, wide: {width: 8}}}
  small: {settings: {}, rows: {small: {}, wide: {width: 8}}, seeds: 2}
"""
TUNED = """
schema: 1
id: tuned
title: Tuned
question: Which is better at its own best?
task: classification
paper: {source: none, metric: accuracy}
methods:
  sgd: {label: SGD, settings: {optimizer: sgd}}
  adam: {label: Adam, baseline: sgd, settings: {optimizer: adam}}
settings: {data: digits, network: resnet8, width: 4, batch_size: 256, epochs: 1, lr: 1}
scales:
  paper: {settings: {}, rows: {a: {}, b: {width: 8}}}
  small: {settings: {}, rows: {a: {}, b: {width: 8}}, seeds: 1, tuned_on: tuning}
  tuning:
    settings: {held_out: 0.25}
    rows: {a: {}}
    seeds: 1
    grid: {lr: [0.05, 0.1]}
    grids: {adam: {lr: [0.001, 0.01]}}
"""


def swept(old="", new="", text=SWEPT):
    assert old in text
    return read(text.replace(old, new, 1), "swept.yaml")


def test_each_point_of_a_grid_is_a_cell_with_a_folder_of_its_own():
    recipe = swept()
    cells = recipe.cells("small", 1, ["sgd", "adam"], ["wide"])
    assert [cell.folder for cell in cells] == [
        "swept-small/wide/sgd/lr=0.1/seed-0",
        "swept-small/wide/sgd/lr=0.2/seed-0",
        "swept-small/wide/sgd/lr=0.4/seed-0",
        "swept-small/wide/adam/lr=0.001/seed-0",
        "swept-small/wide/adam/lr=0.01/seed-0",
    ]
    assert [cell.training.lr for cell in cells] == [0.1, 0.2, 0.4, 0.001, 0.01]
    assert len(recipe.cells("small")) == 2 * 2 * (3 + 2 + 1)
    assert "point" not in config_of(recipe.cells("small", 1, ["fixed"])[0], "cpu")


def test_a_methods_grid_overrules_its_scales_and_that_the_recipes():
    text = SWEPT.replace("seeds: 2}", "seeds: 2, grid: {lr: [7], weight_decay: [0, 1.0e-4]}}")
    recipe = read(text + "grid: {lr: [5], momentum: [0.5]}\n", "swept.yaml")
    points = recipe.points("small", "fixed")
    assert points == [
        (("lr", 7), ("momentum", 0.5), ("weight_decay", decay)) for decay in (0, 1e-4)
    ]
    assert {dict(point)["lr"] for point in recipe.points("small", "adam")} == {0.001, 0.01}
    text = text.replace("seeds: 2,", "seeds: 2, grids: {adam: {lr: [3]}},")
    assert {dict(p)["lr"] for p in read(text, "x").points("small", "adam")} == {3}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[0.4, 1e-1, 0.2]", "[]", ["lr has no values"]),
        ("[0.4, 1e-1, 0.2]", "[0.1, 1e-1]", ["lr has 0.1 twice"]),
        ("[0.4, 1e-1, 0.2]", "[.inf]", ["lr has inf", "finite"]),
        ("[0.4, 1e-1, 0.2]", "[true]", ["lr has True"]),
        ("[0.4, 1e-1, 0.2]", "[-1, 1]", ["lr -1.0 is not allowed"]),
        ("grid: {lr: [0.4", "grid: {rl: [0.4", ["unknown key 'rl'"]),
        ("grid: {lr: [0.4", "grid: {epochs: [0.4", ["epochs is 0.1", "type int"]),
        ("seeds: 2}", "seeds: 2, grids: {sdg: {lr: [1]}}}", ["method in grids", "'sgd'"]),
        ("label: Fixed", "start: sgd, label: Fixed", ["'fixed' starts from 'sgd'", "is swept"]),
    ],
)
def test_a_wrong_grid_says_what_and_where(old, new, words):
    with pytest.raises(UsageError) as error:
        swept(old, new)
    for word in ("swept.yaml", *words) if "grids" in new else words:
        assert word in str(error.value)


def write(out, cells, accuracy):
    """Folders of cells as if they had been trained; those of accuracy None diverged."""
    for cell in cells:
        folder = out / cell.folder
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config_of(cell, "cpu")))
        (folder / "metrics.jsonl").write_text("")
        found = accuracy(cell)
        ok = {"status": "ok", "metrics": {"accuracy": found}}
        result = {
            "schema": 2,
            **(ok if found is not None else {"status": "failed", "error": "infinite"}),
            "baseline": {"accuracy": 0.1},
            "facts": {"test_examples": 100},
            "weights": "0" * 64,
            "metrics_sha256": hashlib.sha256(b"").hexdigest(),
        }
        (folder / "result.json").write_text(json.dumps(seal_json(result)))
    return out


VALUES = {
    ("small", "sgd", 0.1): (0.80, 0.82),
    ("small", "sgd", 0.2): (0.90, 0.92),
    ("small", "sgd", 0.4): (0.85, 0.99),  # the best mean, and the greatest value of the grid
    ("wide", "sgd", 0.1): (0.70, 0.74),
    ("wide", "sgd", 0.2): (0.95, 0.93),
    ("wide", "sgd", 0.4): (0.91, 0.93),
    ("small", "adam", 0.001): (0.5, 0.5),
    ("small", "adam", 0.01): (0.6, 0.6),
    ("wide", "adam", 0.001): (0.5, 0.6),
    ("wide", "adam", 0.01): (0.99, None),
    ("small", "fixed", 0.1): (0.3, 0.4),
}


@pytest.fixture
def made(tmp_path):
    cells = [c for c in swept().cells("small", 2) if (c.row, c.method, c.training.lr) in VALUES]
    write(tmp_path, cells, lambda c: VALUES[c.row, c.method, c.training.lr][c.seed])
    (tmp_path / "swept-small" / "recipe.yaml").write_text(SWEPT)
    return tables(read_cells([tmp_path]))


def test_the_best_point_has_the_best_mean_and_an_edge_is_named(made):
    found = {(s.method, s.row): s for s in sweeps(made)}
    assert list(found) == [(m, r) for m in ("sgd", "adam") for r in ("small", "wide")]
    small, wide = found["sgd", "small"], found["sgd", "wide"]
    assert (small.best.point, small.edges) == ((("lr", 0.4),), ("lr",))
    assert small.best.spread.mean == pytest.approx(92)
    assert (wide.best.point, wide.edges) == ((("lr", 0.2),), ())
    assert wide.ratios == {"lr": 0.5}


def test_regret_is_the_paired_cost_of_the_first_rows_best_point(made):
    found = {(s.method, s.row): s for s in sweeps(made)}
    assert found["sgd", "small"].regret.values == (0, 0)
    costs = 100 * (np.array(VALUES["wide", "sgd", 0.2]) - VALUES["wide", "sgd", 0.4])
    regret = found["sgd", "wide"].regret
    assert regret.values == pytest.approx(costs)
    assert (regret.mean, regret.sd) == pytest.approx((costs.mean(), costs.std(ddof=1)))


def test_a_point_of_which_a_seed_diverged_is_worst(made):
    wide = next(s for s in sweeps(made) if (s.method, s.row) == ("adam", "wide"))
    assert wide.best.point == (("lr", 0.001),)
    assert wide.regret.mean == math.inf
    assert "| Adam | wide | 2 | lr 0.001 (edge: lr) | 55.00 ± 7.07 | ×0.1 | diverged |" in (
        as_markdown(made)
    )


def test_where_less_is_better_regret_is_what_is_more():
    def entry(lr, *losses):
        values = dict(enumerate(losses))
        return Entry("m", "M", values, (), (), *[None] * 7, (("lr", lr),))

    first = (entry(1, 2.0, 3.0), entry(2, 4.0, 4.0))
    here = (entry(1, 5.0, 6.0), entry(2, 4.5, 4.0))
    metric = Metric("loss", "loss", higher_is_better=False)
    sweep = Sweep(swept(), "small", "wide", "m", "M", metric, here, first)
    assert sweep.best.point == (("lr", 2),)
    assert sweep.regret.values == (0.5, 2.0)


def test_tables_of_what_is_not_swept_stay_as_they_are(made):
    text = as_markdown(made)
    assert "| Fixed | 35.00 ± 7.07 | 2 |" in text
    assert "| SGD | small | 2 | lr 0.4 (edge: lr) | 92.00 ± 9.90 | ×1 | 0.00 ± 0.00 |" in text
    latex = as_latex(made)
    assert r"SGD & wide & 2 & lr 0.2 & 94.00 $\pm$ 1.41 & $\times$0.5 & 2.00" in latex
    assert "lr=0.001" in as_csv(made)


def test_a_sweep_comes_back_from_json(made, tmp_path, monkeypatch):
    """With the recipe among the library's own, as for :func:`read_json` it has to be."""
    path = tmp_path / "swept.json"
    path.write_text(as_json(made), encoding="utf-8")
    for module in ("running.export", "recipes"):
        monkeypatch.setattr(f"normwise.lab.{module}.find", lambda name: swept())
    again = read_json(path)
    assert as_json(again) == path.read_text(encoding="utf-8")
    assert as_markdown(again) == as_markdown(made)


def test_one_swept_setting_is_drawn_as_lines_by_method_and_row(made):
    charts = sweep_charts(sweeps(made))
    assert [(type(c), c.title) for c in charts] == [(Lines, "SGD"), (Lines, "Adam")]
    small, wide = charts[0].lines
    assert (small.name, small.x, small.y) == ("small", (0.1, 0.2, 0.4), pytest.approx((81, 91, 92)))
    assert wide.low == pytest.approx((70, 93, 91))
    page = render(made)
    assert "Where is the best learning rate?" in page
    assert "edge: lr" in page


def test_two_swept_settings_are_drawn_as_shades(tmp_path):
    text = SWEPT.replace("grid: {lr: [0.4, 1e-1, 0.2]}", "grid: {lr: [0.1, 1], momentum: [0, 0.9]}")
    recipe = read(text, "swept.yaml")
    cells = recipe.cells("small", 1, ["sgd"], ["small"])
    points = [(c.training.lr, c.training.momentum) for c in cells]
    assert points == [(0.1, 0), (0.1, 0.9), (1, 0), (1, 0.9)]
    write(tmp_path, cells, lambda c: points.index((c.training.lr, c.training.momentum)) / 10)
    folder = tmp_path / "swept-small"
    (folder / "recipe.yaml").write_text(text)
    figure = picture(tables(read_cells([folder])))
    (heat,) = figure.charts
    assert isinstance(heat, Heat)
    assert (heat.rows, heat.columns) == (("1", "0.1"), ("0", "0.9"))
    assert heat.values == (pytest.approx((20, 30)), pytest.approx((0, 10)))
    assert heat.outlined == (0, 1)


def test_held_out_data_are_of_the_training_data_and_are_not_trained_on(tmp_path):
    options = ClassificationOptions("digits", "resnet8", width=4, held_out=0.25)
    problem = Classification(options, tmp_path, torch.device("cpu"))
    data = load("digits", tmp_path)
    assert (problem.examples, len(problem.data.test_labels)) == (674, 224)
    parts = [*problem.data.train.flatten(1), *problem.data.test.flatten(1)]
    whole = torch.tensor(data.train).flatten(1)
    assert sorted(map(tuple, torch.stack(parts).tolist())) == sorted(map(tuple, whole.tolist()))
    assert torch.equal(
        problem.data.test, Classification(options, tmp_path, torch.device("cpu")).data.test
    )


def test_held_out_text_is_the_end_of_the_training_text(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "_load", lambda *_: text)
    text = EncodedText("text", np.arange(1000), np.arange(1000, 1200), tuple("abc") * 400)
    options = LanguageOptions("brown", context=9, width=4, heads=1, held_out=0.1)
    problem = Language(options, tmp_path, torch.device("cpu"))
    # Windows of ten, side by side, each beginning with the last token of the one before.
    assert (int(problem.train.min()), int(problem.train.max())) == (0, 99 * 9)
    assert (int(problem.test.min()), int(problem.test.max())) == (900, 900 + 11 * 9)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tuned_on: tuning", "tuned_on: tunning", ["did you mean 'tuning'"]),
        ("[0.05, 0.1]", "[0.05]", ["sgd 1, adam 2 points", "as many for each"]),
        ("held_out: 0.25", "held_out: 0", ["tested on the test data", "set held_out"]),
        ("rows: {a: {}}", "rows: {a: {}, c: {}}", ["has no row 'b'"]),
        ("seeds: 1\n    grid", "tuned_on: small\n    grid", ["is tuned itself"]),
    ],
)
def test_an_unfair_tuning_is_refused(old, new, words):
    with pytest.raises(UsageError) as error:
        swept(old, new, TUNED)
    for word in words:
        assert word in str(error.value)


def test_a_tuned_scale_trains_with_what_its_sweep_has_chosen(tmp_path, capsys):
    """The whole way: refused untuned, tuned in part, tuned, and trained at the best points."""
    path = tmp_path / "tuned.yaml"
    path.write_text(TUNED)
    rest = [str(path), "--out", str(tmp_path / "runs"), "--quiet"]
    assert cli.main(["paper", "run", *rest]) == 2
    assert "run `normwise paper tune`" in capsys.readouterr().err
    assert cli.main(["paper", "tune", *rest, "--methods", "sgd"]) == 0
    assert cli.main(["paper", "run", *rest]) == 2
    assert "'adam'" in capsys.readouterr().err
    assert cli.main(["paper", "tune", *rest]) == 0
    record = json.loads((tmp_path / "runs" / "tuned-tuning" / "tuned.json").read_text())
    (row,) = record["rows"].values()
    assert {name: entry["points"] for name, entry in row.items()} == {"sgd": 2, "adam": 2}
    best = {name: entry["settings"]["lr"] for name, entry in row.items()}
    for cell in read(TUNED, "x").cells("tuning"):
        result = run_cell(cell, tmp_path / "runs", tmp_path)  # finished: it is only read
        held = row[cell.method]
        assert result["metrics"]["accuracy"] <= held["accuracy"] / 100 + 1e-9
    assert cli.main(["paper", "run", *rest]) == 0
    done = read_cells([tmp_path / "runs" / "tuned-small"])
    assert len(done) == 4
    assert {(c.config["method"], c.config["training"]["lr"]) for c in done} == set(best.items())
    assert all("held_out" not in c.config["options"] for c in done)


def test_a_record_that_is_damaged_or_anothers_is_refused(tmp_path):
    recipe = read(TUNED, "tuned.yaml")
    folder = tmp_path / "tuned-tuning"
    folder.mkdir()
    record = {"recipe": "tuned", "scale": "tuning", "rows": {"a": {"sgd": {"settings": {"lr": 1}}}}}
    for content, error in (("{", Damaged), (json.dumps({**record, "recipe": "x"}), UsageError)):
        (folder / "tuned.json").write_text(content)
        with pytest.raises(error, match=r"tuned\.json"):
            read_tuned(recipe, "small", tmp_path)
    (folder / "tuned.json").write_text(json.dumps(record))
    tuned, _ = read_tuned(recipe, "small", tmp_path)
    (cell,) = recipe.cells("small", 1, ["sgd"], ["b"], tuned)
    assert cell.training.lr == 1


def test_nothing_is_chosen_before_all_points_are_finished(tmp_path):
    recipe = read(TUNED, "tuned.yaml")
    cells = [c for c in recipe.cells("tuning", 1) if c.training.lr != 0.01]
    write(tmp_path, cells, lambda cell: None if cell.training.lr == 0.1 else 0.5)
    (tmp_path / "tuned-tuning" / "recipe.yaml").write_text(TUNED)
    record, unfinished = chosen(sweeps(tables(read_cells([tmp_path]))), "tuning")
    assert unfinished == ["a adam: 1 of 2 points"]
    assert record["rows"] == {
        "a": {
            "sgd": {
                "settings": {"lr": 0.05},
                "at_edge": ["lr"],
                "points": 2,
                "seeds": 1,
                "accuracy": 50.0,
            }
        }
    }


def test_cells_of_the_first_transfer_runs_become_results_of_the_recipe():
    path = Path(__file__).parents[3] / "tools" / "lr_transfer.py"
    spec = spec_from_file_location("lr_transfer", path)
    tool = module_from_spec(spec)
    spec.loader.exec_module(tool)
    cells = [
        {"method": method, "width": 64, "depth": 2, "lr": 0.25, "seed": seed, "steps": 200}
        | {"loss": loss}
        for method, seed, loss in (("Muon", 0, 2.5), ("Muon", 1, None), ("sphere(Muon)", 0, 2.0))
    ]
    (table,) = tool.tables([json.dumps(cell) for cell in cells])
    muon, sphere = table.entries
    assert (muon.method, muon.point, muon.values, muon.failed) == (
        "muon",
        (("lr", 0.25),),
        {0: 2.5},
        (1,),
    )
    assert (sphere.method, sphere.values, table.row) == (
        "sphere-muon",
        {0: 2.0},
        "depth-2-width-64",
    )
