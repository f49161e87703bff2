"""The summary of a run: metrics at the round that validation chose, per client and over clients, and what it cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from coterie import __version__
from coterie.machine import environment, peak_memory
from coterie.ops.metrics import better, mean_metrics, percentiles, worst_client
from coterie.types import ClientId, ClientInfo, Json

PRIMARY = {"classification": "accuracy", "generation": "loss", "multiple_choice": "accuracy"}

_MEASURES = ("weight", "share")


def read_events(metrics: Path) -> list[dict[str, Json]]:
    """The events of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def best_round(evaluations: Sequence[Mapping[str, Json]], metric: str) -> int:
    """The round with the best mean validation metric, the earliest on a tie; the last one without validation data.

    Test data plays no part in the choice.
    """
    best: tuple[int, float] | None = None
    for event in evaluations:
        value = event["mean"].get("validation", {}).get(metric)
        if value is None:
            continue
        value = round(value, 9)  # means of the same values differ in their last bits
        if best is None or better(metric, value, best[1]):
            best = event["round"], value
    return best[0] if best else int(evaluations[-1]["round"])


def summarise(
    events: Sequence[Mapping[str, Json]],
    clients: Sequence[ClientInfo],
    *,
    method: str,
    title: str,
    task: str,
    seed: int,
    evaluated: str = "received",
) -> dict[str, Json]:
    """``summary.json`` as a mapping. Bytes are as encoded; seconds leave out what a crash threw away."""
    starts = [event for event in events if event["event"] == "start_state"]
    rounds = [event for event in events if event["event"] == "round"]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    primary = PRIMARY[task]
    best = best_round(evaluations, primary)
    scores = next(event["clients"] for event in evaluations if event["round"] == best)
    per_client = {c.id: _client(c, scores.get(c.id, {}), rounds) for c in clients}
    tests = {c: numbers(row["test"]) for c, row in per_client.items() if row["test"]}
    worst = worst_client(primary, tests)
    return {
        "coterie": __version__,
        "method": method,
        "title": title,
        "task": task,
        "evaluated": evaluated,
        "seed": seed,
        "rounds": len(rounds),
        "best_round": best,
        "primary": primary,
        "clients": per_client,
        "mean": {
            split: mean_metrics({c: numbers(s[split]) for c, s in scores.items() if split in s})
            for split in _splits(scores)
        },
        "worst": {"client": worst[0], primary: worst[1]} if worst else {},
        "percentiles": percentiles(primary, tests),
        "bytes": {way: sum(row[f"bytes_{way}"] for row in per_client.values()) for way in ("up", "down")},
        "seconds": sum(event["seconds"] for event in [*rounds, *evaluations]),
        "peak_memory_bytes": max([*(event["peak_memory_bytes"] for event in rounds), peak_memory()]),
        "describe": {name: value for event in [*starts, *rounds] for name, value in event["describe"].items()},
        "usage": _usage({client: usage for client, usage in evaluations[-1].get("usage", {}).items() if usage}),
        **environment(),
    }


def _client(client: ClientInfo, scores: Mapping[str, Json], rounds: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    entries = [event["clients"][client.id] for event in rounds if client.id in event["clients"]]
    return {
        "group": client.group,
        "labels": list(client.labels) if client.labels else None,
        "num_train": client.num_train,
        "num_validation": client.num_validation,
        "num_test": client.num_test,
        "test": scores.get("test", {}),
        "validation": scores.get("validation", {}),
        "bytes_up": sum(entry["bytes_up"] for entry in entries),
        "bytes_down": sum(entry["bytes_down"] for entry in entries),
        "seconds": sum(entry["seconds"] for entry in entries),
        "rounds_missed": sum(client.id in event["failed"] for event in rounds),
    }


def numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The metrics with not-a-number for null: what was infinite or not a number was logged so."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _splits(scores: Mapping[ClientId, Mapping[str, Json]]) -> list[str]:
    return sorted({split for by_split in scores.values() for split in by_split})


def _usage(usage: Mapping[ClientId, Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[ClientId, Json]:
    """Gate weight and share of tokens per expert: the mean over modules, or by module where their experts differ."""
    rows = [row for by_module in usage.values() for row in by_module.values()]
    if any(list(row.get("expert") or []) not in ([], list(range(len(row["weight"])))) for row in rows):
        return dict(usage)
    if len({len(row["weight"]) for row in rows}) > 1:
        return dict(usage)
    return {
        client: {what: np.mean([row[what] for row in by_module.values()], axis=0).tolist() for what in _MEASURES}
        for client, by_module in usage.items()
    }
