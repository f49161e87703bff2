"""The commands of the pages that are not followed line by line: each runs here, or a list names the test of it."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sites
import tiny
from coterie.cli.main import app
from doc_blocks import ROOT, blocks

# Followed in tests/e2e/test_pages_as_read.py and tests/unit/test_docs.py.
FOLLOWED = {"README.md", "docs/using-a-run.md", "docs/tutorial-paper.md"}
# How a line begins that does not run here, and the test of what it does.
ELSEWHERE = {
    # make, pip, and the scripts of bench/: test_docs says that there are such targets and files
    "make ": "tests/unit/test_docs.py",
    "pip install ": "tests/unit/test_docs.py",
    "python bench/": "tests/unit/test_docs.py",
    # a download
    "python examples/fetch_data.py": "tests/unit/test_fetch_data.py",
    "coterie compare examples/four-tasks.toml ": "tests/e2e/test_compare.py",
    "coterie compare bench/study/four-tasks.toml ": "tests/e2e/test_compare.py",
    # servers, and what needs one
    "coterie serve ": "tests/e2e/test_flower_processes.py",
    "coterie join ": "tests/e2e/test_flower_processes.py",
    "coterie site check ": "tests/unit/deploy/test_site.py",
    "coterie api ": "tests/unit/cli/test_api.py",
    # Ray, and a package that would have to be installed
    "coterie run triage.toml --engine flower-sim": "tests/unit/engines/test_flower_sim.py",
    "coterie run triage.toml --set method.name=trimmed": "tests/unit/test_plugins.py",
    # from FedLEASE's experts to SmartFed's pool
    "coterie run examples/own-files.toml ": "tests/e2e/test_pages_as_read.py",
    "coterie pool build examples/pool --run ": "tests/e2e/test_pages_as_read.py",
    "coterie run examples/smartfed.toml --set ": "tests/e2e/test_pages_as_read.py",
    "coterie run own-files.toml ": "tests/e2e/test_pages_as_read.py",
    "coterie pool build pool --run ": "tests/e2e/test_pages_as_read.py",
    "coterie run smartfed.toml --set ": "tests/e2e/test_pages_as_read.py",
}
QUICKER = {
    "--methods all --seeds 0,1,2": "--methods fedit,local --seeds 0",
    "1e-3,2e-3,4e-3": "1e-3,4e-3",
    "run.rounds=20": "run.rounds=4",
}
TRIAGE = """
[model]
path = "model"
[data]
folder = "clients"
[lora]
rank = 2
[train]
batch_size = 4
[method]
name = "fedlease"
[methods.fedlease]
warmup_rounds = 1
[run]
rounds = 3
[engine]
threads = 1
device = "cpu"
"""


def triage(folder: Path) -> None:
    """A config and three clients, as the README has them."""
    tiny.folder(folder / "model", "bert")
    clients = iter(sites.federation(folder / "clients", clients=3).values())
    for name in ("north", "south", "east"):
        next(clients).rename(folder / "clients" / name)
    (folder / "triage.toml").write_text(TRIAGE, encoding="utf-8")


def key_of_west(folder: Path) -> None:
    """What a site hands over."""
    run_line(f"coterie keys site {folder / 'west.key'}")


def trained(folder: Path) -> None:
    """A run of which one site has its bundle, and texts for it."""
    triage(folder)
    run_line("coterie run triage.toml")
    shutil.copytree(folder / "runs/triage-fedlease-0/clients/north", folder / "north/state/RUN/export")
    (folder / "new-tickets.csv").write_text("text\nthe printer smokes\nmore paper\n", encoding="utf-8")


def chats(folder: Path) -> None:
    """The config of the page on language models, with a tiny one and a few conversations."""
    (config,) = [
        block.text for block in blocks("toml") if block.page == ROOT / "docs/llm.md" and "SmolLM2" in block.text
    ]
    smaller = {"HuggingFaceTB/SmolLM2-135M-Instruct": "model", "= 1024": "= 64", "rounds = 5": "rounds = 2"}
    smaller |= {'name = "fedlease"': 'name = "fedlease"\nwarmup_rounds = 1', "[engine]": "[engine]\nthreads = 1"}
    for large, small in smaller.items():
        assert large in config
        config = config.replace(large, small)
    (folder / "run.toml").write_text(config, encoding="utf-8")
    tiny.folder(folder / "model", "llama", chat=True)
    for name in ("north", "south", "east"):
        for split, number in (("train", 6), ("test", 2)):
            rows = [
                {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "yes"}]}
                for row in sites.generation_rows("mood", number, f"{name} {split}")
            ]
            sites.write_rows(folder / "clients" / name / f"{split}.jsonl", rows)


def adapters(folder: Path) -> None:
    """Three adapters of PEFT, and the example's config for a smaller base."""
    triage(folder)
    run_line("coterie run triage.toml --out runs/made --set method.name=fedit --set run.rounds=1")
    for name in ("sst2", "trec", "run-17"):
        shutil.copytree(folder / "runs/made/experts/global", folder / "adapters" / name)
    shutil.move(folder / "clients", folder / "examples" / "clients")
    shutil.copytree(folder / "model", folder / "examples" / "model")
    text = (ROOT / "examples/smartfed.toml").read_text(encoding="utf-8")
    text = text.replace("rounds = 8", "rounds = 2").replace('path = "minilm"', 'path = "model"')
    (folder / "examples/smartfed.toml").write_text(text, encoding="utf-8")


