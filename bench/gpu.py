"""Everything that a GPU is needed for, in under ten minutes: tests on it, then figures against those required.

Offline, from a checkout and an environment. Golden, parity and unit tests run first, those of layers and of shared
passes on the device. Then, each in a process of its own and within its seconds: the benches layer, batched, rounds and
scaling, with the packaged encoder and with ``llama-1b`` (random weights, made on the device), in bfloat16 and in NF4;
and the trace of a few training steps, in which nothing may wait for the device.

``--quick`` takes tiny sizes, to see that all of it runs; ``--device cpu`` needs it. A stage that fails or takes too
long is named at the end, and the others still run. The exit status is 1 if a stage failed or a figure is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, table, write

HERE = Path(__file__).parent
ROOT = HERE.parent
LIMIT = 585.0  # seconds for all stages
ON_DEVICE = ("test_every_program_gets_the_answers_that_it_gets_alone", "test_engines_agree_in_float32_after_each_round")
TESTS = ["tests/golden", "tests/unit/nn", "tests/unit/compute", "tests/unit/ops"]
TESTS += [f"tests/parity/test_batched.py::{name}" for name in ON_DEVICE]
QUICK_TESTS = ["tests/golden/test_fedlease_layer.py"]
PASS = 8192  # tokens of a pass


@dataclass(frozen=True)
class Stage:
    """A command that must end within ``seconds``; it writes ``name``.json, or its last line of output is the result."""

    name: str
    command: list[str]
    seconds: float
    file: str = ""

    def run(self, folder: Path, environment: dict[str, str], left: float) -> dict[str, Any]:
        """The result, with what came of the stage and how long it took."""
        began, limit = time.perf_counter(), min(self.seconds, left)
        if limit <= 1:
            return {"stage": self.name, "outcome": "not begun: no time was left", "seconds": 0.0}
        log = folder / f"{self.name}.log"
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    self.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit,
                    check=False,
                )  # fmt: skip
                outcome = "passed" if done.returncode == 0 else f"failed with status {done.returncode}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {limit:.0f} s"
        found: dict[str, Any] = {"stage": self.name, "outcome": outcome, "seconds": time.perf_counter() - began}
        lines = log.read_text(errors="replace").splitlines()
        if outcome != "passed":
            return {**found, "log": lines[-15:]}
        path = folder / f"{self.file}.json"
        if self.file:
            return {**found, "result": json.loads(path.read_text())}
        return {**found, "summary": lines[-1] if lines else ""}


def stages(device: str, quick: bool, folder: Path) -> list[Stage]:
    """What runs, in order: first what is required, last what only describes the device."""
    python, small = sys.executable, ["--quick"] if quick else []
    llama = "llama-tiny" if quick else "llama-1b"

    def bench(name: str, seconds: float, *more: str, as_: str = "") -> Stage:
        out = folder / (as_ or name)
        command = [python, str(HERE / f"{name}.py"), "--device", device, "--out", str(out), *more, *small]
        return Stage(as_ or name, command, seconds, f"{as_ or name}/{name}")

    def probe(name: str, seconds: float) -> Stage:
        out = folder / name
        command = [python, str(HERE / "_device.py"), name, "--device", device, "--model", llama, "--out", str(out)]
        return Stage(name, [*command, *small], seconds, f"{name}/{name}")

    workers = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    pytest = [python, "-m", "pytest", "-q", "-m", "not slow", "-n", "0" if quick else str(workers), "-p"]
    pytest += ["no:cacheprovider", *(QUICK_TESTS if quick else TESTS)]
    allowed = 10.0 if quick else 1.0  # a quick run measures nothing, and a test's machine may be busy
    rows, passes = ["--rows", "1", "4", "16", "--tokens", "128"], ["--batches", "1", "4", "16", "64"]
    bfloat16 = ["--precisions", "bfloat16", "--profile", "0"]
    made = [
        Stage("tests", pytest, 170),
        probe("synchronisation", 60),
        bench("layer", 45),
        bench("batched", 90, *rows, *passes, *bfloat16),
        bench("batched", 100, "--model", llama, *rows, *passes, *bfloat16, "--budget", str(PASS), as_="batched-llama"),
        probe("nf4", 50),
        bench("scaling", 60, "--clients", "8", "64", "--precision", "bfloat16"),
        bench("rounds", 90, "--experts", "4", "--rounds", "0", "--repeats", "2", "--precision", "bfloat16"),
        bench("scaling", 60, "--model", llama, "--clients", "8", "--precision", "bfloat16", as_="scaling-llama"),
    ]
    twice = {"batched", "scaling"} if quick else set()  # with the Llama they go the same way
    return [replace(stage, seconds=allowed * stage.seconds) for stage in made if stage.name not in twice]


def figures(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is required of a device, and whether it is met."""
    layer, batched, llama, waits = (found.get(n) for n in ("layer", "batched", "batched-llama", "synchronisation"))
    made = [_figure("layer over a plain LoRA, M <= 8", _ratio(layer), at_most=1.15)]
    for rows in (1, 4, 16):
        some = [row["speedup"] for row in _rows(batched) if row["rows"] == rows]
        made.append(_figure(f"shared passes over one at a time, batches of {rows} rows", some, at_least=5))
    full = [row["of_matrix_rate"] for row in _rows(llama) if row["rows"] * row["tokens"] * row["per_pass"] == PASS]
    made.append(_figure(f"share of the matrix rate, {PASS} tokens a pass", full, at_least=0.5))
    made.append(_figure("clients' banks in a pass", [row["per_pass"] for row in _rows(llama)], at_least=64))
    known = [] if waits is None or waits["waits_per_step"] is None else [waits["waits_per_step"]]
    return [*made, _figure("waits for the device in a step", known, at_most=0)]


