"""From finished cells to tables: means, paired intervals, exports, and the page in a browser."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import stdev

import pytest
from scipy.stats import ttest_rel

from normwise import cli
from normwise.figures import document
from normwise.lab.errors import UsageError
from normwise.lab.recipes import find
from normwise.lab.report.runs import picture, render
from normwise.lab.running import cell
from normwise.lab.running.cell import config_of
from normwise.lab.running.export import (
    as_csv,
    as_data,
    as_json,
    as_latex,
    as_markdown,
    read_json,
)
from normwise.lab.running.results import Done, read_cells, tables
from normwise.lab.store import seal_json
from normwise.lab.summary import seeds_needed

VALUES = {"sgd": [0.90, 0.91, 0.95], "sgdp": [0.93, 0.95, 0.985], "adamw": [0.8, 0.9, 0.7]}


def write(out, method, seed, accuracy, recipe="digits", row=None, **changes):
    """The folder of a cell, as if it had been trained."""
    rows = [row] if row else list(find(recipe).scales["small"].rows)[:1]
    (one,) = find(recipe).cells("small", 1, [method], rows)
    one = replace(one, seed=seed)
    folder = out / one.folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(one, "cpu")))
    metric = "perplexity" if recipe == "adamp-language" else "accuracy"
    lines = [
        {"epoch": e, "train_loss": e and 1 / e, "norm_growth": 1.0, "effective_lr": 0.1, metric: v}
        for e, v in enumerate((0.1, accuracy))
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(content)
    result = {
        "schema": 2,
        "status": "ok",
        "metrics": {metric: accuracy},
        "baseline": {metric: 0.1},
        "facts": {"test_examples": 100},
        "weights": "0" * 64,
        "metrics_sha256": hashlib.sha256(content.encode()).hexdigest(),
        **changes,
    }
    if result["status"] is not None:
        (folder / "result.json").write_text(json.dumps(seal_json(result)))
    return folder


@pytest.fixture
def runs(tmp_path):
    for method, values in VALUES.items():
        for seed, value in enumerate(values):
            write(tmp_path, method, seed, value)
    write(tmp_path, "adamp", 0, 0.85)
    write(tmp_path, "adamp", 1, 0.0, status="failed", error="the training loss is <not> finite")
    write(tmp_path, "adamp", 2, 0.0, status=None)
    return tmp_path


def test_the_difference_is_paired_and_its_interval_students(runs):
    (table,) = tables(read_cells([runs]))
    sgd, sgdp, adamw, adamp = table.entries
    assert sgd.spread.mean == pytest.approx(92)
    assert sgd.spread.sd == pytest.approx(math.sqrt(7))
    scipy = ttest_rel([100 * v for v in VALUES["sgdp"]], [100 * v for v in VALUES["sgd"]])
    low, high = scipy.confidence_interval()
    assert sgdp.difference - sgdp.half_width == pytest.approx(low)
    assert sgdp.difference + sgdp.half_width == pytest.approx(high)
    assert (sgdp.verdict(table.metric), adamw.verdict(table.metric)) == ("better", "")
    assert (adamp.values, adamp.failed, adamp.unfinished) == ({0: 85}, (1,), (2,))
    assert (adamp.difference, adamp.half_width) == (pytest.approx(5), None)
    assert adamp.verdict(table.metric) == "one seed"
    assert adamp.baseline == 10


def test_chance_in_the_test_examples_widens_the_interval(tmp_path):
    for method, wrong in (("sgd", [1, 2, 3]), ("sgdp", [3])):
        for seed in range(3):
            accuracy = 1 - len(wrong) / 100
            write(tmp_path, method, seed, accuracy, wrong=wrong)
    (table,) = tables(read_cells([tmp_path]))
    sgdp = table.entries[1]
    # All seeds agree, so that the examples alone decide: two of a hundred differ.
    share = 2 / 100
    assert sgdp.half_width == pytest.approx(196 * math.sqrt((share - share**2) / 99))
    assert sgdp.verdict(table.metric) == "within chance"


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.10, 0.09, 0.11), "better"),
        ((-0.001, 0.001, 0.0), "no difference"),
        ((-0.04, 0.05, 0.0), "cannot tell at this size"),
        # Of the claim, 2.27, the interval holds half, and zero too.
        ((0.005, 0.0, 0.015), "cannot tell at this size"),
    ],
)
def test_too_few_seeds_are_told_from_no_difference(tmp_path, gains, verdict):
    for seed, gain in enumerate(gains):
        for method, accuracy in (("sgd", 0.5), ("sgdp", 0.5 + gain)):
            write(
                tmp_path, method, seed, accuracy, recipe="adamp-imagenet", row="resnet18-no-decay"
            )
    (table,) = tables(read_cells([tmp_path]))
    sgdp = table.entries[1]
    assert sgdp.claimed == pytest.approx(70.21 - 67.94)
    assert sgdp.verdict(table.metric) == verdict
    sd = 100 * stdev(gains)
    assert sgdp.sd_of_differences == pytest.approx(sd)
    assert sgdp.seeds_needed == seeds_needed(70.21 - 67.94, sd)
    (again,) = read_json(written(tmp_path / "results.json", table))
    assert again.entries[1] == sgdp
    shown = f"| {verdict} | +2.27 | {sgdp.seeds_needed} | 70.21 |"
    assert shown in as_markdown([table])
    assert verdict in render([table])


def written(path, table):
    path.write_text(as_json([table]), encoding="utf-8")
    return path


def test_lower_is_better_where_the_metric_says_so(tmp_path):
    for method, values in (("adamw", (30.0, 31.0, 32.0)), ("adamp", (20.0, 21.0, 22.1))):
        for seed, value in enumerate(values):
            write(tmp_path, method, seed, value, recipe="adamp-language")
    (table,) = tables(read_cells([tmp_path]))
    assert table.entries[1].verdict(table.metric) == "better"
    assert table.entries[1].paper == 23.26


def test_folders_without_runs_and_damaged_ones_are_errors(tmp_path):
    with pytest.raises(UsageError, match="no runs in"):
        read_cells([tmp_path])
    folder = write(tmp_path, "sgd", 0, 0.5)
    (folder / "result.json").write_text('{"status": "ok"')
    with pytest.raises(UsageError, match=r"result\.json is damaged"):
        read_cells([tmp_path])


def test_exports_agree(runs):
    made = tables(read_cells([runs]))
    data = {row["method"]: row for row in as_data(made)}
    rows = {row["method"]: row for row in csv.DictReader(as_csv(made).splitlines())}
    assert rows.keys() == data.keys() == {*VALUES, "adamp"}
    assert float(rows["sgdp"]["mean"]) == data["sgdp"]["mean"]
    assert rows["sgd"]["difference"] == ""
    assert data["sgdp"]["values"] == pytest.approx({"0": 93, "1": 95, "2": 98.5})
    markdown = as_markdown(made)
    assert "| SGD | 92.00 ± 2.65 | 3 |  |  |  |  | not known |" in markdown
    assert "Baseline: 10.00." in markdown
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert widths == {9}
    latex = as_latex(made)
    assert r"SGD & 92.00 $\pm$ 2.65 & 3 &  &  &  &  & not known \\" in latex
    assert r"accuracy, \%" in latex
    assert latex.isascii()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1


class Page(HTMLParser):
    """Which elements are open, and the rows of the table that are shown."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.loads += [v for k, v in attributes if k in ("src", "href", "data")]
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "tr" and "data-words" in given:
            self.rows.append(("hidden" not in given, given["data-words"]))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_nests_loads_nothing_and_escapes(runs):
    text = render(tables(read_cells([runs])))
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert "is &lt;not&gt; finite" in text
    assert "10 of 11 runs finished" not in text
    assert "11 of 12 runs finished" in text


