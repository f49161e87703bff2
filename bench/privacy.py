"""What differential privacy costs in accuracy: three methods on four tasks, at epsilon 1, 3 and 8 and without.

Sixteen clients on the packaged encoder, four for each of four tasks: sentiment (SST-2), question types (TREC),
entailment (SICK), six intents of a bank (CLINC150). Experts are in its last two layers. Reported is the mean test
accuracy of the clients after the last round, with the method's own way to evaluate. ``level`` is ``[privacy] unit``:
all that a client contributes, or each of its rows. Noise is drawn from the run's seed, so that the figures can be made
again. Clips and learning rates were set once, not tuned, and are the same for all.

    python examples/fetch_data.py             # once
    python bench/privacy.py --threads 1       # goes on where it was stopped: runs/privacy has a file for each case
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, banking, datasets, table, write

from coterie.config.load import check_config
from coterie.experiment import open_run, rounds_of
from coterie.ops.streams import stream
from coterie.runs.events import Evaluated, read_events
from coterie.runs.rounds import Runner

TASKS = {"sst2": 2, "trec": 6, "sick": 3, "banking": 6}  # labels of each
EACH = 4  # clients of a task
EPSILONS, SEEDS = (0.0, 8.0, 3.0, 1.0), (0, 1, 2)  # 0: without
METHODS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "ffa_lora": {},
    "fedlease": {"warmup_rounds": 1, "max_experts": 8, "distance": "B"},
}
CLIPS = {"client": 0.3, "example": 1.0}
TRAIN = {
    "batch_size": 8,
    "epochs": 2,
}  # each row: all rows of a client in every step, for noise falls with their number
TARGETS = [f"layer.{n}.attention.self.{name}" for n in (4, 5) for name in ("query", "value")]


@dataclass(frozen=True)
class Size:
    """Rounds, and how many rows a client trains on and is tested on."""

    rounds: int = 4
    train: int = 36
    test: int = 36


QUICK = Size(1, 6, 6)


@dataclass(frozen=True)
class Case:
    method: str
    level: str  # "none", "client" or "example"
    epsilon: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.level}-{self.epsilon:g}-{self.seed}"


def plan(levels: list[str]) -> Iterator[Case]:
    for seed in SEEDS:
        for method in ("local", *METHODS):
            yield Case(method, "none", 0.0, seed)
        for level in levels:
            for epsilon in EPSILONS[1:]:
                yield from (Case(method, level, epsilon, seed) for method in METHODS)


def rows_of(data: Path | None, work: Path, size: Size, seed: int) -> list[dict[str, Any]]:
    """Write every client's rows, the same number of each label; returns the entries of ``[data] clients``.

    They are drawn from the shortest texts of each label, which take the least time. Without ``data``, made up.
    """
    entries = []
    for task, labels in TASKS.items():
        wanted = {"train": size.train // labels, "validation": 1, "test": size.test // labels}
        chosen: dict[str, list[dict[str, Any]]] = {f"{i}-{split}": [] for i in range(EACH) for split in wanted}
        for label in range(labels):
            count = EACH * sum(wanted.values())
            texts = _texts(data, task, label)[: 2 * count]
            order = torch.randperm(len(texts), generator=stream(seed, "privacy", task, label)).tolist()[:count]
            assert len(order) == count, f"{task} has too few rows of label {label}"
            for i in range(EACH):
                for split, number in wanted.items():
                    chosen[f"{i}-{split}"] += [texts[order.pop()] for _ in range(number)]
        for name, rows in chosen.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (work / f"{seed}-{task}-{name}.jsonl").write_text(lines, encoding="utf-8")
        names = [f"{task} {label}" for label in range(labels)]
        files = [{s: f"{seed}-{task}-{i}-{s}.jsonl" for s in wanted} for i in range(EACH)]
        entries += [{"id": f"{task}-{i}", "group": task, "labels": names, **of} for i, of in enumerate(files)]
    return entries


def _texts(data: Path | None, task: str, label: int) -> list[dict[str, Any]]:
    """A label's rows, the shortest first."""
    if data is None:
        return [{"text": f"{task} {label} {i}", "label": label} for i in range(200)]
    folder = data / task
    lines = [line for s in ("train", "test") for line in (folder / f"{s}.jsonl").read_text("utf-8").splitlines()]
    found = {line: json.loads(line) for line in lines}
    mine = [row for row in found.values() if row["label"] == label]
    return sorted(mine, key=lambda row: (len(row["text"]) + len(row.get("text_pair", "")), row["text"]))


