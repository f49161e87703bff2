"""The pages say what is so: configs load, Python runs, paths and commands exist, references are fresh.

Links: test_make_site.py.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer

import coterie
import coterie.methods
import packages
import sites
import tiny
from coterie.cli.main import app
from coterie.comparison import config_for
from coterie.config.load import check_config, load_config, load_raw
from coterie.data import sources
from coterie.data.clients import load_data
from coterie.data.settings import Columns
from coterie.deploy.agreement import federation_config
from coterie.experiment import run
from coterie.files import write_json
from coterie.methods.registry import methods
from coterie.nn import gates
from coterie.nn.attach import attached
from coterie.types import CoterieError
from doc_blocks import PAGES, ROOT, Block, blocks

EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
PATH = re.compile(r"`((?:src|tests|docs|examples|bench)/[\w./-]*)`")
TUTORIAL = ROOT / "docs" / "tutorial-paper.md"
USING = ROOT / "docs" / "using-a-run.md"
DATASETS = next(filter(Path.is_dir, (ROOT / "examples" / "data", ROOT.parent / "shared" / "data")), None)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def the_block(mark: str) -> Block:
    (block,) = blocks("python", mark)
    return block


# configs -------------------------------------------------------------------------------------------------------------


def check(raw: dict[str, Any]) -> None:
    """As ``coterie run`` does, ``serve``, or ``compare`` where there are settings of several methods."""
    if "federation" in raw and "data" not in raw:
        federation_config(raw)
        return
    if "methods" not in raw:
        check_config(raw)
        return
    check_config(raw)
    for method in methods():
        config_for({name: section for name, section in raw.items() if name != "method"}, method, 0)


def test_there_are_pages_and_examples() -> None:
    assert len(PAGES) >= 15
    assert len(EXAMPLES) >= 6
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES if f"({path.name})" not in listed] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_good_config(path: Path) -> None:
    check(load_raw(path))


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_on_a_page_is_a_good_config(block: Block) -> None:
    check({"data": {"folder": "clients"}, **tomllib.loads(block.text)})


def test_the_check_finds_a_fault() -> None:
    with pytest.raises(CoterieError, match="warm_rounds"):
        check({"data": {"folder": "x"}, "methods": {"fedlease": {"warm_rounds": 1}}})


PUBLIC = [path for path in EXAMPLES if '"data/' in path.read_text("utf-8")]


@pytest.mark.parametrize("path", PUBLIC, ids=lambda p: p.name)
def test_an_example_names_the_script_that_makes_its_data(path: Path) -> None:
    (command,) = re.findall(r"^# The data: python (examples/\S+) (.*)$", path.read_text("utf-8"), re.MULTILINE)
    script, names = command
    assert (ROOT / script).is_file()
    assert load_raw(path)["data"]["datasets"] == [f"data/{name}" for name in names.split()]


@pytest.mark.skipif(DATASETS is None, reason="no public datasets; examples/fetch_data.py downloads them")
@pytest.mark.parametrize("path", PUBLIC, ids=lambda p: p.name)
def test_an_example_gets_the_rows_it_asks_for(path: Path) -> None:
    assert DATASETS is not None
    raw = load_raw(path)
    raw["data"]["datasets"] = [str(DATASETS / Path(name).name) for name in raw["data"]["datasets"]]
    config = check_config({key: raw[key] for key in ("data", "task") if key in raw})
    data = config.data
    clients = load_data(data, config.task.kind, 0, path.parent).clients
    assert len(clients) >= 8
    assert {c.info.num_train for c in clients} == {data.train_rows}
    assert {c.info.num_test for c in clients} == {data.test_rows}


# what the README tells a stranger to do ------------------------------------------------------------------------------

CLIENTS = [f"{trade}-{place}" for trade in ("it", "clinic") for place in ("north", "east", "south")]


def test_the_tutorial_from_a_csv_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "model", "bert")
    make, move, show = [block for block in blocks("python", "run") if block.page == TUTORIAL]
    (config,) = [block.text for block in blocks("toml") if block.page == TUTORIAL]
    for block in (make, move):
        exec(compile(block.text, str(block), "exec"), {})
    smaller = {
        'path = "minilm"': 'path = "model"', "_rows = 12": "_rows = 6", "_rows = 24": "_rows = 3",
        "_rows = 40": "_rows = 4", "rounds = 6": "rounds = 2",
    }  # fmt: skip
    for large, small in smaller.items():
        assert large in config
        config = config.replace(large, small)
    Path("tickets.toml").write_text(config + '[engine]\nthreads = 1\ndevice = "cpu"\n', encoding="utf-8")
    commands = [block.text for block in blocks("sh") if block.page == TUTORIAL]
    for command in commands:
        command = command.replace("fedlease,fedit,local", "fedit,local").replace("0,1,2", "0,1")  # quicker
        assert app(shlex.split(command)[1:], standalone_mode=False) in (None, 0)
    manifest = json.loads(Path("runs/first/manifest.json").read_text(encoding="utf-8"))
    assert sorted(manifest["clients"]) == sorted(CLIENTS)
    assert {Path(f"runs/tickets/compare.{kind}").is_file() for kind in ("html", "md", "tex")} == {True}
    capsys.readouterr()
    exec(compile(show.text, str(show), "exec"), {})
    printed = capsys.readouterr().out
    assert all(f"{name:10} 0." in printed for name in ("fedit", "local"))
    assert "permutation test, Holm" in printed


# Python --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_on_a_page_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")
    assert block.mark in ("run", "method", "gate", "source", "client", "serve"), "no test runs it"
    assert (block.mark == "run") == (block.page in (ROOT / "README.md", USING, TUTORIAL)), "nothing runs it there"
    for name in re.findall(r"^from (coterie[\w.]*) import", block.text, re.MULTILINE):
        importlib.import_module(name)


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules count as methods and as sources."""
    for package in (coterie.methods, sources):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    packages.forget()
    yield tmp_path
    packages.forget()


