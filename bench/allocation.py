"""Which distance finds the clients' jobs, after how much warm-up: FedLEASE's allocation on real text.

Every client trains alone, as in FedLEASE's warm-up; after each round the clients are clustered by B (the paper's), A
and B A. The adjusted Rand index compares the clusters with the datasets that the clients were cut from: 1 is exact.
No target: this tells how sure the allocation is, for bench/results/fedlease.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _harness import arguments, datasets, table, write
from sklearn.metrics import adjusted_rand_score

from coterie.comparison import config_for
from coterie.config.load import load_raw, override
from coterie.experiment import open_run
from coterie.ops.cluster import cluster, lora_distances
from coterie.types import Key, Part

ROOT = Path(__file__).parents[1]
QUICK = ["data.train_rows=8", "data.validation_rows=1", "data.test_rows=1", "data.partition.clients=1"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "four-tasks.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-clusters", type=int, default=8)
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="section.key=value")


def rows_of(raw: dict[str, Any], seed: int, rounds: int, most: int, root: Path) -> Iterator[dict[str, Any]]:
    """A row for each round and distance of one seed."""
    alone = ["methods.fedlease.warmup_rounds=1", "methods.fedlease.max_experts=2", f"run.rounds={rounds + 1}"]
    config = config_for(override(raw, alone), "fedlease", seed)
    with tempfile.TemporaryDirectory() as folder:
        opened = open_run(config, Path(folder), root, {})
        method, engine = opened.method, opened.engine
        state = method.init(engine.spec, engine.clients)
        truth = {c.id: c.group for c in engine.clients}
        for rnd in range(1, rounds + 1):  # nothing is aggregated, so every round is one of warm-up
            sent = dict(engine.train(method, method.configure(state, engine.clients, rnd), rnd))
            loras = {c: d.reply.tensors for c, d in sorted(sent.items()) if d.reply}
            groups = [truth[c] for c in loras]
            losses = [d.reply.info["loss"] for d in sent.values() if d.reply]
            for feature in ("B", "A", "BA"):
                a, b = (
                    [[lora[Key(t.name, 0, part)] for t in engine.spec.targets] for lora in loras.values()]
                    for part in (Part.A, Part.B)
                )
                d = lora_distances(a, b, feature)  # type: ignore[arg-type]
                known = min(len(set(groups)), len(groups) - 1)
                chosen, exact = cluster(d, most), cluster(d, known, min_clusters=known)
                yield {
                    "seed": seed,
                    "round": rnd,
                    "distance": feature,
                    "loss": sum(losses) / len(losses),
                    "chosen_k": chosen.k,
                    "rand_at_chosen_k": float(adjusted_rand_score(groups, chosen.labels)),
                    "rand_at_known_k": float(adjusted_rand_score(groups, exact.labels)),
                    "silhouettes": {str(k): round(s, 4) for k, s in chosen.silhouettes.items()},
                }


def main() -> None:
    chosen = arguments(__doc__ or "", options)
    raw, root = load_raw(chosen.config), chosen.config.parent
    changes = [f"engine.threads={chosen.threads}", *chosen.overrides]
    seeds, rounds = chosen.seeds, chosen.rounds
    if chosen.quick:  # made-up text, so that it runs without the datasets
        raw["data"]["datasets"], changes = ["demo"], [*changes, *QUICK]
        seeds, rounds = [0], 1
    raw = override(raw, changes)
    names = raw["data"]["datasets"]
    if all(name.startswith("data/") for name in names):  # the public ones, as the examples name them
        raw["data"]["datasets"] = [str(datasets() / name.removeprefix("data/")) for name in names]
    rows = [row for seed in seeds for row in rows_of(raw, seed, rounds, chosen.max_clusters, root)]
    table("clusters against datasets", [{k: v for k, v in row.items() if k != "silhouettes"} for row in rows])
    write("allocation", chosen, {"config": raw, "rows": rows})


if __name__ == "__main__":
    main()
