"""A run that gets more rounds is, bit for bit, the run that had them from the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import sites
from coterie import experiment
from coterie.config.load import load_config
from coterie.runs.events import CheckpointSaved, Event
from coterie.types import CoterieError
from stop_run import stop_run
from thinned import thinned

TIMES = ("seconds", "energy", "joules", "joules_from", "peak_memory_bytes", "machine", "versions")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(path: Path, out: Path, *changes: str, resume: bool = False, listen: Any = lambda event: None) -> Any:
    return experiment.run(load_config(path, changes), out, root=path.parent, resume=resume, listen=listen)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def left_by(out: Path) -> dict[str, Any]:
    """All that a run leaves, without times, and without the length of metrics.jsonl that a checkpoint holds."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name.endswith(".ckpt"):
            found[name] = path.read_bytes().split(b"\n", 3)[3]
        elif name == "metrics.jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif name.endswith(".json"):
            found[name] = without_times(json.loads(path.read_text()))
        elif name != "report.html":
            found[name] = path.read_bytes()
    assert (out / "report.html").is_file()
    return found


EVERY_TWO = "run.evaluate_every=2"


@pytest.mark.parametrize(
    ("method", "more"),
    thinned(
        product(["fedlease", "fedamole", "fedsa_lora", "ifca"], ["", EVERY_TWO]),
        lambda method, more: (method in {"fedamole", "ifca"}) == (more == EVERY_TWO),
    ),
)
def test_an_extended_run_is_the_longer_run(method: str, more: str, tmp_path: Path) -> None:
    path, changes = sites.config(tmp_path, method=method, rows=4, others=2), [more] if more else []
    run(path, tmp_path / "whole", "run.rounds=5", *changes)
    run(path, tmp_path / "parts", "run.rounds=3", *changes)
    found = run(path, tmp_path / "parts", "run.rounds=5", *changes, resume=True)
    assert found.rounds == 5
    whole, parts = left_by(tmp_path / "whole"), left_by(tmp_path / "parts")
    assert parts.keys() == whole.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_a_run_that_was_stopped_can_be_extended_too(tmp_path: Path) -> None:
    path = sites.config(tmp_path, method="fedit", rows=4, others=2)
    run(path, tmp_path / "whole", "run.rounds=5")
    stop_run(run, path, tmp_path / "parts", "run.rounds=4", when=saved(2))
    stop_run(run, path, tmp_path / "parts", "run.rounds=5", resume=True, when=saved(4))  # while it is being extended
    run(path, tmp_path / "parts", "run.rounds=5", resume=True)
    whole, parts = left_by(tmp_path / "whole"), left_by(tmp_path / "parts")
    assert [name for name in whole if whole[name] != parts.get(name)] == []


def saved(rnd: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, CheckpointSaved) and event.round == rnd


def test_why_a_run_cannot_be_extended_is_said_and_nothing_changes(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="fedit", rows=4, others=2), tmp_path / "out"
    run(path, out, "run.rounds=3")
    with pytest.raises(CoterieError, match=r"run of 3 rounds, and a run can have more but not fewer"):
        run(path, out, "run.rounds=2", resume=True)
    with pytest.raises(CoterieError, match=r"it differs in run.rounds, train.batch_size"):
        run(path, out, "run.rounds=5", "train.batch_size=3", resume=True)
    (out / "checkpoints" / "000002.ckpt").unlink()
    before = left_by(out)
    with pytest.raises(CoterieError, match=r"cannot be extended: round 3, .* checkpoint of round 2 cannot be used"):
        run(path, out, "run.rounds=5", resume=True)
    assert left_by(out) == before
