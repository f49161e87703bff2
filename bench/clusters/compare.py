"""Which distance finds the clients' jobs: FedLEASE's allocation by each of them, over federations of one collection.

The adjusted Rand index (1: exact) compares the clusters with what the clients' rows are of: at the right number of
clusters, and at the number that each way chooses. No client trains here: `collect.py` made what is compared.

    python bench/clusters/collect.py --out runs/clusters --data ../shared/data      # once
    python bench/clusters/compare.py --collections runs/clusters
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _harness import RESULTS, table, write
from collect import Collected
from sklearn.metrics import adjusted_rand_score

from coterie import codec
from coterie.methods.fedlease.allocation import allocate
from coterie.methods.fedlease.settings import FedLEASESettings
from coterie.types import ClientId, Tensors

MOST = 8
FOUR = ("sst2", "trec", "mrpc", "sick")
WAYS: Mapping[str, Mapping[str, Any]] = {
    "B (paper)": {"distance": "B"},
    "BA": {"distance": "BA"},
    "B centred": {"distance": "B", "centre": True},
    "BA centred": {"distance": "BA", "centre": True},
    "representation": {"distance": "representation"},
    "auto": {"distance": "auto"},
    "B, or one cluster": {"distance": "B", "min_experts": 1},
    "BA centred, or one cluster": {"distance": "BA", "centre": True, "min_experts": 1},
}
FEDERATIONS = {  # rows of a client: clients of each dataset, in the order of its parts
    "four tasks": (100, dict.fromkeys(FOUR, 4)),
    "sizes 4, 3, 2, 1": (100, dict(zip(FOUR, (4, 3, 2, 1), strict=True))),
    "sizes 1, 2, 3, 4": (100, dict(zip(FOUR, (1, 2, 3, 4), strict=True))),
    "4 + 4 + 4": (100, {"sst2": 4, "trec": 4, "mrpc": 4}),
    "four tasks, 24 rows": (24, dict.fromkeys(FOUR, 4)),
    "sst2 + sst2 turned": (100, {"sst2": 4, "sst2-turned": 4}),
    "four tasks + sst2 turned": (100, {**dict.fromkeys(FOUR, 4), "sst2-turned": 4}),
    "sst2 + sst2 turned, 24 rows": (24, {"sst2": 4, "sst2-turned": 4}),
    "sst2 alone": (100, {"sst2": 4, "sst2-again": 4}),
    "trec alone": (100, {"trec": 4, "trec-again": 4}),
}


def members(collected: Collected, numbers: Mapping[str, int]) -> dict[ClientId, str]:
    """The first clients of each dataset, and their job."""
    of: dict[str, list[ClientId]] = {}
    for client, group in sorted(collected.groups.items()):
        of.setdefault(group, []).append(client)
    return {c: name.removesuffix("-again") for name, number in numbers.items() for c in of[name][:number]}


def warm(collected: Collected, clients: Sequence[ClientId], rows: int = 0) -> dict[ClientId, Tensors]:
    """What the clients would send after one round of warm-up, with a representation over so many rows (0: all)."""
    return {c: {**collected.loras[1][c], **collected.representations[rows][c]} for c in clients}


def row(way: str, jobs: Mapping[ClientId, str], sent: Mapping[ClientId, Tensors]) -> dict[str, Any]:
    """How well one way clusters one federation. One job has no Rand index but 1 for one cluster and 0 for more."""
    known = len(set(jobs.values()))
    settings = {**WAYS[way], "warmup_rounds": 1}
    chosen = allocate(FedLEASESettings(max_experts=MOST, **settings), 0, sent, {})
    right = allocate(FedLEASESettings(experts=known, **settings), 0, sent, {}) if known > 1 else None
    ranked = sorted(chosen.silhouettes.values())
    return {
        "way": way,
        "right_k": known,
        "rand_at_right_k": _rand(jobs, right.clusters) if right else None,
        "chosen_k": chosen.num_experts,
        "rand_at_chosen_k": _rand(jobs, chosen.clusters),
        "margin": ranked[-1] - ranked[-2],
        "silhouettes": {str(k): round(s, 4) for k, s in chosen.silhouettes.items()},
        "grounds": chosen.grounds,
    }


def _rand(jobs: Mapping[ClientId, str], clusters: Mapping[ClientId, int]) -> float:
    return float(adjusted_rand_score([jobs[c] for c in clusters], list(clusters.values())))


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    for name, (number, datasets) in FEDERATIONS.items():
        for path in sorted(folder.glob(f"rows-{number}-seed-*.bin")):
            collected = codec.decode(Collected, path.read_bytes())
            jobs = members(collected, datasets)
            sent = warm(collected, list(jobs))
            for way in WAYS:
                yield {"federation": name, "seed": int(path.stem.rsplit("-", 1)[1]), **row(way, jobs, sent)}


def fewer_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The four tasks by representations over fewer rows."""
    for path in sorted(folder.glob("rows-100-seed-*.bin")):
        collected = codec.decode(Collected, path.read_bytes())
        jobs = members(collected, FEDERATIONS["four tasks"][1])
        for rows in sorted(collected.representations):
            found = row("representation", jobs, warm(collected, list(jobs), rows))
            yield {"rows": rows or 100, "seed": int(path.stem.rsplit("-", 1)[1]), **found}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each federation and way: the mean over seeds, and with how many seeds the clusters are exact."""
    lines = []
    for name in FEDERATIONS:
        for way in WAYS:
            of = [row for row in rows if row["federation"] == name and row["way"] == way]
            right = [row["rand_at_right_k"] for row in of if row["rand_at_right_k"] is not None]
            chosen = [row["rand_at_chosen_k"] for row in of]
            exact = sum(value == 1 for value in chosen)
            lines.append(
                {
                    "federation": name,
                    "way": way,
                    "rand_at_right_k": statistics.mean(right) if right else None,
                    "rand_at_chosen_k": statistics.mean(chosen),
                    "exact": f"{exact} of {len(chosen)}",
                    "chosen_k": " ".join(str(row["chosen_k"]) for row in of),
                }
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collections", type=Path, required=True, help="folder that collect.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.quick = False
    torch.set_num_threads(1)
    rows = list(rows_of(options.collections))
    lines, few = summary(rows), list(fewer_rows(options.collections))
    table("clusters against jobs", lines)
    write("clusters", options, {"summary": lines, "rows": rows, "representation_by_rows": few})


if __name__ == "__main__":
    main()
