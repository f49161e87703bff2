"""Composing LoRA modules: SmartFed against FedIT, a merge, whole-LoRA routing and local, on a synthetic language.

A small decoder knows the general skills in digits. A pool holds a LoRA for the general skills in letters and one for
each of four special skills in digits. The targets compose them: sort in letters, mirror in letters; four clients each.
``unrelated`` is a skill that no module has, with the whole pool and with two of its modules (narrow). ``poisoned``: the
pool has one more module, trained on wrong answers.
Exact matches on test rows by round and by bytes, rounds to FedIT's best, with 100% and 10% of the rows (five epochs a
round instead of one, for steps enough).

    python bench/skills/run.py --seeds 0                 # goes on where it was stopped; runs lie in runs/skills
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from language import Task, rows, write_rows
from prepare import CLIENTS, FIRST, MODULES, Modules, config, make_base, make_module, make_pool, merged_base, zero_shot
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from _harness import RESULTS, measured_on

from coterie.config.load import check_config
from coterie.experiment import run

TARGETS: dict[str, Task] = {
    "sort in letters": ("sort", "letters"),
    "mirror in letters": ("mirror", "letters"),
    "unrelated": ("swap", "digits"),
}
TRAIN, TEST = 160, 64


@dataclass(frozen=True)
class Case:
    """One run: a method with its settings, a base, and what share of the training rows."""

    name: str
    method: Mapping[str, Any]
    merged: float = 0.0
    poisoned: bool = False
    narrow: bool = False
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


PAPER = {"name": "smartfed", "router": "paper"}
FRESH = {**PAPER, "fresh_rank": 8}
MAIN = [
    Case("SmartFed", PAPER),
    Case("SmartFed + fresh", FRESH),
    Case("FedIT", {"name": "fedit"}),
    Case("FedIT from merge", {"name": "fedit"}, merged=1.0),
    Case("whole-LoRA routing", {**PAPER, "granularity": "adapter", "active": 3}),
    Case("local", {"name": "local"}),
]
NO_EEQA = Case("no EEQA", {**PAPER, "quota": "uniform"})
ABLATIONS = [
    Case("by a matrix's sum", {**PAPER, "per_active": False}),
    Case("greedy quotas", {**PAPER, "quota": "greedy"}),
    Case("gate_mass", {**PAPER, "importance": "gate_mass"}),
    Case("scale one", {**PAPER, "gate_scale": "one"}),
    Case("K 4", {**PAPER, "active": 4}),
    Case("K 16", {**PAPER, "active": 16}),
    Case("poisoned", PAPER, poisoned=True),
]
NARROW = [  # no mixture of two modules swaps: the parts of the whole pool do
    Case("SmartFed, narrow pool", {**PAPER, "active": 4}, narrow=True),
    Case("SmartFed + fresh, narrow pool", {**FRESH, "active": 4}, narrow=True),
]


def plan(quick: bool, first: bool) -> Iterator[tuple[str, Case, int]]:
    """Target, case, per cent of the rows. All with the first seed; with others no ablations, merge and local."""
    if quick:
        yield "sort in letters", MAIN[0], 10
        return
    main = [case for case in MAIN if first or case.name not in ("FedIT from merge", "local")]
    for target in ("sort in letters", "mirror in letters"):
        for share in (100, 10):
            yield from ((target, case, share) for case in main)
    yield from (("unrelated", case, 100) for case in (*MAIN[:3], *NARROW))
    yield from (("sort in letters", case, 100) for case in (NO_EEQA, ABLATIONS[0]))
    yield from (("sort in letters", case, 100) for case in ABLATIONS[1:] if first)


class Bench:
    def __init__(self, work: Path, quick: bool, modules: Modules = FIRST) -> None:
        self.work, self.quick, self.made_of = work, quick, modules
        self.base = make_base(work / (modules.base_name or "base"), 3 if quick else 500, modules.base)
        self.modules = {name: self._module(name, modules.tasks(name), modules.of(name)) for name in MODULES}
        self.pool = self._pool("", self.modules)

    def _module(self, name: str, tasks: Sequence[Task], of: Modules) -> Path:
        number, epochs = (32, 1) if self.quick else (of.rows(name), 3)
        return make_module(self.work, self.base, name, tasks, number, epochs, of)

    def _pool(self, name: str, modules: Mapping[str, Path]) -> Path:
        """The folder of a pool of these modules, which is made where it is missing."""
        folder = self.work / f"pool{f'-{name}' if name else ''}{self.made_of.name}"
        make_pool(folder, modules)
        return folder

    def zero_shot(self) -> dict[str, float]:
        """Exact matches on the targets of the plain sum of the two modules that compose each."""
        pairs = {"sort in letters": ("letters", "sort"), "mirror in letters": ("letters", "mirror")}
        found = {}
        for target, names in pairs.items():
            pool = make_pool(self._pool("+".join(names), {n: self.modules[n] for n in names}), {})
            folder = self.work / f"merged-{'-'.join(names)}{self.made_of.name}"
            found[target] = zero_shot(self.base, pool, TARGETS[target], folder, 8 if self.quick else 256)
        return found

    def pool_of(self, case: Case) -> Path:
        """The case's pool. Poison is a module trained to answer sorting in letters with the reversed answer."""
        if case.poisoned:
            bad = self._module("poison", [("wrong sort", "letters")], self.made_of.of("poison"))
            return self._pool("poisoned", {**self.modules, "poison": bad})
        if case.narrow:
            return self._pool("narrow", {name: self.modules[name] for name in ("sort", "largest")})
        return self.pool

    def clients(self, target: str, share: int, seed: int) -> Path:
        place = self.work / "clients" / f"{target}-{share}-{seed}".replace(" ", "-")
        if not place.exists():
            # one draw without repetition for all clients and splits
            made = rows([TARGETS[target]], CLIENTS * (TRAIN + 16 + TEST), f"{target} {seed}")
            for client in range(CLIENTS):
                own = made[client::CLIENTS]
                folder = place / f"client-{client}"
                write_rows(folder / "train.jsonl", own[: TRAIN * share // 100])
                write_rows(folder / "validation.jsonl", own[TRAIN : TRAIN + 16])
                write_rows(folder / "test.jsonl", own[TRAIN + 16 :])
        return place

    def place(self, target: str, case: Case, share: int, seed: int) -> Path:
        reuses = case.merged > 0 or case.method["name"] == "smartfed"
        of = f"-pool{self.made_of.name}" if reuses and self.made_of.name else ""
        of = of if reuses or not self.made_of.base else f"-{self.made_of.base_name}"
        return self.work / "runs" / f"{target}-{share}-{case.name}-{seed}{of}".replace(" ", "-")

    def run(self, target: str, case: Case, share: int, seed: int) -> dict[str, Any]:
        """The row of a run, which is made where it is not finished."""
        out = self.place(target, case, share, seed)
        if not (out / "summary.json").exists():
            self._federate(target, case, share, seed, out)
        about = {"target": target, "share": share, "case": case.name, "seed": seed}
        return _row(out) | about | {"pool": self.made_of.draw, "form": self.made_of.form}

    def _federate(self, target: str, case: Case, share: int, seed: int, out: Path) -> None:
        base, method = self.base, dict(case.method)
        if case.merged:
            pool = make_pool(self.pool, self.modules)
            base = merged_base(self.base, pool, case.merged, self.work / f"merged-{case.merged}{self.made_of.name}")
        if method["name"] == "smartfed":
            method["pool"] = str(self.pool_of(case))
        clients = self.clients(target, share, seed)
        more = {"run": {"rounds": 2 if self.quick else 10}, "train": {"epochs": 1 if share == 100 else 5}}
        more |= {section: {**more.get(section, {}), **values} for section, values in case.more.items()}
        made = check_config(config(base, clients, method, seed, **more))
        run(made, out, root=self.work, resume=(out / "config.json").exists())


def _row(out: Path) -> dict[str, Any]:
    """What a finished run has to say."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    accuracy = [e["mean"]["test"]["exact_match"] for e in events if e["event"] == "evaluation"]
    trained = [e for e in events if e["event"] == "round"]
    moved = [sum(c["bytes_up"] + c["bytes_down"] for c in e["clients"].values()) for e in trained]
    up = [sum(c["bytes_up"] for c in e["clients"].values()) for e in trained]
    told: dict[str, Any] = {}
    for event in trained:
        told |= event["describe"]
    kept = {name: told[name] for name in ("use", "quotas", "importance", "dropped") if name in told}
    uses = [e["describe"]["use"] for e in trained if "use" in e["describe"]]
    return {"accuracy": accuracy, "bytes": moved, "bytes_up": up, **kept, **({"uses": uses} if uses else {})}


def first_at(values: list[float], goal: float) -> int | None:
    """The first round (from 1) with at least ``goal``."""
    return next((i for i, value in enumerate(values, start=1) if value >= goal), None)


def show(found: list[dict[str, Any]]) -> None:
    out = Console(width=None if sys.stdout.isatty() else 160)
    for target, share in dict.fromkeys((row["target"], row["share"]) for row in found):
        here = [row for row in found if (row["target"], row["share"]) == (target, share)]
        goals = {row["seed"]: max(row["accuracy"]) for row in here if row["case"] == "FedIT"}
        table = Table(title=f"{target}, {share}% of the rows: exact matches by round")
        rounds = len(here[0]["accuracy"])
        for column in (
            "case",
            "seed",
            *map(str, range(1, rounds + 1)),
            "rounds to FedIT's best",
            "KiB to it",
            "KiB in all",
        ):
            table.add_column(column, justify="left" if column == "case" else "right")
        for row in here:
            at = first_at(row["accuracy"], goals[row["seed"]]) if row["seed"] in goals else None
            kib = [f"{sum(row['bytes'][:n]) / 1024:.0f}" if n else "-" for n in (at, rounds)]
            values = [f"{value:.2f}" for value in row["accuracy"]]
            table.add_row(row["case"], str(row["seed"]), *values, str(at or "-"), *kib)
        out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test: one tiny run, no figures")
    parser.add_argument("--work", type=Path, default=Path("runs/skills"), help="base, modules, pools and runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: bench/results)")
    parser.add_argument("--seeds", default="0", help="with commas between them; of the clients' rows and of training")
    parser.add_argument("--pool", type=int, default=0, help="which draw of the modules' rows")
    parser.add_argument("--form", default="hard", choices=("hard", "easy"), help="easy: a pool that fits the targets")
    parser.add_argument("--zero-shot", action="store_true", help="only measure the plain sums of two modules")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--only", default="", help="only the cases with these words in 'target, share, name;'")
    parser.add_argument("--finished", action="store_true", help="make no run, only write down those that are finished")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    bench = Bench(options.work.resolve(), options.quick, Modules(options.pool, options.form))
    if options.zero_shot:
        print(bench.zero_shot())
        return
    found = []
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for seed in seeds:
        for target, case, share in plan(options.quick, seed == seeds[0]):
            if options.finished and not (bench.place(target, case, share, seed) / "summary.json").exists():
                continue
            if all(word in f"{target}, {share}, {case.name};" for word in options.only.split("|")):
                found.append(bench.run(target, case, share, seed))
                print(
                    f"{target}, {share}%, {case.name}, seed {seed}:",
                    *(f"{a:.2f}" for a in found[-1]["accuracy"]),
                    flush=True,
                )
    show(found)
    if options.only:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"bench": "skills", "quick": options.quick, "rows": found, "measured_on": measured_on()}
    (options.out / "skills.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
