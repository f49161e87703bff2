"""``evaluate``: the metrics of the run, by its code, on other rows; and every model on everyone's rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import bundles
import coterie
import finished_runs
import sites
from coterie.adapters.about import Texts
from coterie.adapters.bundle import read_bundle, write_bundle
from coterie.artifacts.cross import cross_table
from coterie.artifacts.evaluate import evaluate, open_client, plain
from coterie.cli.main import app
from coterie.comparison.cross import CROSS
from coterie.config.load import check_config
from coterie.data.settings import Columns
from coterie.experiment import about_export
from coterie.ops.metrics import classification_metrics
from coterie.runs.summary import read_summary
from coterie.types import CoterieError, DataError


@pytest.fixture(scope="module")
def finished() -> Path:
    return finished_runs.fedlease()


def test_a_clients_own_test_rows_score_what_the_run_reports(finished: Path) -> None:
    summary = read_summary(finished / "summary.json")
    for client in ("mood-0", "size-1"):
        result = evaluate(finished, client)
        assert result.rows == 6
        assert dict(result.metrics) == pytest.approx(dict(summary.clients[client].test), abs=1e-6)
        validation = evaluate(finished, client, split="validation")
        assert dict(validation.metrics) == pytest.approx(dict(summary.clients[client].validation), abs=1e-6)


def test_a_file_scores_as_the_same_rows_of_the_run(finished: Path) -> None:
    own = evaluate(finished, "size-0")
    result = evaluate(finished, "size-0", data=finished.parent / "clients" / "size-0" / "test.jsonl")
    assert result.metrics == own.metrics
    assert result.confusion == own.confusion
    assert result.labels == ("big", "small", "tiny")
    assert json.loads(json.dumps(plain(result)))["confusion"] == own.confusion


def test_confusion_and_calibration_are_those_of_the_predictions(tmp_path: Path) -> None:
    folder = bundles.finished(tmp_path)
    rows = [{"text": f"{i} words {i * 7}", "label": bundles.LABELS[i % 3]} for i in range(9)]
    sites.write_rows(tmp_path / "rows.jsonl", rows)
    result = evaluate(folder, "north", data=tmp_path / "rows.jsonl")
    answers = [answer.columns() for answer in coterie.load(folder, "north").predict(rows)]
    predicted = [bundles.LABELS.index(str(answer["prediction"])) for answer in answers]
    assert result.confusion is not None
    counted = [[0] * 3 for _ in range(3)]
    for i, label in enumerate(predicted):
        counted[i % 3][label] += 1
    assert result.confusion == counted
    expected = classification_metrics([i % 3 for i in range(9)], predicted)
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    sure = [float(answer["probability"]) for answer in answers]  # type: ignore[arg-type]
    bins: dict[int, list[float]] = {}
    for i, (confidence, label) in enumerate(zip(sure, predicted, strict=True)):
        bins.setdefault(int(confidence * 15), []).append((i % 3 == label) - confidence)
    assert result.calibration_error == pytest.approx(sum(abs(sum(gaps)) for gaps in bins.values()) / 9, abs=1e-5)


def test_choices_have_a_confusion_matrix_where_rows_share_them(tmp_path: Path) -> None:
    folder = bundles.finished(tmp_path, "multiple_choice")
    shared = [{"prompt": f"p {i}", "choices": [" a", " b"], "label": i % 2} for i in range(4)]
    sites.write_rows(tmp_path / "shared.jsonl", shared)
    result = evaluate(folder, "north", data=tmp_path / "shared.jsonl")
    chosen = [answer.columns()["choice"] for answer in coterie.load(folder, "north").predict(shared)]
    assert result.metrics["accuracy"] == sum(c == i % 2 for i, c in enumerate(chosen)) / 4
    assert result.calibration_error is None


def test_text_is_scored_by_its_loss(tmp_path: Path) -> None:
    folder = bundles.finished(tmp_path, "generation")
    sites.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}])
    result = evaluate(folder, "north", data=tmp_path / "rows.jsonl")
    assert set(result.metrics) == {"loss", "perplexity"}
    assert (result.labels, result.confusion, result.calibration_error) == (None, None, None)


def test_a_bundle_names_no_function_to_import_as_a_score(tmp_path: Path) -> None:
    bundle, rows = bundles.finished(tmp_path, "generation") / "clients" / "north", tmp_path / "rows.jsonl"
    sites.write_rows(rows, [{"prompt": "a", "completion": " b"}])
    bank, about = read_bundle(bundle)
    texts = Texts("all", "likelihood", 0.1, ("os:system",), 4, 0.0, 1.0, 0)
    write_bundle(bundle, bank, replace(about, texts=texts))
    with pytest.raises(CoterieError, match="names the function os:system as a score"):
        evaluate(bundle, data=rows)
    task = {"kind": "generation", "generate": True, "scores": ["numeric", "my.code:score"]}
    config = check_config({"task": task, "data": {"folder": "clients"}, "model": {"path": "model"}})
    written = about_export(config, tmp_path, 1, "last").texts
    assert written is not None
    assert written.scores == ("numeric",)


def test_a_bundle_alone_draws_tokens_as_its_run_did(tmp_path: Path) -> None:
    bundle = bundles.finished(tmp_path, "generation") / "clients" / "north"
    bank, about = read_bundle(bundle)
    write_bundle(bundle, bank, replace(about, texts=Texts("all", "likelihood", 0.1, ("numeric",), 4, 1.0, 1.0, 7)))
    assert open_client(bundle, None).workplace.seed == 7


def test_preferences_need_the_run_or_a_column_of_completions(tmp_path: Path) -> None:
    """Of a bundle of an older format, which does not say how its run measured them."""
    folder, rows = bundles.finished(tmp_path, "generation"), tmp_path / "rows.jsonl"
    sites.write_rows(rows, [{"prompt": "a", "chosen": " b", "rejected": " c"}])
    with pytest.raises(CoterieError, match=r"give the folder of the run, or --column completion=chosen"):
        evaluate(folder, "north", data=rows)
    assert set(evaluate(folder, "north", data=rows, columns=Columns(completion="chosen")).metrics) >= {"loss"}


def test_what_cannot_be_scored_is_said(finished: Path, tmp_path: Path) -> None:
    bundle = finished / "clients" / "mood-0"
    with pytest.raises(CoterieError, match="holds a bundle without its run; give the rows with --data"):
        evaluate(bundle)
    sites.write_rows(tmp_path / "rows.jsonl", [{"text": "x", "label": "sad"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the label 'sad' is not one of bad, good"):
        evaluate(bundle, data=tmp_path / "rows.jsonl")
    with pytest.raises(CoterieError, match="has no none rows; it has train, validation, test"):
        evaluate(finished, "mood-0", split="none")


def test_every_model_on_everyones_rows(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = cross_table(finished)
    assert table.clients == ["mood-0", "mood-1", "place-0", "size-0", "size-1"]
    summary = read_summary(finished / "summary.json")
    for i, client in enumerate(table.clients):
        assert table.cells[i][i] == f"{100 * summary.clients[client].test['accuracy']:.1f}"
    assert [cell == "-" for cell in table.cells[2]] == [True, True, False, True, True]
    assert table.picture.read_bytes().startswith(b"\x89PNG")
    assert (finished / CROSS).is_file()
    app(["evaluate", str(finished), "--cross", "--metric", "loss"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "loss: whose model (down), on whose test rows (across)" in shown
    with pytest.raises(CoterieError, match="no model has the metric 'f1'; the metrics are accuracy, loss"):
        cross_table(finished, "f1")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        *(
            (["--cross", option, "x"], f"--cross scores every model on the run's own test rows.* leave out {option}$")
            for option in ("--client", "--data", "--split", "--column", "--out", "--base", "--device")
        ),
        (["--metric", "loss"], "add --cross, or leave out --metric"),
        (["--client", "mood-0", "--data", "x.jsonl", "--split", "test"], r"x\.jsonl have no splits; leave out"),
    ],
)
def test_options_that_do_not_count_are_refused(finished: Path, given: list[str], why: str) -> None:
    with pytest.raises(CoterieError, match=why):
        app(["evaluate", str(finished), *given], standalone_mode=False)


def test_the_command_shows_and_writes_the_figures(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = finished.parent / "clients" / "mood-0" / "test.jsonl"
    app(
        ["evaluate", str(finished), "--client", "mood-0", "--data", str(data), "--out", str(tmp_path / "e.json")],
        standalone_mode=False,
    )
    shown = capsys.readouterr().out
    for text in ("6 rows", "accuracy", "macro F1", "expected calibration error", "rows by label (down)", "bad"):
        assert text in shown
    assert json.loads((tmp_path / "e.json").read_text())["rows"] == 6