def test_the_method_of_the_contributing_page_runs(plugged: Path) -> None:
    (plugged / "fedmedian.py").write_text(the_block("method").text, encoding="utf-8")
    path = sites.config(plugged / "site", method="fedmedian")
    summary = run(load_config(path), plugged / "out", root=path.parent)
    assert summary.rounds == 3
    assert (plugged / "out" / "experts" / "global" / "adapter_config.json").is_file()
    failed = [json.loads(line).get("failed") for line in (plugged / "out" / "metrics.jsonl").read_text().splitlines()]
    assert not any(failed)
    with pytest.raises(CoterieError, match="keeps heads with the clients"):
        run(load_config(path, ["task.head=shared"]), plugged / "other", root=path.parent)


def test_the_method_of_the_contributing_page_serves_a_federation(plugged: Path) -> None:
    import flower_sites
    from coterie.deploy import server
    from coterie.deploy.attempt import begin_attempt
    from coterie.deploy.events import Finished
    from coterie.deploy.journal import JOURNAL, Journal, read_journal
    from coterie.flower.app import GridTransport
    from coterie.runs.folder import plain
    from grid import InProcessGrid

    (plugged / "fedmedian.py").write_text(the_block("method").text, encoding="utf-8")
    clients = ["mood-0", "place-0", "size-0"]
    path, out = sites.config(plugged, method="fedmedian"), plugged / "served"
    federation = {"sites": clients, "at_least": 3, "wait": 5.0, "greeting": 0.0}
    config = flower_sites.server_config(path, federation=federation)
    write_json(out / "config.json", {"root": str(plugged), "config": plain(config)})
    begin_attempt(out, {})
    workers = flower_sites.workers(plugged, clients, policy={"upload_bank": True})
    grid = InProcessGrid({11 + i: workers[client].answer for i, client in enumerate(clients)})
    server.run(GridTransport(grid, pause=0.01), out, Journal(out / JOURNAL))
    assert isinstance(read_journal(out)[-1].event, Finished)
    alone = coterie.run(flower_sites.local_config(path, clients, plugged), plugged / "alone", root=plugged)
    assert alone.rounds == 3
    for expert in ("experts/global/adapter_model.safetensors", "clients/mood-0/bundle.safetensors"):
        assert (out / expert).read_bytes() == (plugged / "alone" / expert).read_bytes()


