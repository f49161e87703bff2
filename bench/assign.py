"""FedAMoLE's assignment of a round, at scale: all modules of a model, 2 clients an expert, 2 to 8 experts a client.

Affinities are softmaxes over clients of random scores: `flat`, `peaked` (ten times the scores), and `alike`, where all
experts want nearly the same clients: the hardest found. Against linprog with scipy's own settings, on one thread on a
few modules, scaled up: its time, and how much of the sum it misses. Target: 300 x 100 x 48, flat and peaked, in 10 s.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
from _harness import arguments, interleaved, table, write
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog

from coterie.ops.assign import Limits, assign
from coterie.ops.streams import stream_seed

Array = NDArray[np.float64]
LIMITS = Limits(clients_per_expert=2, min_experts=2, max_experts=8)
SIZES = ((30, 10, 12), (100, 50, 24), (300, 100, 48))  # experts, clients, modules
KINDS = ("flat", "peaked", "alike")
AT_MOST_S = 10.0


def affinity(kind: str, experts: int, clients: int, modules: int) -> Array:
    draw = np.random.default_rng(stream_seed(0, kind, experts, clients))
    scores = draw.standard_normal((modules, experts, clients))
    if kind == "alike":
        scores = draw.standard_normal((modules, 1, clients)) + 0.1 * scores
    powers = np.exp((1 if kind == "flat" else 10) * scores)
    return np.asarray(powers / powers.sum(axis=2, keepdims=True))


def as_it_comes(scores: Array) -> float:
    """The sum that linprog finds for one module, with nothing set but the problem."""
    experts, clients = scores.shape
    rows = sparse.kron(sparse.eye_array(experts), np.ones((1, clients)))
    columns = sparse.csc_array(sparse.kron(np.ones((1, experts)), sparse.eye_array(clients)))
    found = linprog(
        -scores.ravel(),
        sparse.vstack([columns, -columns]),
        np.repeat([LIMITS.max_experts, -LIMITS.min_experts], clients),
        rows,
        np.full(experts, LIMITS.clients_per_expert),
        bounds=(0, 1),
    )
    return float(scores.ravel() @ found.x.round())


def measure(kind: str, size: tuple[int, int, int], threads: int, repeats: int, few: int) -> dict[str, Any]:
    experts, clients, modules = size
    scores = affinity(kind, experts, clients, modules)
    sums = (scores * assign(scores, LIMITS))[:few].sum(axis=(1, 2))  # this warms up, too
    run = {f"{n}": partial(assign, scores, LIMITS, threads=n) for n in sorted({1, threads})}
    times = interleaved({name: (lambda work=work: work) for name, work in run.items()}, repeats, warmup=0)
    start = time.perf_counter()
    plain = [as_it_comes(one) for one in scores[:few]]
    plain_s = (time.perf_counter() - start) * modules / len(plain)
    return {
        "experts": experts,
        "clients": clients,
        "modules": modules,
        "affinity": kind,
        "one_thread_s": times.median("1"),
        "one_thread_cpu_s": float(np.median(times.cpu["1"])),
        "threads_s": times.median(str(threads)),
        "threads_gain": 1 / times.ratio(str(threads), "1"),
        "worst_s": max(times.wall[str(threads)]),
        "linprog_s": plain_s,
        "linprog_misses": max(0.0, float((sums - plain).max())),
    }


def main() -> None:
    options = arguments(__doc__ or "")
    sizes, repeats, few = (((30, 10, 2),), 1, 1) if options.quick else (SIZES, 3, 4)
    rows = [measure(kind, size, options.threads, repeats, few) for size in sizes for kind in KINDS]
    table("assignment", rows)
    worst = max(row["worst_s"] for row in rows if row["modules"] == sizes[-1][2] and row["affinity"] != "alike")
    targets = {"seconds": {"worst": worst, "at_most": AT_MOST_S}}
    table("targets", [{"target": name, **value} for name, value in targets.items()])
    write("assign", options, {"limits": vars(LIMITS), "rows": rows, "targets": targets})


if __name__ == "__main__":
    main()
