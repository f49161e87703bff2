"""Clients whose rows differ in length, many in a forward pass: what grouping them by length and torch.compile gain.

Sixteen clients on the packaged encoder, each with rows around a length of its own (8 to 80 tokens), a plain LoRA of
rank 8 with dropout 0.05, four clients a pass: in the order in which they come, grouped as the engine groups them, and
grouped with the base's frozen parts compiled. Compiling takes a while once; the table says how long.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _harness import arguments, interleaved, table, write
from batched import Case, asked_of, make_workplace

from coterie.compute.batched import train_together
from coterie.compute.client import LocalCompute
from coterie.compute.workplace import Workplace
from coterie.engines.grouping import Load, _mean_longest, cost, grouped
from coterie.nn.compiled import compile_frozen
from coterie.ops.streams import stream
from coterie.requests import Train

ROWS, LONGEST = 4, 80
COMPILERS = ("c++", "g++", "clang++")
Asked = list[tuple[LocalCompute, Train]]


def uneven(workplace: Workplace, case: Case, clients: int, steps: int) -> Asked:
    """What the clients ask; each one's rows cut to 0.75 to 1.25 of a length of its own."""
    asked, draw = asked_of(workplace, case, clients, steps), stream(0, "lengths")
    for compute, _ in asked:
        own = 8 + (LONGEST * 0.8 - 8) * float(torch.rand((), generator=draw))
        key = compute.client.info.id, "train"
        cut = [max(4, round(own * (0.75 + 0.5 * float(torch.rand((), generator=draw))))) for _ in workplace.cache[key]]
        workplace.cache[key] = [
            replace(row, ids=row.ids[:n], types=row.types[:n] if row.types else None)
            for row, n in zip(workplace.cache[key], cut, strict=True)
        ]
    return asked


def passes(workplace: Workplace, asked: Asked, size: int) -> dict[str, list[Asked]]:
    """The clients in groups of ``size``, in the order in which they come and as the engine groups them."""
    loads = []
    for number, (compute, _) in enumerate(asked):
        lengths = [len(row.ids) for row in workplace.cache[compute.client.info.id, "train"]]
        loads.append(Load(number, -(-len(lengths) // ROWS), ROWS, _mean_longest(lengths, ROWS)))
    as_they_come = [loads[start : start + size] for start in range(0, len(loads), size)]
    groups = {"as they come": as_they_come, "grouped": grouped(loads, size)}
    for name, of in groups.items():
        print(f"{name}: {sum(map(cost, of)):,.0f} tokens of cost", flush=True)
    return {name: [[asked[one.number] for one in group] for group in of] for name, of in groups.items()}


def run_of(groups: list[Asked]) -> Callable[[], Callable[[], Any]]:
    def run() -> None:
        for group in groups:
            train_together(group)

    return lambda: run


def measure(precision: str, clients: int, steps: int, size: int, repeats: int) -> list[dict[str, Any]]:
    case = Case(ROWS, LONGEST, precision, "cpu", "minilm")
    plain, compiled = make_workplace(case), make_workplace(case)
    cases = passes(plain, uneven(plain, case, clients, steps), size)
    about: dict[str, float] = {}
    if any(map(shutil.which, COMPILERS)):
        begun = time.perf_counter()
        parts = compile_frozen(compiled.base)
        cases["grouped, compiled"] = passes(compiled, uneven(compiled, case, clients, steps), size)["grouped"]
        run_of(cases["grouped, compiled"])()()
        about = {"parts": parts, "first_seconds": time.perf_counter() - begun}
    else:
        print("not compiled: there is no C++ compiler", flush=True)
    runs = {name: run_of(groups) for name, groups in cases.items()}
    times = interleaved(runs, repeats, warmup=1)
    return [
        {
            "precision": precision,
            "way": name,
            "seconds": times.median(name),
            "speedup": times.ratio("as they come", name),
            "speedup_of_cpu_time": times.cpu_ratio("as they come", name),
            "over_grouped": times.ratio("grouped", name),
            **(about if "compiled" in name else {}),
        }
        for name in runs
    ]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])


def main() -> None:
    options = arguments(__doc__ or "", add)
    clients, steps, size, repeats = (4, 1, 2, 1) if options.quick else (16, 3, 4, 7)
    rows = [row for precision in options.precisions for row in measure(precision, clients, steps, size, repeats)]
    table(f"{clients} clients of uneven rows, {size} a pass", rows)
    write("uneven", options, {"clients": clients, "steps": steps, "per_pass": size, "repeats": repeats, "rows": rows})


if __name__ == "__main__":
    main()
