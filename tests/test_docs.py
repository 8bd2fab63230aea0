"""Every code block of the README and of the docs runs; pages, links and reference are whole."""

import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
import yaml

from normwise import cli
from normwise.lab.recipes import ids
from normwise.lab.running.export import as_json, read_json
from normwise.lab.running.sweeps import sweeps

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "docs" / "results"
REPORTS = [
    path
    for path in sorted(RESULTS.rglob("*.json"))
    # A benchmark's own results may have the name of a recipe.
    if path.stem in ids() and path.read_text(encoding="utf-8").startswith("[")
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


def identify(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """A page without its blocks and spans of code."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]+`", "", text)


def commands():
    for page in PAGES:
        for block in blocks(page, "bash", "console"):
            for line in block.splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words:
                    yield pytest.param(words, id=f"{identify(page)}: {' '.join(words)}")


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_every_code_block_has_a_language_that_is_run(page):
    languages = {language for language, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert languages <= {"python", "bash", "console"}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=identify)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    if "torch.optim.Muon" in page.read_text("utf-8") and not hasattr(torch.optim, "Muon"):
        pytest.skip("Muon came with torch 2.9")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("words", list(commands()))
def test_commands_exist_and_take_their_arguments(words, tmp_path, monkeypatch, capsys):
    """Quick ones run; the others are parsed, or gone through dry."""
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True)
    elif words[0] == "python":
        assert (ROOT / words[1]).exists()
    elif words[0] == "pip":
        assert words[1] == "install"
        extras = re.findall(r"\[(\w+)\]", words[2])
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
    else:
        assert words[0] == "normwise"
        words = words[: words.index(">")] if ">" in words else words
        cli._parser().parse_args(words[1:])
        if words[1] == "compare" and "--epochs" not in words:
            return  # takes a minute
        if (
            words[1] in ("report", "checkpoint")
            or words[1:3] == ["data", "fetch"]
            or words[3:4] == ["adamp-imagenet"]
        ):
            return  # needs runs, a network, or data
        if words[1] == "inspect" and not words[2].startswith("hf:"):
            return  # of a package that is the reader's, or that cannot be installed everywhere
        if any(word.startswith("hf:") for word in words):
            pytest.importorskip("transformers", reason="the network comes from transformers")
        monkeypatch.chdir(tmp_path)
        assert cli.main(words[1:]) == 0
        assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("P_{t+1} = P_t/(1 − λη_t)", "P<sub>t+1</sub> = P<sub>t</sub>/(1 − λη<sub>t</sub>)"),
        ("βp_{t−1}, Σ_{k<t} β^{t−k}‖p_k‖²", None),
        ("2^(−(k−1)/2), D^−0.32, c^aₛ", "2<sup>−(k−1)/2</sup>, D<sup>−0.32</sup>, c<sup>aₛ</sup>"),
        ("`w_t` of [x](a_b.md#w_t) and weight_decay", "`w_t` of [x](a_b.md#w_t) and weight_decay"),
    ],
)
def test_pages_set_indices_and_powers_outside_of_code(written, shown):
    """Else Markdown takes underscores for emphasis, and braces for attributes."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    found = hooks.set_mathematics(written)
    assert found == shown if shown else not set("_^{}") & set(found)


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_no_page_has_mathematics_that_the_site_would_show_as_latex(page):
    assert not re.search(r"\$\$|\\[a-z]{3,}", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_every_link_within_the_repository_leads_somewhere(page):
    targets = [target for target in LINK.findall(prose(page)) if "://" not in target]
    missing = [t for t in targets if not (page.parent / t.partition("#")[0]).exists()]
    assert not missing


def test_every_page_of_the_site_is_in_its_navigation():
    def files(nav):
        for entry in nav:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from files(value) if isinstance(value, list) else [value]

    docs = ROOT / "docs"
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [str(page.relative_to(docs).as_posix()) for page in docs.rglob("*.md")]
    assert sorted(files(nav)) == sorted(pages)


def test_every_room_with_public_names_is_in_the_reference():
    """All but the lab, which is public through its commands, and optim, whose names are at the top.

    The page of a room lists what its ``__all__`` has.
    """
    reference = ROOT / "docs" / "reference"
    shown = {
        m for p in reference.glob("*.md") for m in re.findall(r"^::: (\S+)", p.read_text(), re.M)
    }
    package = ROOT / "src" / "normwise"
    rooms = {
        f"normwise.{p.parent.name}"
        for p in package.glob("*/__init__.py")
        if "__all__" in p.read_text()
    }
    assert {"normwise"} | rooms - {"normwise.lab", "normwise.optim"} <= shown


def test_the_site_is_built_strictly(tmp_path):
    """A broken link or anchor, a page that is not listed, a name that is gone: each is an error."""
    pytest.importorskip("material", reason="the site needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="the site needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stderr
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        shown = (tmp_path / "reference" / f"{page.stem}.html").read_text(encoding="utf-8")
        for room in re.findall(r"^::: (normwise(?:\.\w+)?)$", page.read_text(), re.MULTILINE):
            module = importlib.import_module(room)
            public = {name: getattr(module, name) for name in module.__all__}
            told = [n for n, o in public.items() if inspect.isclass(o) or inspect.isfunction(o)]
            missing = [name for name in told if f'id="{room}.{name}"' not in shown]
            assert not missing, f"of {room}"
        assert not re.search(r"={5}|::</p>|:(?:class|func|meth|math):`", shown), "not Markdown"
    loaded = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="https?:')
    outside = [p.name for p in tmp_path.rglob("*.html") if loaded.search(p.read_text("utf-8"))]
    assert not outside, "reading the site needs no network"


def test_importing_normwise_imports_nothing_heavy_but_torch():
    heavy = ["numba", "triton", "matplotlib", "sklearn", "scipy", "rich", "lightning", "ray"]
    code = (
        "import sys, torch; before = set(sys.modules); import normwise; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.decode().strip() == "[]"


def is_swept(path):
    return any(row.get("point") for row in json.loads(path.read_text(encoding="utf-8")))


FIXED = [p.stem for p in REPORTS if p.parent == RESULTS and not is_swept(p)]


@pytest.mark.parametrize("recipe", FIXED)
def test_the_results_page_shows_what_the_data_says(recipe):
    rows = json.loads((RESULTS / f"{recipe}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    (section,) = (s for s in page.split("\n## ") if f"normwise paper run {recipe}" in s)
    for row in rows:
        shown = "failed" if row["mean"] is None else f"{row['mean']:.2f}"
        if row["sd"] is not None:
            shown += f" ± {row['sd']:.2f}"
        assert f"| {shown} " in section, row["method"]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_results_can_be_reported_again(path):
    (recipe, *others) = {table.recipe.id for table in read_json(path)}
    assert (recipe, others) == (path.stem, [])


def test_results_tables_and_figures_are_what_the_committed_numbers_give(monkeypatch):
    """``python docs/make_answers.py`` has nothing to do."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    answers = importlib.import_module("make_answers")
    held = answers.tables()
    for name, of_recipe in held.items():
        assert (RESULTS / f"{name}.json").read_text("utf-8") == as_json(of_recipe), name
    for path in answers.PAGES:
        text = path.read_text("utf-8")
        assert answers.page(text, held) == text, path.name
    made = answers.figures(held)
    assert {path.name for path in answers.PICTURES.iterdir()} == made.keys()
    for name, text in made.items():
        assert (answers.PICTURES / name).read_text("utf-8") == text, name


def test_the_tables_of_the_results_page_are_those_of_the_report(monkeypatch):
    """A number that is changed by hand in a table, or in the data, does not stay unseen."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    answers = importlib.import_module("make_answers")
    (page, *_) = answers.PAGES
    text, held = page.read_text("utf-8"), {"digits": read_json(RESULTS / "digits.json")}
    wrong = text.replace("| SGD | 88.65 ±", "| SGD | 98.65 ±", 1)
    assert wrong != text
    assert "| SGD | 88.65 ±" in answers.page(wrong, held)


def lines_of(name):
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_page_of_the_shift_shows_what_its_data_says():
    page = (ROOT / "docs" / "epsilon-shifted-l2.md").read_text(encoding="utf-8")
    words = {"bare": "plain", "shifted": "shifted"}
    for run in lines_of("epsilon_shift.jsonl"):
        if run["decay"] == "guarded" or run["steps"] != 6000:
            continue
        norm = "not normalized" if run["method"] == "none" else run["method"]
        decay = "" if run["method"] == "none" else f", {words[run['decay']]}"
        (row,) = (
            r for r in page.splitlines() if r.startswith(f"| {norm}, {run['optimizer']}{decay} |")
        )
        largest = f"{run['largest']:.{'0f' if run['largest'] < 1000 else '0e'}}"
        end = f"– ({run['failed_at']:,})" if run["failed_at"] else f"{run['accuracy']:.1f}"
        column = 1 + [1e-2, 1e-3, 1e-4, 1e-5, 0].index(run["weight_decay"])
        shown = f"{end}, {re.sub(r'e.0*', 'e', largest)}"
        assert row.split("|")[1 + column].strip() == shown


def test_the_page_of_the_shift_shows_the_accuracies_of_depthwise_filters():
    page = (ROOT / "docs" / "epsilon-shifted-l2.md").read_text(encoding="utf-8")
    found = {}
    for run in lines_of("depthwise_standardization.jsonl"):
        if run["steps"] == 2000:
            found.setdefault(run["variant"], []).append(run["accuracy"])
    for variant, values in found.items():
        (row,) = (r for r in page.splitlines() if r.startswith(f"| {variant} "))
        assert f"| {mean(values):.1f} ± {stdev(values):.1f} |" in row


def swept(recipe):
    """The sweeps of a recipe, by the label of the method and the row."""
    return {(s.label, s.row): s for s in sweeps(read_json(RESULTS / f"{recipe}.json"))}


def spread(values):
    """Mean and, of two or more seeds, standard deviation, as the page has them."""
    if values.mean == 0:
        return "0"
    return f"{values.mean:.3f}" + ("" if values.sd is None else f" ± {values.sd:.3f}")


def test_the_page_of_spheres_shows_which_learning_rates_carry_over():
    page = (ROOT / "docs" / "sphere.md").read_text(encoding="utf-8")
    found, method, shown = swept("lr-transfer"), "", 0
    superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    for name, depth, seeds, rates, losses, regrets in re.findall(
        r"^\| ([^|]*?) ?\| ([24]) \| (\d) \| (2⁻[^|]*) \| ([^|]*) \| ([^|]*) \|$", page, re.M
    ):
        method = name or method
        own = [found[method, f"depth-{depth}-width-{width}"] for width in (32, 64, 128)]
        assert {len(s.best.values) for s in own} == {int(seeds)}
        exponents = [int(r[1:].translate(superscripts)) for r in rates.split(", ")]
        assert [2.0**e for e in exponents] == [dict(s.best.point)["lr"] for s in own]
        assert losses == ", ".join(spread(s.best.spread) for s in own)
        assert regrets.replace("–", "0") == ", ".join(spread(s.regret) for s in own)
        shown += 1
    assert shown == len({(label, row.split("-width-")[0]) for label, row in found})


def test_the_page_of_decay_shows_the_best_of_each_place_in_adam():
    page = (ROOT / "docs" / "weight-decay.md").read_text(encoding="utf-8")
    found = swept("decay-moments")
    assert len(found) == 5
    for (label, _), sweep in found.items():
        values = sweep.best.values.values()
        lr, decay = (f"{v:g}".replace("e-0", "e-") for _, v in sweep.best.point)
        best = f"{sweep.best.spread.mean:.2f} ({min(values):.2f}–{max(values):.2f}) | {lr}, {decay}"
        assert re.search(rf"^\| {label} \|.*\| {re.escape(best)} \|$", page, re.M), best
    first, second = (
        np.array([mean(e.values.values()) for e in found[label, "mnist"].entries])
        for label in ("L2", "second moment only")
    )
    good = (first + second) / 2 >= 80
    differences = (first - second)[good]
    said = f"over the {good.sum()} cells above 80% the mean difference is {differences.mean():.2f}"
    assert said.replace("-", "−") in page
    assert f"(the largest, {abs(differences).max():.2f}," in page


def pairs():
    """The lines of the table of pairs: of every task's first metric, from all data together."""
    for recipe in ids():
        if recipe == "growth-gain":  # one question at many growths, with a section of its own
            continue
        path = RESULTS / f"{recipe}.json"
        rows = json.loads(path.read_text(encoding="utf-8")) if path in REPORTS else []
        metrics = {}
        for row in rows:
            metrics.setdefault(row["row"], row["metric"])
        for row in rows:
            if row["compared_with"] is None:
                continue
            if row["method"] in ("adamp", "sgdp") and row["metric"] == metrics[row["row"]]:
                differs = f"{row['difference']:+.2f} ± {row['half_width_95']:.2f}"
                differs = differs.replace("-", "−").replace("−0.00", "+0.00")
                name = {"adamp": "AdamP", "sgdp": "SGDP"}[row["method"]]
                metric = row["metric"].replace("_", " ").replace("ap", "AP")
                claim, seeds = row["claimed"], row["seeds_needed"]
                claimed = "not known | " if claim is None else f"{claim:+.2f} | {seeds}"
                scale = "" if row["scale"] == "small" else f" ({row['scale']})"
                pair = f"{name} to {row['compared_with']}"
                yield (
                    f"| {recipe}: {row['row']}{scale} | {metric} | {pair} "
                    f"| {row['seeds']} | {differs} | {row['verdict']} "
                    f"| {claimed.replace('-', '−')} |"
                )


def test_one_table_has_every_pair():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if re.match(r"\| [\w.-]+: ", line)]
    assert table == list(pairs())