def nothing(folder: Path) -> None:
    """The page needs no file."""


# What a page's reader has, and the page's commands that run, in their order.
PAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "docs/deploy.md": (key_of_west, ["keys init", "keys init", "keys site", "keys add", "keys add"]),
    "docs/llm.md": (chats, ["doctor", "run"]),
    "docs/run-folder.md": (trained, ["run", "run", "run"]),
    "docs/serving.md": (nothing, ["api-key", "api-key"]),
    "docs/tutorial-federation.md": (trained, ["doctor", "keys init", "predict"]),
    "examples/plugin/README.md": (nothing, ["methods"]),
    "docs/comparing.md": (triage, ["compare", "compare"]),
    "docs/methods/smartfed.md": (adapters, ["pool build", "pool show", "run"]),
}
SLOW = {"docs/comparing.md", "docs/methods/smartfed.md"}


def lines(page: str) -> list[str]:
    """The lines of the shell blocks of a page, without those that :data:`ELSEWHERE` names."""
    written = [line for block in blocks("sh") if block.page == ROOT / page for line in block.text.splitlines()]
    return [line for line in written if line.strip() and not line.startswith(tuple(ELSEWHERE))]


def run_line(line: str) -> str:
    """Run a command of Coterie's; returns its name."""
    for large, small in QUICKER.items():
        line = line.replace(large, small)
    program, *words = shlex.split(line, comments=True)
    assert program == "coterie", line
    if words[:2] == ["keys", "init"]:  # on another day, or another machine
        shutil.rmtree("keys", ignore_errors=True)
    assert app(words, standalone_mode=False) in (None, 0), line
    return " ".join(words[:2] if words[0] in ("keys", "pool") else words[:1])


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in PAGES])
def test_the_commands_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    prepare, commands = PAGES[page]
    prepare(tmp_path)
    assert [run_line(line) for line in lines(page)] == commands


def test_a_command_that_does_not_run_here_is_tested_elsewhere() -> None:
    """Every line of every page is accounted for, and no entry of the lists is left over."""
    written = {
        (str(b.page.relative_to(ROOT)), line) for b in blocks("sh") for line in b.text.splitlines() if line.strip()
    }
    others = {(page, line) for page, line in written if page not in FOLLOWED | PAGES.keys()}
    assert {(page, line) for page, line in others if not line.startswith(tuple(ELSEWHERE))} == set()
    assert {start for start in ELSEWHERE if not any(line.startswith(start) for _, line in written)} == set()
    assert {file for file in ELSEWHERE.values() if not (ROOT / file).is_file()} == set()
