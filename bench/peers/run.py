"""The same federated work by Coterie and by its peers: seconds of a round, of the start, memory and bytes.

FedIT on the packaged encoder and on a small decoder: the same base, rows, steps, rank and threads, with every client's
test rows in every round. Coterie runs one client at a time, many in a pass, and over Flower's simulation. Flower's
simulation has Trainer and PEFT at the clients, as in its LLM examples (:mod:`peer_flower`); NVFlare's simulator has its
patch of Trainer (:mod:`peer_nvflare`). Each run is a process of its own. Memory is the sum of what it and its
descendants hold (pages that several share are divided among them), in memory and swapped out. It is looked at twice a
second, or less often where there are many processes: looking takes at most 2% of the time. FedLEASE's published loop is
measured in ``published_code.py``.

    bench/peers/setup.sh runs/peers                     # once: an environment for each peer
    taskset -c 0 python bench/peers/run.py --threads 1 --clients 4,16
    taskset -c 0 python bench/peers/run.py --threads 1 --clients 64 --nvflare-processes 16 --name peers-64
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _federation import Size, config_of, made_clients
from _harness import arguments, table, write
from _models import path_of

from coterie import experiment
from coterie.deploy.processes import flower_environment, start, stop, tail
from coterie.machine import processor
from coterie.nn.locate import resolve
from coterie.runs.events import CheckpointSaved, Evaluated, Event, RoundDone

HERE = Path(__file__).parent
OURS: dict[str, dict[str, Any]] = {
    "Coterie, one at a time": {"clients_per_batch": 1},
    "Coterie, batched": {"clients_per_batch": "auto"},
    "Coterie, batched, bfloat16": {"clients_per_batch": "auto", "precision": "bfloat16"},
    "Coterie, Flower's simulation": {"name": "flower-sim", "ray": {"clients_at_once": 1}},
}
PEERS = {"Flower, Trainer and PEFT": "flower", "NVFlare, Trainer and PEFT": "nvflare"}
TARGETS = {"minilm": ("query", "value"), "llama-small": ("q_proj", "v_proj")}
FIRST = "Coterie, one at a time"
EVERY = 0.5  # seconds between looks at the memory, at least
LOOKING = 0.02  # the most of the time that looking takes; it takes about 15 ms a process


def measured(command: list[str], task: Path, rounds: int, limit: float) -> dict[str, Any]:
    """What a run says of its rounds within ``limit`` seconds, with the peak memory of it and of all that it starts."""
    folder, out = Path(tempfile.mkdtemp(dir=task.parent)), task.parent / "found.json"
    out.unlink(missing_ok=True)
    env = flower_environment(folder / "flower") | {"RAY_DISABLE_DOCKER_CPU_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    env |= {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env["OMP_NUM_THREADS"] = str(json.loads(task.read_text())["threads"])
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    began, log, looks = time.time(), folder / "log", Looks()
    process = start([*command, str(task), str(out)], env, log)
    try:
        while process.poll() is None and time.time() < began + limit:
            time.sleep(looks.look(process.pid))
    finally:
        end(process)
    if not out.exists():
        late = f" in {limit:.0f} seconds" if time.time() > began + limit else ""
        raise NoResultError(f"no result{late}; {looks}\n{tail(log, 40)}")
    found = json.loads(out.read_text())
    marks, losses = found["marks"], found["losses"]
    seconds = [after - before for before, after in pairwise(marks)]
    usual = statistics.median(seconds[1:] or seconds)
    return {
        "start_s": marks[1] - began - usual,  # some load their models in the first round
        "round_s": usual,
        "rounds_s": seconds,
        "whole_s": time.time() - began,
        "peak_mib": looks.peak / 2**20,
        "swapped_mib": looks.swapped / 2**20,
        "processes": looks.processes,
        "looking_s": looks.seconds,
        "loss": losses[rounds - 2],  # NVFlare evaluates before it trains: the last round's loss is not known
        "mib": found["bytes"] / 2**20,
        "tokens": found.get("tokens"),
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a run and all that it started: NVFlare's simulator puts itself in a session of its own."""
    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    stop(process)
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


