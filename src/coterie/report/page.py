"""Makes ``report.html`` of a run folder: one file with its pictures inside, no script, nothing fetched.

Reads what the run wrote and nothing else, so a report can be made again at any time, of a run that is still going or
was killed too. What it does not know (the state of a method to come, a manifest) it shows as plain tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from coterie.files import write_atomic
from coterie.methods.findings import Clusters, find, from_json
from coterie.report import plots
from coterie.report.assignment import History, by_round, history, is_assignment
from coterie.report.assignment_pictures import assignment_pictures, assignment_table, usage_pictures
from coterie.report.plots import Picture, natural
from coterie.report.quotas import SHOWN as _OF_QUOTAS
from coterie.report.quotas import is_quotas, quota_pictures
from coterie.report.tables import PERCENT, Table, show, tables
from coterie.types import CoterieError, Json

REPORT_FILE = "report.html"
SITES = "sites.json"  # what a federation of sites adds up to
PICTURE_FOLDER = "pictures"
_SPLITS = ("test", "validation")
_TITLES = {"macro_f1": "macro F1", "matthews": "Matthews", "rouge_l": "ROUGE-L", "exact_match": "exact match"}
_PICTURED = {"clusters", "silhouettes", "distances", "order"}  # of what a method describes; the rest becomes tables
_ASSIGNED = {"assignment", "pool"}  # pictured too, where it is an assignment of experts by module


@dataclass(frozen=True)
class Run:
    """What a run folder holds, read once. Of a round that was logged twice (a killed run, resumed) the last counts."""

    name: str
    summary: dict[str, Any]
    config: dict[str, Any]
    manifest: dict[str, Any]
    start: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return str(self.summary.get("title") or self.config.get("method", {}).get("name") or self.name)

    @property
    def primary(self) -> str:
        """The metric that chose the best round: the summary's, else accuracy if it was measured, else the loss."""
        measured = [mean for event in self.evaluations.values() for mean in (event.get("mean") or {}).values()]
        return str(self.summary.get("primary") or ("accuracy" if any("accuracy" in m for m in measured) else "loss"))

    @property
    def describe(self) -> dict[str, Any]:
        """What the method says of its state at the end of what there is."""
        said = [self.start, *(event.get("describe") or {} for _, event in sorted(self.rounds.items()))]
        said.append(self.summary.get("describe") or {})
        return {name: value for part in said for name, value in part.items()}

    @property
    def pool(self) -> dict[str, Any]:
        """What the method says of its pool of experts, if it has one."""
        found = self.describe.get("pool")
        return found if isinstance(found, dict) else {}

    @property
    def usage(self) -> dict[str, dict[str, Any]]:
        """Per client how its tokens use its experts: the summary's, else that of the last evaluation."""
        last = self.evaluations[max(self.evaluations)].get("usage") if self.evaluations else None
        said = (self.summary.get("usage") or {}, last or {})
        return next((found for usage in said if (found := {c: row for c, row in usage.items() if row})), {})

    @property
    def mean(self) -> dict[str, dict[str, Any]]:
        """Mean metrics by split: at the best round, or at the last evaluated one of a run that has not finished."""
        last = self.evaluations[max(self.evaluations)].get("mean") if self.evaluations else None
        return self.summary.get("mean") or last or {}

    @property
    def clients(self) -> dict[str, dict[str, Any]]:
        """Per client what the summary says (without one: what the events add up to), grouped, in natural order."""
        rows = self.summary.get("clients") or _clients_from_events(self)
        clusters, groups = self.describe.get("clusters") or {}, self.group_of
        rows = {
            c: {"rounds_missed": 0, **row, "group": groups.get(c), "cluster": clusters.get(c)}
            for c, row in rows.items()
        }
        return dict(sorted(rows.items(), key=lambda item: (natural(item[1].get("group") or ""), natural(item[0]))))

    @property
    def group_of(self) -> dict[str, str | None]:
        """The group of every client that the manifest or the summary names."""
        known = {**(self.manifest.get("clients") or {}), **(self.summary.get("clients") or {})}
        return {client: (row or {}).get("group") for client, row in known.items()}

    @property
    def splits(self) -> list[str]:
        return [split for split in _SPLITS if self.mean.get(split)]

    @property
    def metrics(self) -> list[str]:
        """What was measured, the primary metric first."""
        names = {name: None for split in self.splits for name in self.mean[split]}
        return sorted(names, key=lambda name: name != self.primary)

    @property
    def groups(self) -> dict[str, tuple[int, float]]:
        """The number of clients and their mean of the primary metric, on test data, by group."""
        found: dict[str, list[float]] = {}
        for row in self.clients.values():
            if row["group"] is not None and (value := (row.get("test") or {}).get(self.primary)) is not None:
                found.setdefault(row["group"], []).append(value)
        return {group: (len(values), sum(values) / len(values)) for group, values in found.items()}

    @property
    def failures(self) -> list[tuple[int, str, Json]]:
        """(round, client, reason) of every reply that did not count."""
        return [(rnd, c, why) for rnd, e in sorted(self.rounds.items()) for c, why in (e.get("failed") or {}).items()]

    @property
    def bytes(self) -> dict[str, int]:
        return self.summary.get("bytes") or {
            way: sum(row.get(f"bytes_{way}") or 0 for row in self.clients.values()) for way in ("up", "down")
        }

    @property
    def seconds(self) -> float:
        events = [*self.rounds.values(), *self.evaluations.values()]
        return float(self.summary.get("seconds") or sum(event.get("seconds") or 0.0 for event in events))

    def curve(self, split: str, client: str | None = None) -> list[tuple[int, float]]:
        """The primary metric by round: of one client, or the mean."""
        points = []
        for rnd, event in sorted(self.evaluations.items()):
            found = (event.get("mean") if client is None else (event.get("clients") or {}).get(client)) or {}
            if (value := (found.get(split) or {}).get(self.primary)) is not None:
                points.append((rnd, value))
        return points


