"""Several methods and seeds on one federation, side by side.

A variant is a method with its own settings: ``fedamole:assignment=static``, more settings after more colons.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coterie.config.load import Raw, check_config, load_raw, method_name, override, section_of
from coterie.config.sections import Config
from coterie.experiment import run
from coterie.files import write_json
from coterie.methods.findings import Clusters, find
from coterie.methods.registry import method_named
from coterie.runs.events import METRICS, Evaluated, Listener, plain, read_events
from coterie.runs.summary import Summary
from coterie.types import ClientId

Results = dict[str, dict[int, Summary]]  # variant -> seed -> summary
Watch = Callable[[int, str], AbstractContextManager[Listener]]  # makes a run's listener, from its rounds and its label


def _silent(rounds: int, label: str) -> AbstractContextManager[Listener]:
    return nullcontext(lambda event: None)


@dataclass(frozen=True)
class Row:
    """The figures of one variant: test metrics, the mean of its seeds, None where there are no test data.

    ``means`` are those over the clients, by seed, ``std`` is their standard deviation; ``bytes`` is what all clients
    sent and received.
    """

    primary: str
    seeds: Sequence[int]
    means: Sequence[float | None]
    mean: float | None
    std: float
    worst: float | None
    clients: Mapping[ClientId, float | None]
    groups: Mapping[ClientId, str | None]
    evaluated: str
    bytes: float
    seconds: float


def compare(
    config: Path | str,
    out: Path | str,
    *,
    methods: Sequence[str] = ("fedlease", "fedit", "local"),
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
    watch: Watch = _silent,
) -> Results:
    """Run every one of ``methods`` with every seed on the federation of a TOML file, each in a folder below ``out``.

    A run that exists already continues. Returns the summary of each run, and writes ``compare.json``.
    """
    path = Path(config)
    return compare_all(override(load_raw(path), overrides), methods, seeds, Path(out), path.parent, watch)


def compare_all(
    raw: Raw, methods: Sequence[str], seeds: Sequence[int], folder: Path, root: Path, watch: Watch
) -> Results:
    """Every variant with every seed, each in its own folder below ``folder``. A run that exists already continues.

    Writes ``compare.json``. Raises :class:`CoterieError` as a run does.
    """
    runs = {(m.strip(), s): config_for(raw, m.strip(), s) for m in methods for s in seeds}
    results: Results = {}
    cache: dict[str, object] = {}
    for (method, seed), settings in runs.items():
        place = folder / folder_of(method, seed)
        with watch(settings.run.rounds, f"{method} seed {seed}") as listen:
            resume = (place / "config.json").exists()
            summary = run(settings, place, root=root, resume=resume, listen=listen, cache=cache)
        results.setdefault(method, {})[seed] = summary
        write_json(folder / "compare.json", plain(table_of(results)))
    return results


def config_for(raw: Raw, variant: str, seed: int) -> Config:
    """The config of one run of a comparison: the file's, with this variant and this seed.

    ``[methods.NAME]`` holds a method's own settings, and ``[method]`` those of the one that it names.
    """
    method, *settings = variant.split(":")
    method_named(method)
    own = section_of(raw, "method") if method_name(raw) == method else {}
    own = section_of(override({"method": own}, [f"method.{setting}" for setting in settings]), "method")
    return check_config({**raw, "method": {**own, "name": method}, "run": {**section_of(raw, "run"), "seed": seed}})


def folder_of(variant: str, seed: int) -> str:
    """The name of a run's folder: ``fedamole-assignment-static-0``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{variant}-{seed}")


def title_of(variant: str) -> str:
    """The title in tables and pictures: ``FedAMoLE, assignment static``."""
    method, *settings = variant.split(":")
    return ", ".join([method_named(method).title, *(setting.replace("=", " ") for setting in settings)])


def table_of(results: Results) -> dict[str, Row]:
    """The figures of every variant, over its seeds."""
    return {variant: _row(by_seed) for variant, by_seed in results.items()}


def _row(by_seed: Mapping[int, Summary]) -> Row:
    summaries = list(by_seed.values())
    first, primary = summaries[0], summaries[0].primary
    means = [_known(summary.mean.get("test", {}).get(primary)) for summary in summaries]
    numbers = [mean for mean in means if mean is not None]
    each = {c: [_known(s.clients[c].test.get(primary)) for s in summaries] for c in first.clients}
    return Row(
        primary=primary,
        seeds=list(by_seed),
        means=means,
        mean=_mean(means),
        std=float(np.std(numbers, ddof=1)) if len(numbers) == len(means) > 1 else 0.0,
        worst=_mean([_known(s.worst.value) if s.worst else None for s in summaries]),
        clients={client: _mean(values) for client, values in each.items()},
        groups={client: row.group for client, row in first.clients.items()},
        evaluated=first.evaluated,
        bytes=float(np.mean([s.bytes.up + s.bytes.down for s in summaries])),
        seconds=float(np.mean([s.seconds for s in summaries])),
    )


def clusters_of(results: Results) -> tuple[str, Clusters] | None:
    """The first variant that finds clusters of clients, and those of its first seed."""
    for variant, by_seed in results.items():
        if found := find(next(iter(by_seed.values())).findings, Clusters):
            return variant, found
    return None


def curves(folder: Path, results: Results) -> dict[str, list[tuple[int, float]]]:
    """By title: the mean test metric over clients and seeds, by round."""
    found = {}
    for variant, by_seed in results.items():
        values: dict[int, list[float]] = {}
        for seed, summary in by_seed.items():
            for event in read_events(folder / folder_of(variant, seed) / METRICS):
                if isinstance(event, Evaluated) and "test" in event.mean:
                    values.setdefault(event.round, []).append(event.mean["test"][summary.primary])
        found[title_of(variant)] = [(rnd, float(np.mean(row))) for rnd, row in sorted(values.items())]
    return found


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
