"""Looking back: the runs of a folder, what two of them differ in, all results as a DataFrame."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import coterie
import finished_runs
from coterie.artifacts.history import chosen, differences, entry_of, runs_in
from coterie.cli.main import app
from coterie.files import read_json, write_json
from coterie.runs.summary import read_summary
from coterie.types import CoterieError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run, a copy with another seed and better results, one that is not finished, and a model's folder."""
    done = finished_runs.fedlease()
    shutil.copytree(done, tmp_path / "runs" / "a", ignore=shutil.ignore_patterns("personal", "experts", "clients"))
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "runs" / "more" / "b")
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "runs" / "c")
    b = tmp_path / "runs" / "more" / "b"
    config = read_json(b / "config.json")
    config["config"]["run"]["seed"] = 7
    write_json(b / "config.json", config)
    summary = read_json(b / "summary.json")
    summary["mean"]["test"]["accuracy"] = 1.0
    summary["clients"]["mood-0"]["test"]["accuracy"] = 1.0
    write_json(b / "summary.json", summary)
    manifest = read_json(b / "manifest.json")
    write_json(b / "manifest.json", {**manifest, "notes": "others"})
    (tmp_path / "runs" / "c" / "summary.json").unlink()
    shutil.copytree(done.parent / "model", tmp_path / "runs" / "model")
    return tmp_path / "runs"


def test_the_runs_of_a_folder_sorted_and_filtered(folder: Path) -> None:
    entries = runs_in(folder)
    assert [str(e.folder.relative_to(folder)) for e in entries] == ["a", "c", "more/b"]
    assert [(e.method, e.seed, e.state) for e in entries] == [
        ("fedlease", 0, "finished"),
        ("fedlease", 0, "round 3 of 3"),
        ("fedlease", 7, "finished"),
    ]
    assert [e.folder.name for e in chosen(entries, (), "test")] == ["b", "a", "c"]
    assert [e.folder.name for e in chosen(entries, ["run.seed=7"], "run")] == ["b"]
    assert [e.folder.name for e in chosen(entries, ["run.seed=0"], "state")] == ["a", "c"]
    for filters, sort, text in ((["seed"], "run", "not of the form"), ([], "best", "the columns are run, method")):
        with pytest.raises(CoterieError, match=text):
            chosen(entries, filters, sort)
    with pytest.raises(CoterieError, match="there is no run in"):
        runs_in(folder / "model")


def test_the_commands_show_runs_and_differences(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["runs", str(folder), "--sort", "test"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "method", "seed", "state", "metric", "test", "worst", "bytes"]
    assert lines[1].split()[:6] == [str(folder / "more" / "b"), "fedlease", "7", "finished", "accuracy", "100.0"]
    assert "round 3 of 3" in lines[3]
    app(["diff", str(folder / "a"), str(folder / "more" / "b")], standalone_mode=False)
    shown = capsys.readouterr().out
    for text in ("settings", "run.seed", "data", "notes", "results", "mood-0.accuracy", "mean.test.accuracy"):
        assert text in shown
    app(["diff", str(folder / "a"), str(folder / "a")], standalone_mode=False)
    assert capsys.readouterr().out.count("no difference") == 3


@pytest.mark.parametrize(
    ("file", "content", "known"),
    [
        ("summary.json", '{"mean": {"te', ["fedlease", "0"]),
        ("summary.json", "[1, 2]", ["fedlease", "0"]),
        ("config.json", '{"root": "/', ["-", "-"]),
    ],
)
def test_a_damaged_run_hides_no_other(
    file: str, content: str, known: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a" / file).write_text(content)
    app(["runs", str(folder)], standalone_mode=False)
    _, damaged, *others, note = capsys.readouterr().out.splitlines()
    assert damaged.split()[:4] == [str(folder / "a"), *known, "damaged"]
    assert [row.split()[0] for row in others] == [str(folder / "c"), str(folder / "more" / "b")]
    assert note.startswith(f"note: {folder / 'a' / file} is ")
    with pytest.raises(CoterieError, match=file):
        coterie.results(folder)


def test_a_difference_has_both_values(folder: Path) -> None:
    found = differences(folder / "a", folder / "more" / "b")
    assert [(d.name, d.before, d.after) for d in found["settings"]] == [("run.seed", "0", "7")]
    assert [(d.name, d.before, d.after) for d in found["data"]] == [("notes", "-", "others")]
    assert {d.name for d in found["results"]} <= {"mean.test.accuracy", "mood-0.accuracy"}
    assert entry_of(folder / "c").summary is None
    assert [d.name for d in differences(folder / "c", folder / "c")["results"]] == []


def test_results_are_a_row_per_client(folder: Path) -> None:
    table = coterie.results(folder)
    assert len(table) == 10
    summary = read_summary(folder / "a" / "summary.json")
    row = table[(table["run"] == "a") & (table["client"] == "size-1")].iloc[0]
    assert row["test_accuracy"] == summary.clients["size-1"].test["accuracy"]
    assert (row["num_train"], row["method"], row["seed"]) == (12, "fedlease", 0)
    assert table.groupby("run")["test_accuracy"].mean().shape == (2,)


def test_results_without_pandas_say_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CoterieError, match=r"coterie\.results needs pandas: pip install pandas"):
        coterie.results(folder)
