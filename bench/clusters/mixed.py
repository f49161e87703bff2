"""What routing is worth where every client has two jobs: FedLEASE with each routing on a mixed federation.

Eight clients, each with two of four tasks in a ratio of its own: sst2, trec, of which domain a request of CLINC150
is, and six of its intents in a sixth domain. Every task has most of the rows of two clients and some of the rows of
two others. Clusters are known (``allocation = "oracle"``, by the task with most of the rows), so that FedLEASE's
variants differ in routing alone. FedAMoLE and baselines stand beside them. All have the learning rate that FedLEASE was
tuned to on four tasks. Every variant is held against the one without routing.

    python bench/clusters/mixed.py --out runs/mixed --seeds 0,1,2    # goes on where it was stopped
    python bench/clusters/mixed.py --out runs/mixed --seeds 0,1,2,3,4,5 --finished    # what there is, without more runs
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from _harness import datasets, measured_on, table
from _paired import against

from coterie.comparison import compare
from coterie.comparison.variants import folder_of

DOMAINS = ("banking", "travel", "home", "work", "meta")
INTENTS = ("recipe", "calories", "restaurant_reservation", "how_busy", "cook_time", "food_last")
TASKS = ("sst2", "trec", "domains", "intents")
SHARES = (0.8, 0.7, 0.75, 0.6, 0.7, 0.65, 0.6, 0.8)  # of a client's rows that are of its first task
ROWS = {"train": 80, "validation": 30, "test": 80}
CONTROL = "fedlease:routing=own"
PERSONAL = "fedlease:download=used:router=personal"
VARIANTS = (
    "fedlease:routing=adaptive",
    CONTROL,
    *(f"fedlease:routing=top_k:top_k={k}" for k in range(1, len(TASKS) + 1)),
    "fedlease:download=used",
    PERSONAL,
    *(f"{PERSONAL}:download_threshold=1:download_every={rounds}" for rounds in (4, 6, 12)),
    "fedlease:router=personal",
    "fedamole",
    "fedex_lora",
    "flexlora",
    "ifca",
    "fedit",
    "local",
)
SHOWN = ("name", "points", "interval", "ahead", "p_seeds", "p_clients", "holm")
QUICK = {"run": {"rounds": 3, "evaluate_every": 3}, "train": {"learning_rate": 2e-3, "batch_size": 8, "epochs": 1}}
CONFIG = {
    "model": {"path": "minilm", "max_length": 48},
    "lora": {"rank": 4},
    "train": {"learning_rate": 4e-3, "batch_size": 8, "epochs": 2},
    "methods": {"fedlease": {"warmup_rounds": 1, "allocation": "oracle"}},
    "run": {"rounds": 12, "evaluate_every": 3, "evaluate": "trained"},
    "engine": {"threads": 1, "precision": "bfloat16", "clients_per_batch": 8},
}


def rows_of(data: Path, task: str, split: str) -> list[dict[str, str]]:
    """The rows of one task's split, each with a text and the name of its label, which says the task."""
    folder = data / ("clinc150" if task in ("domains", "intents") else task)
    names = json.loads((folder / "info.json").read_text())["labels"]
    rows = []
    for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        label = row["domain"] if task == "domains" else names[row["label"]]
        if label in {"domains": DOMAINS, "intents": INTENTS}.get(task, names):
            rows.append({"text": row["text"], "label": f"{task}: {label}"})
    return rows


def write_clients(data: Path, folder: Path, seed: int, sizes: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Write every client's rows; yields the entries of ``[data] clients``. No row goes to two clients."""
    draw, folder = random.Random(seed), folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    left = {(task, split): rows_of(data, task, split) for split in ROWS for task in TASKS}
    for rows in left.values():
        draw.shuffle(rows)
    for number, share in enumerate(SHARES):
        first, second = TASKS[number % 4], TASKS[(number + (1 if number < 4 else 2)) % 4]
        labels: list[str] = []
        for split, size in sizes.items():
            main = round(share * size)
            rows = [left[first, split].pop() for _ in range(main)]
            rows += [left[second, split].pop() for _ in range(size - main)]
            labels = labels or sorted({row["label"] for row in rows})
            rows = [row for row in rows if row["label"] in labels]  # trec has a rare one
            (folder / f"{number}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {split: str(folder / f"{number}-{split}.jsonl") for split in ROWS}
        yield {"id": f"{number}-{first}-{second}", "group": first, "labels": labels, **files}


def write_config(data: Path, folder: Path, seed: int, quick: bool) -> Path:
    """The config of one seed's federation, with its rows beside it."""
    sizes = {split: size // 8 for split, size in ROWS.items()} if quick else ROWS
    clients = write_clients(data, folder / f"rows-{seed}", seed, sizes)
    lines = [f"[[data.clients]]\n{_keys(entry)}" for entry in clients]
    for name, keys in (CONFIG | QUICK if quick else CONFIG).items():
        nested = {f"{name}.{key}": value for key, value in keys.items() if isinstance(value, dict)}
        flat = {key: value for key, value in keys.items() if not isinstance(value, dict)}
        lines += [f"[{title}]\n{_keys(of)}" for title, of in ({name: flat} if flat else nested).items()]
    path = folder / f"mixed-{seed}.toml"
    path.write_text("\n".join(lines))
    return path


def _keys(values: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """One run: accuracy at the round that validation chose, of all clients and of the worst; MiB that travelled."""
    return {
        "seed": summary["seed"],
        "accuracy": summary["mean"]["test"]["accuracy"],
        "worst": summary["worst"]["accuracy"],
        "best_round": summary["best_round"],
        "clients": {name: of["test"]["accuracy"] for name, of in summary["clients"].items()},
        "mib": (summary["bytes"]["up"] + summary["bytes"]["down"]) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mixed"))
    parser.add_argument("--data", type=Path, help="folder of the public datasets")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(VARIANTS))
    parser.add_argument("--finished", action="store_true", help="make no run, only write down those that are finished")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few rows and rounds, no figures")
    options = parser.parse_args()
    rows, methods = [], options.methods.split(",")
    for seed in map(int, options.seeds.split(",")):
        folder = options.out / f"seed-{seed}"
        if not options.finished:
            config = write_config(datasets(options.data), options.out, seed, options.quick)
            compare(config, folder, methods=methods, seeds=[seed])
        for method in methods:
            path = folder / folder_of(method, seed) / "summary.json"
            if path.exists() or not options.finished:
                rows.append({"method": method, **row(json.loads(path.read_text()))})
    table("routing where clients have two jobs", [{k: v for k, v in of.items() if k != "clients"} for of in rows])
    tests = against({(of["method"], of["seed"]): of["clients"] for of in rows}, CONTROL)
    table("less the own expert alone, in points", [{k: line[k] for k in SHOWN} for line in tests])
    found = {"quick": options.quick, "config": CONFIG, "shares": SHARES, "rows": rows, "tests": tests}
    found["measured_on"] = measured_on()
    (options.out / "mixed.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