class NoResultError(Exception):
    """A run left no result."""


@dataclass
class Looks:
    """The most memory that a process and its descendants held, in bytes, swapped out included; how many they were."""

    peak: int = 0
    swapped: int = 0
    processes: int = 0
    seconds: float = 0.0  # of looking

    def look(self, pid: int) -> float:
        """Look once; returns the seconds until the next look."""
        began = time.process_time()
        held = memory(pid)
        took = time.process_time() - began
        swapped = sum(swap for _, swap in held)
        self.peak = max(self.peak, swapped + sum(resident for resident, _ in held))
        self.swapped = max(self.swapped, swapped)
        self.processes = max(self.processes, len(held))
        self.seconds += took
        return max(EVERY, took / LOOKING)


def memory(pid: int) -> list[tuple[int, int]]:
    """Bytes of a process and each descendant: in memory, with a share of the pages that are shared, and swapped out."""
    held = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found = process.memory_full_info()
                held.append((int(found.pss), int(found.swap)))
    return held


def ours(way: str, file: Path, out: Path) -> None:
    """A whole run of ours, in this process: checkpoints, experts, bundles and the report with it."""
    task = json.loads(file.read_text())
    torch.set_num_threads(task["threads"])
    sections: dict[str, dict[str, Any]] = {
        "method": {"name": "fedit"},
        "task": {"head": "shared"},
        "run": {"rounds": task["rounds"], "evaluate_every": 1},
        "lora": task["lora"],
        "train": task["train"],
        "engine": {**OURS[way], "threads": task["threads"]},
    }
    size = Size(**{**task["size"], "model": task["model"]})
    config = config_of(task["clients"], size, **sections)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    marks, losses, traffic = [], [], {"bytes": 0, "tokens": 0}

    def listen(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            marks.append(time.time())
        elif isinstance(event, Evaluated):
            losses.append(event.mean["test"]["loss"])
        elif isinstance(event, RoundDone):
            entries = event.clients.values()
            traffic["bytes"] = round(statistics.fmean(entry.bytes_down + entry.bytes_up for entry in entries))
            traffic["tokens"] = event.tokens

    folder = Path(tempfile.mkdtemp(dir=file.parent)) / "run"
    experiment.run(config, folder, root=Path(task["folder"]), listen=listen)
    out.write_text(json.dumps({"marks": marks, "losses": losses, **traffic}))


def task_file(folder: Path, model: str, size: Size, options: argparse.Namespace) -> Path:
    """What all read: the base, the clients and their files, the LoRA, the training."""
    folder.mkdir()
    path = path_of(model, folder, dtype=torch.float32)
    entries = made_clients(folder, size)
    config = config_of(entries, size)
    content = {
        "folder": str(folder),
        "path": resolve(path) if path == "minilm" else path,
        "model": path,
        "max_length": config.model.max_length,
        "clients": entries,
        "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": list(TARGETS[model])},
        "train": {
            "batch_size": size.batch,
            "steps": size.steps,
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "clip": 1.0,
        },
        "threads": options.threads,
        "rounds": options.rounds,
        "nvflare_processes": min(options.nvflare_processes or size.clients, size.clients),
        "size": vars(size),
    }
    file = folder / "task.json"
    file.write_text(json.dumps(content))
    return file