def _ratio(layer: dict[str, Any] | None) -> list[float]:
    return [] if layer is None else [layer["targets"]["time_ratio_up_to_8"]["worst"]]


def _rows(batched: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The cells that were measured."""
    return [] if batched is None else [row for row in batched["rows"] if "speedup" in row]


def _figure(name: str, values: list[float], at_most: float | None = None, at_least: float | None = None) -> Any:
    """The largest of ``values``, the limit, and the verdict."""
    limit = f"<= {at_most:g}" if at_most is not None else f">= {at_least:g}"
    if not values:
        return {"figure": name, "value": "-", "required": limit, "verdict": "not measured"}
    value = max(values)
    met = value <= at_most if at_most is not None else value >= (at_least or 0)
    return {"figure": name, "value": value, "required": limit, "verdict": "met" if met else "missed"}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    options = arguments(__doc__ or "", add)
    if options.device == "cpu" and not options.quick:
        print("gpu.py measures a GPU, and there is none here; with --quick it tries the way on the processor")
        return
    began, done = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models").mkdir()
        environment = {
            **os.environ,
            "COTERIE_TEST_DEVICE": options.device,
            "COTERIE_BENCH_MODELS": str(folder / "models"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        }
        for stage in stages(options.device, options.quick, folder):
            left = (10 if options.quick else 1) * LIMIT - (time.perf_counter() - began)
            done.append(stage.run(folder, environment, left))
            print(f"{stage.name}: {done[-1]['outcome']}, {done[-1]['seconds']:.0f} s", flush=True)
            for line in done[-1].get("log", ()):
                print(f"    {line}")
    found = {stage["stage"]: stage["result"] for stage in done if "result" in stage}
    required = figures(found)
    about = torch.cuda.get_device_name(0) if options.device.startswith("cuda") else options.device
    table("stages", [{key: stage[key] for key in ("stage", "outcome", "seconds")} for stage in done])
    table(f"required, on {about}", required)
    results = {"device": options.device, "name": about, "figures": required, "stages": done}
    write("gpu", options, {**results, "seconds": time.perf_counter() - began})
    failed = any(stage["outcome"] != "passed" for stage in done)
    missed = not options.quick and any(figure["verdict"] != "met" for figure in required)
    sys.exit(int(failed or missed))


if __name__ == "__main__":
    main()
