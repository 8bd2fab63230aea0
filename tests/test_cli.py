"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

import normwise
from normwise import cli
from normwise.lab import errors
from normwise.lab.store import read_metrics

QUICK = ["compare", "--seeds", "1", "--epochs", "1", "--batch-size", "256", "--optimizers", "sgdp"]


def usage_error(capsys, *arguments):
    """Run a command that must be refused, and return its one line."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("normwise: error: ")
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizers", "sgd,admp"], ["'admp'", "did you mean 'adamp'?", "sgdp"]),
        (["--optimizers", "zzz"], ["'zzz'", "choose from sgd, sgdp, adamw, adamp"]),
        (["--optimizers", ""], ["no optimizer", "choose from"]),
        (["--optimizers", " , "], ["no optimizer", "choose from"]),
        (["--optimizers", "sgd,SGD"], ["'sgd'", "twice"]),
        (["--task", "digit"], ["'digit'", "did you mean 'digits'?"]),
        (["--seeds", "0"], ["--seeds", "'0'", "from 1 to 10000"]),
        (["--seeds", "-3"], ["--seeds", "'-3'", "from 1"]),
        (["--seeds", "1000000000"], ["--seeds", "'1000000000'", "from 1 to 10000"]),
        (["--seeds", "two"], ["--seeds", "'two'", "from 1"]),
        (["--seeds", "1.5"], ["--seeds", "'1.5'", "whole number"]),
        (["--epochs", "0"], ["--epochs", "'0'", "1 or more"]),
        (["--batch-size", "-1"], ["--batch-size", "'-1'", "1 or more"]),
        (["--batch-size", "100000"], ["--batch-size 100000", "898"]),
        (["--lr-sgd", "nan"], ["--lr-sgd", "'nan'", "finite", "greater than 0"]),
        (["--lr-sgd", "-inf"], ["--lr-sgd", "'-inf'", "finite"]),
        (["--lr-adam", "-1e-3"], ["--lr-adam", "'-1e-3'", "greater than 0"]),
        (["--lr-adam", "0"], ["--lr-adam", "'0'", "greater than 0"]),
        (["--lr-adam", "fast"], ["--lr-adam", "'fast'", "finite"]),
        (["--sedes", "3"], ["--sedes"]),
    ],
)
def test_compare_refuses_what_it_cannot_do(capsys, tmp_path, arguments, words):
    out = tmp_path / "run"
    line = usage_error(capsys, "compare", "--out", str(out), *arguments)
    for word in words:
        assert word in line
    assert not out.exists()


def test_an_unknown_command_gets_a_suggestion(capsys):
    assert "did you mean 'compare'?" in usage_error(capsys, "compair")


def test_an_output_folder_with_something_in_it_is_left_alone(capsys, tmp_path):
    (tmp_path / "precious").write_text("mine")
    line = usage_error(capsys, *QUICK, "--out", str(tmp_path))
    assert str(tmp_path) in line
    assert "absent or empty" in line
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_an_output_folder_that_is_a_file_is_refused(capsys, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    assert repr(f"{file}{below}") in usage_error(capsys, *QUICK, "--out", f"{file}{below}")
    assert file.read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that refuses to write")
def test_an_output_folder_that_cannot_be_written_is_refused(capsys):
    assert "'/proc/normwise'" in usage_error(capsys, *QUICK, "--out", "/proc/normwise")


def test_missing_packages_are_named_with_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "sklearn" else object())
    line = usage_error(capsys, *QUICK)
    assert "scikit-learn" in line
    assert 'pip install "normwise[lab]"' in line


def test_no_command_prints_the_help_and_is_a_usage_error(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "compare" in err
    assert "toy" in err


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"normwise {normwise.__version__}\n"
    for command in ([], ["compare"], ["toy"]):
        assert cli.main([*command, "--help"]) == 0
        assert "exit codes" in capsys.readouterr().out


def test_json_is_all_there_is_on_stdout(capsys, tmp_path):
    assert cli.main([*QUICK, "--json", "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["folder"] == str(tmp_path / "run")
    assert summary["optimizers"][0]["finished"] == [0]
    assert "SGDP" in err


def test_quiet_shows_a_table_and_no_progress(capsys, tmp_path):
    assert cli.main([*QUICK, "--quiet", "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "SGDP" in out
    assert "report.html" in out


def test_the_default_folder_is_new_every_time(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*QUICK, "--quiet"]) == 0
    assert cli.main([*QUICK, "--quiet"]) == 0
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("compare-") for folder in folders)
    capsys.readouterr()


def test_a_training_that_fails_is_exit_code_1_in_one_line(capsys, tmp_path):
    arguments = [*QUICK, "--quiet", "--lr-sgd", "1e30", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "sgdp, seed 0" in err
    assert "1 failed" in out


def test_the_toy_prints_the_papers_digits_and_draws(capsys, tmp_path):
    picture = tmp_path / "toy.png"
    assert cli.main(["toy", "--json", "--out", str(picture)]) == 0
    numbers = json.loads(capsys.readouterr().out)["numbers"]
    assert len(numbers) == 9
    assert all(number["rounded"] == number["text"] for number in numbers)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "exists already" in usage_error(capsys, "toy", "--out", str(picture))
    assert ".png" in usage_error(capsys, "toy", "--out", str(tmp_path / "toy.exe"))
    assert cli.main(["toy"]) == 0
    assert "3.7258" in capsys.readouterr().out


@pytest.mark.parametrize(
    "end", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_a_readable_partial_run(tmp_path, end):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "normwise", "compare", "--out", str(out), "--quiet", "--json"]
    process = subprocess.Popen(
        [*command, "--epochs", "100000", "--seeds", "1", "--batch-size", "256"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell may have told its background jobs to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(end)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert json.loads(stdout)["status"] == "interrupted"
    assert json.loads((out / "run.json").read_text("utf-8"))["status"] == "interrupted"
    records = read_metrics(out)
    assert [r["epoch"] for r in records] == list(range(len(records)))
    assert "Interrupted" in (out / "report.html").read_text("utf-8")


def test_import_loads_nothing_of_the_lab():
    code = (
        "import sys, normwise; "
        "print([m for m in ('matplotlib', 'sklearn', 'rich', 'normwise.lab') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
