"""The report of a run and its pictures: complete, self-contained, safe with any text, and at ease with gaps."""

import math
import re
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from coterie.methods.findings import Clusters
from coterie.report import plots
from coterie.report.page import write_report
from coterie.report.tables import show, tables
from coterie.requests import ExpertUse
from coterie.types import CoterieError
from pages import Page, drawn, make_run

CLIENTS = ("north-1", "north-2", "north-10", "south-1")
GROUPS = {client: client.split("-")[0] for client in CLIENTS}
CLUSTERS = {"north-1": 0, "north-2": 0, "north-10": 0, "south-1": 1}
DISTANCES = [[0.0, 0.3, 0.31, 0.8], [0.3, 0.0, 0.29, 0.9], [0.31, 0.29, 0.0, 0.85], [0.8, 0.9, 0.85, 0.0]]
DESCRIBE = {"phase": "experts", "clusters": CLUSTERS, "order": list(CLIENTS), "distances": DISTANCES,
            "silhouettes": {"2": 0.41, "3": 0.2}, "aggregation_error": 0.125}  # fmt: skip
FOUND = Clusters(CLUSTERS, {2: 0.41, 3: 0.2}, CLIENTS, DISTANCES)
PICTURES = {"metric-by-round", "loss-by-round", "client-distances", "dendrogram", "silhouettes", "expert-usage",
            "aggregation-error"}  # fmt: skip
PNG_MAGIC = b"\x89PNG\r\n"


def scores(shift: float) -> dict:
    return {"accuracy": 0.5 + shift, "macro_f1": 0.4 + shift, "matthews": shift, "loss": 1.0 - shift}


def events(rounds: int = 3, clients: tuple[str, ...] = CLIENTS, describe: dict | None = None) -> list[dict]:
    found = []
    for rnd in range(1, rounds + 1):
        entry = {"loss": 2.0 / rnd, "seconds": 1.5, "bytes_up": 1000, "bytes_down": 3000, "tokens": 640}
        state = DESCRIBE if describe is None else describe
        found.append({"event": "round", "round": rnd, "seconds": 6.0, "failed": {}, "describe": state,
                      "clients": dict.fromkeys(clients, entry)})  # fmt: skip
        both = {"validation": scores(0.1 * rnd), "test": scores(0.09 * rnd)}
        found.append({"event": "evaluation", "round": rnd, "clients": dict.fromkeys(clients, both), "mean": both})
    return found


def summary(clients: tuple[str, ...] = CLIENTS) -> dict:
    row = {"num_train": 90, "num_validation": 10, "num_test": 50, "rounds_missed": 0,
           "labels": ["no", "yes"], "test": scores(0.27), "validation": scores(0.3), "bytes_up": 3000,
           "bytes_down": 9000, "seconds": 4.5}  # fmt: skip
    return {
        "coterie": "0.1.0", "method": "fedlease", "title": "FedLEASE", "task": "classification", "seed": 7, "rounds": 3,
        "best_round": 3, "primary": "accuracy",
        "clients": {c: {**row, "group": GROUPS.get(c, "other")} for c in clients},
        "mean": {"test": scores(0.27), "validation": scores(0.3)},
        "worst": {"client": clients[-1], "accuracy": 0.7654}, "percentiles": {"p10": 0.61, "p50": 0.772, "p90": 0.91},
        "bytes": {"up": 12000, "down": 36000}, "seconds": 75.0, "peak_memory_bytes": 3 * 2**30,
        "versions": {"torch": "2.13"}, "machine": {"cores": 2, "memory_bytes": 2**34, "gpus": []},
        "describe": DESCRIBE,
        "usage": {c: {"weight": [0.25, 0.75], "share": [0.5, 1.0]} for c in clients},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = {"root": "/somewhere", "config": {"lora": {"rank": 4, "targets": ["query", "value"]}}}
    clients = {c: {"rows": {"train": 90, "test": 50}, "files": {"a.jsonl": "ab" * 32}} for c in CLIENTS}
    manifest = {"kind": "classification", "clients": clients}
    return make_run(tmp_path / "clinic", events(), summary(), config=config, manifest=manifest)


def test_a_finished_run_is_told_in_full(run):
    page = Page(write_report(run))
    for expected in ("FedLEASE", "clinic", "4 clients, 3 rounds, classification, seed 7", "round 3, which validation",
                     "77.0%", "76.5%", "11.7 KiB", "35.2 KiB sent to clients", "1 min 15 s", "3.0 GiB", "16.0 GiB",
                     "median 77.2%", "lora.rank 4", "query, value", "90 / 10 / 50", "abababababab..."):  # fmt: skip
        assert expected in page.text, expected
    order = [page.text.index(f"{client} {GROUPS[client]}") for client in ("north-1", "north-2", "north-10", "south-1")]
    assert order == sorted(order)
    assert page.tags["svg"] == page.tags["figure"] == len(PICTURES)


def test_the_page_is_self_contained_and_well_formed(run):
    page = Page(write_report(run))  # which checks that tags balance
    assert max(page.ids.values()) == 1
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert page.loads
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in page.loads)
    assert not re.search(r"@import|url\((?!#)", page.source)
    pointed = {target[1:] for target in page.loads if target.startswith("#")}
    pointed |= set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert len(pointed) > 10
    assert pointed <= set(page.ids)
    assert "prefers-color-scheme: dark" in page.source
    for colour in (plots.INK, plots.MUTED, plots.LINE, plots.SURFACE):
        assert f": {colour}" not in page.source.split("</style>", 1)[1], "a picture must follow the page's colours"


