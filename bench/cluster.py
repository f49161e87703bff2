"""FedLEASE's allocation at scale: distances between 1,000 clients with 48 modules of 1024 x 4, and their clusters.

Each measurement runs in a process of its own, whose peak memory counts everything: Python, torch, the input (786 MB).
Targets: seconds, and under 2 GB. A loop over pairs is timed on few clients and scaled up by the number of pairs.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from _harness import arguments, table, write

from coterie.ops.cluster import cluster, distances, lora_distances
from coterie.ops.streams import stream

GROUPS = 8


def loras(clients: int, modules: int, d: int, rank: int, name: str) -> list[list[torch.Tensor]]:
    """Random matrices [d, rank] (float32) of clients in a few groups."""
    draw = stream(0, name)
    centres = [[torch.randn(d, rank, generator=draw) for _ in range(modules)] for _ in range(GROUPS)]
    return [
        [torch.randn(d, rank, generator=draw).mul_(2).add_(centre) for centre in centres[client % GROUPS]]
        for client in range(clients)
    ]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB


def work(task: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(task["threads"])
    clients, modules, d, rank = (task[name] for name in ("clients", "modules", "d", "rank"))
    imported = peak_mib()
    b = loras(clients, modules, d, rank, "B")
    a = [[m.T for m in client] for client in loras(clients, modules, d, rank, "A")] if task["feature"] == "BA" else []
    with_input = peak_mib()
    start = time.perf_counter()
    if task["feature"] == "pairs":
        pairwise(b)
        return {**task, "distance_s": time.perf_counter() - start}
    found = distances(b) if task["feature"] == "B" else lora_distances(a, b, task["feature"])
    middle = time.perf_counter()
    clusters = cluster(found, task["max_clusters"])
    return {
        **task,
        "distance_s": middle - start,
        "cluster_s": time.perf_counter() - middle,
        "clusters_found": clusters.k,
        "imported_mib": imported,
        "with_input_mib": with_input,
        "peak_mib": peak_mib(),
    }


def pairwise(b: list[list[torch.Tensor]]) -> None:
    """The distances pair by pair and module by module, as one writes them from the formula."""
    for i, mine in enumerate(b):
        for other in b[:i]:
            for x, y in zip(mine, other, strict=True):
                1 - torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0).item()


def apart(**task: Any) -> dict[str, Any]:
    """:func:`work` in a process of its own."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = arguments(__doc__ or "", lambda parser: parser.add_argument("--task", help="for the processes it starts"))
    if options.task:
        print(json.dumps(work(json.loads(options.task))))
        return
    size = {"modules": 48, "d": 1024, "rank": 4, "max_clusters": 16, "threads": options.threads}
    clients, few, products, repeats = 1000, 24, 200, 3
    if options.quick:
        size |= {"modules": 2, "d": 16}
        clients, few, products, repeats = 20, 4, 20, 1
    runs = [apart(feature="B", clients=clients, **size) for _ in range(repeats)]
    runs.sort(key=lambda run: run["distance_s"])
    whole, product = runs[len(runs) // 2], apart(feature="BA", clients=products, **size)
    naive = apart(feature="pairs", clients=few, **size)
    scale = clients * (clients - 1) / (few * (few - 1))
    shown = ("feature", "clients", "modules", "distance_s", "cluster_s", "clusters_found", "with_input_mib", "peak_mib")
    table("allocation", [{name: run[name] for name in shown} for run in (whole, product)])
    found = {
        "runs": runs,
        "product": product,
        "loop_over_pairs": {"measured": naive, "scaled_to_all_pairs_s": naive["distance_s"] * scale},
        "targets": {
            "seconds": {"worst": max(run["distance_s"] + run["cluster_s"] for run in runs), "at_most": 30.0},
            "peak_gb": {"worst": max(run["peak_mib"] for run in runs) * 2**20 / 1e9, "at_most": 2.0},
        },
    }
    table("targets", [{"target": name, **value} for name, value in found["targets"].items()])
    table("loop over pairs, scaled", [{"seconds": found["loop_over_pairs"]["scaled_to_all_pairs_s"]}])
    write("cluster", options, found)


if __name__ == "__main__":
    main()
