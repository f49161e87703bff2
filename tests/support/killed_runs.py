"""Runs in child processes that are killed at some moment, and what has to be the same bit for bit afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coterie import experiment
from coterie.config.load import load_config

FORK = multiprocessing.get_context("fork")
TIMES = ("seconds", "energy", "joules", "joules_from", "peak_memory_bytes", "machine", "versions")


def run(path: Path, out: Path, resume: bool = False, listen: Callable[[Any], None] = lambda event: None) -> Any:
    return experiment.run(load_config(path), out, root=path.parent, resume=resume, listen=listen)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def results(out: Path) -> dict[str, Any]:
    """Everything that must be the same bit for bit: exports and personal states by bytes, metrics without times."""
    folders = ("experts", "clients", "personal", "trained")
    files = [p for name in folders for p in sorted((out / name).rglob("*")) if p.is_file()]
    found: dict[str, Any] = {str(p.relative_to(out)): p.read_bytes() for p in files}
    for path in sorted((out / "checkpoints").glob("*.ckpt")):  # magic, hash, and what holds the metrics' length; state
        found[path.name] = path.read_bytes().split(b"\n", 3)[3]
    events = [without_times(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [event for event in events if event["event"] != "note"]
    found["summary"] = without_times(json.loads((out / "summary.json").read_text()))
    return found


def killed(target: Callable[[], None], after: float | None = None) -> bool:
    """Run ``target`` in a child, SIGKILL it ``after`` seconds if it still runs; whether it was killed."""
    child = FORK.Process(target=target)
    child.start()
    child.join(after)
    if child.is_alive() and child.pid:
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def go_on(path: Path, out: Path) -> None:
    run(path, out, resume=(out / "config.json").exists())
