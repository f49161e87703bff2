"""A client that was not there: onboarded after the run, against having taken part and against training alone.

One client of each dataset is left out of the federation of ``examples/four-tasks.toml``, onboarded into the finished
run with the experts frozen, and compared on its test rows with the same client in a run of all sixteen, and with local
training. Settings are those of that file, and of ``coterie onboard``. Runs are kept in ``--work``: what is finished is
not repeated, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from _harness import HERE, arguments, datasets, table, write

from coterie.artifacts.onboard import onboard
from coterie.compute.join import EPOCHS
from coterie.config.load import check_config
from coterie.data.clients import load_data
from coterie.data.rows import ClientData, TextRow
from coterie.experiment import run
from coterie.runs.summary import SUMMARY, read_summary

FOUR_TASKS = HERE.parent / "examples" / "four-tasks.toml"
METHODS = ("fedlease", "fedit", "fedamole")


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, default=Path("runs/onboard"), help="where runs are kept")
    parser.add_argument("--data", type=Path, help="the folder of the public datasets")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, separated by commas")


def four_tasks(quick: bool) -> dict[str, Any]:
    """The settings of the four-task run; ``quick``: few rows, and two rounds."""
    raw = tomllib.loads(FOUR_TASKS.read_text(encoding="utf-8"))
    if quick:
        raw["data"] |= {"train_rows": 12, "validation_rows": 6, "test_rows": 6}
        raw["data"]["partition"]["clients"] = 3
        raw["methods"]["fedlease"]["max_experts"] = 2
        raw["run"]["rounds"] = 2
    raw["run"] |= {"evaluate_every": raw["run"]["rounds"], "export": "last"}
    raw["engine"]["device"] = "cpu"
    return raw


def rows_on_disk(folder: Path, sources: Path | None, seed: int, quick: bool) -> dict[str, list[str]]:
    """Every client's rows as files in ``folder/ID``; the clients by dataset."""
    data = four_tasks(quick)["data"]
    names = [Path(name).name for name in data["datasets"]]
    data["datasets"] = ["demo:clinic", "demo:bank"] if sources is None else [str(sources / name) for name in names]
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

    raw = four_tasks(quick)
    own = raw.pop("methods").get(method, {})
    raw["run"]["seed"] = seed
    return {**raw, "data": {"clients": [files(client) for client in clients]}, "method": {"name": method, **own}}


def finished(folder: Path, raw: Mapping[str, Any]) -> Path:
    """The run of ``raw``: done now, or from where it was stopped, unless it is there."""
    if not (folder / SUMMARY).is_file():
        run(check_config(raw), folder, root=Path.cwd(), resume=(folder / "config.json").is_file())
    return folder


def accuracy(folder: Path, client: str) -> float:
    return float(read_summary(folder / SUMMARY).clients[client].test["accuracy"])


def joined(work: Path, part: Path, method: str, client: str, epochs: int) -> tuple[float, float]:
    """The accuracy of the client in its model of the run ``part``, before and after its router and head train."""
    kept = work / "joined" / f"{method}-{client}.json"
    if not kept.is_file():
        bundle = kept.with_suffix("")
        shutil.rmtree(bundle, ignore_errors=True)
        made = onboard(part, work / "clients" / client, bundle, client=client, epochs=epochs)
        kept.write_text(json.dumps([made.before["accuracy"], made.after["accuracy"]]))
    before, after = json.loads(kept.read_text())
    return float(before), float(after)


def compare(options: argparse.Namespace, seed: int, sources: Path | None) -> list[dict[str, Any]]:
    """A row per method and client that was left out."""
    work = options.work / f"seed-{seed}{'-quick' if options.quick else ''}"
    by_dataset = rows_on_disk(work / "clients", sources, seed, options.quick)
    out = [clients[-1] for clients in by_dataset.values()]
    everyone = [client for clients in by_dataset.values() for client in clients]
    there = [client for client in everyone if client not in out]
    epochs = 2 if options.quick else EPOCHS

    def of(name: str, clients: list[str], method: str) -> Path:
        return finished(work / name, config_of(work / "clients", clients, method, seed, options.quick))

    alone = of("local", out, "local")
    rows: list[dict[str, Any]] = []
    for method in options.methods.split(","):
        part, whole = of(f"{method}-part", there, method), of(f"{method}-whole", everyone, method)
        for client in out:
            before, after = joined(work, part, method, client, epochs)
            rows.append({
                "method": method, "seed": seed, "client": client, "joined at first": before, "onboarded": after,
                "took part": accuracy(whole, client), "alone": accuracy(alone, client),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    options = arguments(__doc__ or "", options_of)
    if options.quick:
        options.work, options.methods = options.out / "runs", "fedlease"
    sources = None if options.quick else datasets(options.data)
    rows: list[dict[str, Any]] = []
    for seed in map(int, options.seeds.split(",")):
        rows += compare(options, seed, sources)
        report(options, rows)
    if options.quick:
        shutil.rmtree(options.work, ignore_errors=True)


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Show and write what is measured so far."""
    means = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        names = ("joined at first", "onboarded", "took part", "alone")
        means.append({"method": method, **{name: fmean(row[name] for row in own) for name in names}})
    table("accuracy of clients that were left out, mean", means)
    write("onboard", options, {"settings": four_tasks(options.quick), "means": means, "rows": rows})


if __name__ == "__main__":
    main()
