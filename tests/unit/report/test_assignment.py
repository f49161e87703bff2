"""Who holds which expert: a made-up run in its report, and its pictures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from assigned_run import CLIENTS, POOL, assignment, events, made, summary_of, total, usage
from coterie.report import plots
from coterie.report.page import write_report
from coterie.report.plots import Panel
from coterie.types import ClientInfo
from pages import Page, drawn, make_run


def test_the_summary_keeps_usage_by_module_only_where_experts_differ() -> None:
    lines = events()
    assert total(lines)["usage"] == usage()
    assert total(lines)["describe"] == {"assignment": assignment(3), "pool": POOL, "aggregation_error": None}
    alike = {"a": {"m": {"weight": [0.2, 0.8], "share": [0.5, 1.0], "expert": [0, 1]},
                   "n": {"weight": [0.4, 0.6], "share": [0.7, 0.2], "expert": [0, 1]}}}  # fmt: skip
    infos = [ClientInfo("a", num_train=9)]
    for row in (alike, {"a": {m: {k: v for k, v in use.items() if k != "expert"} for m, use in alike["a"].items()}}):
        lines[-1]["usage"] = {**row, "b": {}}
        found = summary_of(lines, infos)["usage"]
        assert found == {"a": {"weight": pytest.approx([0.3, 0.7]), "share": pytest.approx([0.6, 0.6])}}


# ---- the report

ALWAYS = {"metric-by-round", "loss-by-round", "expert-assignment", "experts-held", "experts-together"}


def pictures(run: Path) -> set[str]:
    return {path.stem for path in (run / "pictures").glob("*.png")}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn: that takes long."""
    monkeypatch.setattr(plots, "svg", lambda figure, name: "<svg></svg>")
    monkeypatch.setattr(plots, "png", lambda figure, path: (path.parent.mkdir(exist_ok=True), path.touch()))


def test_a_finished_run_shows_its_assignment(tmp_path: Path) -> None:
    run = made(tmp_path / "done", events(), total(events()))
    page = Page(write_report(run, pictures=True))
    assert pictures(run) == ALWAYS | {"expert-usage", "assignment-changes", "assignment-agreement"}
    assert page.tags["svg"] == 8
    for expected in ("mode dynamic", "experts in a module's pool 7", "per module mean 2.0, 2 to 2",
                     "in total mean 12.0, 12 to 12",
                     "0 of 72 pairs of expert and client (0%), in round 4", "100.0% of pairs", "40.0% of all pairs",
                     "3 of 6 modules.", "held in round 4", "0.query", "10.value",
                     "Frames: the group", "The shared expert, which every token uses"):  # fmt: skip
        assert expected in page.text, expected
    assert "State after the last round" not in page.text
    assert "clients_per_expert" not in page.text
    assert len(re.findall(r'class="card wide"', page.source)) >= 1