def config(case: Case, entries: list[dict[str, Any]], size: Size) -> dict[str, Any]:
    privacy: dict[str, Any] = {}
    if case.level != "none":
        privacy = {
            "unit": case.level,
            "clip": CLIPS[case.level],
            "epsilon": case.epsilon,
            "metrics": "unprotected",
            "noise_source": "seeded",
        }
    example = case.level == "example"
    return {
        "model": {"path": "minilm", "max_length": 40},
        "data": {"clients": entries},
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": TARGETS},
        "train": {"learning_rate": 1e-2, **({"batch_size": size.train, "epochs": 3} if example else TRAIN)},
        "method": {"name": case.method, **METHODS.get(case.method, {})},
        "privacy": privacy,
        "run": {"rounds": size.rounds, "seed": case.seed, "evaluate_every": size.rounds, "export": "last"},
        "engine": {
            "threads": torch.get_num_threads(),
            "device": "cpu",
            "clients_per_batch": 1 if example else 8,
            "precision": "bfloat16",
        },
    }


def measured(raw: dict[str, Any], work: Path, cache: dict[str, Any]) -> dict[str, Any]:
    """Run a case: what the clients of each task reach, and what it spent."""
    folder = work / "now"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    opened = open_run(check_config(raw), folder, work, cache)
    try:
        runner = Runner(opened.method, opened.engine, rounds_of(opened.config), folder)
        runner.run()
    finally:
        opened.engine.close()
    last = [event for event in read_events(folder / "metrics.jsonl") if isinstance(event, Evaluated)][-1]
    accuracy = {client: scores["test"]["accuracy"] for client, scores in last.clients.items()}
    guarantee = asdict(runner.private.guarantee()) if runner.private else None
    by_task = {t: statistics.fmean(v for c, v in accuracy.items() if c.startswith(f"{t}-")) for t in TASKS}
    return {"accuracy": statistics.fmean(accuracy.values()), "tasks": by_task, "guarantee": guarantee}


def rows_in(work: Path, chosen: argparse.Namespace, size: Size) -> Iterator[dict[str, Any]]:
    """Every case that is planned, measured here or before."""
    cache: dict[str, Any] = {}
    (work / "cases").mkdir(parents=True, exist_ok=True)
    levels = chosen.levels.split(",")
    cases = [Case("fedit", level, 8.0, 0) for level in levels] if chosen.quick else [*plan(levels)]
    for case in (case for case in cases if chosen.only in case.name):
        entries = rows_of(*_data(work, chosen), size, case.seed)
        raw = config(case, entries, size)
        mark = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:8]
        path = work / "cases" / f"{case.name}-{mark}.json"
        if not path.exists():
            if chosen.finished:
                continue
            path.write_text(json.dumps(measured(raw, work, cache)), encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
        print(case.name, f"{found['accuracy']:.3f}", file=sys.stderr, flush=True)
        yield asdict(case) | found


def _data(work: Path, chosen: argparse.Namespace) -> tuple[Path | None, Path]:
    """The folder of the datasets (None: made up), beside where the rows go."""
    if chosen.quick:
        return None, work
    found = datasets(chosen.data).resolve()
    link = work / "datasets"
    if not link.exists():
        link.mkdir()
        banking(found, link / "banking")
        for task in TASKS:
            if task != "banking":
                (link / task).symlink_to(found / task)
    return link, work


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["level"], row["epsilon"]), []).append(row)
    return [
        {
            "method": method,
            "level": level,
            "epsilon": epsilon or "none",
            "seeds": len(of),
            "accuracy": round(statistics.fmean(row["accuracy"] for row in of), 4),
            "deviation": round(statistics.pstdev(row["accuracy"] for row in of), 4),
            **{task: round(statistics.fmean(row["tasks"][task] for row in of), 4) for task in TASKS},
        }
        for (method, level, epsilon), of in groups.items()
    ]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the datasets (default: examples/data or ../shared/data)")
    parser.add_argument("--work", type=Path, help="rows, and a file for each case (default: runs/privacy)")
    parser.add_argument("--levels", default="client,example", help="which [privacy] unit, separated by commas")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--finished", action="store_true", help="measure nothing, only write down what is there")


def main() -> None:
    chosen = arguments(__doc__ or "", options)
    size = QUICK if chosen.quick else Size()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) if chosen.quick else (chosen.work or Path("runs/privacy")).resolve()
        rows = list(rows_in(work, chosen, size))
    found = means(rows)
    table("accuracy", found)
    write("privacy", chosen, {"size": asdict(size), "clips": CLIPS, "means": found, "rows": rows})


if __name__ == "__main__":
    main()
