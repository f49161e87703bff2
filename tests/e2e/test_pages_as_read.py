"""The README and the page on using a run, followed line by line: every command and every block of Python runs."""

from __future__ import annotations

import csv
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

import coterie
import sites
import tiny
from coterie.cli.main import app
from coterie.runs.summary import read_summary
from coterie.types import CoterieError
from doc_blocks import FENCE, ROOT, blocks

README = ROOT / "README.md"
USING = ROOT / "docs" / "using-a-run.md"
SMALLER = {
    'path = "minilm"': 'path = "model"',
    "epochs = 2": "epochs = 1",
    "warmup_rounds = 2": "warmup_rounds = 1",
    "rounds = 8": "rounds = 3",
}
QUICKER = {"run.rounds=12": "run.rounds=4", "fedlease,fedit,local --seeds 0,1,2": "fedit,local --seeds 0,1"}
# Servers, and what needs one or a hub: tests/e2e/test_flower_processes.py, tests/unit/api, tests/unit/cli/test_push.py.
ELSEWHERE = {"api", "serve", "join", "site", "status", "push"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of someone who has three clients' files and the README's config, in small."""
    (config,) = [block.text for block in blocks("toml") if block.page == README]
    for large, small in SMALLER.items():
        assert large in config
        config = config.replace(large, small)
    tiny.folder(tmp_path / "model", "bert")
    places = iter(sites.federation(tmp_path / "clients").values())
    for name in ("north", "south", "east"):
        next(places).rename(tmp_path / "clients" / name)
    (tmp_path / "triage.toml").write_text(config + '[engine]\nthreads = 1\ndevice = "cpu"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(line: str) -> str | None:
    """Run a line of a page; returns the command's name, None if it is no command of Coterie's or runs elsewhere."""
    for large, small in QUICKER.items():
        line = line.replace(large, small)
    words = shlex.split(line, comments=True)
    if words[:1] != ["coterie"] or words[1] in ELSEWHERE:
        return None
    assert app(words[1:], standalone_mode=False) in (None, 0), line
    return words[1]


def follow(page: Path) -> list[str]:
    """Run the blocks of a page in their order, Python in one namespace; returns the commands that ran."""
    ran, names = [], dict[str, Any]()
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        if match[1] == "sh":
            ran += [name for line in match[3].splitlines() if (name := command(line))]
        elif match[1] == "python":
            exec(compile(match[3], f"{page.name}: {match[3][:40]}", "exec"), names)
    return ran


def test_the_readme_and_what_it_leaves(reader: Path) -> None:
    assert follow(README) == ["doctor", "run", "run", "run", "run", "config", *["keys"] * 3, "compare"]
    kept = {path.relative_to(reader).parts[2] for path in reader.glob("runs/triage-fedlease-0/*")}
    page = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w.]+)", page.partition("## In a tracker")[0], re.MULTILINE))
    assert kept == named - {"tensorboard", "mlflow.db", "wandb", "trained", "kept"}


def test_the_page_on_using_a_run(
    reader: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["run", "triage.toml"], standalone_mode=False)
    app(["run", "triage.toml", "--set", "method.name=fedit"], standalone_mode=False)
    rows = sites.classification_rows("mood", 6, "new")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["text", "label"])
    writer.writeheader()
    writer.writerows(rows)
    for name in ("tickets.csv", "labelled.csv"):
        (reader / name).write_text(text.getvalue(), encoding="utf-8")
    sites.write_rows(reader / "newcomers" / "west" / "train.jsonl", sites.classification_rows("mood", 12, "west"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.getvalue().encode()), encoding="utf-8"))
    ran = follow(USING)
    assert ran == [
        *("predict", "predict", "evaluate", "evaluate", "evaluate", "export", "export", "export", "export"),
        *("onboard", "predict", "runs", "runs", "diff"),
    ]
    north = coterie.load("runs/triage-fedit-0", client="north")
    classify = pipeline("text-classification", model=north.model, tokenizer=north.tokenizer)
    assert f"{classify('the printer on floor two smokes')[0]['label']}\n" in capsys.readouterr().out
    (reader / "newcomers" / "west").rename(reader / "clients" / "west")
    with pytest.raises(CoterieError, match="fedlease-0: west came after it; move the new rows to another folder"):
        app(["evaluate", "runs/triage-fedlease-0", "--client", "north"], standalone_mode=False)


@pytest.mark.slow
def test_the_way_from_fedlease_to_smartfed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of one run are the pool of the next, for other clients, with the examples' configs."""
    examples = tmp_path / "examples"
    sites.federation(examples / "clients")
    sites.federation(examples / "later", clients=3)
    tiny.folder(examples / "model", "bert")
    less = {'path = "minilm"': 'path = "model"', "rounds = 10": "rounds = 3", "rounds = 8": "rounds = 2"}
    less |= {"warmup_rounds = 2": "warmup_rounds = 1", "epochs = 2": "epochs = 1", "threads = 2": "threads = 1"}
    for name in ("own-files.toml", "smartfed.toml"):
        text = (ROOT / "examples" / name).read_text(encoding="utf-8")
        for large, small in less.items():
            text = text.replace(large, small)
        (examples / name).write_text(text, encoding="utf-8")
    page = ROOT / "docs" / "methods" / "smartfed.md"
    (block,) = [of.text for of in blocks("sh") if of.page == page and "--run runs/fedlease" in of.text]
    monkeypatch.chdir(tmp_path)
    assert [command(line) for line in block.splitlines()] == ["run", "pool", "run"]
    experts = {path.name for path in (tmp_path / "runs" / "fedlease" / "experts").iterdir()}
    (summary,) = (tmp_path / "runs" / "smartfed").rglob("summary.json")
    found = read_summary(summary)
    assert {*found.clients} == {"mood-0", "place-0", "size-0"}
    assert {*found.describe["adapters"]} == experts  # type: ignore[call-overload]
