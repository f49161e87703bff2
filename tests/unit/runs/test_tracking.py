"""Trackers: what they hold afterwards, read by their own libraries, is what the run's events say."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

import sites
from coterie import experiment
from coterie.config.load import check_config, load_config
from coterie.config.sections import Tracker
from coterie.runs import trackers
from coterie.runs.entries import ClientRound
from coterie.runs.events import ClientDone, Evaluated, Event, Note, Ready, RoundDone, RoundStart
from coterie.runs.trackers import Tracked, check_tracker
from coterie.runs.tracking import tracking
from coterie.types import CoterieError

Points = Mapping[str, list[tuple[int, float]]]
SETTINGS = {"run.rounds": 2, "method.name": "fedit"}


def needs(name: Tracker) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed: `make test-tracking` installs it"
    )


def of_round(rnd: int) -> list[Event]:
    def entry(**said: float) -> ClientRound:
        return ClientRound(20 * rnd, 10 * rnd, 0.1, said)

    scores = {"a": {"test": {"accuracy": 0.25 * rnd}}, "b": {"test": {"accuracy": 0.5}, "validation": {"loss": 2.0}}}
    return [
        RoundStart(rnd, ["a", "b"]),
        ClientDone(rnd, "a", entry(loss=9.0), None),
        RoundDone(rnd, {"a": entry(loss=1 / rnd), "b": entry()}),
        Evaluated(rnd, scores, {"test": {"accuracy": 0.125 * rnd}}),
    ]


EXPECTED: Points = {
    "loss/a": [(1, 1.0), (2, 0.5)],
    "bytes_up/a": [(1, 10.0), (2, 20.0)],
    "bytes_up/b": [(1, 10.0), (2, 20.0)],
    "bytes_down/a": [(1, 20.0), (2, 40.0)],
    "bytes_down/b": [(1, 20.0), (2, 40.0)],
    "test accuracy/mean": [(1, 0.125), (2, 0.25)],
    "test accuracy/a": [(1, 0.25), (2, 0.5)],
    "test accuracy/b": [(1, 0.5), (2, 0.5)],
    "validation loss/b": [(1, 2.0), (2, 2.0)],
}


def tracked(name: Tracker, folder: Path, each: list[list[Event]]) -> list[Event]:
    """Run with ``name`` in ``folder``, stopped and resumed between the parts of ``each``; what a listener gets."""
    heard: list[Event] = []
    for number, events in enumerate(each):
        with tracking([name], Tracked(folder, SETTINGS, number > 0), heard.append) as listen:
            for event in [Ready(2, 2, str(folder)), *events, Note("an event that has no numbers")]:
                listen(event)
    return heard


def test_tensorboard_has_scalars_by_round(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked("tensorboard", tmp_path, [[*of_round(1), *of_round(2)]])
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = EventAccumulator(str(file)).Reload()
    assert {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]} == EXPECTED


@needs("mlflow")
def test_mlflow_has_one_run_with_the_settings_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracked("mlflow", tmp_path, [of_round(1), of_round(2)])
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("coterie")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {name: str(value) for name, value in SETTINGS.items()}
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"{tmp_path.parent.name}/{tmp_path.name}")
    found = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    assert found == EXPECTED
    assert not (Path.cwd() / "mlruns").exists()


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB with fragments (CRC, length, kind), after 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last fragment
            yield record
            record = b""


@needs("wandb")
def test_wandb_writes_offline_runs_with_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracked("wandb", tmp_path, [of_round(1), of_round(2)])
    from wandb.proto import wandb_internal_pb2

    number = (tmp_path / "wandb" / "id").read_text()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert len(files) == 2
    found: dict[str, list[tuple[int, float]]] = {}
    for file in files:
        records: list[Any] = []
        end = time.monotonic() + 60
        while not any(record.HasField("exit") for record in records) and time.monotonic() < end:
            time.sleep(0.1)  # another process writes it
            records = [wandb_internal_pb2.Record.FromString(content) for content in wandb_records(file.read_bytes())]
        for history in (record.history for record in records):
            for item in history.item:
                key = item.key or "/".join(item.nested_key)
                if not key.startswith("_"):
                    found.setdefault(key, []).append((history.step.num, float(item.value_json)))
    assert found == EXPECTED


@needs("trackio")
def test_trackio_has_one_run_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # its folder is settled when it is imported
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    tracked("trackio", tmp_path / "run", [of_round(1), of_round(2)])
    assert capsys.readouterr().out == ""
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("coterie")
    found: dict[str, list[tuple[int, float]]] = {}
    for line in SQLiteStorage.get_logs("coterie", run):
        for key, value in line.items():
            if key not in ("step", "timestamp"):
                found.setdefault(key, []).append((line["step"], value))
    assert found == EXPECTED


def test_mlflow_takes_a_round_in_one_transaction_and_is_told_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Client:
        def log_batch(self, run: str, metrics: Any) -> None:
            calls.append((run, [metric[:2] for metric in metrics], {metric[3] for metric in metrics}))

        def set_terminated(self, run: str, status: str) -> None:
            calls.append((run, status))

    entities = SimpleNamespace(Metric=lambda *given: given)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(entities=entities))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(trackers, "_OPEN", {"mlflow": lambda _: trackers._MLflow(Client(), "7")})
    monkeypatch.setattr(trackers, "_METRICS", 2)
    monkeypatch.setattr(trackers, "check_tracker", lambda _: None)
    monkeypatch.setattr(trackers, "faults_of", lambda _: (OSError,))
    numbers = {"a": 1.0, "b": 2.0, "c": 3.0}
    with trackers.opened("mlflow", Tracked(tmp_path, SETTINGS, False)) as sink:
        sink.log(numbers, 4)
    assert calls == [("7", [("a", 1.0), ("b", 2.0)], {4}), ("7", [("c", 3.0)], {4}), ("7", "FINISHED")]
    with pytest.raises(KeyError), trackers.opened("mlflow", Tracked(tmp_path, SETTINGS, False)):
        raise KeyError("the run ends")
    assert calls[-1] == ("7", "FAILED")


class Full:
    """A tracker whose disk is full after the first round."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def log(self, numbers: Mapping[str, float], rnd: int) -> None:
        if rnd > 1:
            raise OSError("no space left")
        self.rounds.append(rnd)

    def close(self, failed: bool = False) -> None:
        raise OSError("no space left")


