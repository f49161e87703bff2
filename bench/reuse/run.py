"""LoRA modules for four public datasets, reused for others: SmartFed and FedIT on the packaged encoder.

The pool: one LoRA each for sst2, trec, mrpc and sick, trained on its own on 1,500 rows. The targets: ``clinc150``, ten
domains of user requests with fifteen intents each, a client for each domain (nothing of it is in the pool); ``sst2
again``, eight clients with 24 rows each of the job that one module does. Test accuracy by round, bytes.

    python bench/reuse/run.py --data ../shared/data --seeds 0     # goes on where it was stopped; runs lie in runs/reuse
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _harness import RESULTS, measured_on, table

from coterie.adapters import build_pool
from coterie.config import check_config
from coterie.federate import federate
from coterie.pool import POOL_FILE, write_pool

MODULES = ("sst2", "trec", "mrpc", "sick")
TRAIN = {"learning_rate": 2e-3, "batch_size": 8, "epochs": 2}
METHODS: dict[str, dict[str, Any]] = {
    "SmartFed, K 4": {"name": "smartfed", "active": 4},
    "SmartFed, K 8": {"name": "smartfed", "active": 8},
    "SmartFed, K 4 + fresh": {"name": "smartfed", "active": 4, "fresh_rank": 4},
    "whole-LoRA routing": {"name": "smartfed", "granularity": "adapter", "active": 2},
    "scale one": {"name": "smartfed", "active": 8, "gate_scale": "one"},
    "no EEQA": {"name": "smartfed", "active": 4, "quota": "uniform"},
    "FedIT": {"name": "fedit"},
    "local": {"name": "local"},
}


def targets(data: Path) -> dict[str, dict[str, Any]]:
    natural = {"name": "natural", "column": "domain", "own_labels": True}
    return {
        "sst2 again": {
            "datasets": [str(data / "sst2")],
            "partition": {"name": "by_dataset", "clients": 8},
            "train_rows": 24,
            "validation_rows": 8,
            "test_rows": 50,
        },
        "clinc150": {
            "datasets": [str(data / "clinc150")],
            "partition": natural,
            "train_rows": 45,
            "validation_rows": 15,
            "test_rows": 60,
        },
    }


def config(data: dict[str, Any], method: dict[str, Any], seed: int, rounds: int, **train: Any) -> dict[str, Any]:
    return {
        "model": {"path": "minilm", "max_length": 48},
        "data": data,
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["query", "value"]},
        "train": TRAIN | train,
        "method": method,
        "run": {"rounds": rounds, "seed": seed},
        "engine": {"threads": torch.get_num_threads(), "device": "cpu", "precision": "auto"},
    }


def make_pool(work: Path, data: Path, cache: dict[str, Any]) -> Path:
    sources = []
    for name in MODULES:
        out = work / "modules" / name
        if not (out / "summary.json").exists():
            rows = {"train_rows": 1500, "validation_rows": 8, "test_rows": 200}
            alone = {"datasets": [str(data / name)], **rows}
            made = config(alone, {"name": "fedit"}, 0, 1, batch_size=16)
            federate(check_config(made), out, root=work, resume=(out / "config.json").exists(), cache=cache)
        found = json.loads((out / "summary.json").read_text())["mean"]["test"]["accuracy"]
        print(f"module {name}: test accuracy {found:.3f}", flush=True)
        sources.append(f"{name}={out / 'experts' / 'global'}")
    pool = work / "pool"
    if not (pool / POOL_FILE).exists():
        write_pool(pool, build_pool(sources))
    return pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the datasets")
    parser.add_argument("--work", type=Path, default=Path("runs/reuse"), help="modules, pool and runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: bench/results)")
    parser.add_argument("--seeds", default="0", help="with commas between them")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, data, cache = options.work.resolve(), options.data.resolve(), dict[str, Any]()
    pool = make_pool(work, data, cache)
    found = []
    for seed in map(int, options.seeds.split(",")):
        for target, rows in targets(data).items():
            for name, method in METHODS.items():
                own = {**method, "pool": str(pool)} if method["name"] == "smartfed" else method
                out = work / "runs" / f"{target}-{name}-{seed}".replace(" ", "-").replace(",", "")
                made = check_config(config(rows, own, seed, options.rounds))
                federate(made, out, root=work, resume=(out / "config.json").exists(), cache=cache)
                events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                accuracy = [e["mean"]["test"]["accuracy"] for e in events if e["event"] == "evaluation"]
                clients = [c for e in events if e["event"] == "round" for c in e["clients"].values()]
                row = {"target": target, "method": name, "seed": seed}
                row |= {str(rnd): value for rnd, value in enumerate(accuracy, start=1)}
                found.append(row | {"KiB": sum(c["bytes_up"] + c["bytes_down"] for c in clients) // 1024})
                print(target, name, seed, *(f"{value:.3f}" for value in accuracy), flush=True)
    table("test accuracy by round, mean over the clients", found)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"bench": "reuse", "quick": False, "rows": found, "measured_on": measured_on()}
    (options.out / "reuse.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