def test_the_source_of_the_contributing_page_loads(plugged: Path) -> None:
    (plugged / "tabs.py").write_text(the_block("source").text, encoding="utf-8")
    (plugged / "rows.txt").write_text("good\tall well\nbad\tnot\tso well\n", encoding="utf-8")
    (dataset,) = sources.load("tabs:rows.txt", plugged, Columns())
    assert dataset.name == "rows"
    assert dataset.tables["train"].records == [
        {"label": "good", "text": "all well"},
        {"label": "bad", "text": "not\tso well"},
    ]
    with pytest.raises(CoterieError, match="no such file"):
        sources.load("tabs:none.txt", plugged, Columns())


def test_the_gate_of_the_contributing_page_weighs(monkeypatch: pytest.MonkeyPatch) -> None:
    space = dict(vars(gates))
    exec(compile(the_block("gate").text, "gate", "exec"), space)
    monkeypatch.setattr(gates, "sigmoid", space["sigmoid"], raising=False)
    packages.forget()
    try:
        made = tiny.model("bert")
        bank = tiny.bank(tiny.targets(made), experts=3, gate="sigmoid")
        with attached(made, bank) as handle:
            handle.now.usage = {}
            made(**tiny.batch())
        sums = torch.stack([weights[0].sum() for weights in handle.now.usage.values()])
        assert ((sums > 0) & (sums < 3 * 21)).all()
    finally:
        monkeypatch.undo()
        packages.forget()


# paths, commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    named = PATH.findall(page.read_text(encoding="utf-8"))
    made_later = {"src/coterie/methods/fedmedian.py", "bench/results/NAME.json"}
    made_later |= {f"examples/{folder}" for folder in ("data", "clients", "later", "pool")}
    assert [path for path in named if path not in made_later and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_on_a_page_exist(block: Block) -> None:
    group = typer.main.get_command(app)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    seen = 0
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["coterie"]:
            assert isinstance(group, click.Group)
            context = click.Context(group)
            command = group.get_command(context, words[1])
            assert command is not None, line
            command.make_parser(click.Context(command)).parse_args(words[2:])
        elif words[:1] == ["make"]:
            assert words[1] in targets, line
        elif words[:1] == ["python"]:
            assert (ROOT / words[1]).is_file(), line
        else:
            assert not words or words[:2] == ["pip", "install"], line
        seen += bool(words)
    assert seen


# tables --------------------------------------------------------------------------------------------------------------


def test_the_readme_names_every_method_in_its_table_of_what_travels() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    travels = text.split("## What travels")[1].split("##")[0]
    named = set(re.findall(r"^\| `(\w+)`", travels, re.MULTILINE))
    assert named == set(methods())


@pytest.mark.parametrize("method", ["fedlease", "fedamole"])
def test_a_methods_page_has_every_setting_with_its_default(method: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text.split("## Settings")[1], re.MULTILINE))
    fields = methods()[method].Settings.model_fields
    assert rows == {name: str(field.default) for name, field in fields.items()}


@pytest.mark.parametrize("page", ["methods", "config", "site", "releases"])
def test_a_reference_page_is_what_the_command_prints_now(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = {"site": ["site", "config"], "releases": ["methods", "--releases"]}.get(page, [page])
    app([*command, "--markdown"], standalone_mode=False)
    found = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
    assert found == f"<!-- Made by `make docs`: do not edit. -->\n\n{capsys.readouterr().out}", "run `make docs`"


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_has_a_page_with_its_settings_and_what_travels(name: str) -> None:
    """Settings are on the page itself; for the larger methods with the table of all keys beside."""
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert re.search(r"\by +=.*W0", page), "no formula"
    assert re.search(r"^## (What travels, and what it tells|What a client gives away)$", page, re.MULTILINE)
    assert "\n## When to use it\n" in page
    missing = [
        key for key in methods()[name].Settings.model_fields if f"`{key}`" not in page and f"{key} =" not in page
    ]
    assert missing == []


def test_every_picture_is_on_a_page_and_small() -> None:
    pictures = sorted((ROOT / "docs" / "pictures").iterdir())
    assert len(pictures) >= 6
    paths = [ROOT / "README.md", ROOT / "docs" / "gallery.md", *(ROOT / "docs" / "results").glob("*.md")]
    pages = [path.read_text(encoding="utf-8") for path in paths]
    for path in pictures:
        assert any(f"pictures/{path.name})" in page for page in pages), path.name
        assert path.stat().st_size < 160_000
