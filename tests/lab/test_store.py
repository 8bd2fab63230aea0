"""The folder of a run."""

from __future__ import annotations

import json
import os

import pytest

from normwise.lab.errors import UsageError
from normwise.lab.store import RunFolder, read_metrics, write_atomically, write_new


def test_records_can_be_read_while_the_run_goes_on(tmp_path):
    store = RunFolder(tmp_path / "a" / "b")
    store.append_metrics({"epoch": 0})
    store.append_metrics({"epoch": 1})
    assert read_metrics(store.path) == [{"epoch": 0}, {"epoch": 1}]
    store.close()


@pytest.mark.parametrize(
    "tail", ['{"epoch": 2', '{"epo', '{"epoch": 2}', '"é'.encode()[:2].decode("latin1")]
)
def test_a_half_written_last_line_is_passed_over(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n' + tail, encoding="utf-8")
    whole = [{"epoch": 0}, {"epoch": 1}]
    assert read_metrics(path) == ([*whole, {"epoch": 2}] if tail.endswith("}") else whole)


def test_a_bad_line_elsewhere_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n{"epo\n{"epoch": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_not_a_number_is_never_written(tmp_path):
    store = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match="JSON compliant"):
        store.append_metrics({"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        store.write_json("summary.json", {"loss": float("inf")})
    store.close()
    assert read_metrics(store.path) == []


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path):
    RunFolder(tmp_path).close()
    with pytest.raises(UsageError, match="is not empty"):
        RunFolder(tmp_path)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="a file"):
            RunFolder(path)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_files_are_readable_as_the_umask_says(tmp_path):
    previous = os.umask(0o022)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(previous)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_new_file_never_replaces_one(tmp_path):
    write_new(tmp_path / "deep" / "toy.png", b"first")
    with pytest.raises(UsageError, match="exists already"):
        write_new(tmp_path / "deep" / "toy.png", b"second")
    assert (tmp_path / "deep" / "toy.png").read_bytes() == b"first"


def test_json_files_are_read_back(tmp_path):
    store = RunFolder(tmp_path)
    store.write_json("run.json", {"title": "η ÷ ‖w‖"})
    store.close()
    assert json.loads((tmp_path / "run.json").read_text("utf-8")) == {"title": "η ÷ ‖w‖"}
