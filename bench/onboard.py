"""A client that was not there: onboarded after the run, against having taken part and against training alone.

One client of each of four public datasets is left out of a federation, onboarded into the finished run with the
experts frozen, and compared on its test rows with the same client in a run of all, and with local training of as many
epochs. Runs are kept in ``--work`` and not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from _harness import arguments, datasets, table, write

from coterie.artifacts.onboard import onboard
from coterie.config.load import check_config
from coterie.data.clients import load_data
from coterie.data.rows import ClientData, TextRow
from coterie.experiment import run
from coterie.runs.summary import SUMMARY, read_summary

NAMES = ("sst2", "trec", "mrpc", "sick")
METHODS = ("fedlease", "fedit", "fedamole")
SETTINGS: dict[str, dict[str, Any]] = {"fedlease": {"warmup_rounds": 1, "max_experts": 6}, "fedamole": {}}
PER_DATASET, ROUNDS = 3, 6


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, default=Path("runs/onboard"), help="where runs are kept")
    parser.add_argument("--data", type=Path, help="the folder of the public datasets")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, separated by commas")


def rows_on_disk(folder: Path, sources: Path | None, seed: int, quick: bool) -> dict[str, list[str]]:
    """Every client's rows as files in ``folder/ID``; the clients by dataset."""
    given = ["demo:clinic", "demo:bank"] if sources is None else [str(sources / name) for name in NAMES]
    data = {
        "datasets": given, "train_rows": 12 if quick else 48, "validation_rows": 6 if quick else 24,
        "test_rows": 6 if quick else 96,
        "partition": {"name": "by_dataset", "clients": PER_DATASET, "stratify": True},
    }  # fmt: skip
    config = check_config({"data": data})
    clients = load_data(config.data, "classification", seed, Path.cwd()).clients
    by_dataset: dict[str, list[str]] = {}
    for client in clients:
        by_dataset.setdefault(str(client.info.group), []).append(client.info.id)
        for split, rows in client.splits.items():
            path = folder / client.info.id / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(as_record(client, row)) + "\n" for row in rows))
    return by_dataset


def as_record(client: ClientData, row: Any) -> dict[str, str]:
    assert isinstance(row, TextRow)
    assert client.info.labels is not None
    pair = {} if row.text_pair is None else {"text_pair": row.text_pair}
    return {"text": row.text, "label": client.info.labels[row.label], **pair}


def config_of(folder: Path, clients: list[str], method: str, seed: int, quick: bool) -> dict[str, Any]:
    def files(client: str) -> dict[str, str]:
        return {
            "id": client,
            **{s: str((folder / client / f"{s}.jsonl").resolve()) for s in ("train", "validation", "test")},
        }

    return {
        "model": {"path": "minilm", "max_length": 64},
        "data": {"clients": [files(client) for client in clients]},
        "lora": {"rank": 4},
        "train": {"learning_rate": 2e-3, "batch_size": 8, "epochs": 1},
        "method": {
            "name": method,
            **SETTINGS.get(method, {}),
            **({"max_experts": 2} if quick and method == "fedlease" else {}),
        },
        "run": {
            "rounds": 2 if quick else ROUNDS,
            "seed": seed,
            "evaluate_every": 2 if quick else ROUNDS,
            "export": "last",
        },
        "engine": {"threads": 1, "device": "cpu"},
    }


def finished(folder: Path, raw: Mapping[str, Any]) -> Path:
    """The run of ``raw``, done now unless it was done before."""
    if not (folder / SUMMARY).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        run(check_config(raw), folder, root=Path.cwd())
    return folder


def accuracy(folder: Path, client: str) -> float:
    return float(read_summary(folder / SUMMARY).clients[client].test["accuracy"])


def compare(options: argparse.Namespace, seed: int, sources: Path | None) -> list[dict[str, Any]]:
    """A row per method and client that was left out."""
    work = options.work / f"seed-{seed}{'-quick' if options.quick else ''}"
    by_dataset = rows_on_disk(work / "clients", sources, seed, options.quick)
    out = [clients[-1] for clients in by_dataset.values()]
    everyone = [client for clients in by_dataset.values() for client in clients]
    there = [client for client in everyone if client not in out]
    epochs = 2 if options.quick else ROUNDS

    def of(name: str, clients: list[str], method: str) -> Path:
        return finished(work / name, config_of(work / "clients", clients, method, seed, options.quick))

    alone = of("local", out, "local")
    rows: list[dict[str, Any]] = []
    for method in options.methods.split(","):
        part, whole = of(f"{method}-part", there, method), of(f"{method}-whole", everyone, method)
        for client in out:
            bundle = work / "joined" / f"{method}-{client}"
            shutil.rmtree(bundle, ignore_errors=True)
            joined = onboard(part, work / "clients" / client, bundle, client=client, epochs=epochs)
            rows.append({
                "method": method, "seed": seed, "client": client, "joined at first": joined.before["accuracy"],
                "onboarded": joined.after["accuracy"], "took part": accuracy(whole, client),
                "alone": accuracy(alone, client),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    options = arguments(__doc__ or "", options_of)
    if options.quick:
        options.work, options.methods = options.out / "runs", "fedlease"
    sources = None if options.quick else datasets(options.data)
    rows = [row for seed in map(int, options.seeds.split(",")) for row in compare(options, seed, sources)]
    means = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        names = ("joined at first", "onboarded", "took part", "alone")
        means.append({"method": method, **{name: fmean(row[name] for row in own) for name in names}})
    table("accuracy of clients that were left out, mean", means)
    shape = {"clients_per_dataset": PER_DATASET, "rounds": ROUNDS, "train_rows": 48, "test_rows": 96, "rank": 4}
    write("onboard", options, {"shape": shape, "means": means, "rows": rows})
    if options.quick:
        shutil.rmtree(options.work, ignore_errors=True)


if __name__ == "__main__":
    main()
