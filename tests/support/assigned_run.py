"""A made-up run of a method that assigns experts, as the lines of JSON that it writes."""

from __future__ import annotations

import itertools
from pathlib import Path

from coterie.runs.events import from_json
from coterie.runs.summary import summarise
from coterie.types import ClientInfo
from pages import make_run

GROUPS = {f"{group}-{i}": group for group in ("north", "south") for i in (1, 2, 10)}
CLIENTS = list(GROUPS)
MODULES = [f"encoder.layer.{layer}.attention.self.{name}" for layer in (0, 2, 10) for name in ("query", "value")]
POOL = {"experts": 7, "clients_per_expert": 2, "max_experts": 4, "mode": "dynamic"}  # expert 6: held by nobody
ROUNDS = 4


def holders(rnd: int, module: int, expert: int) -> tuple[int, int]:
    """Two clients of different groups; from round 2 on of the same for experts 0 to 2, from round 3 on for all."""
    first = expert // 3 * 3
    if rnd >= (2 if expert < 3 else 3):
        return first + expert % 3, first + (expert + 1) % 3
    return (expert + module) % 6, (expert + module + 3) % 6


def assignment(rnd: int) -> dict:
    """What round ``rnd`` trains with."""
    held = {module: {client: [] for client in CLIENTS} for module in MODULES}
    for (m, module), expert in itertools.product(enumerate(MODULES), range(6)):
        for c in holders(rnd, m, expert):
            held[module][CLIENTS[c]].append(expert)
    return held


def usage(numbered: bool = True) -> dict:
    """Of every client, the shared expert first: an expert's gate weight is a tenth of its number."""
    found = {}
    for client in CLIENTS:
        held = {module: experts[client] for module, experts in assignment(ROUNDS).items()}
        rows = {
            m: {"weight": [1.0, *(e / 10 for e in row)], "share": [1.0] * (1 + len(row))} for m, row in held.items()
        }
        found[client] = {m: {**row, "expert": [-2, *held[m]]} if numbered else row for m, row in rows.items()}
    return found


def events(rounds: int = ROUNDS) -> list[dict]:
    """The lines of a run: the last round re-assigns nothing, round 3 changes nothing."""
    start = {"assignment": assignment(1), "pool": POOL, "aggregation_error": None}
    lines: list[dict] = [{"event": "start_state", "round": 0, "describe": start}]
    for rnd in range(1, rounds + 1):
        describe = {"assignment": assignment(rnd + 1)} if rnd < min(ROUNDS, 3) else {}
        entry = {"loss": 2.0 / rnd, "seconds": 1.5, "bytes_up": 1000, "bytes_down": 3000, "tokens": 640}
        common = {"round": rnd, "seconds": 6.0, "peak_memory_bytes": 1}
        lines.append({"event": "round", **common, "failed": {}, "describe": describe,
                      "clients": dict.fromkeys(CLIENTS, entry)})  # fmt: skip
        scores = {split: {"accuracy": 0.1 * rnd, "loss": 1 / rnd} for split in ("validation", "test")}
        lines.append({"event": "evaluation", **common, "clients": dict.fromkeys(CLIENTS, scores), "mean": scores})
    return lines


def total(lines: list[dict]) -> dict:
    """``summary.json``, made as a run makes it."""
    lines = [*lines[:-1], {**lines[-1], "usage": usage()}]
    infos = [ClientInfo(c, num_train=9, num_validation=2, num_test=5, group=GROUPS[c]) for c in CLIENTS]
    return summary_of(lines, infos)


def summary_of(lines: list[dict], infos: list[ClientInfo]) -> dict:
    events = [event for line in lines if (event := from_json(line))]
    return summarise(events, infos, method="x", title="X", task="classification", seed=0).to_json()


def made(folder: Path, lines: list[dict], summary: dict | None = None, grouped: bool = True) -> Path:
    clients = {client: {"group": group if grouped else None} for client, group in GROUPS.items()}
    return make_run(folder, lines, summary, manifest={"clients": clients})
