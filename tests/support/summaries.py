"""Made-up summaries of runs, and comparisons of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.comparison import Comparison
from coterie.comparison.figures import Done
from coterie.runs.summary import ClientSummary, Summary, Traffic, Worst


def summary(**changes: Any) -> Summary:
    def client(accuracy: float) -> ClientSummary:
        return ClientSummary(num_train=7, group="g", test={"accuracy": accuracy, "loss": 2 - accuracy})

    made = Summary(
        title="FedIT", primary="accuracy", best_round=2, rounds=3, seconds=75.0,
        clients={"north": client(0.25), "south": client(0.75)},
        mean={"test": {"accuracy": 0.5, "loss": 1.5}}, worst=Worst("north", "accuracy", 0.25),
        bytes=Traffic(2**20, 3 * 2**20), peak_memory_bytes=2**29,
    )  # fmt: skip
    return replace(made, **changes)


def scaled(factor: float, **changes: Any) -> Summary:
    """A summary whose accuracies are multiplied by ``factor``."""
    clients = {
        client: replace(row, test={"accuracy": row.test["accuracy"] * factor, "loss": 1.0})
        for client, row in summary().clients.items()
    }
    worst = Worst("north", "accuracy", 0.25 * factor)
    return summary(clients=clients, mean={"test": {"accuracy": 0.5 * factor, "loss": 1.0}}, worst=worst, **changes)


def without_test() -> Summary:
    clients = {client: replace(row, test={}) for client, row in summary().clients.items()}
    return summary(clients=clients, mean={}, worst=None)


def of_clients(values: Sequence[float], validation: float | None = None, **changes: Any) -> Summary:
    """A summary of clients ``c0``, ``c1``, ... with these test accuracies, and a validation mean."""
    clients = {f"c{i}": ClientSummary(test={"accuracy": value}) for i, value in enumerate(values)}
    mean = {"test": {"accuracy": sum(values) / len(values)}}
    mean |= {} if validation is None else {"validation": {"accuracy": validation}}
    worst = Worst(f"c{min(range(len(values)), key=lambda i: values[i])}", "accuracy", min(values))
    return replace(Summary(primary="accuracy", clients=clients, mean=mean, worst=worst), **changes)


def compared(results: Mapping[str, Mapping[int, Summary]], folder: Path = Path("runs/x"), **more: Any) -> Comparison:
    """A comparison of these summaries; its runs have folders below ``folder``."""
    done = {v: {seed: Done(folder / f"{v}-{seed}", of) for seed, of in runs.items()} for v, runs in results.items()}
    return Comparison(done, **more)
