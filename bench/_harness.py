"""What the benches share: interleaved timing, a table, and a JSON file that says on what it was measured."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from coterie.machine import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DATA = (HERE.parent / "examples" / "data", HERE.parents[1] / "shared" / "data")


def arguments(
    description: str, add: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
) -> argparse.Namespace:
    """The options of every bench: ``--quick`` (small sizes, one repeat: does it run?), ``--out``, ``--threads``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: a smoke test, no figures")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: bench/results)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch's threads")
    add(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def datasets(chosen: Path | None = None) -> Path:
    """The folder of the public datasets: ``chosen``, or the first of ``DATA`` that is there."""
    for folder in DATA if chosen is None else (chosen,):
        if folder.is_dir():
            return folder
    tried = " and no ".join(map(str, DATA)) if chosen is None else str(chosen)
    raise SystemExit(f"no datasets: there is no {tried}; run `python examples/fetch_data.py` to download them")


def banking(data: Path, folder: Path) -> Path:
    """CLINC150's banking domain as a dataset of its own, made once."""
    return domain(data, "banking", folder)


def domain(data: Path, name: str, folder: Path) -> Path:
    """One of CLINC150's domains, with its fifteen intents, as a dataset of its own, made once."""
    if (folder / "info.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    info = json.loads((data / "clinc150" / "info.json").read_text())
    numbers: dict[int, int] = {}
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (data / "clinc150" / f"{split}.jsonl").read_text().splitlines()]
        own = [row for row in rows if row["domain"] == name]
        for row in own:
            row["label"] = numbers.setdefault(row["label"], len(numbers))
        lines = [json.dumps({"text": row["text"], "label": row["label"]}) for row in own]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    labels = [info["labels"][old] for old in numbers]
    (folder / "info.json").write_text(json.dumps({**info, "labels": labels}))
    return folder


@dataclass(frozen=True)
class Times:
    """Seconds of each case in each round: on the clock, and of this process's work (all threads together)."""

    wall: Mapping[str, Sequence[float]]
    cpu: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Seconds on the clock."""
        return statistics.median(self.wall[name])

    def ratio(self, name: str, to: str) -> float:
        """The median over the rounds of one case's time over another's in the same round, on the clock."""
        return statistics.median(a / b for a, b in zip(self.wall[name], self.wall[to], strict=True))

    def cpu_ratio(self, name: str, to: str) -> float:
        """The same by processor time, which other work on the machine disturbs less (with one thread, hardly)."""
        return statistics.median(a / b for a, b in zip(self.cpu[name], self.cpu[to], strict=True))


def interleaved(cases: Mapping[str, Callable[[], Callable[[], Any]]], repeats: int, warmup: int = 2) -> Times:
    """The times of each case in each of ``repeats`` rounds, in which all take turns.

    A case prepares itself untimed and returns what is timed. Other work on the machine so falls on all cases alike,
    and the order turns around every round, so that none always runs in the wake of the same other.
    """
    wall: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-warmup, repeats):
        for name in list(cases)[:: 1 if turn % 2 else -1]:
            run = cases[name]()
            start, work = time.perf_counter(), time.process_time()
            run()
            if turn >= 0:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - work)
    return Times(wall, cpu)


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print ``rows`` with their keys as the columns."""
    shown, names = Table(title=title), list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        values = [row.get(name, "") for name in names]
        shown.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values))
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


def write(name: str, options: argparse.Namespace, results: Mapping[str, Any]) -> Path:
    """Write ``NAME.json`` with the results and what they were measured on. A quick run says that it is one."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    content = {"bench": name, "quick": options.quick, **results, "measured_on": measured_on()}
    path.write_text(json.dumps(content, indent=1) + "\n")
    Console().print(f"written: {path}")
    return path


def measured_on() -> dict[str, Any]:
    """Versions, machine and commit. A load above the number of cores: others were at work too."""
    found = environment()
    threads = {"threads": torch.get_num_threads(), "load": [round(value, 2) for value in os.getloadavg()]}
    git = {"commit": _git("rev-parse", "HEAD"), "changed_files": len(_git("status", "--porcelain").splitlines())}
    return {**found, "machine": {**found["machine"], **threads}, "git": git}


def _git(*command: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip()
