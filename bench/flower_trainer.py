"""A FedIT round against the same round with Flower's simulation engine (Ray) and Hugging Face's Trainer and PEFT.

The same encoder, rows, number of steps and of rows in a step, threads, and every client's test rows in every round.
Each way runs in processes of its own; memory is the sum over them of what each holds (pages that several share are
divided among them), looked at twice a second. Flower's way is in :mod:`_flower_app`: it loads the model for every
message, as its LLM examples do. Needs ray (``pip install ray==2.55.1``); --quick starts none.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from _federation import Size, Timed, config_of, made_clients
from _harness import arguments, table, write

from coterie.deploy.processes import flower_environment, start, stop, tail
from coterie.machine import version
from coterie.nn.locate import resolve

OURS = {
    "one at a time": {"clients_per_batch": 1},
    "batched": {"clients_per_batch": "auto"},
    "batched, bfloat16": {"clients_per_batch": "auto", "precision": "bfloat16"},
}
EVERY = 0.5  # seconds between looks at the memory


def measured(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a process of its own says of its rounds, with the peak memory of it and of all that it starts."""
    file, log, out = folder / "way.json", folder / "way.log", folder / "found.json"
    file.write_text(json.dumps({**task, "out": str(out)}))
    out.unlink(missing_ok=True)
    home = folder / "flower"
    here = str(Path(__file__).parent)
    env = flower_environment(home) | {"OMP_NUM_THREADS": str(task["threads"]), "RAY_DISABLE_DOCKER_CPU_WARNING": "1"}
    env["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    env |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    began, peak, most = time.time(), 0, 0
    process = start([sys.executable, __file__, "--task", str(file)], env, log)
    try:
        while process.poll() is None:
            held = memory(process.pid)
            peak, most = max(peak, sum(held)), max(most, len(held))
            time.sleep(EVERY)
    finally:
        stop(process)
    if not out.exists():
        raise SystemExit(f"{task['way']} failed:\n{tail(log, 40)}")
    found = json.loads(out.read_text())
    marks = found["marks"]
    return {
        "start_s": marks[0]["start"] - began,
        "first_round_s": marks[0]["evaluated"] - marks[0]["start"],
        "round_s": statistics.median(mark["evaluated"] - mark["start"] for mark in marks[1:] or marks),
        "train_s": statistics.median(mark["trained"] - mark["start"] for mark in marks[1:] or marks),
        "rounds_s": [mark["evaluated"] - mark["start"] for mark in marks],
        "whole_s": time.time() - began,
        "peak_mib": peak / 2**20,
        "processes": most,
        "accuracy": found["accuracy"][-1],
    }


def memory(pid: int) -> list[int]:
    """Bytes that a process and each of its descendants hold, with a share of the pages that they share."""
    held = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                held.append(int(process.memory_full_info().pss))
    return held


def work(task: dict[str, Any]) -> None:
    """One way, in this process."""
    torch.set_num_threads(task["threads"])
    if task["way"] == "flower":
        from _flower_app import simulate

        found = simulate(Path(task["file"]), task["rounds"], task["threads"], task["actors"])
    else:
        found = ours(task)
    Path(task["out"]).write_text(json.dumps(found))


def ours(task: dict[str, Any]) -> dict[str, Any]:
    given = json.loads(Path(task["file"]).read_text())
    size, folder = Size(**task["size"]), Path(given["folder"])
    sections: dict[str, dict[str, Any]] = {
        "method": {"name": "fedit"},
        "task": {"head": "shared"},
        "run": {"rounds": 1000},
        "engine": {**OURS[task["way"]], "threads": task["threads"]},
    }
    with tempfile.TemporaryDirectory(dir=folder) as name:
        timed = Timed.opening(config_of(given["clients"], size, **sections), Path(name) / "run", folder)
        marks, accuracy = [], []
        for _ in range(task["rounds"]):
            start = time.time()
            timed.round()
            events = (timed.folder / "metrics.jsonl").read_text().splitlines()
            accuracy.append(json.loads(events[-1])["mean"]["test"]["accuracy"])
            marks.append({"start": start, "trained": start + timed.phases[-1]["train"], "evaluated": time.time()})
    return {"marks": marks, "accuracy": accuracy}


def task_file(folder: Path, size: Size) -> Path:
    """What both ways read: the clients and their files, the LoRA, the training."""
    entries = made_clients(folder, size)
    config = config_of(entries, size)
    content = {
        "folder": str(folder),
        "path": resolve("minilm"),
        "max_length": config.model.max_length,
        "clients": entries,
        "lora": {**config.lora.model_dump(), "targets": ["query", "value"]},
        "train": config.train.model_dump(),
    }
    file = folder / "task.json"
    file.write_text(json.dumps(content))
    return file


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a client in a round, of 8 rows each")
    parser.add_argument("--rounds", type=int, default=4, help="of each run; the first does not count")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each way, in turns")
    parser.add_argument("--with-ray", action="store_true", help="start Ray in the quick form too")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)


def main() -> None:
    options = arguments(__doc__ or "", add)
    if options.task:
        work(json.loads(options.task.read_text()))
        return
    size = Size(options.clients, train=8 * options.steps, test=32, steps=options.steps)
    if options.quick:
        size, options.rounds, options.repeats = Size(2, train=4, test=4, words=6, steps=1, batch=4), 2, 1
    ways: dict[str, dict[str, Any]] = {way: {"way": way, "threads": options.threads} for way in OURS}
    ray = importlib.util.find_spec("ray") is not None
    if ray and (options.with_ray or not options.quick):
        ways["Flower, one actor"] = {"way": "flower", "threads": options.threads, "actors": 1}
        if options.threads > 1:
            ways["Flower, an actor a core"] = {"way": "flower", "threads": 1, "actors": options.threads}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = task_file(folder, size)
        for repeat in range(options.repeats):
            for way, task in list(ways.items())[:: 1 if repeat % 2 == 0 else -1]:
                given = {**task, "file": str(file), "rounds": options.rounds, "size": vars(size)}
                found[way].append(measured(given, folder))
    rows = [row(way, runs, found) for way, runs in found.items()]
    table("a FedIT round: seconds, and the peak memory of all processes", rows)
    missing = None if any(task["way"] == "flower" for task in ways.values()) else "not measured: ray was not started"
    if missing:
        print(f"Flower: {missing}")
    versions = {name: version(name) for name in ("flwr", "ray", "accelerate")}
    write("flower_trainer", options, {"size": vars(size), "rows": rows, "runs": found, "flower": missing or versions})


def row(way: str, runs: list[dict[str, Any]], found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the runs; how many times ours, one client at a time, goes into this way."""
    names = ("start_s", "first_round_s", "round_s", "train_s", "whole_s", "peak_mib", "processes", "accuracy")
    made: dict[str, Any] = {"way": way} | {name: statistics.median(run[name] for run in runs) for name in names}
    pairs = list(zip(runs, found["one at a time"], strict=True))
    made["round_over_ours"] = statistics.median(run["round_s"] / own["round_s"] for run, own in pairs)
    made["whole_over_ours"] = statistics.median(run["whole_s"] / own["whole_s"] for run, own in pairs)
    return made


if __name__ == "__main__":
    main()