def write_report(run: Path, pictures: bool = False, summary: dict[str, Any] | None = None) -> Path:
    """Write ``RUN/report.html`` (and with ``pictures`` each picture as a PNG) and return its path.

    ``summary`` stands for ``summary.json`` where that is not written yet. Raises :class:`CoterieError` for a folder
    that holds no run and for a file in it that is damaged.
    """
    data = read_run(run)
    data = data if summary is None else replace(data, summary=summary)
    assigned = _history(data)
    drawn = list(_pictures(data, assigned))
    if pictures:
        for picture in drawn:
            plots.png(picture.figure, run / PICTURE_FOLDER / f"{picture.name}.png")
    machine = data.summary.get("machine") or {}
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            run=data,
            clients=data.clients,
            losses=_losses(data),
            shown={picture.name: (picture, Markup(plots.svg(picture.figure, picture.name))) for picture in drawn},
            state=_state(data, assigned),
            settings=tables(data.config, "Settings"),
            manifest=[*tables(_read_json(run / SITES), "Over the network"), *tables(data.manifest, "Data")],
            machine=[*tables(data.summary.get("versions") or {}, "Versions"), *tables(machine, "Machine")],
        )
    )
    write_atomic(run / REPORT_FILE, page.encode())
    return run / REPORT_FILE


def read_run(run: Path) -> Run:
    """What ``run`` holds. A half-written last line of the metrics (the run was killed) is left out and noted."""
    files = {name: _read_json(run / f"{name}.json") for name in ("summary", "config", "manifest")}
    files["config"] = files["config"].get("config", files["config"])  # beside it: where its paths start
    events, notes = _read_events(run / "metrics.jsonl")
    if not any(files.values()) and not events:
        raise CoterieError(f"{run} holds no run: no summary.json, metrics.jsonl or config.json; give a run's folder")
    kept: dict[str, dict[int, dict[str, Any]]] = {"round": {}, "evaluation": {}, "start_state": {}}
    for event in events:
        if event.get("event") in kept:
            kept[event["event"]][int(event["round"])] = event
        elif event.get("event") == "note":
            notes.append(event)
    start = kept["start_state"].get(0, {}).get("describe") or {}
    return Run(run.resolve().name, **files, start=start, rounds=kept["round"], evaluations=kept["evaluation"],
               notes=notes)  # fmt: skip