def ways(options: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each way that can run here, to which the task and the place of the result are added."""
    found = {name: [sys.executable, str(Path(__file__).resolve()), "--way", name] for name in OURS}
    for name, peer in PEERS.items():
        python = options.environments.resolve() / peer / "bin" / "python"
        if python.exists():
            found[name] = [str(python), str(HERE.resolve() / f"peer_{peer}.py")]
        else:
            print(f"{name}: no environment at {python}; make it with bench/peers/setup.sh {options.environments}")
    wanted = options.ways.split(";") if options.ways else list(found)
    return {name: command for name, command in found.items() if any(part in name for part in wanted)}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--environments", type=Path, default=Path("runs/peers"), help="the folder that setup.sh made")
    parser.add_argument("--models", default="minilm,llama-small")
    parser.add_argument("--clients", default="4,16")
    parser.add_argument("--rounds", type=int, default=4, help="of each run; the first does not count")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a client in a round, of 8 rows each")
    parser.add_argument("--nvflare-processes", type=int, help="of its clients at once; default: one for each client")
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds that a run may take")
    parser.add_argument("--name", default="peers", help="of the JSON")
    parser.add_argument("--add", action="store_true", help="keep what the JSON has of other models, clients and ways")
    parser.add_argument("--ways", help="parts of names, separated by semicolons; default: all")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)


def main() -> None:
    options = arguments(__doc__ or "", add)
    if options.way:
        ours(options.way, *options.files)
        return
    if options.quick:
        options.models, options.clients, options.rounds, options.steps = "llama-tiny", "2", 2, 1
        options.ways = "one at a time;batched"
        TARGETS["llama-tiny"] = TARGETS["llama-small"]
    cells = [(model, int(clients)) for model in options.models.split(",") for clients in options.clients.split(",")]
    rows, failed, commands = kept(options), [], ways(options)
    versions = {peer: versions_of(options.environments / peer / "bin" / "python") for peer in PEERS.values()}
    with tempfile.TemporaryDirectory() as name:
        for model, clients in cells:
            size = Size(clients, train=8 * options.steps, test=32, steps=options.steps)
            task = task_file(Path(name) / f"{model}-{clients}", model, size, options)
            for way, command in commands.items():
                found = {"model": model, "clients": clients, "way": named(way, clients, options)}
                try:
                    found |= measured(command, task, options.rounds, options.limit)
                except NoResultError as error:
                    failed.append(f"{found['way']}, {model}, {clients} clients")
                    print(f"{failed[-1]}: {error}", flush=True)
                    continue
                print(json.dumps(found), flush=True)
                rows = [*(row for row in rows if whose(row) != whose(found)), found]
                about = {"steps": options.steps, "peers": versions}
                write(options.name, options, {**about, "rows": rows})
    for model, clients in cells:
        table(f"{model}, {clients} clients", compared([row for row in rows if cell_of(row) == (model, clients)]))
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


def named(way: str, clients: int, options: argparse.Namespace) -> str:
    """A way's name, with the number of NVFlare's processes where they are fewer than the clients."""
    processes = options.nvflare_processes or clients
    return f"{way}, {processes} processes" if "NVFlare" in way and processes < clients else way


def kept(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that the JSON has, with ``--add``; those of another processor are refused."""
    file = options.out / f"{options.name}.json"
    if not options.add or not file.exists():
        return []
    content = json.loads(file.read_text())
    before, now = content["measured_on"]["machine"]["cpu"], processor()
    if before != now:
        raise SystemExit(f"{file} is from {before}, and this is {now}: give another --name")
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def whose(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["model"], row["clients"], row["way"]


def cell_of(row: dict[str, Any]) -> tuple[str, int]:
    return row["model"], row["clients"]


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one table: rates, and how many times one client at a time goes into each way."""
    first = next((row for row in rows if row["way"] == FIRST), None)
    made = []
    for row in rows:
        shown = {key: row[key] for key in ("way", "start_s", "round_s", "peak_mib", "processes", "mib", "loss")}
        shown["clients_per_s"] = row["clients"] / row["round_s"]
        if first:
            tokens = first["tokens"]
            shown["tokens_per_s"] = tokens / row["round_s"]
            shown |= {f"{key}_ratio": row[key] / first[key] for key in ("start_s", "round_s", "peak_mib")}
        made.append(shown)
    return made


def versions_of(python: Path) -> dict[str, str] | None:
    """The versions in a peer's environment; None without one."""
    if not python.exists():
        return None
    code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return {name: found[name] for name in ("torch", "transformers", "peft", "flwr", "ray", "nvflare") if name in found}


if __name__ == "__main__":
    main()
