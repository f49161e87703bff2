"""``clients_per_batch = "auto"`` against one client at a time: it must not be slower by more than noise.

FedLEASE with four experts, as ``coterie run`` takes its rounds, with rows of uneven length (half to one and a half
times the mean). Beside what ``auto`` chooses, four clients a pass show what it avoids or finds. Rounds are timed in
turns; the warm-up round, in which ``auto`` decides, is timed apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _federation import Size, Timed, config_of, made_clients
from _harness import arguments, interleaved, table, write
from _published import quiet

WAYS: dict[str, dict[str, Any]] = {
    "one": {"clients_per_batch": 1},
    "auto": {"clients_per_batch": "auto"},
    "four": {"clients_per_batch": 4},
}


@dataclass(frozen=True)
class Case:
    """Mean words of a row, rows of a step, and the precision."""

    words: int
    batch: int
    precision: str


def measure(folder: Path, case: Case, clients: int, steps: int, repeats: int) -> dict[str, Any]:
    """The ratios of processor time to one client at a time, and what ``auto`` chose."""
    size = Size(clients, steps * case.batch, 4, case.words, steps, case.batch)
    entries, cache = made_clients(folder, size), dict[str, Any]()
    method = {"name": "fedlease", "warmup_rounds": 1, "experts": 4, "allocation": "random"}
    run = {"rounds": 1000, "evaluate_every": 1000}
    timed, first = {}, {}
    for way, engine in WAYS.items():
        config = config_of(entries, size, method=method, run=run, engine={**engine, "precision": case.precision})
        timed[way] = Timed.opening(config, folder / way, folder, cache)
        began = time.process_time()
        timed[way].round()
        first[way] = time.process_time() - began
    times = interleaved({way: lambda of=of: of.round for way, of in timed.items()}, repeats, warmup=1)
    auto = timed["auto"].engine.together
    assert auto is not None
    assert auto.auto is not None
    assert auto.auto.now is not None
    return {
        "precision": case.precision,
        "words": case.words,
        "rows": case.batch,
        "auto": auto.clients_per_batch,
        "reason": auto.auto.now.reason,
        "auto_over_one": times.cpu_ratio("auto", "one"),
        "four_over_one": times.cpu_ratio("four", "one"),
        "first_round_seconds": first,
        "seconds": times.median("one"),
    }


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--words", type=int, nargs="+", default=[6, 22, 44])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])


def main() -> None:
    options = arguments(__doc__ or "", add)
    if options.quick:
        options.clients, options.steps, options.repeats = 4, 1, 1
        options.words, options.rows, options.precisions = [6], [1], ["float32"]
    quiet()
    found = []
    for precision in options.precisions:
        for words in options.words:
            for rows in options.rows:
                with tempfile.TemporaryDirectory() as name:
                    case = Case(words, rows, precision)
                    found.append(measure(Path(name), case, options.clients, options.steps, options.repeats))
                    table("processor time over one client at a time", found[-1:])
    write("auto", options, {"clients": options.clients, "steps": options.steps, "cases": found})


if __name__ == "__main__":
    main()