def test_a_tracker_that_fails_is_a_note_and_gets_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Full()
    monkeypatch.setattr(trackers, "_OPEN", {"tensorboard": lambda _: sink})
    monkeypatch.setattr(trackers, "check_tracker", lambda _: None)
    heard = tracked("tensorboard", tmp_path, [[*of_round(1), *of_round(2)]])
    assert sink.rounds == [1, 1]
    notes = [event.text for event in heard if isinstance(event, Note)]
    assert notes[0] == "tensorboard takes no more figures (no space left); metrics.jsonl has all of them"
    assert len(notes) == 2  # the other is the last event


def test_a_run_and_its_continuation_are_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[bool, object]] = []
    sink = Full()

    def begin(run: Tracked) -> Any:
        opened.append((run.resumed, run.settings["run.rounds"]))
        return sink

    monkeypatch.setattr(trackers, "_OPEN", {"trackio": begin})
    for module in (trackers, experiment):
        monkeypatch.setattr(module, "check_tracker", lambda _: None)
    config = load_config(sites.config(tmp_path, method="fedit"), ["run.rounds=1", 'run.tracking=["trackio"]'])
    experiment.run(config, tmp_path / "out", root=tmp_path)
    assert sink.rounds == [1, 1]
    longer = config.model_copy(update={"run": config.run.model_copy(update={"rounds": 2})})
    heard: list[Event] = []
    experiment.run(longer, tmp_path / "out", root=tmp_path, resume=True, listen=heard.append)
    assert opened == [(False, 1), (True, 2)]
    assert [event.text for event in heard if isinstance(event, Note) and "trackio takes no more" in event.text]


def test_a_tracker_that_cannot_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Tracked) -> Any:
        raise RuntimeError("no such server\nmore")

    monkeypatch.setattr(trackers, "_OPEN", {"tensorboard": fails})
    monkeypatch.setattr(trackers, "check_tracker", lambda _: None)
    with pytest.raises(CoterieError, match=r"^tensorboard cannot start \(no such server\); see what it needs"):
        tracked("tensorboard", tmp_path, [[]])


@pytest.mark.parametrize("name", get_args(Tracker))
def test_without_its_library_it_says_what_to_install(name: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(CoterieError, match=rf'^\[run\] tracking = \["{name}"\] needs a package: pip install {name}'):
        check_tracker(name)


def test_the_setting_of_earlier_versions_is_read() -> None:
    raw = {"data": {"datasets": ["demo:clinic"]}}
    assert check_config({**raw, "run": {"tensorboard": True}}).run.tracking == ("tensorboard",)
    assert check_config({**raw, "run": {"tensorboard": False}}) == check_config(raw)
    with pytest.raises(CoterieError, match=r"run\.tracking.*'tensorboard', 'mlflow', 'wandb' or 'trackio'"):
        check_config({**raw, "run": {"tracking": ["comet"]}})
