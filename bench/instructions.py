"""Instructions in chat format on a small decoder, without a hub: FedLEASE, FedAMoLE and SmartFed, FedIT and local.

A decoder like that of ``skills/`` knows general skills in digits ("rotate 3 1 2" is answered "1 2 3"), also as the
second instruction of a conversation. Eight clients hold
conversations of two instructions each. Half of the instructions are of the client's special skill (sort, reverse,
mirror or swap: two clients each, which the methods are not told), in digits and in letters; the others are general
skills in letters, which all clients have in common. SmartFed's pool has a LoRA for the general skills in letters and
one for each of four special skills in digits; none for swap. Exact matches of the last answer, by client.

    python bench/instructions.py                         # goes on where it was stopped; runs lie in runs/instructions
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from _harness import HERE, arguments, table, write

sys.path.insert(0, str(HERE / "skills"))
from language import GENERAL, Task, row, write_rows
from prepare import MODULES, config, make_base, make_module, make_pool, single

from coterie.config.load import check_config
from coterie.experiment import run

METHODS = ("local", "fedit", "fedlease", "fedamole", "smartfed")
SKILLS = ("sort", "reverse", "mirror", "swap")
EACH = 2  # clients with the same special skill
ROWS = {"train": 160, "validation": 32, "test": 64}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }} = "
    "{% else %}{{ m['content'] }} </s> {% endif %}{% endfor %}"
)
GENERAL_IN_LETTERS: list[Task] = [(skill, "letters") for skill in GENERAL]


def follow_up(draw: random.Random) -> dict[str, str]:
    """A row of a general skill; in half of the cases after another one and its answer."""
    first, second = single(draw), single(draw)
    if draw.random() < 0.5:
        return first
    return {**second, "prompt": f"{first['prompt']}{first['completion']} </s> {second['prompt']}"}


def conversation(skill: str, draw: random.Random) -> dict[str, Any]:
    """Two instructions and their answers; each of the client's skill or of a general one, as it comes."""
    turns = []
    for _ in range(2):
        own = (skill, draw.choice(["digits", "letters"]))
        made = row(own if draw.random() < 0.5 else draw.choice(GENERAL_IN_LETTERS), draw)
        turns.append({"role": "user", "content": made["prompt"].removesuffix(" =")})
        turns.append({"role": "assistant", "content": made["completion"].strip()})
    return {"messages": turns}


def make_clients(folder: Path, seed: int, share: float) -> Path:
    """A folder for each client; no conversation occurs twice."""
    if folder.exists():
        return folder
    seen: set[str] = set()
    for number in range(len(SKILLS) * EACH):
        skill, draw = SKILLS[number // EACH], random.Random(f"instructions {seed} {number}")
        for split, rows in ROWS.items():
            made: list[dict[str, Any]] = []
            while len(made) < max(4, int(rows * share)):
                one = conversation(skill, draw)
                if (text := json.dumps(one)) not in seen:
                    seen.add(text)
                    made.append(one)
            write_rows(folder / f"{skill}-{number % EACH}" / f"{split}.jsonl", made)
        (folder / f"{skill}-{number % EACH}" / "info.json").write_text(json.dumps({"group": skill}))
    return folder


class Bench:
    """The base, the pool and the runs, under ``work``."""

    def __init__(self, work: Path, quick: bool) -> None:
        self.work, self.quick = work, quick
        self.base = make_base(work / "base", 3 if quick else 800, sample=follow_up)
        self.template = work / "chat.jinja"
        self.template.write_text(TEMPLATE)

    def pool(self) -> Path:
        """The pool of LoRAs, one for each of the skills' modules."""
        number, epochs = (32, 1) if self.quick else (2000, 3)
        made = {
            name: make_module(self.work, self.base, name, tasks, number * (1 + (name == "letters")), epochs)
            for name, tasks in MODULES.items()
        }
        make_pool(self.work / "pool", made)
        return self.work / "pool"

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """What a run says of the round that validation chose; made where it is not finished."""
        out = self.work / "runs" / f"{method}-{seed}"
        if not (out / "summary.json").exists():
            settings: dict[str, Any] = {"name": method}
            if method == "smartfed":
                settings |= {"pool": str(self.pool()), "router": "paper"}  # the published figures are of this
            if method == "fedamole":
                settings["clients_per_expert"] = 2  # the published figures are of this
            clients = make_clients(self.work / "clients" / str(seed), seed, 0.05 if self.quick else 1.0)
            made = config(
                self.base,
                clients,
                settings,
                seed,
                model={"max_length": 32, "chat_template": str(self.template)},
                task={"scores": ["exact_match"]},
                train={"epochs": 1 if self.quick else 3},
                run={"rounds": 1 if self.quick else 8, "evaluate_every": 2},
                engine={"clients_per_batch": len(SKILLS) * EACH},
            )
            run(check_config(made), out, root=self.work, resume=(out / "config.json").exists())
        summary = json.loads((out / "summary.json").read_text())
        own = {client: each["test"]["exact_match"] for client, each in summary["clients"].items()}
        by_skill = {skill: statistics.fmean(v for c, v in own.items() if c.startswith(skill)) for skill in SKILLS}
        moved = summary["bytes"]["up"] + summary["bytes"]["down"]
        found = {"method": method, "seed": seed, "exact_match": statistics.fmean(own.values())}
        return {**found, "worst_client": min(own.values()), "loss": summary["mean"]["test"]["loss"]} | {
            "by_skill": by_skill,
            "round": summary["best_round"],
            "bytes": moved,
        }


def shown(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method: means over the seeds."""
    rows = []
    for method in dict.fromkeys(each["method"] for each in found):
        own = [each for each in found if each["method"] == method]
        mean = {name: statistics.fmean(each[name] for each in own) for name in ("exact_match", "worst_client", "loss")}
        skills = {skill: statistics.fmean(each["by_skill"][skill] for each in own) for skill in SKILLS}
        rows.append({"method": method, "seeds": len(own), **mean, **skills})
    return rows


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--work", type=Path, default=None, help="folder of the runs (default: runs/instructions)")


def main() -> None:
    options = arguments(__doc__ or "", add)
    if options.quick:
        options.seeds, options.methods = [0], ["fedit"]
    work = options.work or (options.out / "runs" if options.quick else Path("runs/instructions"))
    bench = Bench(work.resolve(), options.quick)
    found = []
    for seed in options.seeds:
        for method in options.methods:
            found.append(bench.run(method, seed))
            print(json.dumps(found[-1]), flush=True)
    table("instructions: exact matches of the last answer", shown(found))
    write("instructions", options, {"rows_of_a_client": ROWS, "runs": found, "means": shown(found)})


if __name__ == "__main__":
    main()
