"""Warm-up LoRAs and representations of clients on real text, for `compare.py`: what FedLEASE's clusters are made of.

For every seed and number of rows, 28 clients of seven datasets: sst2 in three disjoint parts (as it is, again, and
with its labels turned round), trec in two, mrpc and sick. Each client trains alone, as in FedLEASE's warm-up, and its
LoRA is kept after every round; beside it, the mean input of each target in the frozen base over 5, 20 and all of its
rows. Nothing is averaged, so any subset of the clients is a federation. A collection that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coterie import codec
from coterie.compute.client import LocalCompute
from coterie.config.load import check_config
from coterie.engines.local import LocalEngine
from coterie.experiment import open_run
from coterie.methods.parts import lora_of
from coterie.requests import Observe
from coterie.types import ClientId, Tensors

PARTS = {  # dataset: of which it is a part, one row in how many, from which row on, labels turned round
    "sst2": ("sst2", 3, 0, False),
    "sst2-again": ("sst2", 3, 1, False),
    "sst2-turned": ("sst2", 3, 2, True),
    "trec": ("trec", 2, 0, False),
    "trec-again": ("trec", 2, 1, False),
    "mrpc": ("mrpc", 1, 0, False),
    "sick": ("sick", 1, 0, False),
}
FEW, SOME, ALL = 5, 20, 0  # rows of a representation


@dataclass(frozen=True)
class Collected:
    """``loras[round][client]``, ``representations[rows][client]`` (0: all rows), each client's dataset and loss."""

    groups: Mapping[ClientId, str]
    loras: Mapping[int, Mapping[ClientId, Tensors]] = field(default_factory=dict)
    losses: Mapping[int, Mapping[ClientId, float]] = field(default_factory=dict)
    representations: Mapping[int, Mapping[ClientId, Tensors]] = field(default_factory=dict)


def prepare(data: Path, folder: Path) -> list[str]:
    """Write the datasets of ``PARTS`` from the public ones in ``data``; returns their folders."""
    for name, (source, step, first, turned) in PARTS.items():
        made = folder / name
        if (made / "test.jsonl").exists():
            continue
        made.mkdir(parents=True, exist_ok=True)
        (made / "info.json").write_text((data / source / "info.json").read_text())
        for split in ("train", "validation", "test"):
            lines = (data / source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[first::step]
            rows = [json.loads(line) for line in lines]
            rows = [{**row, "label": 1 - row["label"]} for row in rows] if turned else rows
            (made / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [str(folder / name) for name in PARTS]


def config_of(datasets: list[str], clients: int, rows: int, rounds: int, seed: int) -> dict[str, Any]:
    """The config of `examples/four-tasks.toml` with these datasets and nothing but warm-up."""
    return {
        "model": {"path": "minilm", "max_length": 128},
        "data": {
            "datasets": datasets,
            "train_rows": rows,
            "validation_rows": 1,
            "test_rows": 6,
            "partition": {"name": "by_dataset", "clients": clients, "stratify": True},
        },
        "lora": {"rank": 4},
        "train": {"learning_rate": 2e-3, "batch_size": 8, "epochs": 2},
        "method": {"name": "fedlease", "warmup_rounds": 1},
        "run": {"rounds": rounds + 1, "seed": seed},
        "engine": {"threads": torch.get_num_threads(), "precision": "bfloat16", "clients_per_batch": 7},
    }


def collect(raw: dict[str, Any], rounds: int) -> Collected:
    """The LoRAs of ``rounds`` rounds of warm-up and the representations of one federation."""
    with tempfile.TemporaryDirectory() as folder:
        opened = open_run(check_config(raw), Path(folder), Path(folder), {})
        method, engine = opened.method, opened.engine
        assert isinstance(engine, LocalEngine)
        state = method.init(engine.spec, engine.clients)
        loras: dict[int, dict[ClientId, Tensors]] = {}
        losses: dict[int, dict[ClientId, float]] = {}
        for rnd in range(1, rounds + 1):  # nothing is aggregated, so every round is one of warm-up
            sent = dict(engine.train(method, method.configure(state, engine.clients, rnd), rnd))
            replies = {c: d.reply for c, d in sorted(sent.items()) if d.reply}
            loras[rnd] = {c: lora_of(reply.tensors) for c, reply in replies.items()}
            losses[rnd] = {c: float(reply.info["loss"]) for c, reply in replies.items()}
        representations = {rows: dict(_representations(engine, method, rows)) for rows in (FEW, SOME, ALL)}
        return Collected({c.id: str(c.group) for c in engine.clients}, loras, losses, representations)


def _representations(engine: LocalEngine, method: Any, rows: int) -> Iterator[tuple[ClientId, Tensors]]:
    ins = next(iter(method.configure(method.init(engine.spec, engine.clients), engine.clients, 1).values()))
    for client in engine.federation.clients:
        bank = method.bank(ins, client.info, method.begin(engine.spec, client.info))  # B = 0: the frozen base
        request = Observe(bank, "train", ("directions",), examples=rows)
        yield client.info.id, LocalCompute(engine.workplace, client, 1).observe(request).directions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the collections")
    parser.add_argument("--data", type=Path, required=True, help="folder of the public datasets")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 24])
    parser.add_argument("--clients", type=int, default=4, help="of each dataset")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets = prepare(options.data, options.out / "data")
    for seed in options.seeds:
        for rows in options.rows:
            path = options.out / f"rows-{rows}-seed-{seed}.bin"
            if not path.exists():
                made = collect(config_of(datasets, options.clients, rows, options.rounds, seed), options.rounds)
                path.with_suffix(".part").write_bytes(codec.encode(made))
                path.with_suffix(".part").rename(path)
                print(path.name, flush=True)


if __name__ == "__main__":
    main()
