"""What one or two bad clients of eight cost the others: attacks on four methods, with and without a robust rule.

Eight clients on the packaged encoder, with experts in its last three layers: four have requests to a bank, four about
travel (two domains of CLINC150, five intents of each). The attackers are the last client of travel and, if there are
two, the last of banking; or, in cases that are named so, the last two of travel. Reported is the mean test accuracy of
the honest clients after the last round; the reference has no attackers at all. An attacker trains honestly and then
changes its reply (``ATTACKS``), from the first round on, FedLEASE's warm-up included. It knows the honest replies.

    python examples/fetch_data.py             # once
    python bench/attacks.py --threads 1       # goes on where it was stopped: runs/attacks has a file for each case

Targets: with a robust rule, two of eight cost at most 3 points; with no setting, one with -50 times its update at
most 10.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from _attackers import ATTACKS, Hostile
from _harness import arguments, datasets, table, write
from safetensors.torch import load_file, save_file

from coterie.adapters.pool import POOL_FILE, Pool, norms, read_pool, total, write_pool
from coterie.adapters.read import WEIGHTS_FILE, build_pool
from coterie.config.load import check_config
from coterie.experiment import open_run, rounds_of, run
from coterie.ops.streams import stream
from coterie.runs.events import Evaluated, Note, RoundDone, read_events
from coterie.runs.rounds import Runner

TASKS = ("banking", "travel")  # domains of CLINC150
SPLITS = ("train", "validation", "test")
EACH, INTENTS = 4, 5
TARGETS = [f"layer.{n}.attention.self.{name}" for n in (3, 4, 5) for name in ("query", "value")]
ATTACKERS = ("travel-3", "banking-3")
TOGETHER = ("travel-3", "travel-2")
FEDAMOLE = {"name": "fedamole", "experts": 16, "max_experts": 6}
PUBLISHED = {"embed": "after", "embed_rows": "held_out", "inertia": 0.0, "prototype": "experts"}  # of FedAMoLE
METHODS: dict[str, dict[str, Any]] = {
    "fedit": {"name": "fedit"},
    "fedlease": {"name": "fedlease", "warmup_rounds": 1},  # clusters by texts, then by LoRAs: the default
    "fedamole": FEDAMOLE,
    "fedamole of two": {**FEDAMOLE, "clients_per_expert": 2},
    "fedamole as published": {**FEDAMOLE, **PUBLISHED},
    "smartfed": {"name": "smartfed", "active": 4},
    "smartfed as published": {"name": "smartfed", "active": 4, "router": "paper"},
    "fedlease by B": {"name": "fedlease", "warmup_rounds": 1, "distance": "B"},
}
SHOWN = {
    "fedit": "FedIT",
    "fedlease": "FedLEASE",
    "fedamole": "FedAMoLE",
    "fedamole of two": "FedAMoLE, two clients per expert",
    "fedamole as published": "FedAMoLE as published",
    "smartfed": "SmartFed",
    "smartfed as published": "SmartFed as published",
    "fedlease by B": "FedLEASE, by B",
}
CHOSEN = "clip + multi_krum"  # what docs/robustness.md recommends
OTHER = "clip + geometric_median"
X50 = "sign flip x50"
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "median": {"rule": "median"},
    "trimmed_mean": {"rule": "trimmed_mean"},
    "geometric_median": {"rule": "geometric_median"},
    "krum": {"rule": "krum"},
    "multi_krum": {"rule": "multi_krum"},
    "centered_clipping": {"rule": "centered_clipping"},
    "clip": {"clip": 0.5},
    "clip + median": {"rule": "median", "clip": 0.5},
    "clip + geometric_median": {"rule": "geometric_median", "clip": 0.5},
    "clip + nnm + trimmed_mean": {"rule": "trimmed_mean", "clip": 0.5, "nnm": True},
    "clip + multi_krum": {"rule": "multi_krum", "clip": 0.5},
}


@dataclass(frozen=True)
class Size:
    """Rounds, and how many rows of each intent a client trains on and is tested on."""

    rounds: int = 4
    train: int = 8
    test: int = 16

    @property
    def texts(self) -> int:
        """Of each intent, for all clients: those of training, validation and test."""
        return EACH * (self.train + 1 + self.test)


QUICK = Size(1, 2, 1)


@dataclass(frozen=True)
class Case:
    method: str
    attack: str  # "" for none: a federation of the honest clients alone
    attackers: int
    rule: str
    seed: int = 0
    together: bool = False  # two attackers have rows of the same task

    @property
    def name(self) -> str:
        who = f"{self.attackers}{'-together' * self.together}"
        return f"{self.method}-{who}-{self.attack or 'honest'}-{self.rule}-{self.seed}".replace(" ", "")

    @property
    def bad(self) -> tuple[str, ...]:
        """The clients that attack, or that are missing where nobody does."""
        return (TOGETHER if self.together else ATTACKERS)[: self.attackers]


def plan(seeds: Sequence[int]) -> Iterator[Case]:
    """The figures that are required first, with every seed, then all others with the first one."""
    for seed in seeds:
        for method in METHODS:
            yield from (Case(method, "", n, "none", seed) for n in (2, 1))
            yield Case(method, X50, 1, "none", seed)
            yield from (Case(method, attack, 2, CHOSEN, seed) for attack in ATTACKS if fits(method, attack))
    for attackers, rule in ((2, "none"), (1, CHOSEN), (1, "none"), (2, OTHER)):
        for attack in ATTACKS:
            yield from (Case(m, attack, attackers, rule, seeds[0]) for m in METHODS if fits(m, attack))
    for rule, attack in ((CHOSEN, attack) for attack in ATTACKS):
        yield from (Case(m, attack, 2, rule, seeds[0], together=True) for m in METHODS if fits(m, attack))
    yield from (Case(method, "", 2, "none", seeds[0], together=True) for method in METHODS)
    yield from (Case(method, "", 2, CHOSEN, seeds[0]) for method in METHODS)
    for attack in ("inner product", "a little is enough", "sign flip", ""):
        yield from (Case("fedit", attack, 2, rule, seeds[0]) for rule in RULES)


def fits(method: str, attack: str) -> bool:
    """A pool is SmartFed's, a cluster FedLEASE's."""
    name = METHODS[method]["name"]
    only = {
        "poisoned adapter": "smartfed",
        "adapter within the bound": "smartfed",
        "lying member": "fedlease",
        "a little, as a member": "fedlease",
    }
    return only.get(attack, name) == name


def texts_of(data: Path | None, size: Size) -> dict[str, dict[str, list[str]]]:
    """The shortest texts of every intent of a task: they take the least time. Without ``data``, made up."""
    if data is None:
        some = [f"intent-{n}" for n in range(INTENTS)]
        return {t: {name: [f"{t} {name} {i}" for i in range(size.texts)] for name in some} for t in TASKS}
    names = json.loads((data / "clinc150" / "info.json").read_text(encoding="utf-8"))["labels"]
    files = [data / "clinc150" / f"{split}.jsonl" for split in SPLITS]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    found: dict[str, dict[str, list[str]]] = {}
    for task in TASKS:
        intents = sorted({row["label"] for row in rows if row["domain"] == task})[:INTENTS]
        by_intent = {n: {row["text"] for row in rows if row["label"] == n} for n in intents}
        shortest = {n: sorted(texts, key=lambda text: (len(text), text)) for n, texts in by_intent.items()}
        found[task] = {names[n]: texts[: size.texts] for n, texts in shortest.items()}
    return found


def rows_of(work: Path, texts: Mapping[str, Mapping[str, list[str]]], size: Size) -> list[dict[str, Any]]:
    """Write every client's rows; returns the entries of ``[data] clients``. A flipped client's are beside its own."""
    content: dict[str, list[str]] = {}
    for task, intents in texts.items():
        for number, of in enumerate(intents.values()):
            order = torch.randperm(len(of), generator=stream(0, "attacks", task, number)).tolist()
            for i, j in enumerate(order):
                turn, who = divmod(i, EACH)
                split = "train" if turn < size.train else "validation" if turn == size.train else "test"
                for flipped in (0, 1):
                    row = {"text": of[j], "label": (number + flipped) % INTENTS}
                    name = f"{task}-{who}-{split}{'-flipped' * flipped}.jsonl"
                    content.setdefault(name, []).append(json.dumps(row) + "\n")
    for name, lines in content.items():
        (work / name).write_text("".join(lines), encoding="utf-8")
    return [{"id": f"{t}-{i}", "group": t, "labels": [*texts[t]]} for t in texts for i in range(EACH)]


def config(case: Case, entries: list[dict[str, Any]], pools: Mapping[str, Path], size: Size) -> dict[str, Any]:
    clients = [
        {**entry, **{s: f"{entry['id']}-{s}.jsonl" for s in SPLITS}}
        for entry in entries
        if case.attack or entry["id"] not in case.bad
    ]
    for entry in clients:
        if case.attack == "flipped labels" and entry["id"] in case.bad:
            entry["train"] = f"{entry['id']}-train-flipped.jsonl"
    method = {**METHODS[case.method]}
    if method["name"] == "smartfed":
        within = "within 10" if case.rule == "none" else "within 3"  # SmartFed's default bound with this rule
        bad_pools = {"poisoned adapter": "poisoned", "adapter within the bound": within}
        method["pool"] = str(pools[bad_pools.get(case.attack, "pool")])
    return {
        "model": {"path": "minilm", "max_length": 32},
        "data": {"clients": clients},
        "lora": {"rank": 4, "alpha": 8.0, "targets": TARGETS},
        "train": {"learning_rate": 1e-2, "batch_size": 8, "epochs": 2},
        "method": method,
        "robust": RULES[case.rule],
        "run": {"rounds": size.rounds, "seed": case.seed, "evaluate_every": size.rounds},
        "engine": {
            "threads": torch.get_num_threads(),
            "device": "cpu",
            "clients_per_batch": 8,
            "precision": "bfloat16",
        },
    }


def make_pools(work: Path, size: Size, cache: dict[str, Any]) -> dict[str, Path]:
    """SmartFed's pool: a LoRA for each task; and pools in which travel's is turned round, and stronger."""
    adapters = {}
    for task in TASKS:
        out = work / "modules" / task
        if not (out / "summary.json").exists():
            entry = {"id": task, **{s: f"{task}-0-{s}.jsonl" for s in SPLITS}}
            raw = config(Case("fedit", "", 0, "none"), [], {}, size) | {"data": {"clients": [entry]}}
            raw["run"] = {"rounds": size.rounds, "seed": 1}
            run(check_config(raw), out, root=work, resume=(out / "config.json").exists(), cache=cache)
        adapters[task] = out / "experts" / "global"
    pools = {"pool": adapters, "poisoned": {**adapters, "travel": turned(adapters["travel"], 50.0)}}
    for bound in (3, 10):
        usual = {name: total(of) for name, of in norms(pool_of(work, "pool", adapters)).items()}
        factor = 0.99 * bound * usual["banking"] / usual["travel"]
        pools[f"within {bound}"] = {**adapters, "travel": turned(adapters["travel"], factor)}
    for name, members in pools.items():
        pool_of(work, name, members)
    return {name: work / name for name in pools}


def turned(adapter: Path, factor: float) -> Path:
    """A copy of the adapter that is ``factor`` times as strong and turned round."""
    bad = adapter.parents[2] / f"turned {factor:.2f}"
    if not (bad / WEIGHTS_FILE).exists():
        shutil.copytree(adapter, bad, ignore=shutil.ignore_patterns(WEIGHTS_FILE), dirs_exist_ok=True)
        tensors = load_file(adapter / WEIGHTS_FILE)
        save_file({name: t * -factor if ".lora_B." in name else t for name, t in tensors.items()}, bad / WEIGHTS_FILE)
    return bad


def pool_of(work: Path, name: str, members: Mapping[str, Path]) -> Pool:
    """The pool of these adapters, which is made where it is missing."""
    if not (work / name / POOL_FILE).exists():
        write_pool(work / name, build_pool([f"{module}={path}" for module, path in members.items()]))
    return read_pool(work / name)


def measured(case: Case, raw: dict[str, Any], work: Path, cache: dict[str, Any]) -> dict[str, Any]:
    """Run a case; what the honest clients reach, and what the log says of the attackers."""
    folder = work / "now"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    opened = open_run(check_config(raw), folder, work, cache)
    bad = case.bad if case.attack else ()
    try:
        engine = Hostile(opened.engine, bad, case.attack) if bad else opened.engine
        Runner(opened.method, engine, rounds_of(opened.config), folder).run()
    finally:
        opened.engine.close()
    events = read_events(folder / "metrics.jsonl")
    last = [event for event in events if isinstance(event, Evaluated)][-1]
    accuracy = {c: scores["test"]["accuracy"] for c, scores in last.clients.items()}
    honest = [value for client, value in sorted(accuracy.items()) if client not in bad]
    left_out = sum(len(event.failed) for event in events if isinstance(event, RoundDone))
    notes = [event.text for event in events if isinstance(event, Note)]
    return {"accuracy": sum(honest) / len(honest), "clients": accuracy, "left_out": left_out, "notes": notes}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the datasets (default: examples/data or ../shared/data)")
    parser.add_argument("--work", type=Path, help="rows, pools, and a file for each case (default: runs/attacks)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one for all cases")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--finished", action="store_true", help="measure nothing, only write down what is there")


def rows_in(work: Path, chosen: argparse.Namespace, size: Size) -> Iterator[dict[str, Any]]:
    """Every case that is planned, measured here or before."""
    cache: dict[str, Any] = {}
    (work / "cases").mkdir(parents=True, exist_ok=True)
    entries = rows_of(work, texts_of(None if chosen.quick else datasets(chosen.data).resolve(), size), size)
    pools = {} if chosen.quick else make_pools(work, size, cache)
    cases = [Case("fedit", "sign flip", 2, CHOSEN)] if chosen.quick else [*dict.fromkeys(plan(chosen.seeds))]
    for case in (case for case in cases if chosen.only in case.name):
        raw = config(case, entries, pools, size)
        mark = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:8]
        path = work / "cases" / f"{case.name}-{mark}.json"
        if not path.exists():
            if chosen.finished:
                continue
            path.write_text(json.dumps(measured(case, raw, work, cache)), encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
        print(case.name, f"{found['accuracy']:.3f}", found["left_out"], file=sys.stderr, flush=True)
        yield asdict(case) | found


def points(lost: float) -> str:
    """One decimal, without a minus before 0."""
    return f"{round(lost, 1) + 0.0:.1f}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table of docs/results/robustness.md: what attackers cost, in points, the mean over seeds (least to most)."""
    columns = [(1, "none", False), (2, "none", False), (2, CHOSEN, False), (2, CHOSEN, True)]
    heads = ("method", "attack", "one, no setting", "two, no setting", "two, `multi_krum` and `clip`", "both of travel")
    yield f"| {' | '.join(heads)} |"
    yield "| --- " * len(heads) + "|"
    for method in METHODS:
        for attack in (attack for attack in ATTACKS if fits(method, attack)):
            cells = []
            for column in columns:
                lost = [
                    100 * row["lost"]
                    for row in rows
                    if (row["method"], row["attack"]) == (method, attack)
                    and (row["attackers"], row["rule"], row["together"]) == column
                    and row["lost"] is not None
                ]
                ends = f" ({points(min(lost))} to {points(max(lost))})" if len(lost) > 1 else ""
                cells.append(f"{points(sum(lost) / len(lost))}{ends}" if lost else "-")
            if {*cells} == {"-"}:
                continue
            yield f"| {SHOWN[method]} | {attack} | " + " | ".join(cells) + " |"


def main() -> None:
    chosen = arguments(__doc__ or "", options)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) if chosen.quick else (chosen.work or Path("runs/attacks")).resolve()
        rows = list(rows_in(work, chosen, QUICK if chosen.quick else Size()))
    federation = itemgetter("method", "attackers", "seed", "together")
    honest = {federation(row): row for row in rows if not row["attack"] and row["rule"] == "none"}
    for row in rows:
        without = honest.get(federation(row))
        row["lost"] = None if without is None else round(without["accuracy"] - row["accuracy"], 4)
    table("honest clients' accuracy", [{k: v for k, v in r.items() if k not in ("clients", "notes")} for r in rows])
    write("attacks", chosen, {"size": asdict(QUICK if chosen.quick else Size()), "rows": rows})
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
