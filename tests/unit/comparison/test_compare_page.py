"""The page, the tables and the pictures of a comparison."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coterie.cli.main import app
from coterie.comparison.figures import record_of
from coterie.comparison.jobs import Missing
from coterie.comparison.page import comparison_pictures, write_page
from coterie.comparison.record import Record, write_record
from coterie.comparison.tables import brief, by_client, latex, leader, markdown, notes, overview, signed
from coterie.comparison.tuning import Choice
from coterie.report import plots
from coterie.types import CoterieError
from pages import Page, drawn
from summaries import compared, of_clients

PICTURES = ["compare-by-round", "compare-by-bytes", "compare-gains", "compare-wins"]


def study(folder: Path, names: tuple[str, ...] = ("fedit", "local", "ifca:clusters=2")) -> Record:
    """A comparison of two seeds whose runs have three rounds, written in ``folder``."""
    results = {}
    for i, name in enumerate(names):
        results[name] = {
            seed: replace(of_clients([0.2 + 0.1 * i, 0.5 + 0.01 * seed, 0.8], 0.5 + 0.1 * i), rounds=3, best_round=2)
            for seed in (0, 1)
        }
        for seed in (0, 1):
            events: list[dict[str, Any]] = []
            for rnd in (1, 2, 3):
                sent = {"bytes_up": 1000 * (i + 1), "bytes_down": 0, "seconds": 1.0}
                events.append({"event": "round", "round": rnd, "clients": {"c0": sent}})
                mean = {split: {"accuracy": 0.1 * rnd + 0.1 * i + 0.02 * seed} for split in ("test", "validation")}
                events.append({"event": "evaluation", "round": rnd, "mean": mean})
            (folder / f"{name}-{seed}").mkdir(parents=True)
            text = "".join(json.dumps(event) + "\n" for event in events)
            (folder / f"{name}-{seed}" / "metrics.jsonl").write_text(text)
    choice = Choice(("train.learning_rate=2e-3",), 9, {"train.learning_rate=2e-3": 0.5}, ("train.learning_rate",))
    lost = [Missing("smartfed", 0, (), "failed", "it <needs> a pool & more")]
    made = record_of(compared(results, folder, choices={"fedit": choice}, missing=lost))
    write_record(folder / "compare.json", made)
    return made


def test_the_page_holds_the_tables_the_pictures_and_what_is_missing(tmp_path: Path) -> None:
    record = study(tmp_path)
    assert write_page(tmp_path) == tmp_path / "compare.html"
    page = Page(tmp_path / "compare.html")
    assert [link for link in page.loads if not link.startswith("#") and not link.endswith("/report.html")] == []
    assert page.tags["svg"] == len(PICTURES)
    assert max(page.ids.values()) == 1
    text = " ".join(" ".join(page.texts).split())
    for row in record.variants.values():
        assert row.title in text
    assert "IFCA, clusters 2 has the best validation mean." in text
    lost = "No result of smartfed, seed 0 (failed): it <needs> a pool & more"
    assert text.count(lost) == 1
    for table in ("compare.md", "compare.tex"):
        assert lost in (tmp_path / table).read_text()
    assert "train.learning_rate is at the edge of what was tried" in text
    assert "Tuning: validation accuracy" in text
    assert 'href="ifca%3Aclusters%3D2-0/report.html"' in page.source
    write_page(tmp_path)
    assert (tmp_path / "compare.html").read_text() == page.source
    write_page(tmp_path, with_pictures=True)
    assert sorted(p.stem for p in (tmp_path / "pictures").iterdir()) == sorted(PICTURES)


def test_coterie_report_makes_the_page_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path)
    app(["report", str(tmp_path)], standalone_mode=False)
    assert capsys.readouterr().out == f"page: {tmp_path / 'compare.html'}\n"
    assert (tmp_path / "compare.tex").exists()
    with pytest.raises(CoterieError, match=r"holds no compare.json of this version"):
        write_page(tmp_path / "none")


def test_pictures_of_few_and_of_many_methods(tmp_path: Path) -> None:
    many = study(tmp_path, ("fedit", *(f"fedprox:strength=0.{i}" for i in range(1, 9))))
    pictures = {picture.name: picture for picture in comparison_pictures(many, tmp_path)}
    assert list(pictures) == ["compare-by-round", "compare-by-bytes", "compare-wins"]  # no local to gain over
    for picture in pictures.values():
        assert drawn(picture.figure).std() > 0
    alone = study(tmp_path / "alone", ("fedit",))
    assert [p.name for p in comparison_pictures(alone, tmp_path / "alone")] == ["compare-by-round", "compare-by-bytes"]
    assert list(comparison_pictures(alone, tmp_path / "elsewhere")) == []


def test_gains_and_losses_by_client(tmp_path: Path) -> None:
    """Of the clients, c0 alone differs between the methods, by 0.1 each."""
    pictures = {p.name: plots.svg(p.figure, p.name) for p in comparison_pictures(study(tmp_path), tmp_path)}
    wins = pictures["compare-wins"]
    assert "better, at most 20.0 points" in wins
    assert [name for name in ("c0", "c1", "c2", "FedIT", "Local") if name not in wins] == []
    assert "gain in test accuracy over Local" in pictures["compare-gains"]


def test_the_tables(tmp_path: Path) -> None:
    record = study(tmp_path)
    table = overview(record)
    assert table.head[:2] == ["method", "accuracy, %"]
    cells = {row[0].text: dict(zip(table.head, row, strict=True)) for row in table.rows}
    best, fedit = cells["IFCA, clusters 2"], cells["FedIT"]
    assert (best["accuracy, %"].best, fedit["accuracy, %"].best) == (True, False)
    assert re.fullmatch(r"50\.2 ± 2\.1", fedit["accuracy, %"].text)
    assert fedit["against the best other"].text == "-6.7 [-20.0, 0.0] to IFCA, clusters 2"
    assert best["against the best other"].text == "+3.3 [0.0, +10.0] to Local"
    assert (fedit["worst client"].text, best["worst client"].text) == ("20.0", "40.0")
    assert fedit["tuned to"].text == "train.learning_rate=2e-3"
    assert best["tuned to"].text == "-"
    assert [row[0].text for row in by_client(record).rows] == ["c0", "c1", "c2", "mean"]
    short = brief(record)
    assert short.head[-1] == "learning_rate"
    assert [row[-1].text for row in short.rows] == ["2e-3", "-", "-"]


def test_the_operations_of_training_have_a_column_where_they_are_known() -> None:
    runs = {"fedit": {0: of_clients([0.5], gflop=2000.0), 1: of_clients([0.5], gflop=4000.0)}}
    one = overview(record_of(compared({**runs, "local": {0: of_clients([0.4])}})))
    columns = dict(zip(one.head, zip(*one.rows, strict=True), strict=True))
    assert [cell.text for cell in columns["operations"]] == ["3 TFLOP", "-"]
    assert "operations" not in overview(record_of(compared({"local": {0: of_clients([0.4])}}))).head


def test_a_reference_that_sees_all_rows_is_named_as_one() -> None:
    runs = {"centralised": {0: of_clients([0.9, 0.8], 0.9)}, "fedit": {0: of_clients([0.5, 0.4], 0.5)}}
    both, alone = record_of(compared(runs)), record_of(compared({"fedit": runs["fedit"]}))
    assert leader(both) == "FedIT has the best validation mean, Centralised aside."
    assert leader(alone) == "FedIT has the best validation mean."
    text = "Centralised, which trains on all clients' rows, counts as a reference and not as the best."
    assert (text in notes(both), text in notes(alone)) == (True, False)


def test_every_form_of_the_tables_says_where_methods_are_not_compared_alike() -> None:
    mine, other = of_clients([0.9], evaluated="trained"), of_clients([0.5], evaluated="received")
    record = record_of(compared({"fedamole": {0: mine, 1: mine}, "fedit": {0: other}}))
    ways = "The methods are evaluated differently (received: FedIT; trained: FedAMoLE): "
    for text in (markdown(record), latex(record)):
        assert ways in text
        assert "The methods have different seeds (FedAMoLE: 0, 1; FedIT: 0)." in text
    assert latex(record).splitlines()[1].startswith(f"% {ways}")
    alike = record_of(compared({"fedamole": {0: mine}, "local": {0: replace(other, evaluated="trained")}}))
    assert not [note for note in notes(alike) if note.startswith("The methods")]


def test_a_difference_of_nothing_has_no_sign() -> None:
    assert [signed(value, "accuracy") for value in (0.0, -1e-17, -0.0004, 0.0006, -0.02)] == [
        "0.0", "0.0", "0.0", "+0.1", "-2.0",
    ]  # fmt: skip
    assert signed(-0.0001, "loss") == "0.000"


def test_markdown_and_latex_hold_the_same_cells(tmp_path: Path) -> None:
    record = study(tmp_path)
    tables = (overview(record), by_client(record))
    rows = [line for line in markdown(record).splitlines() if line.startswith("| ")]
    assert len(rows) == sum(len(table.rows) + 2 for table in tables)
    assert {line.count("|") for line in rows} == {len(table.head) + 1 for table in tables}
    assert "**" in rows[-1]
    tex = latex(record)
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 2
    assert r"train.learning\_rate=2e-3" in tex
    assert r"accuracy, \%" in tex
    assert r"50.2 $\pm$ 2.1" in tex
    assert r"\textbf{" in tex
    strange = replace(record, variants={"x": replace(record.variants["fedit"], title="a&b_c|d\\~^<", against=None)})
    assert r"a\&b\_c|d\textbackslash{}\textasciitilde{}\^{}$<$" in latex(strange)
    assert r"a&b_c\|d" in markdown(strange)