def chromium():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found or pytest.skip("no Chromium here")


@pytest.mark.slow
def test_filter_and_sort_work_in_a_browser(runs, tmp_path):
    """The page's script runs in Chromium; the document that it leaves is looked at."""
    path = tmp_path / "report.html"
    path.write_text(render(tables(read_cells([runs]))), encoding="utf-8")

    def rows(view):
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command = [chromium(), *arguments, f"{path.as_uri()}#{view}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        shown = [words for visible, words in Page(done.stdout).rows if visible]
        return [next(m for m in ("SGDP", "SGD", "AdamW", "AdamP") if m in w) for w in shown]

    assert rows("") == ["SGD", "SGDP", "AdamW", "AdamP"]
    assert rows("filter=better") == ["SGDP"]
    assert rows("sort=1") == ["AdamW", "AdamP", "SGD", "SGDP"]
    assert rows("sort=1&down") == ["SGDP", "SGD", "AdamP", "AdamW"]
    assert rows("filter=adam&sort=0") == ["AdamP", "AdamW"]


@pytest.mark.parametrize("ending", [".md", ".tex", ".csv", ".json", ".html", ".svg"])
def test_the_command_writes_every_format(runs, tmp_path, capsys, ending):
    out = tmp_path / "new" / f"report{ending}"
    assert cli.main(["report", str(runs), "--out", str(out)]) == 0
    assert "SGDP" in out.read_text("utf-8") or "sgdp" in out.read_text("utf-8")
    assert capsys.readouterr().out == f"{out}\n"


def test_a_report_in_json_says_all_that_its_runs_say(runs, tmp_path):
    made = tables(read_cells([runs]))
    path = tmp_path / "report.json"
    path.write_text(as_json(made), encoding="utf-8")
    again = read_json(path)
    assert as_markdown(again) == as_markdown(made)
    assert as_data(again) == as_data(made)
    assert document(picture(again)) == document(picture(made))
    page, same = render(made), render(again)
    assert Page(same).rows == Page(page).rows
    assert same.count("<figure") == page.count("<figure") > 4
    assert "11 of 12 runs finished" in same
    assert "How each was made" in page
    assert "How each was made" not in same


def test_the_command_draws_chosen_curves_of_runs_and_of_reports(runs, tmp_path, capsys):
    report, drawn, again = (tmp_path / f"made.{n}" for n in ("json", "svg", "2.svg"))
    curves = ["--curves", "norm_growth,train_loss"]
    for source, out, more in ((runs, report, []), (runs, drawn, curves), (report, again, curves)):
        assert cli.main(["report", str(source), "--out", str(out), *more]) == 0
    assert drawn.read_text("utf-8") == again.read_text("utf-8")
    assert "Training loss" in drawn.read_text("utf-8")
    assert "Effective learning rate" not in drawn.read_text("utf-8")
    capsys.readouterr()
    assert cli.main(["report", str(runs), "--out", "x.png", "--curves", "norms"]) == 2
    assert "unknown curve 'norms': did you mean 'norm'" in capsys.readouterr().err


def test_a_report_in_json_that_is_none_is_an_error(tmp_path):
    for content in ("{", "[]", "[1]", '[{"recipe": "digits"}]'):
        path = tmp_path / "report.json"
        path.write_text(content)
        with pytest.raises(UsageError, match=r"report\.json is damaged"):
            read_json(path)


def test_the_commands_refuse_what_they_cannot_do(runs, tmp_path, capsys):
    for arguments, words in (
        (["report", str(runs), "--out", "x.doc"], "must end in .html"),
        (["report", str(tmp_path / "nowhere")], "no runs in"),
        (["paper", "run", "digit"], "did you mean 'digits'"),
        (["paper", "run", "digits", "--executor", "rai"], "did you mean 'ray'"),
        (["paper", "run", "digits", "--seeds", "0"], "from 1 to 10000"),
        (["paper", "run", "digits", "--seeds", "1000000000"], "from 1 to 10000"),
        (["paper", "run", "digits", "--device", "tpu"], "--device tpu is not allowed"),
        (["data", "fetch", "cifar"], "did you mean"),
        (["paper", "rum"], "rum"),
    ):
        assert cli.main(arguments) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1


def test_paper_run_trains_once_and_shows_the_table(tmp_path, capsys, monkeypatch):
    recipe = (Path(find.__globals__["__file__"]).parent / "digits.yaml").read_text()
    quick = recipe.replace("width: 8, epochs: 3", "width: 4, epochs: 1, batch_size: 256")
    quick = quick.replace("id: digits", "id: quick").replace("label: SGDP", "label: Mine")
    (tmp_path / "quick.yaml").write_text(quick)
    command = ["paper", "run", str(tmp_path / "quick.yaml"), "--seeds", "1", "--out"]
    command += [str(tmp_path / "runs"), "--methods", "sgd,sgdp"]
    assert cli.main(command) == 0
    first = capsys.readouterr()
    assert "2/2 digits sgdp seed 0" in first.err
    assert "| Mine |" in first.out
    monkeypatch.setattr(cell, "CellStart", None)
    assert cli.main([*command, "--json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)] == ["sgd", "sgdp"]
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    assert "| Mine |" in capsys.readouterr().out


def test_the_lists_name_everything(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NORMWISE_DATA", str(tmp_path))
    assert cli.main(["paper", "list"]) == 0
    assert "adamp-imagenet" in capsys.readouterr().out
    (tmp_path / "cifar-100-binary").mkdir()
    for state, file in (("absent", "train.bin"), ("in part", "test.bin"), ("at hand", "more.bin")):
        assert cli.main(["data", "list"]) == 0
        assert f"cifar100         {state}" in capsys.readouterr().out
        (tmp_path / "cifar-100-binary" / file).touch()


def test_a_cell_that_has_only_begun_is_unfinished(tmp_path):
    folder = write(tmp_path, "sgd", 0, 0.5, status=None)
    (folder / "metrics.jsonl").unlink()
    (done,) = read_cells([tmp_path])
    assert done == Done(folder, done.config, None, [])
    (table,) = tables([done])
    assert table.entries[0].spread is None
    assert Page(render([table])).open == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[1, 2]"),
        ("config.json", "{"),
        ("config.json", "{}"),
        ("result.json", "[]"),
        ("result.json", '{"status": "ok"}'),
        ("metrics.jsonl", '{"epoch": 0}\n'),
    ],
)
def test_a_damaged_cell_is_skipped_and_the_others_are_reported(tmp_path, capsys, name, content):
    write(tmp_path, "sgd", 0, 0.5)
    bad = write(tmp_path, "sgdp", 0, 0.6)
    (bad / name).write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "| SGD | 50.00 |" in out
    assert "SGDP" not in out
    assert err.count("\n") == 1
    assert f"skipped: {bad / name} is damaged" in err


def test_a_digit_changed_in_a_result_is_noticed(tmp_path):
    folder = write(tmp_path, "sgd", 0, 0.5)
    text = (folder / "result.json").read_text()
    (folder / "result.json").write_text(text.replace("0.5", "0.9"))
    with pytest.raises(UsageError, match="its checksum differs"):
        read_cells([tmp_path])
