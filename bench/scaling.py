"""Seconds of a round and peak memory for 8 to 1,024 simulated clients: the cost per client must not grow.

FedLEASE with four experts on the packaged encoder, a warm-up round, then rounds with all experts, the last one with
evaluation. Each number of clients runs in a process of its own, whose peak resident size counts all: Python, torch,
the base, the server's state. Files and rows are made before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _federation import Size, Timed, config_of, made_clients
from _harness import arguments, table, write
from _models import MODELS, path_of

from coterie.machine import peak_memory

WAYS = {
    "one at a time": {"clients_per_batch": 1},
    "batched": {"clients_per_batch": "auto"},
}
MOST_GB = 4.0


def work(task: dict[str, Any]) -> dict[str, Any]:
    """The rounds of one federation, in this process."""
    torch.set_num_threads(task["threads"])
    size, folder, rounds = Size(**task["size"]), Path(task["folder"]), task["rounds"]
    entries = json.loads((folder / "entries.json").read_text())[: size.clients]
    engine = {**WAYS[task["way"]], "precision": task["precision"], "threads": task["threads"]}
    method = {"name": "fedlease", "distance": "B", "warmup_rounds": 1, "experts": 4}
    run = {"rounds": 1000, "evaluate_every": rounds}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        began = time.perf_counter()
        config = config_of(entries, size, method=method, run=run, engine=engine)
        timed = Timed.opening(config, Path(name) / "run", folder)
        opened = time.perf_counter() - began
        for _ in range(rounds):
            timed.round()
    first, last = timed.phases[0], timed.phases[-1]
    each = 1e3 / size.clients
    return {
        "clients": size.clients,
        "way": task["way"],
        "per_pass": timed.clients_per_pass,
        "open_s": opened,
        "warm_up_s": sum(first.values()),
        "round_s": last["train"] + last["save"],
        "evaluate_s": last["evaluate"],
        "ms_per_client": each * (last["train"] + last["save"]),
        "evaluate_ms_per_client": each * last["evaluate"],
        "save_s": last["save"],
        "peak_mib": peak_memory() / 2**20,
        **({"peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20} if size.device.startswith("cuda") else {}),
        "phases": timed.phases,
    }


def apart(task: dict[str, Any]) -> dict[str, Any]:
    """:func:`work` in a process of its own."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32, 128, 512, 1024])
    parser.add_argument("--steps", type=int, default=1, help="optimiser steps of a client in a round, of 8 rows each")
    parser.add_argument("--rounds", type=int, default=2, help="the first is FedLEASE's warm-up; the last is reported")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "auto"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="minilm", choices=MODELS, help="a Llama is random, in bfloat16")
    parser.add_argument("--task", help=argparse.SUPPRESS)


def main() -> None:
    options = arguments(__doc__ or "", add)
    if options.task:
        print(json.dumps(work(json.loads(options.task))))
        return
    rows: dict[str, int] = {"train": 16, "test": 8, "steps": options.steps}
    if options.quick:
        options.clients, rows = [4], {"train": 2, "test": 2, "words": 6, "steps": 1, "batch": 2}
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        where = {"device": options.device, "model": path_of(options.model, folder, options.device)}
        entries = made_clients(folder, Size(max(options.clients), **rows))
        (folder / "entries.json").write_text(json.dumps(entries))
        for clients in options.clients:
            for way in WAYS:
                task = {
                    "way": way,
                    "folder": name,
                    "size": vars(Size(clients, **rows, **where)),
                    "rounds": options.rounds,
                }
                found.append(apart({**task, "threads": options.threads, "precision": options.precision}))
                shown = {key: value for key, value in found[-1].items() if key != "phases"}
                print(json.dumps(shown), flush=True)
    shown = [{key: value for key, value in row.items() if key != "phases"} for row in found]
    table(f"a round by the number of clients, {options.precision}", shown)
    about = {"device": options.device, "model": options.model, "precision": options.precision}
    results = {**about, "rows": rows, "runs": found, "targets": targets(found)}
    table("targets", [{"target": key, **value} for key, value in results["targets"].items()])
    write("scaling", options, results)


def targets(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The cost of a client with the most clients over that with 32 (or the fewest), and the peak memory."""
    made: dict[str, Any] = {}
    for way in WAYS:
        runs = {run["clients"]: run for run in found if run["way"] == way}
        few, many = runs.get(32, runs[min(runs)]), runs[max(runs)]
        value = many["ms_per_client"] / few["ms_per_client"]
        name = f"a client of {many['clients']} over one of {few['clients']}, {way}"
        made[name] = {"value": value, "at_most": 1.1, "met": value <= 1.1}
        peak = many["peak_mib"] * 2**20 / 1e9
        made[f"peak GB, {many['clients']} clients, {way}"] = {"value": peak, "at_most": MOST_GB, "met": peak <= MOST_GB}
    return made


if __name__ == "__main__":
    main()
