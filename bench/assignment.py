"""When FedAMoLE's experts measure, on which rows, and how they start: what the assignment makes of it, and its worth.

For every variant and seed: test accuracy after local training by round, the share of the pairs of holders of one
expert that are of one domain (chance: .18), and the share of the pairs of expert and client that are new in a round.

Two federations of twelve clients, three of each domain. ``tasks``: sst2, trec, sick, and CLINC150's banking domain.
``requests``: four domains of CLINC150, one row of each intent at a client, four rounds; LoRA in the last three layers.

    python examples/fetch_data.py sst2 trec sick clinc150   # once
    python bench/assignment.py --federation requests --seeds 0 1 2 3 4 5   # goes on where it stopped
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _harness import arguments, banking, datasets, domain, table, write
from _paired import against

from coterie.comparison import config_for
from coterie.comparison.variants import folder_of
from coterie.config.load import override
from coterie.experiment import run
from coterie.methods.findings import Assignment
from coterie.report.history import by_round, history
from coterie.report.read import read_run

CONTROL = "random, all rows"
OLD = "embed_rows=held_out:inertia=0.0:prototype=experts"
NEW = "embed=before:embed_rows=all"
VARIANTS = {
    "published": f"fedamole:embed=after:{OLD}",
    "random": "fedamole:assignment=random:embed_rows=held_out",
    "random, all rows": "fedamole:assignment=random:embed_rows=all",
    "known domains": "fedamole:assignment=oracle:embed_rows=held_out",
    "known domains, all rows": "fedamole:assignment=oracle:embed_rows=all",
    "before": f"fedamole:embed=before:{OLD}",
    "before, all rows": f"fedamole:{NEW}:inertia=0.0:prototype=experts",
    "before, all rows, inertia": f"fedamole:{NEW}:inertia=2.0:prototype=experts",
    "before, all rows, inertia, from one": f"fedamole:{NEW}:inertia=2.0:prototype=experts:first_holders=1",
    "by holders": f"fedamole:{NEW}:inertia=2.0:prototype=holders:clients_per_expert=2",
    "by holders, groups": "fedamole",  # the defaults
}
RAW: dict[str, Any] = {
    "model": {"path": "minilm", "max_length": 64},
    "data": {"train_rows": 100, "validation_rows": 16, "test_rows": 100},
    "lora": {"rank": 8},
    "train": {"learning_rate": 2e-3, "batch_size": 8, "epochs": 2},
    "methods": {"fedamole": {"experts": 24, "max_experts": 6}},
    "run": {"rounds": 8, "evaluate": "trained", "evaluate_every": 4},
    "engine": {"threads": 1, "device": "cpu", "precision": "bfloat16", "clients_per_batch": "auto"},
}
DOMAINS = ("banking", "travel", "kitchen_and_dining", "work")
TARGETS = [f"layer.{n}.attention.self.{name}" for n in (3, 4, 5) for name in ("query", "value")]
REQUESTS: dict[str, Any] = {
    "model": {"path": "minilm", "max_length": 32},
    "data": {"train_rows": 15, "validation_rows": 4, "test_rows": 60},
    "lora": {"rank": 8, "targets": TARGETS},
    "train": {"learning_rate": 2e-3, "batch_size": 4, "epochs": 2},
    "run": {"rounds": 4, "evaluate": "trained", "evaluate_every": 4},
}
SHOWN = ("name", "round", "points", "ahead", "p_seeds", "p_clients", "holm")
QUICK = ["data.train_rows=8", "data.validation_rows=1", "data.test_rows=2", "run.rounds=1", "run.evaluate_every=1"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--federation", choices=("tasks", "requests"), default="tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="names of VARIANTS, or NAME=VARIANT")
    parser.add_argument("--work", type=Path, default=Path("runs/assignment"), help="where the runs lie")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--finished", action="store_true", help="make no run, only write down those that are finished")


def row_of(name: str, variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """What a finished run shows."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scored = [e for e in events if e["event"] == "evaluation"]
    accuracy = {str(e["round"]): e["mean"]["test"]["accuracy"] for e in scored}
    by_client = {str(e["round"]): {c: v["test"]["accuracy"] for c, v in e["clients"].items()} for e in scored}
    made = read_run(folder)
    rounds = by_round(made.history(Assignment), sorted(made.rounds))
    modules = sorted({module for of in rounds.values() for module in of.experts})
    past = history(rounds, sorted(made.group_of), modules, made.group_of)
    moved = {str(r): past.changed[r] / past.pairs[r] for r in past.changed}
    losses = {str(e["round"]): sum(c["loss"] for c in e["clients"].values()) / len(e["clients"])
              for e in events if e["event"] == "round"}  # fmt: skip
    agreement = {str(r): share for r, share in past.agreement.items()}
    row = {"name": name, "variant": variant, "seed": seed, "accuracy": accuracy, "agreement": agreement}
    return row | {"moved": moved, "loss": losses, "chance": past.chance, "clients": by_client}


