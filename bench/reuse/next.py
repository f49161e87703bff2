"""One to the next: the experts of finished FedLEASE runs as SmartFed's pool, for clients with 24 rows each.

The runs are those of ``bench/study/run.py four-tasks --methods fedlease``. Each is followed by a federation of the same
four tasks, of which none of its rows was trained on before: two clients for each task, 24 rows each. Test accuracy by
round, bytes, and the rounds that SmartFed takes to what FedIT reaches in nine.

    python bench/reuse/next.py --run runs/study/four-tasks/fedlease-train.learning_rate-4e-3-0 --run ...
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
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
SMARTFED = {"name": "smartfed", "active": 4}
CASES: dict[str, Mapping[str, Any]] = {
    "FedIT": {"name": "fedit"},
    "local": {"name": "local"},
    "SmartFed, paper": SMARTFED,
    "SmartFed, signed": {**SMARTFED, "router": "signed", "router_rate": 10.0},
    "SmartFed, response": {**SMARTFED, "router": "response", "router_rate": 10.0},
    "SmartFed, response + fresh": {**SMARTFED, "router": "response", "router_rate": 10.0, "fresh_rank": 4},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, action="append", required=True, help="a finished FedLEASE run; repeatable")
    parser.add_argument("--work", type=Path, default=Path("runs/next"), help="pools and runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: bench/results)")
    parser.add_argument("--rate", type=float, default=4e-3, help="[train] learning_rate")
    parser.add_argument("--only", default="", help="these cases alone, with ; between them")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, cache, rows = options.work.resolve(), dict[str, Any](), []
    for before in options.run:
        folder = work / before.resolve().name
        if not (folder / "pool" / POOL_FILE).exists():
            experts = sorted((before / "experts").iterdir())
            write_pool(folder / "pool", build_pool([f"{path.name}={path}" for path in experts]))
        for name in options.only.split(";") if options.only else CASES:
            pool = {"pool": str(folder / "pool")} if CASES[name]["name"] == "smartfed" else {}
            out = folder / f"{name}-{options.rate:g}".replace(" ", "-").replace(",", "")
            if not (out / "summary.json").exists():
                made = check_config(config(before, folder, {**CASES[name], **pool}, options.rate))
                run(made, out, root=work, resume=(out / "config.json").exists(), cache=cache)
            rows.append({"case": name, "run": before.name, "rate": options.rate, **row_of(out)})
            print(before.name, name, *(f"{value:.3f}" for value in rows[-1]["test"]), flush=True)
    table(
        "test accuracy by round", [{"case": r["case"], "run": r["run"], **dict(enumerate(r["test"], 1))} for r in rows]
    )
    if options.only:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"bench": "next", "quick": False, "rows": rows, "measured_on": measured_on()}
    (options.out / "next.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