@pytest.mark.usefixtures("quick")
def test_a_run_under_way_shows_what_the_next_round_holds(tmp_path: Path) -> None:
    run = made(tmp_path / "half", events(2))
    page = Page(write_report(run, pictures=True))
    assert pictures(run) == ALWAYS | {"assignment-changes", "assignment-agreement"}
    assert "held in round 3" in page.text
    assert "100.0% of pairs" in page.text, "the groups are in the manifest"
    begun = made(tmp_path / "begun", events(0))
    assert "held in round 1" in Page(write_report(begun, pictures=True)).text
    assert pictures(begun) == ALWAYS - {"metric-by-round", "loss-by-round"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("group", [lambda c: None, lambda c: "all", lambda c: c], ids=["none", "one", "each its own"])
def test_without_groups_to_tell_apart_there_is_no_agreement(tmp_path: Path, group) -> None:
    summary = total(events())
    for client, row in summary["clients"].items():
        row["group"] = group(client)
    run = made(tmp_path / "run", events(), summary, grouped=False)
    page = Page(write_report(run, pictures=True))
    assert pictures(run) == ALWAYS | {"expert-usage", "assignment-changes"}
    assert "Frames: the group" not in page.text
    assert "agreement with the groups" not in page.text


@pytest.mark.usefixtures("quick")
def test_an_assignment_that_stays_has_no_picture_of_changes(tmp_path: Path) -> None:
    lines = events()
    for line in lines[1:]:
        line.pop("describe", None)
    run = made(tmp_path / "static", lines)
    page = Page(write_report(run, pictures=True))
    assert pictures(run) == ALWAYS | {"assignment-agreement"}
    assert "0 of 72 pairs" in page.text
    assert "Grey: held before" not in page.text


@pytest.mark.usefixtures("quick")
def test_a_summary_alone_and_usage_without_numbers_or_assignment_have_pictures(tmp_path: Path) -> None:
    alone = Page(write_report(make_run(tmp_path / "alone", [], total(events()))))
    assert "held in round 4" in alone.text
    summary = {**total(events()), "usage": usage(numbered=False), "describe": {}}
    other = Page(write_report(make_run(tmp_path / "other", [], summary)))
    assert "Which client uses which expert" in other.text
    assert "Who holds which expert" not in other.text
    assert "shared expert" not in other.text
    lines = [*events()[:-1], {**events()[-1], "usage": usage()}]
    unsaid = {**total(events()), "describe": {}, "usage": {client: {} for client in CLIENTS}}
    for name, summary in (("killed", None), ("unsaid", unsaid)):
        page = Page(write_report(made(tmp_path / name, lines, summary)))
        assert "Which client uses which expert" in page.text
        assert "mode dynamic" in page.text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("held", [{"m": {"a": []}}, {"m": {}}])
def test_an_assignment_of_nothing_is_no_picture(tmp_path: Path, held: dict) -> None:
    start = {"event": "start_state", "round": 0, "describe": {"assignment": held, "pool": {"experts": 0}}}
    run = made(tmp_path / "empty", [start])
    assert "Who holds which expert" not in Page(write_report(run)).text


# ---- pictures


def cells(ax) -> np.ma.MaskedArray:
    return ax.images[-1].get_array()


def test_assigned_experts_have_a_panel_per_module_with_the_rounds_held() -> None:
    values = np.array([[3.0, np.nan], [np.nan, 1.0]])
    panel = Panel([5, 2], values, np.array([[True, True], [False, True]]))
    figure = plots.assigned_experts({"0.query": panel, "9.value": panel}, ["a", "b"], ["x", None])
    drawn(figure)
    left, right = figure.axes
    assert [ax.get_title(loc="left") for ax in (left, right)] == ["0.query", "9.value"]
    assert [text.get_text() for text in left.texts] == ["3", "1"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["5", "2"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b"]
    np.testing.assert_array_equal(np.ma.getmaskarray(cells(left)), [[False, True], [True, False]])
    np.testing.assert_array_equal(left.images[0].get_array().mask, [[True, False], [True, True]])  # lost: a, expert 2


def test_groups_are_named_where_they_part_more_than_one_client_each() -> None:
    panel = {"m": Panel([0], np.ones((3, 1)))}
    named = plots.assigned_experts(panel, ["a", "b", "c"], ["x", "x", "y"])
    assert [text.get_text() for text in named.axes[0].texts] == ["1", "1", "1", "x", "y"]
    for groups in (["x"] * 3, [None] * 3, ["x", "y", "z"]):
        figure = plots.assigned_experts(panel, ["a", "b", "c"], groups)
        assert [text.get_text() for text in figure.axes[0].texts] == ["1", "1", "1"]


def test_used_experts_are_empty_where_none_is_held() -> None:
    weight, share = (Panel([0, 1], np.array([[0.25, np.nan], [0.0, 1.0]]) * scale) for scale in (1, 1 / 2))
    measures = {"gate weight": {"0.q": weight, "1.q": weight}, "share": {"0.q": share, "1.q": share}}
    figure = plots.used_experts(measures, ["a", "b"], [None, None])
    drawn(figure)
    titles = ["0.q: gate weight", "1.q: gate weight", "0.q: share", "1.q: share"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == titles
    assert [text.get_text() for text in figure.axes[0].texts] == [".25", ".00", "1.0"]
    assert [text.get_text() for text in figure.axes[2].texts] == [".12", ".00", ".50"]
    alone = plots.used_experts({m: {"0.q": row["0.q"]} for m, row in measures.items()}, ["a", "b"], [None, None])
    assert len({round(ax.get_position().y0, 6) for ax in alone.axes}) == 1, "one module: the measures side by side"


def test_how_many_experts_are_held_is_in_the_cells_and_from_to_beside_them() -> None:
    figure = plots.held_experts(np.array([[2, 5], [4, 4]]), ["0.q", "0.v"], ["a", "b"], [None, None])
    drawn(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["2", "5", "4", "4", "2 to 5", "4 to 4"]
    assert figure.axes[0].child_axes[0].get_xlabel() == "experts held: 2 to 5, mean 3.8"
    same = plots.held_experts(np.array([[3]]), ["0.q"], ["a"], [None])
    drawn(same)
    assert (same.axes[0].get_xlabel(), same.axes[0].child_axes) == ("experts held: 3 to 3, mean 3.0", [])


def test_sharing_is_framed_by_group_without_the_diagonal() -> None:
    shares = np.array([[1, 0.5, 0.1], [0.5, 1, 0.2], [0.1, 0.2, 1]])
    figure = plots.held_together(shares, ["a", "b", "c"], ["x", "x", "y"])
    drawn(figure)
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.texts] == ["50", "10", "50", "20", "10", "20", "x", "y"]
    assert [patch.get_bbox().bounds for patch in ax.patches] == [(0, 0, 2, 2), (2, 2, 1, 1)]
    assert shares[0, 0] == 1, "what was given stays as it was"


@pytest.mark.parametrize(("clients", "experts", "modules"), [(2, 2, 1), (41, 30, 60), (120, 300, 2)])
def test_any_size_can_be_drawn_without_a_warning(clients: int, experts: int, modules: int) -> None:
    rng = np.random.default_rng(0)
    held = rng.random((clients, experts)) < 0.1
    names, groups = [f"client-{c}" for c in range(clients)], [f"g{c * 5 // clients}" for c in range(clients)]
    panel = Panel(list(range(experts)), np.where(held, 1.0, np.nan), np.ones_like(held))
    figures = [
        plots.assigned_experts({"first": panel, "last": panel}, names, groups),
        plots.used_experts({"weight": {"a": panel, "b": panel}, "share": {"a": panel, "b": panel}}, names, groups),
        plots.held_experts(rng.integers(0, 9, (clients, modules)), [f"{m}.q" for m in range(modules)], names, groups),
        plots.held_together(rng.random((clients, clients)), names, groups),
    ]
    for figure in figures:
        assert drawn(figure).std() > 0
        assert figure.get_figwidth() < 11


def test_a_curve_can_be_compared_with_a_level() -> None:
    figure = plots.lines_by_round({"same": [(1, 0.2), (3, 0.6)]}, level=("chance", 0.4))
    drawn(figure)
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in dashed] == [([1, 3], [0.4, 0.4])]
    assert [text.get_text() for text in figure.axes[0].texts] == ["same", "chance"]