def rows(chosen: argparse.Namespace, raw: Mapping[str, Any], named: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A row for each seed and variant, from its run, which is made where it is missing."""
    for seed in chosen.seeds:
        for name, variant in named.items():
            folder = chosen.work / folder_of(variant, seed)
            if not (folder / "summary.json").exists():
                if chosen.finished:
                    continue
                config = config_for(dict(raw), variant, seed)
                run(config, folder, root=Path.cwd(), resume=(folder / "config.json").exists())
                shutil.rmtree(folder / "experts", ignore_errors=True)
            row = row_of(name, variant, seed, folder)
            print(seed, name, row["accuracy"], row["agreement"], row["moved"], flush=True)
            yield row


def against_random(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every variant less random assignment on the same seeds, by round (:func:`_paired.against`)."""
    lines: list[dict[str, Any]] = []
    for rnd in dict.fromkeys(rnd for row in found for rnd in row["accuracy"]):
        of = {(row["name"], row["seed"]): row["clients"][rnd] for row in found if rnd in row["clients"]}
        lines += [{"name": line.pop("name"), "round": rnd, **line} for line in against(of, CONTROL)]
    return lines


def federation(name: str, work: Path) -> list[str]:
    """The datasets of a federation: folders, made where they are missing."""
    data = datasets()
    if name == "requests":
        return [str(domain(data, of, work / of)) for of in DOMAINS]
    return [*(str(data / of) for of in ("sst2", "trec", "sick")), str(banking(data, work / "banking"))]


def main() -> None:
    chosen = arguments(__doc__ or "", options)
    of = RAW | REQUESTS if chosen.federation == "requests" else RAW
    raw: dict[str, Any] = override(of, [f"engine.threads={chosen.threads}", *chosen.overrides])
    named = {v.split("=", 1)[0] if v not in VARIANTS else v: VARIANTS.get(v) or v.split("=", 1)[1]
             for v in chosen.variants}  # fmt: skip
    if chosen.quick:
        raw = override(raw, QUICK)
        raw["data"]["datasets"], raw["data"]["partition"] = ["demo"], {"name": "by_dataset", "clients": 1}
        chosen.seeds, named, chosen.work = [0], {"published": "fedamole:experts=6"}, chosen.out / "runs"
    else:
        raw["data"]["datasets"] = federation(chosen.federation, chosen.work.resolve())
        raw["data"]["partition"] = {"name": "by_dataset", "clients": 3, "stratify": True}
    found = list(rows(chosen, raw, named))
    shown = [{k: v for k, v in row.items() if k not in ("clients", "variant", "loss")} for row in found]
    table("FedAMoLE's assignment", shown)
    tests = against_random(found)
    table("less random assignment, in points", [{k: line[k] for k in SHOWN} for line in tests])
    named_data = {**raw["data"], "datasets": [Path(name).name for name in raw["data"]["datasets"]]}
    name = "assignment" if chosen.federation == "tasks" else "assignment-requests"
    write(name, chosen, {"config": {**raw, "data": named_data}, "rows": found, "tests": tests})


if __name__ == "__main__":
    main()
