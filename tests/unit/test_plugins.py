"""Installed packages add methods, gates and sources: the example package as pip installs it, and made-up ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import coterie
import packages
import sites
import tiny
from coterie.config.load import load_config
from coterie.data import sources
from coterie.data.settings import Columns
from coterie.methods.registry import method_named, methods
from coterie.nn.attach import attached
from coterie.nn.gates import gate_named
from coterie.types import CoterieError

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    torch.set_num_threads(1)
    packages.forget()
    yield tmp_path
    packages.forget()


def test_the_example_package_runs_as_pip_installs_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EXAMPLE, folder / "source")  # pip builds in the source's folder
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "source")], check=True, capture_output=True)
    assert "trimmed" not in methods()
    packages.forget()
    monkeypatch.syspath_prepend(str(folder / "site"))
    assert issubclass(method_named("trimmed"), coterie.Method)
    assert "trimmed" in methods()

    path = sites.config(folder / "run", method="trimmed")
    config = load_config(path, ["method.trim=0.3", "run.rounds=2"])
    assert config.method == {"name": "trimmed", "trim": 0.3}
    summary = coterie.run(config, folder / "out", root=path.parent)
    assert summary.rounds == 2
    assert (folder / "out" / "experts" / "global" / "adapter_config.json").is_file()
    events = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [event["failed"] for event in events if event["event"] == "round"] == [{}, {}]
    with pytest.raises(CoterieError, match="trim"):
        load_config(path, ["method.trim=0.7"])


GATE = '''
import torch

def cold(p, z):
    """Half of everything."""
    return torch.full_like(p, 0.5)

def other(p, z): ...
'''


def test_an_installed_package_adds_a_gate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"coterie.gates: cold": "cold_gates:cold", "coterie.gates: wrong": "cold_gates:other"}
    packages.install(folder, monkeypatch, "coterie-cold", points, cold_gates=GATE)
    made = tiny.model("bert")
    bank = tiny.bank(tiny.targets(made), experts=2, gate="cold", slots=2)
    with attached(made, bank) as handle:
        handle.now.usage = {}
        made(**tiny.batch())
    assert all(torch.equal(weights[0], torch.full((2,), 0.5 * 21)) for weights in handle.now.usage.values())
    with pytest.raises(CoterieError, match=r"the gate 'wrong' must be a function wrong\(p, z\)"):
        gate_named("wrong")
    with pytest.raises(CoterieError, match=r"unknown gate 'none'; the gates are .*softmax.*, cold, wrong"):
        gate_named("none")


SOURCE = """
from coterie.data.files import table_of
from coterie.data.sources import Dataset

PREFIX = "letters"
USAGE = "letters:WORD: a row for every letter"

def load(rest, root, columns):
    return (Dataset(rest, {"train": table_of(rest, [{columns.text: c, columns.label: c} for c in rest])}),)
"""


def test_an_installed_package_adds_a_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"coterie.sources: letters": "letters_source"}
    packages.install(folder, monkeypatch, "coterie-letters", points, letters_source=SOURCE)
    (dataset,) = sources.load("letters:abc", folder, Columns())
    assert [record["text"] for record in dataset.tables["train"].records] == ["a", "b", "c"]
    with pytest.raises(CoterieError, match="letters:WORD: a row for every letter"):
        sources.load("lettres:abc", folder, Columns())


FAULTY = {
    "no load": ('PREFIX, USAGE = "letters", ""', "the source 'letters' lacks load"),
    "another prefix": (SOURCE.replace('"letters"', '"other"', 1), "the source 'letters' has PREFIX = 'other'"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_faulty_source_says_what_it_lacks(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, reason = FAULTY[case]
    points = {"coterie.sources: letters": "letters_source"}
    packages.install(folder, monkeypatch, "coterie-letters", points, letters_source=text)
    with pytest.raises(CoterieError, match=reason):
        sources.load("letters:abc", folder, Columns())
