"""What shows a finding is found by the finding's type: no page knows a method."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import coterie
import sites
from coterie.config.load import load_config
from coterie.experiment import run
from coterie.methods import findings
from coterie.methods.fedit import FedIT, FedITState
from coterie.methods.findings import AggregationError, Assignment, Clusters, Finding, Notes, Quotas, Values
from coterie.methods.registry import methods
from coterie.report import page, plots
from pages import Page


@dataclass(frozen=True)
class Sorted(FedIT):
    """FedIT that finds clusters: clients by the first letter of their ids."""

    name = "sorted"
    title = "Sorted"

    def describe(self, state: FedITState) -> list[Finding]:
        letters = sorted({client[0] for client in CLIENTS})
        members = {client: letters.index(client[0]) for client in CLIENTS}
        distances = [[float(members[a] != members[b]) for b in CLIENTS] for a in CLIENTS]
        return [Clusters(members, {2: 0.25, 3: 0.5}, CLIENTS, distances), Values({"letters": len(letters)})]


CLIENTS = ("mood-0", "mood-1", "place-0", "size-0", "size-1")


def test_a_new_method_that_finds_clusters_has_their_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "svg", lambda figure, name: "<svg></svg>")
    path = sites.config(tmp_path, method="fedit")
    config = load_config(path)
    monkeypatch.setattr(type(config), "make_method", lambda config, root: Sorted(FedIT.Settings(), config.plan()))
    summary = run(config, tmp_path / "out", root=tmp_path)
    assert summary.title == "Sorted"
    shown = Page(tmp_path / "out" / "report.html").text
    for expected in ("Distances between clients", "How many clusters", "letters 3", "size-0 2", "cluster"):
        assert expected in shown, expected
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["describe"]["clusters"]["place-0"] == 1


def test_every_finding_but_notes_is_shown_by_one_module() -> None:
    kinds = {kind for kind in vars(findings).values() if isinstance(kind, type) and hasattr(kind, "to_json")}
    kinds -= {Finding}
    assert len(kinds) >= 6
    assert {*page._modules()} == kinds - {Notes}  # notes stand at the top of the page


def looked_up(tree: ast.AST) -> Iterator[str]:
    """The texts that a file looks up in mappings: ``x["name"]`` and ``x.get("name")``."""
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript):
            key = node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            key = node.args[0] if node.args else None
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value


def test_no_file_looks_up_what_a_method_is_called_or_says() -> None:
    root = Path(coterie.__file__).parent
    shown = (Clusters({"a": 0}), Assignment({"m": {}}), Quotas({}, {}, {}), AggregationError(0.0))
    private = {*methods(), *(name for finding in shown for name in finding.to_json())} - {"pool"}
    assert {"fedlease", "clusters", "assignment", "quotas"} <= private
    files = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] != "methods"]
    assert len(files) > 80
    found = {path.name: private & {*looked_up(ast.parse(path.read_text(encoding="utf-8")))} for path in files}
    assert {name: names for name, names in found.items() if names} == {}
    assert [*looked_up(ast.parse('results.get("fedlease", {})["clusters"]'))] == ["clusters", "fedlease"]
