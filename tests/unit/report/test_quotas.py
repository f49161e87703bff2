"""What a report shows of a pool of adapters: quotas by layer and matrix, importance and use, by round and by client."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.methods.findings import Adapter
from coterie.report import plots
from coterie.report.page import write_report
from coterie.report.quotas import adapter_use
from coterie.requests import ExpertUse
from coterie.types import SHARED
from pages import Page, drawn, make_run

MODULES = [
    f"bert.encoder.layer.{layer}.{rest}" for layer in (0, 1) for rest in ("attention.self.query", "output.dense")
]
ADAPTERS = {"sst2": [0, 3], "trec": [3, 2]}
START = {
    "pool": "ab" * 32,
    "adapters": ADAPTERS,
    "sizes": dict.fromkeys(MODULES, 5),
    "quotas": dict.fromkeys(MODULES, 2),
    "importance": {},
    "use": {},
    "dropped": [],
}
PICTURES = {"quotas", "importance", "adapter-use", "adapter-use-by-round"}


def a_run(folder: Path, start: dict = START) -> Path:
    events: list[dict] = [{"event": "start_state", "round": 0, "describe": start}]
    for rnd in (1, 2, 3):
        quotas = {m: 1 + (i + rnd) % 4 for i, m in enumerate(MODULES)}
        told = {
            "quotas": quotas,
            "importance": dict.fromkeys(MODULES, 0.1 * rnd),
            "use": {"sst2": 1 - 0.1 * rnd, "trec": 0.1 * rnd},
        }
        clients = {c: {"loss": 1.0, "seconds": 1.0, "bytes_up": 1, "bytes_down": 1} for c in ("a", "b")}
        events.append(
            {"event": "round", "round": rnd, "describe": told, "clients": clients, "failed": {}, "seconds": 1}
        )
    row = {"weight": [1.0, 1.0, 1.0, 0.0, 0.5, 0.5], "share": [1.0] * 6, "expert": [SHARED, 0, 1, 2, 3, 4]}
    usage = {c: dict.fromkeys(MODULES, row) for c in ("a", "b")}
    ends = {"describe": {**start, **events[-1]["describe"]}, "usage": usage, "clients": {"a": {}, "b": {}}}
    return make_run(folder, events, ends)


def test_the_pictures_are_there_and_the_tables_do_not_repeat_them(tmp_path: Path) -> None:
    page = Page(write_report(a_run(tmp_path), pictures=True))
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} >= PICTURES
    for text in ("1/5", "query", "dense", "sst2", "trec", "Where the active experts go"):
        assert text in page.text
    assert "abababab" in page.text  # the pool's name is told beside the pictures; the quotas are not told twice
    assert MODULES[0] not in page.text


def test_clients_with_a_budget_of_their_own_are_listed(tmp_path: Path) -> None:
    assert "Budgets of clients" not in Page(write_report(a_run(tmp_path / "none"))).text
    page = Page(write_report(a_run(tmp_path / "some", {**START, "budgets": {"b": 1}})))
    assert "client active experts per matrix the run's b 1 2.5" in page.text


def test_its_pictures_draw_without_a_warning() -> None:
    places = {(str(layer), matrix): layer + 1 for layer in range(12) for matrix in ("query", "value")}
    assert drawn(plots.quota_map(places, dict.fromkeys(places, 16))).any()
    assert drawn(plots.quota_map({("-", "q"): 2}, {("-", "q"): 2})).any()
    assert drawn(plots.adapter_use({"a": {"x": 0.25}, "b": {}}, ["x", "y"])).any()


def test_use_is_the_share_of_the_routed_weight() -> None:
    adapters = {name: Adapter(*of) for name, of in ADAPTERS.items()}
    use = ExpertUse([1.0, 1.0, 1.0, 0.0, 0.5, 0.5], [], [SHARED, 0, 1, 2, 3, 4])
    assert adapter_use({"q": use, "v": ExpertUse([1.0], [], [3])}, adapters) == pytest.approx(
        {"sst2": 0.5, "trec": 0.5}
    )
    assert adapter_use({}, adapters) == {}
