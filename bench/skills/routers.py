"""SmartFed's routers against FedIT, over draws of the base and its pool and over seeds: rounds to FedIT's best, bytes.

The federations of bench/skills/run.py: sort in letters, mirror in letters with 10% of the rows, a skill that no module
has (with a fresh expert beside the pool), sort with a poisoned module in the pool. Each draw has a base and a pool of
its own. Every method's rate (FedIT's learning rate, the routers' ``router_rate``) and its decay are chosen from several
on a seed that is not reported: those with the best mean accuracy over rounds and pools, for sort with the hard pools. A
fresh expert has FedIT's rate, without a decay.

    python bench/skills/routers.py --form hard --pools 0,1,2 --seeds 0,1,2    # resumable; runs in runs/skills
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from prepare import LEARNING_RATE, Modules
from run import Bench, Case, first_at

sys.path.insert(0, str(Path(__file__).parents[1]))
from _harness import RESULTS, measured_on, table

HELD_BACK = 100  # the seed on which rates are chosen
ROUNDS = 10
FEDIT = "FedIT"
SMARTFED = {"name": "smartfed"}


Rate = tuple[float, float]  # a factor of the learning rate of prepare.py, and of itself from round to round


@dataclass(frozen=True)
class Kind:
    """A method with its settings, and the rates to choose from."""

    method: Mapping[str, Any]
    rates: tuple[Rate, ...]


@dataclass(frozen=True)
class Setting:
    """A federation: its target, the share of the rows, and what of the pool there is."""

    target: str
    share: int = 100
    fresh: bool = False
    poisoned: bool = False


KINDS = {
    FEDIT: Kind({"name": "fedit"}, ((0.5, 1), (1, 1), (2, 1), (1, 0.9))),
    "paper": Kind(SMARTFED | {"router": "paper"}, ((0.5, 1), (1, 1), (2, 1), (1, 0.9))),
    "signed": Kind(SMARTFED | {"router": "signed"}, ((20, 1), (40, 1), (80, 1), (20, 0.9), (40, 0.9), (30, 0.7))),
    "response": Kind(SMARTFED | {"router": "response"}, ((5, 1), (10, 1), (20, 1), (10, 0.9), (20, 0.9))),
    "mixing": Kind(SMARTFED | {"router": "mixing"}, ((5, 1), (10, 1), (20, 1), (10, 0.9), (20, 0.9))),
}
SETTINGS = {
    "sort": Setting("sort in letters"),
    "mirror, 10%": Setting("mirror in letters", 10),
    "unrelated": Setting("unrelated", fresh=True),
    "sort, poisoned": Setting("sort in letters", poisoned=True),
}


def case_of(kind: str, rate: Rate, setting: Setting, fedits: float, rounds: int) -> Case:
    """``fedits``: FedIT's rate, which a fresh expert gets too."""
    factor, decay = rate
    method, more = {**KINDS[kind].method}, {"run": {"rounds": rounds}}
    name = f"{kind}, rate {factor:g}" + (f", decay {decay:g}" if decay < 1 else "")
    if kind == FEDIT:
        more["train"] = {"learning_rate": LEARNING_RATE * factor, "round_decay": decay}
        return Case(name, method, more=more)
    method |= {"router_rate": factor, "router_decay": decay}
    method |= {"fresh_rank": 8, "fresh_rate": fedits} if setting.fresh else {}
    name += f", fresh {fedits:g}" * setting.fresh + ", poisoned" * setting.poisoned
    return Case(name, method, poisoned=setting.poisoned, more=more)


class Routers:
    """The runs of one form of the bench over these ``pools``, which are made where they are not finished."""

    def __init__(self, work: Path, form: str, pools: Sequence[int], quick: bool, finished: bool) -> None:
        self.work, self.form, self.pools, self.quick, self.finished = work, form, pools, quick, finished
        self.benches: dict[Modules, Bench] = {}
        self.rates: dict[str, Rate] = {}
        self.tried: list[dict[str, Any]] = []

    def row(self, kind: str, rate: Rate, name: str, seed: int, pool: int) -> dict[str, Any] | None:
        """A run; None for one that is not finished, where none is to be made."""
        setting = SETTINGS[name]
        modules = Modules(pool, "hard" if seed == HELD_BACK or kind == FEDIT else self.form, base=pool)
        if modules not in self.benches:
            self.benches[modules] = Bench(self.work, self.quick, modules)
        bench = self.benches[modules]
        fedits = self.rate(FEDIT)[0] if setting.fresh and kind != FEDIT else 1
        rounds = 2 if self.quick else ROUNDS
        case = case_of(kind, rate, setting, fedits, rounds)
        if self.finished and not (bench.place(setting.target, case, setting.share, seed) / "summary.json").exists():
            return None
        row = bench.run(setting.target, case, setting.share, seed)
        if len(row["accuracy"]) != rounds:
            raise SystemExit(
                f"{bench.place(setting.target, case, setting.share, seed)} does not have {rounds} rounds: remove it"
            )
        print(f"{name}, {case.name}, seed {seed}, pool {pool}:", *(f"{a:.2f}" for a in row["accuracy"]), flush=True)
        left_out = {"quotas", "importance", "bytes_up", "share"} | ({"use", "uses"} if not setting.poisoned else set())
        kept = {what: value for what, value in row.items() if what not in left_out}
        return {"setting": name, "kind": kind, "rate": rate, **kept}

    def rate(self, kind: str) -> Rate:
        """The best rate for sort, with the seed that is held back and the hard pools."""
        if kind not in self.rates:
            rates = KINDS[kind].rates[:1] if self.quick else KINDS[kind].rates
            tried = {rate: [self.row(kind, rate, "sort", HELD_BACK, pool) for pool in self.pools] for rate in rates}
            known = {rate: [row["accuracy"] for row in rows if row] for rate, rows in tried.items()}
            reached = {rate: mean(map(mean, of)) for rate, of in known.items() if len(of) == len(self.pools)}
            self.tried += [{"kind": kind, "rate": rate, "accuracy": known[rate]} for rate in reached]
            self.rates[kind] = max(reached, key=reached.__getitem__) if reached else rates[0]
        return self.rates[kind]

    def rows(self, seeds: Sequence[int], names: Sequence[str]) -> Iterator[dict[str, Any]]:
        for name in names:
            for seed in seeds:
                for pool in self.pools:
                    for kind in KINDS:
                        if row := self.row(kind, self.rate(kind), name, seed, pool):
                            yield row