def test_pictures_are_files_on_request_alone(run):
    write_report(run)
    assert not (run / "pictures").exists()
    write_report(run, pictures=True)
    found = {path.stem: path.read_bytes() for path in (run / "pictures").glob("*.png")}
    assert found.keys() == PICTURES
    assert all(data.startswith(PNG_MAGIC) for data in found.values())


def test_the_same_run_gives_the_same_bytes(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


HOSTILE = '<script>alert("&1")</script>'


def test_any_text_is_shown_as_it_is_and_never_runs(tmp_path):
    names = (HOSTILE, "$a_{b$", "</svg><b>", "日本")
    state = {**DESCRIBE, "clusters": dict.fromkeys(names, 0), "order": list(names), "note": HOSTILE}
    lines = events(2, names, state)
    lines[0]["failed"] = {names[0]: "</table><img src=x onerror=alert(1)>"}
    lines.append({"event": "note", "round": 2, "text": HOSTILE})
    total = {**summary(names), "describe": state, "title": HOSTILE}
    for row in total["clients"].values():
        row |= {"group": HOSTILE, "labels": [HOSTILE]}
    folder = make_run(tmp_path / "x", lines, total, manifest={HOSTILE: {"a": HOSTILE}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(write_report(folder))
    assert page.tags["script"] == page.tags["img"] == 0
    assert page.tags["b"] == page.source.count('class="tile"')
    assert page.text.count(HOSTILE) >= 6
    for name in names:
        assert name in page.text


def test_no_text_hides_or_turns_what_is_around_it(tmp_path):
    """A folder of an older version may hold names that are refused today."""
    lines = events(2)
    lines[0]["failed"] = {"south-1": "\x1b[2Jits loss is \u202enan"}
    lines.append({"event": "note", "round": 2, "text": "all \x1b[8mgone"})
    source = Page(write_report(make_run(tmp_path / "x", lines, None, manifest={"\u202eb": {"a": "\x1b]0;x"}}))).source
    assert "\x1b" not in source
    assert "\u202e" not in source
    assert "its loss is \\u202enan" in source


def test_a_run_without_a_summary_says_so_and_shows_what_there_is(tmp_path):
    lines = events(2)
    lines[2]["failed"] = {"south-1": "its loss is nan"}
    folder = make_run(tmp_path / "half", lines)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "rou')
    page = Page(write_report(folder))
    for expected in ("has not finished", "round 2, the last one evaluated", "last line of metrics.jsonl is incomplete",
                     "1 reply did not count", "its loss is nan", "68.0%", "7.8 KiB", "3 of 4", "12 s"):  # fmt: skip
        assert expected in page.text, expected
    assert page.tags["svg"] == len(PICTURES) - 1, "all but the usage, which only a summary has"


def test_a_round_that_was_done_again_after_a_crash_counts_once(tmp_path):
    page = Page(write_report(make_run(tmp_path / "again", [*events(1), *events(2)])))
    assert "4 clients, 2 rounds" in page.text
    assert "7.8 KiB" in page.text  # 4 clients x 2 rounds x 1000 bytes


@pytest.mark.parametrize("files", [{"config": {"config": {"lora": {"rank": 4}}}}, {"manifest": {"kind": "x"}}])
def test_a_run_that_has_just_begun_has_a_report(tmp_path, files):
    page = Page(write_report(make_run(tmp_path / "new", [], **files)))
    assert "0 clients, 0 rounds" in page.text
    assert "has not finished" in page.text
    assert page.tags["svg"] == 0


def test_optional_parts_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "svg", lambda figure, name: "<svg></svg>")  # drawing them is what takes long
    whole, lines = summary(), events()
    optional = [key for key in whole if key not in ("clients", "primary")]
    for key in optional:
        less = {k: v for k, v in whole.items() if k != key}
        assert Page(write_report(make_run(tmp_path / key, lines, less))).tags["svg"] >= 4
    untuned = {**whole, "mean": {"test": scores(0.2)}}
    assert "round 3, the last one." in Page(write_report(make_run(tmp_path / "untuned", [], untuned))).text
    bare = {"clients": {"a": {}}, "primary": "accuracy"}
    assert "a 0 / 0 / 0 0 B 0 B 0 GFLOP 0.0 s" in Page(write_report(make_run(tmp_path / "bare", [], bare))).text
    emptied = {**whole, "worst": {}, "percentiles": {}, "usage": {}, "describe": {}, "machine": None}
    page = Page(write_report(make_run(tmp_path / "emptied", [], emptied)))
    assert "worst client" not in page.text
    assert page.tags["svg"] == 0


def test_energy_and_operations_of_active_experts_are_shown_where_they_are_known(tmp_path):
    bare = {"clients": {"a": {"gflop": 2.0, "gflop_active": 2.0}, "b": {"gflop": 3.0}}, "primary": "accuracy"}
    text = Page(write_report(make_run(tmp_path / "bare", [], bare))).text
    assert "energy" not in text
    assert "active experts" not in text
    rich = {"clients": {"a": {"gflop": 2.0, "gflop_active": 1.5, "joules": 1500.0, "joules_from": "estimate"},
                        "b": {"gflop": 3.0, "gflop_active": 3.0}},
            "joules": 1500.0, "joules_from": "estimate", "primary": "accuracy"}  # fmt: skip
    text = Page(write_report(make_run(tmp_path / "rich", [], rich))).text
    assert "energy 1.5 kJ training, estimate" in text
    assert "a 0 / 0 / 0 0 B 0 B 2 GFLOP 1.5 GFLOP 1.5 kJ estimate 0.0 s" in text
    assert "b 0 / 0 / 0 0 B 0 B 3 GFLOP 3 GFLOP - 0.0 s" in text


def test_nan_and_null_are_shown_as_a_dash(tmp_path):
    total, lines = summary(), events()
    total["mean"]["test"]["accuracy"] = math.nan
    total["clients"]["north-1"]["test"] = {"accuracy": math.nan, "macro_f1": None, "matthews": math.inf}
    total["describe"] = {**DESCRIBE, "distances": [[math.nan] * 4] * 4, "silhouettes": {"2": math.nan, "3": None}}
    lines[0]["clients"]["north-1"]["loss"] = math.nan
    lines[1]["mean"]["test"]["accuracy"] = math.nan
    page = Page(write_report(make_run(tmp_path / "gaps", lines, total)))
    assert not re.search(r"\bnan\b|None", page.text, re.IGNORECASE)
    assert "test accuracy - mean" in page.text
    assert "north-1 north 0 - - inf -" in page.text


def test_generation_is_reported_by_its_loss(tmp_path):
    lines, total = events(), summary()
    measured = {"loss": 0.7512, "perplexity": 2.1234, "rouge_l": 0.333, "exact_match": 0.05}
    for event in lines[1::2]:
        event["mean"] = {"validation": measured, "test": measured}
        event["clients"] = dict.fromkeys(CLIENTS, event["mean"])
    total |= {"primary": "loss", "task": "generation", "mean": {"validation": measured, "test": measured}}
    total |= {"worst": {"client": "south-1", "loss": 0.9}, "percentiles": {"p10": 0.5, "p90": 0.9}}
    for row in total["clients"].values():
        row |= {"labels": None, "test": measured, "validation": measured}
    page = Page(write_report(make_run(tmp_path / "text", lines, total)))
    for expected in ("Loss by round", "test loss 0.751", "perplexity 2.123", "ROUGE-L 33.3%", "exact match 5.0%"):
        assert expected in page.text, expected
    assert "accuracy" not in page.text


def test_what_a_later_method_says_of_its_state_becomes_tables(tmp_path):
    state = {
        "temperature": 0.25,
        "assignment": {"north-1": {"query": 3, "value": 4}, "south-1": {"query": 5, "value": 6}},
        "quota": [[7, 8], [9, 10]],
        "budget": {"total": 64, "floor": {"query": 2}},
    }
    page = Page(write_report(make_run(tmp_path / "later", events(1, describe=state))))
    for expected in ("temperature 0.25", "Assignment query value north-1 3 4 south-1 5 6", "budget: total 64",
                     "budget: floor.query 2", "0 7 8 1 9 10"):  # fmt: skip
        assert expected.lower() in page.text.lower(), expected


def test_a_folder_that_is_no_run_or_is_damaged_is_an_error_that_says_where(tmp_path):
    with pytest.raises(CoterieError, match=r"nothing holds no run"):
        write_report(tmp_path / "nothing")
    folder = make_run(tmp_path / "torn", events(1), summary())
    (folder / "summary.json").write_text('{"title": ')
    with pytest.raises(CoterieError, match=r"summary\.json is damaged"):
        write_report(folder)
    (folder / "summary.json").write_text("[1, 2]")
    with pytest.raises(CoterieError, match=r"summary\.json is not a summary"):
        write_report(folder)
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text('{"event": "round", "round": 1}\nnonsense\n{"event": "note", "text": "x"}\n')
    with pytest.raises(CoterieError, match=r"metrics\.jsonl, line 2 is not JSON"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (0.87349, "accuracy", "87.3%"),
        (-0.1, "matthews", "-0.100"),
        (1.23456, "loss", "1.235"),
        (0.002, "learning_rate", "0.002"),
        (12345, "tokens", "12,345"),
        (999, "bytes_up", "999 B"),
        (1536, "bytes_up", "1.5 KiB"),
        (300 * 2**20, "memory_bytes", "300 MiB"),
        (5 * 2**40, "bytes", "5120 GiB"),
        (3.21, "seconds", "3.2 s"),
        (59.9, "seconds", "60 s"),
        (125, "seconds", "2 min 05 s"),
        (3725, "seconds", "1 h 02 min"),
        (math.nan, "accuracy", "-"),
        (math.nan, "", "-"),
        (None, "loss", "-"),
        (math.inf, "perplexity", "inf"),
        (True, "", "yes"),
        ([], "", "-"),
        (["a", 1, None], "", "a, 1, -"),
        (list(range(30)), "", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... (30)"),
        ({"neg": 4, "pos": 5}, "", "neg 4, pos 5"),
    ],
)
def test_values_are_shown_with_their_unit(value, name, text):
    assert show(value, name) == text


def test_json_becomes_tables():
    plain, found = tables({"a": 1, "b": {"c": [1, 2]}, "rows": [{"x": 1}, {"x": 2, "y": 3}], "none": {}}, "All")
    assert (plain.title, plain.rows) == ("All", [("a", 1), ("b.c", [1, 2]), ("none", {})])
    assert (found.title, found.head, found.rows) == ("rows", ["", "x", "y"], [["0", 1, None], ["1", 2, 3]])
    (spread,) = tables({"c": {"p": {"n": {"u": 1, "v": 2}, "m": {"u": 3}}, "q": {"n": {"u": 4, "v": 5}, "m": {}}}}, "")
    assert spread.head == ["", "n.u", "n.v", "m"]
    assert spread.rows == [["p", 1, 2, {"u": 3}], ["q", 4, 5, {}]]
    assert tables({}, "Nothing") == []


# ---- pictures


def texts(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_distances_are_sorted_and_framed_by_cluster():
    order = ["south-1", "north-10", "north-1", "north-2"]
    shuffled = [CLIENTS.index(client) for client in order]
    distances = np.array(DISTANCES)[np.ix_(shuffled, shuffled)].tolist()
    figure = plots.client_distances(Clusters(CLUSTERS, {}, order, distances), GROUPS)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["north-10", "north-1", "north-2", "south-1"]
    assert texts(figure) == ["cluster 0", "cluster 1"]
    frames = [patch.get_bbox().bounds for patch in ax.patches]
    assert frames == [(0, 0, 3, 3), (3, 3, 1, 1)]
    cells = ax.collections[0].get_array()
    assert np.ma.getmaskarray(cells).diagonal().all()
    assert cells[0, 1] == 0.31  # north-10 and north-1
    assert cells[3, 2] == 0.9  # south-1 and north-2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["north", "south"]
    assert drawn(figure).std() > 0


@pytest.mark.parametrize("count", [2, 41, 60])
def test_distances_of_any_number_of_clients(count):
    order = [f"c{i}" for i in range(count)]
    distances = np.ones((count, count)).tolist()
    drawn(plots.client_distances(Clusters({}, {}, order, distances)))
    drawn(plots.client_distances(Clusters(dict.fromkeys(order, 0), {}, order, distances), {c: c for c in order}))


def test_curves_are_named_at_their_ends_without_touching():
    curves = {"FedLEASE": [(1, 0.5), (2, 0.81)], "FedIT": [(2, 0.80), (1, 0.4)], "Local": [(1, 0.6), (2, math.nan)]}
    figure = plots.lines_by_round(curves, {"c": [(1, 0.3), (2, None)]}, mark=2)
    drawn(figure)
    ax = figure.axes[0]
    assert texts(figure) == ["best: 2", *curves]
    ends = sorted(text.xy[1] for text in ax.texts[1:])
    low, high = ax.get_ylim()
    assert all(above - below >= 0.069 * (high - low) for below, above in pairwise(ends))
    lines = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in ax.lines}
    assert (0.4, 0.8) in lines.values(), "points are sorted by round"
    assert (1,) in lines, "a value that is no number is left out"


def test_many_curves_have_a_legend_and_looks_of_their_own():
    curves = {f"method {i}": [(1, 0.1 * i)] for i in range(9)}
    figure = plots.lines_by_round(curves, percent=False)
    drawn(figure)
    assert len(figure.axes[0].get_legend().get_texts()) == 9
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 9
    drawn(plots.lines_by_round({}))


def test_usage_shows_every_expert_of_every_client():
    usage = {"b": ExpertUse([0.1, 0.9], [0.2, 1.0]), "a": ExpertUse([1.0], [1.0]), "c": ExpertUse([], [])}
    figure = plots.expert_usage(usage, {"b": 1, "a": 0})
    drawn(figure)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["mean gate weight", "share of tokens"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00", "0.10", "0.90"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["c", "a", "b"]
    assert [patch.get_bbox().bounds for patch in figure.axes[0].patches] == [(0, 1, 1, 1), (1, 2, 1, 1)]
    drawn(plots.expert_usage({f"c{i}": ExpertUse([0.01] * 30, []) for i in range(50)}))


def test_silhouettes_mark_the_chosen_number():
    figure = plots.silhouettes(Clusters({"a": 0, "b": 1, "c": 2}, {2: 0.1, 10: math.nan, 3: -0.2}))
    drawn(figure)
    assert texts(figure) == ["0.100", "-0.200", "-"]
    colours = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert colours[1] != colours[0] == colours[2]


def test_a_dendrogram_is_cut_where_the_clusters_are():
    figure = plots.dendrogram(FOUND, {"north-1": "north"})
    drawn(figure)
    ax = figure.axes[0]
    merged = sorted(max(line.get_xdata()) for line in ax.lines[:-1])
    (cut,) = set(ax.lines[-1].get_xdata())
    assert len(merged) == len(CLIENTS) - 1
    assert sum(height > cut for height in merged) == FOUND.number - 1
    assert cut not in merged, "between two merges"
    assert {label.get_text() for label in ax.get_yticklabels()} == {"north-1  (north)", *CLIENTS} - {"north-1"}
    assert len(plots.dendrogram(Clusters({"a": 0, "b": 0}, {}, ["a", "b"], [[0, 1], [1, 0]])).axes[0].lines) == 1


def test_the_demo_picture_is_one_png_with_two_panels(tmp_path):
    path = tmp_path / "made" / "demo.png"
    curves = {"FedLEASE": [(1, 0.5), (2, 0.8)], "FedIT": [(1, 0.4), (2, 0.6)]}
    plots.demo_picture(path, FOUND, GROUPS, curves)
    first = path.read_bytes()
    assert first.startswith(PNG_MAGIC)
    plots.demo_picture(path, FOUND, {}, curves)
    assert path.read_bytes() != first


def test_an_svg_keeps_its_ids_to_itself_and_its_text_as_text():
    figure = plots.client_distances(FOUND, GROUPS)
    one, two = plots.svg(figure, "first picture"), plots.svg(figure, "second")
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in (one, two)]
    assert len(ids[0]) > 10
    assert not ids[0] & ids[1]
    assert 'aria-label="first picture"' in one
    assert ">north-10</text>" in one
    assert "DejaVu" not in one


def test_client_names_sort_as_people_count():
    names = ["c10", "c2", "10", "9", "a", "c2b"]
    assert sorted(names, key=plots.natural) == ["9", "10", "a", "c2", "c2b", "c10"]
