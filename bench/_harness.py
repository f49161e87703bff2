"""What the benches share: interleaved timing, a table, and a JSON file that says on what it was measured."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = ("torch", "transformers", "peft", "numpy", "scipy", "scikit-learn", "coterie")


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


def interleaved(
    cases: Mapping[str, Callable[[], Callable[[], Any]]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each case in each of ``repeats`` rounds, in which all take turns.

    A case prepares itself untimed and returns what is timed. Other work on the machine so falls on all cases alike,
    and the order turns around every round, so that none always runs in the wake of the same other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-warmup, repeats):
        for name in list(cases)[:: 1 if turn % 2 else -1]:
            run = cases[name]()
            start = time.perf_counter()
            run()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """The median over the rounds of one case's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print ``rows``, which have the same keys, with those as the columns."""
    shown = Table(title=title)
    for name in rows[0]:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
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
    return {
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "machine": {
            "cpu": _cpu(),
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load": [round(value, 2) for value in os.getloadavg()],
        },
        "git": {"commit": _git("rev-parse", "HEAD"), "changed_files": len(_git("status", "--porcelain").splitlines())},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip()