def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("coterie.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"show": show, "metric": lambda name: _TITLES.get(name, name.replace("_", " "))}
    env.tests["percent"] = PERCENT.__contains__
    return env


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as fault:
        raise CoterieError(f"cannot read {path}, which the report is made from: {fault}") from fault
    if not isinstance(found, dict):
        raise CoterieError(f"{path} holds a {type(found).__name__} where a run has a mapping; is it a run's folder?")
    return found


def _read_events(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The events, and a note if the last line was cut short."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except ValueError as fault:
            if number < len(lines):
                raise CoterieError(f"{path}, line {number} is no JSON: {fault}; repair or remove it") from fault
            return events, [{"text": f"The last line of {path.name} is incomplete and was left out."}]
    return events, []


def _clients_from_events(run: Run) -> dict[str, dict[str, Any]]:
    scores = (run.evaluations[max(run.evaluations)].get("clients") or {}) if run.evaluations else {}
    events = run.rounds.values()
    seen = {client for event in events for client in [*event.get("clients", {}), *event.get("failed", {})]}
    clients = {}
    for client in scores.keys() | seen:
        entries = [event["clients"][client] for event in events if client in event.get("clients", {})]
        sums = {key: sum(entry.get(key) or 0 for entry in entries) for key in ("bytes_up", "bytes_down", "seconds")}
        missed = sum(client in event.get("failed", {}) for event in events)
        clients[client] = {**sums, "rounds_missed": missed, **scores.get(client, {})}
    return clients


def _losses(run: Run) -> dict[int, float]:
    """The mean training loss of each round over the clients that reported one."""
    found = {
        rnd: [x["loss"] for c, x in event.get("clients", {}).items() if x.get("loss") is not None]
        for rnd, event in sorted(run.rounds.items())
    }
    return {rnd: sum(losses) / len(losses) for rnd, losses in found.items() if losses}


def _history(run: Run) -> History | None:
    """The assignment of experts by round, if the method makes one: clients by group, modules by name."""
    found = by_round(run.start, {rnd: event.get("describe") or {} for rnd, event in run.rounds.items()})
    if not found and is_assignment(last := run.describe.get("assignment")):
        found = {int(run.summary.get("rounds") or 1): last}
    if not found:
        return None
    modules = {module for assignment in found.values() for module in assignment}
    holders = {client for assignment in found.values() for by_client in assignment.values() for client in by_client}
    groups = run.group_of
    clients = sorted(holders, key=lambda client: (natural(groups.get(client) or ""), natural(client)))
    past = history(found, clients, sorted(modules, key=natural), groups, run.pool.get("experts") or 0)
    return past if past.held.size else None


def _state(run: Run, assigned: History | None) -> list[Table]:
    """What the method says of its state that no picture shows."""
    hidden = _PICTURED | (_ASSIGNED if assigned else set()) | (_OF_QUOTAS if is_quotas(run.describe) else set())
    rest = tables({k: v for k, v in run.describe.items() if k not in hidden}, "State after the last round")
    return ([assignment_table(assigned, run.pool)] if assigned else []) + rest


def _pictures(run: Run, assigned: History | None) -> Iterator[Picture]:
    name = _TITLES.get(run.primary, run.primary)
    mean = {split: curve for split in _SPLITS if (curve := run.curve(split))}
    if mean:
        first = next(iter(mean))
        figure = plots.accuracy_by_round(
            mean,
            {client: run.curve(first, client) for client in run.clients},
            label=f"{name}, mean of the clients",
            percent=run.primary in PERCENT,
            mark=run.summary.get("best_round"),
        )
        yield Picture("metric-by-round", f"{name.capitalize()} by round", figure, f"Thin lines: {first}, each client.")
    if losses := _losses(run):
        figure = plots.accuracy_by_round({"training": [*losses.items()]}, label="mean loss", percent=False)
        yield Picture("loss-by-round", "Training loss by round", figure, "Mean over the clients that replied.")
    yield from _method_pictures(run)
    if assigned:
        yield from assignment_pictures(assigned)
    usage = {client: row for client, row in run.usage.items() if _is_by_module(row)}
    if is_quotas(run.describe):
        by_round = {rnd: event.get("describe") or {} for rnd, event in run.rounds.items()}
        yield from quota_pictures(run.describe, by_round, usage)
    yield from usage_pictures(usage, {client: row["group"] for client, row in run.clients.items()}, assigned)


def _method_pictures(run: Run) -> Iterator[Picture]:
    found = find(from_json(run.describe), Clusters)
    clusters = found.members if found else {}
    groups = {client: row.get("group") for client, row in run.clients.items()}
    if found and len(found.order) == len(found.distances) > 1:
        note = (
            "Squares: the group that a client was cut from, which the method is not told."
            if any(groups.values())
            else ""
        )
        figure = plots.client_distances(found, groups)
        yield Picture(
            "client-distances",
            "Distances between clients",
            figure,
            f"Near clients stand out; frames are clusters. {note}",
        )
    if found and found.silhouettes:
        figure = plots.silhouettes(found)
        yield Picture("silhouettes", "How many clusters", figure, "Higher: clusters that stand further apart.")
    usage = {client: row for client, row in run.usage.items() if not _is_by_module(row)}
    if any(len(values) > 1 for row in usage.values() for values in row.values()):
        note = "Framed: the expert of the client's own cluster." if clusters else ""
        yield Picture("expert-usage", "Which client uses which expert", plots.expert_usage(usage, clusters), note)
    errors = [(r, e["describe"]["aggregation_error"]) for r, e in sorted(run.rounds.items()) if _has_error(e)]
    if len(errors) > 1:
        figure = plots.accuracy_by_round({"error": errors}, label="relative error", percent=False)
        note = "What averaging A and B apart loses: the norm of mean(BA) - mean(B) mean(A) over that of mean(BA)."
        yield Picture("aggregation-error", "Aggregation error by round", figure, note)


def _is_by_module(usage: Mapping[str, Json]) -> bool:
    return any(isinstance(row, dict) for row in usage.values())


def _has_error(event: Mapping[str, Any]) -> bool:
    return (event.get("describe") or {}).get("aggregation_error") is not None
