"""One to the next: the experts of finished FedLEASE runs as SmartFed's pool, for clients with 24 rows each.

The runs are those of ``bench/study/run.py four-tasks --methods fedlease``. Each is followed by a federation of the same
four tasks, with none of the rows that its clients trained on: two clients for each task, 24 rows each. Test accuracy by
round, bytes, and the rounds that each method takes to FedIT's best of nine.

    python bench/reuse/next.py runs/study/four-tasks/fedlease-train.learning_rate-4e-3-*
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _harness import RESULTS, measured_on, table

from coterie.adapters.pool import POOL_FILE, write_pool
from coterie.adapters.read import build_pool
from coterie.config.load import check_config
from coterie.data.clients import load_data
from coterie.data.rows import TextRow
from coterie.experiment import run

ROUNDS = 9
SMARTFED = {"name": "smartfed", "router": "paper", "active": 4}
SIGNED = {"router": "signed", "router_rate": 30.0, "router_decay": 1.0}
CASES: dict[str, Mapping[str, Any]] = {
    "FedIT": {"name": "fedit"},
    "FedLEASE": {"name": "fedlease", "warmup_rounds": 1, "max_experts": 6},
    "local": {"name": "local"},
    "SmartFed": SMARTFED,
    "SmartFed + fresh": {**SMARTFED, "fresh_rank": 4},
    "SmartFed, signed": {**SMARTFED, **SIGNED},
    "SmartFed, signed + fresh": {**SMARTFED, **SIGNED, "router_decay": 0.7, "fresh_rank": 4},
}


def kept_back(before: Path, folder: Path) -> list[str]:
    """The datasets of the run ``before`` without the rows that its clients trained on."""
    recorded = json.loads((before / "config.json").read_text())
    config, root = check_config(recorded["config"]), Path(recorded["root"])
    data = load_data(config.data, "classification", config.run.seed, root)
    used = {(row.text, row.text_pair) for c in data.clients for row in c.splits["train"] if isinstance(row, TextRow)}
    made = []
    for entry in recorded["config"]["data"]["datasets"]:
        source, out = root / entry, folder / Path(entry).name
        made.append(str(out))
        if (out / "info.json").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation", "test"):
            lines = (source / f"{split}.jsonl").read_text().splitlines()
            rows = [(line, json.loads(line)) for line in lines]
            left = [line for line, row in rows if (row["text"], row.get("text_pair")) not in used]
            (out / f"{split}.jsonl").write_text("\n".join(left) + "\n")
        (out / "info.json").write_text((source / "info.json").read_text())
    return made


def config(before: Path, folder: Path, method: Mapping[str, Any], rate: float) -> dict[str, Any]:
    seed = json.loads((before / "config.json").read_text())["config"]["run"]["seed"]
    return {
        "model": {"path": "minilm", "max_length": 128},
        "data": {
            "datasets": kept_back(before, folder / "data"),
            "partition": {"name": "by_dataset", "clients": 2, "stratify": True},
            "train_rows": 24,
            "validation_rows": 40,
            "test_rows": 60,
        },
        "lora": {"rank": 4},
        "train": {"learning_rate": rate, "batch_size": 4, "epochs": 2},
        "method": dict(method),
        "run": {"rounds": ROUNDS, "seed": seed},
        "engine": {"threads": torch.get_num_threads(), "precision": "bfloat16", "clients_per_batch": 4},
    }


def row_of(out: Path) -> dict[str, Any]:
    """Test and validation accuracy by round, and the KiB that all clients moved in each."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    means = [event["mean"] for event in events if event["event"] == "evaluation"]
    moved = [
        sum(c["bytes_up"] + c["bytes_down"] for c in event["clients"].values()) // 1024
        for event in events
        if event["event"] == "round"
    ]
    return {split: [mean[split]["accuracy"] for mean in means] for split in ("test", "validation")} | {"KiB": moved}


def with_speed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` with the rounds and the KiB that each took to FedIT's best test accuracy after the same run."""
    best = {row["run"]: max(row["test"]) for row in rows if row["case"] == "FedIT"}
    made = []
    for row in rows:
        there = [n for n, value in enumerate(row["test"], 1) if value >= best.get(row["run"], 2.0)]
        rounds = there[0] if there else None
        made.append({**row, "rounds": rounds, "KiB to it": sum(row["KiB"][:rounds]) if rounds else None})
    return made


def averaged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each case: its test accuracy by round, mean over the runs."""
    return [
        {"case": case, "runs": len(own), **{str(n): mean(at) for n, at in enumerate(zip(*own, strict=True), 1)}}
        for case in dict.fromkeys(row["case"] for row in rows)
        if (own := [row["test"] for row in rows if row["case"] == case])
    ]


def pool_of(before: Path, folder: Path) -> Path:
    """The pool of the experts of the run ``before``, made where it is missing."""
    if not (folder / POOL_FILE).exists():
        write_pool(folder, build_pool([f"{path.name}={path}" for path in sorted((before / "experts").iterdir())]))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished FedLEASE runs")
    parser.add_argument("--work", type=Path, default=Path("runs/next"), help="pools and runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: bench/results)")
    parser.add_argument("--rate", type=float, default=4e-3, help="[train] learning_rate")
    parser.add_argument("--only", default="", help="these cases alone, with ; between them")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, cache, rows = options.work.resolve(), dict[str, Any](), []
    for before in options.runs:
        folder = work / before.resolve().name
        pool = pool_of(before, folder / "pool")
        for name in options.only.split(";") if options.only else CASES:
            method = {**CASES[name], **({"pool": str(pool)} if CASES[name]["name"] == "smartfed" else {})}
            out = folder / f"{name}-{options.rate:g}".replace(" ", "-").replace(",", "")
            if not (out / "summary.json").exists():
                made = check_config(config(before, folder, method, options.rate))
                run(made, out, root=work, resume=(out / "config.json").exists(), cache=cache)
            rows.append({"case": name, "run": before.name, "rate": options.rate, **row_of(out)})
            print(before.name, name, *(f"{value:.3f}" for value in rows[-1]["test"]), flush=True)
    table("test accuracy by round", averaged(rows))
    names = ("case", "run", "rounds", "KiB to it")
    table("to FedIT's best", [{name: row[name] for name in names} for row in with_speed(rows)])
    if not options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"bench": "next", "quick": False, "rows": with_speed(rows), "measured_on": measured_on()}
        (options.out / "next.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