def against_fedit(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each row beside FedIT's of the same federation.

    ``rounds``: to FedIT's best; ``times``: how many times fewer than FedIT's own; ``bytes``: a round's, after the one
    in which the pool is sent, as a share of FedIT's; ``behind``: by how much at the worst round; ``lost``: how many
    rounds more than without the poisoned module.
    """
    by = {(row["setting"], row["kind"], row["pool"], row["seed"]): row for row in rows}
    found = []
    for row in rows:
        base = by.get((row["setting"], FEDIT, row["pool"], row["seed"]))
        if base is None or row["kind"] == FEDIT:
            continue
        best = max(base["accuracy"])
        needed, at = first_at(base["accuracy"], best), first_at(row["accuracy"], best)
        one = {name: row[name] for name in ("setting", "kind", "seed", "pool", "rate")}
        one |= {"last": row["accuracy"][-1], "FedIT": best, "rounds": at, "FedIT's": needed}
        one |= {"times": needed / at if needed and at else None, "bytes": _a_round(row) / _a_round(base)}
        one |= {"behind": max(b - a for a, b in zip(row["accuracy"], base["accuracy"], strict=True))}
        if "poison" in row.get("use", {}):
            one["poison"] = [use["poison"] for use in row["uses"]]
            clean = by.get(("sort", row["kind"], row["pool"], row["seed"]))
            before = first_at(clean["accuracy"], best) if clean else None
            one["lost"] = at - before if at and before else None
        found.append(one)
    return found


def _a_round(row: Mapping[str, Any]) -> float:
    return mean(row["bytes"][1:])


def averaged(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The means over pools and seeds, the least and the most rounds; that of ``times`` over the runs that got there.

    ``poison`` is its largest share by round 3: the second measurement, because ``quota_interval`` is 2.
    """
    made = []
    for name, kind in dict.fromkeys((row["setting"], row["kind"]) for row in found):
        here = [row for row in found if (row["setting"], row["kind"]) == (name, kind)]
        reached = [row["rounds"] for row in here if row["rounds"]]
        of = {"setting": name, "kind": kind, "runs": len(here), "there": len(reached)}
        of |= {"last": mean(row["last"] for row in here), "FedIT": mean(row["FedIT"] for row in here)}
        of |= {"ahead at last": sum(row["last"] > row["FedIT"] for row in here)}
        of |= {"rounds": f"{min(reached)}-{max(reached)}"} if reached else {}
        times = [row["times"] for row in here if row["times"]]
        of |= {"times": mean(times) if times else None, "bytes": mean(row["bytes"] for row in here)}
        of |= {"behind": max(row["behind"] for row in here)}
        if "poison" in here[0]:
            of["poison"] = max(row["poison"][1] for row in here)
        made.append(of)
    return made


def _lines(content: Mapping[str, Any]) -> str:
    """JSON with a line for each row of a list, which is a quarter of what a line for each number takes."""
    parts = []
    for name, value in content.items():
        rows = isinstance(value, list)
        text = "[\n" + ",\n".join("  " + json.dumps(row) for row in value) + "\n ]" if rows else json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny runs, no figures")
    parser.add_argument("--form", default="hard", choices=("hard", "easy"), help="easy: a pool that fits the targets")
    parser.add_argument("--work", type=Path, default=Path("runs/skills"), help="base, modules, pools and runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: bench/results)")
    parser.add_argument("--seeds", default="0,1,2", help="of the clients' rows and of training")
    parser.add_argument("--pools", default="0,1,2", help="draws of the base and of the modules' rows")
    parser.add_argument("--settings", default=";".join(SETTINGS), help="with ; between them")
    parser.add_argument("--finished", action="store_true", help="make no run, only write down those that are finished")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    pools, seeds = (list(map(int, of.split(","))) for of in (options.pools, options.seeds))
    names = options.settings.split(";")
    if options.quick:
        pools, seeds, names = [0], [0], names[:1]
    routers = Routers(options.work.resolve(), options.form, pools, options.quick, options.finished)
    rows = list(routers.rows(seeds, names))
    found = against_fedit(rows)
    table("against FedIT: means over pools and seeds", averaged(found))
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"bench": "routers", "quick": options.quick, "form": options.form}
    content |= {"rates": routers.rates, "tried": routers.tried}
    content |= {"mean": averaged(found), "against": found, "rows": rows, "measured_on": measured_on()}
    name = "routers" if options.form == "hard" else f"routers-{options.form}"
    (options.out / f"skills-{name}.json").write_text(_lines(content) + "\n")


if __name__ == "__main__":
    main()
