"""TensorBoard logs: the event files hold what the run's events say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from coterie.runs.events import ClientDone, ClientRound, Evaluated, Event, Note, Ready, RoundDone, RoundStart
from coterie.runs.tracking import check_tensorboard, tensorboard
from coterie.types import CoterieError

INSTALLED = importlib.util.find_spec("tensorboard") is not None


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


@pytest.mark.skipif(not INSTALLED, reason="tensorboard is not installed (extra tracking)")
def test_events_become_scalars_by_round(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    listen = tensorboard(tmp_path)
    listen(Ready(2, 2, str(tmp_path)))
    for event in [*of_round(1), *of_round(2)]:
        listen(event)
    listen(Note("an event that has no numbers"))
    (file,) = (tmp_path / "tensorboard").iterdir()  # written by now: the last evaluation flushed it
    found = EventAccumulator(str(file)).Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert scalars == {
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


def test_without_tensorboard_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    for check in (check_tensorboard, lambda: tensorboard(tmp_path / "run")):
        with pytest.raises(CoterieError, match=r"\[run\] tensorboard needs TensorBoard: pip install tensorboard$"):
            check()
    assert list(tmp_path.iterdir()) == []
