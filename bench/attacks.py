"""What one or two bad clients of eight cost the others: attacks on four methods, with and without a robust rule.

Eight clients on the packaged encoder: four have requests to a bank, four about travel (two domains of CLINC150, five
intents of each). The attackers are the last client of travel and, if there are two, the last of banking. Reported is
the mean test accuracy of the honest clients after the last round; the reference has no attackers at all. An attacker
trains honestly and then changes its reply (``ATTACKS``), from the first round on, FedLEASE's warm-up included. It knows
the honest replies.

    python examples/fetch_data.py             # once
    python bench/attacks.py --work runs/attacks   # goes on where it was stopped: a file for each case

Targets: with a robust rule, two of eight cost at most 3 points; with no setting, one with -50 times its update at
most 10.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _harness import RESULTS, datasets, measured_on, table
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.adapters.pool import POOL_FILE, write_pool
from coterie.adapters.read import WEIGHTS_FILE, build_pool
from coterie.config.load import check_config
from coterie.engines.base import Delivery, Stream
from coterie.experiment import open_run, rounds_of, run
from coterie.ops.streams import stream
from coterie.runs.events import Evaluated, Note, RoundDone, read_events
from coterie.runs.rounds import Runner
from coterie.types import ClientId, ClientInfo, Instruction, Key, Reply, Tensors

TASKS = ("banking", "travel")  # domains of CLINC150
SPLITS = ("train", "validation", "test")
EACH, INTENTS, ROUNDS = 4, 5, 6
TRAIN_ROWS, TEST_ROWS = 8, 16  # of each intent, for each client
ATTACKERS = ("travel-3", "banking-3")
CLAIMED = 10**9  # rows
METHODS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "fedlease": {"warmup_rounds": 1},
    "fedamole": {"experts": 16, "max_experts": 6},
    "smartfed": {"active": 4},
}
CHOSEN = "clip + geometric_median"  # what docs/robustness.md recommends
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
class Case:
    method: str
    attack: str  # "" for none: a federation of the honest clients alone
    attackers: int
    rule: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}-{self.attackers}-{self.attack or 'honest'}-{self.rule}-{self.seed}".replace(" ", "")


# attacks --------------------------------------------------------------------------------------------------------------

Updates = Mapping[ClientId, Tensors]
Attack = Callable[[Tensors, Updates, torch.Generator, int], Tensors]  # own update, the honest ones, draw, round


def times(factor: float) -> Attack:
    return lambda own, honest, draw, rnd: {key: factor * value for key, value in own.items()}


def noise(own: Tensors, honest: Updates, draw: torch.Generator, rnd: int) -> Tensors:
    """Three times the norm of its own update, tensor by tensor, in a random direction."""
    made = {key: torch.randn(value.shape, generator=draw) for key, value in sorted(own.items())}
    return {key: 3 * own[key].norm() / value.norm() * value for key, value in made.items()}


def little(own: Tensors, honest: Updates, draw: torch.Generator, rnd: int) -> Tensors:
    """A little is enough (arXiv 1902.06156): the honest mean less 1.5 standard deviations, by coordinate."""
    return {key: x.mean(0) - 1.5 * x.std(0, correction=0) for key, x in _stacked(own, honest).items()}


def inner_product(own: Tensors, honest: Updates, draw: torch.Generator, rnd: int) -> Tensors:
    """Inner-product manipulation (arXiv 1903.03936): minus four times the honest mean."""
    return {key: -4 * x.mean(0) for key, x in _stacked(own, honest).items()}


def lying(own: Tensors, honest: Updates, draw: torch.Generator, rnd: int) -> Tensors:
    """Honest in the first round, in which FedLEASE clusters; then minus five times its update."""
    return own if rnd == 1 else times(-5.0)(own, honest, draw, rnd)


def _stacked(own: Tensors, honest: Updates) -> dict[Key, Tensor]:
    """Of each tensor that the attacker sends, what the honest clients send; its own where nobody else does."""
    sent = {key: [update[key] for update in honest.values() if key in update] for key in own}
    return {key: torch.stack(values or [own[key]]) for key, values in sent.items()}


ATTACKS: dict[str, Attack] = {
    "sign flip": times(-1.0),
    "sign flip x50": times(-50.0),
    "noise": noise,
    "a little is enough": little,
    "inner product": inner_product,
    "flipped labels": times(1.0),  # its rows are wrong, see rows_of
    "poisoned adapter": times(1.0),  # of the pool, see make_pools; the attackers send nothing of their own
    "lying member": lying,
    "rows of 10^9": times(-1.0),
}


@dataclass(frozen=True)
class Hostile:
    """An engine whose ``attackers`` change what they reply. All else is the engine's."""

    engine: Any
    attackers: tuple[ClientId, ...]
    attack: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def clients(self) -> tuple[ClientInfo, ...]:
        claimed = {"num_train": CLAIMED} if self.attack == "rows of 10^9" else {}
        return tuple(replace(c, **claimed) if c.id in self.attackers else c for c in self.engine.clients)

    def train(
        self, method: Any, instructions: Mapping[ClientId, Instruction], rnd: int, limits: Any
    ) -> Stream[Delivery]:
        came = dict(self.engine.train(method, instructions, rnd, limits))
        infos = {client.id: client for client in self.clients}
        starts, updates = {}, {}
        for client, delivery in came.items():
            reply = delivery.reply
            assert reply is not None, delivery.error
            own = {**method.begin(self.spec, infos[client]).tensors, **instructions[client].tensors}
            starts[client] = {key: own[key] for key in reply.tensors if key in own}
            updates[client] = {k: v - starts[client][k] if k in starts[client] else v for k, v in reply.tensors.items()}
        honest = {client: update for client, update in updates.items() if client not in self.attackers}
        for client, delivery in sorted(came.items()):
            if client in self.attackers and delivery.reply is not None:
                draw = stream(0, "attack", rnd, client)
                moved = ATTACKS[self.attack](updates[client], honest, draw, rnd)
                tensors = {k: starts[client][k] + v if k in starts[client] else v for k, v in moved.items()}
                rows = CLAIMED if self.attack == "rows of 10^9" else delivery.reply.num_examples
                delivery = replace(delivery, reply=Reply(tensors, rows, delivery.reply.info))
            yield client, delivery


# cases ----------------------------------------------------------------------------------------------------------------


def plan() -> Iterator[Case]:
    """The figures that are required first, then everything."""
    for method in METHODS:
        yield from (Case(method, "", count, "none") for count in (2, 1))
        yield Case(method, "sign flip x50", 1, "none")
    for rule in (CHOSEN, "none"):
        for attack in ATTACKS:
            yield from (Case(method, attack, 2, rule) for method in METHODS if fits(method, attack))
    yield from (Case(method, "", 2, CHOSEN) for method in METHODS)
    for attack in ("sign flip", "a little is enough", "inner product", ""):
        yield from (Case("fedit", attack, 2, rule) for rule in RULES)
    for rule in (CHOSEN, "none"):
        for attack in ATTACKS:
            yield from (Case(method, attack, 1, rule) for method in METHODS if fits(method, attack))


def fits(method: str, attack: str) -> bool:
    """A pool is SmartFed's, a cluster FedLEASE's."""
    return {"poisoned adapter": "smartfed", "lying member": "fedlease"}.get(attack, method) == method


def rows_of(work: Path, data: Path) -> list[dict[str, Any]]:
    """Write every client's rows; returns the entries of ``[data] clients``. A flipped client's are beside its own."""
    names, entries = json.loads((data / "clinc150" / "info.json").read_text(encoding="utf-8"))["labels"], []
    files = [data / "clinc150" / f"{split}.jsonl" for split in SPLITS]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    for task in TASKS:
        intents = sorted({row["label"] for row in rows if row["domain"] == task})[:INTENTS]
        entries += [{"id": f"{task}-{i}", "group": task, "labels": [names[n] for n in intents]} for i in range(EACH)]
        content: dict[str, list[str]] = {}
        for number, intent in enumerate(intents):
            texts = sorted({row["text"] for row in rows if row["label"] == intent}, key=lambda text: (len(text), text))
            texts = texts[: EACH * (TRAIN_ROWS + 1 + TEST_ROWS)]  # the short ones: a run takes less time
            order = torch.randperm(len(texts), generator=stream(0, "attacks", intent)).tolist()
            for i, j in enumerate(order):
                turn, who = divmod(i, EACH)
                split = "train" if turn < TRAIN_ROWS else "validation" if turn == TRAIN_ROWS else "test"
                for flipped in (0, 1):
                    row = {"text": texts[j], "label": (number + flipped) % INTENTS}
                    name = f"{task}-{who}-{split}{'-flipped' * flipped}.jsonl"
                    content.setdefault(name, []).append(json.dumps(row) + "\n")
        for name, lines in content.items():
            (work / name).write_text("".join(lines), encoding="utf-8")
    return entries


def config(case: Case, entries: list[dict[str, Any]], pools: Mapping[str, Path]) -> dict[str, Any]:
    bad = ATTACKERS[: case.attackers]
    clients = [
        {**entry, **{s: f"{entry['id']}-{s}.jsonl" for s in SPLITS}}
        for entry in entries
        if case.attack or entry["id"] not in bad
    ]
    for entry in clients:
        if case.attack == "flipped labels" and entry["id"] in bad:
            entry["train"] = f"{entry['id']}-train-flipped.jsonl"
    method = {"name": case.method, **METHODS[case.method]}
    if case.method == "smartfed":
        method["pool"] = str(pools["poisoned" if case.attack == "poisoned adapter" else "pool"])
    return {
        "model": {"path": "minilm", "max_length": 32},
        "data": {"clients": clients},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["query", "value"]},
        "train": {"learning_rate": 5e-3, "batch_size": 8, "epochs": 2},
        "method": method,
        "robust": RULES[case.rule],
        "run": {"rounds": ROUNDS, "seed": case.seed, "evaluate_every": ROUNDS},
        "engine": {"threads": torch.get_num_threads(), "device": "cpu", "clients_per_batch": 8},
    }


def make_pools(work: Path, data: Path, cache: dict[str, Any]) -> dict[str, Path]:
    """SmartFed's pool: a LoRA for each task; and one in which travel's is 50 times as strong and turned round."""
    adapters = {}
    for task in TASKS:
        out = work / "modules" / task
        if not (out / "summary.json").exists():
            entry = {"id": task, **{s: f"{task}-0-{s}.jsonl" for s in SPLITS}}
            raw = config(Case("fedit", "", 0, "none"), [], {}) | {"data": {"clients": [entry]}}
            raw["run"] = {"rounds": ROUNDS, "seed": 1}
            run(check_config(raw), out, root=work, resume=(out / "config.json").exists(), cache=cache)
        adapters[task] = out / "experts" / "global"
    bad = work / "modules" / "poisoned"
    if not (bad / WEIGHTS_FILE).exists():
        shutil.copytree(adapters["travel"], bad, ignore=shutil.ignore_patterns(WEIGHTS_FILE), dirs_exist_ok=True)
        tensors = load_file(adapters["travel"] / WEIGHTS_FILE)
        save_file({name: t * -50 if ".lora_B." in name else t for name, t in tensors.items()}, bad / WEIGHTS_FILE)
    for name, members in (("pool", adapters), ("poisoned", {**adapters, "travel": bad})):
        if not (work / name / POOL_FILE).exists():
            write_pool(work / name, build_pool([f"{module}={path}" for module, path in members.items()]))
    return {name: work / name for name in ("pool", "poisoned")}


def measured(case: Case, raw: dict[str, Any], work: Path, cache: dict[str, Any]) -> dict[str, Any]:
    """Run a case; what the honest clients reach, and what the log says of the attackers."""
    folder = work / "now"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    opened = open_run(check_config(raw), folder, work, cache)
    bad = ATTACKERS[: case.attackers] if case.attack else ()
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


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the datasets (default: examples/data or ../shared/data)")
    parser.add_argument("--work", type=Path, default=Path("runs/attacks"), help="rows, pools, and a file for each case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: bench/results)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--finished", action="store_true", help="measure nothing, only write down what is there")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    work, data, cache = chosen.work.resolve(), datasets(chosen.data).resolve(), dict[str, Any]()
    (work / "cases").mkdir(parents=True, exist_ok=True)
    entries, pools = rows_of(work, data), make_pools(work, data, cache)
    rows: list[dict[str, Any]] = []
    for case in dict.fromkeys(plan()):
        if chosen.only not in case.name:
            continue
        raw = config(case, entries, pools)
        mark = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:8]
        path = work / "cases" / f"{case.name}-{mark}.json"
        if not path.exists():
            if chosen.finished:
                continue
            path.write_text(json.dumps(measured(case, raw, work, cache)), encoding="utf-8")
        rows.append(asdict(case) | json.loads(path.read_text(encoding="utf-8")))
        print(case.name, f"{rows[-1]['accuracy']:.3f}", rows[-1]["left_out"], file=sys.stderr, flush=True)
    honest = {
        (r["method"], r["attackers"], r["seed"]): r["accuracy"] for r in rows if not r["attack"] and r["rule"] == "none"
    }
    for row in rows:
        without = honest.get((row["method"], row["attackers"], row["seed"]))
        row["lost"] = None if without is None else round(without - row["accuracy"], 4)
    table("honest clients' accuracy", [{k: v for k, v in r.items() if k not in ("clients", "notes")} for r in rows])
    chosen.out.mkdir(parents=True, exist_ok=True)
    content = {"bench": "attacks", "quick": False, "rows": rows, "measured_on": measured_on()}
    (chosen.out / "attacks.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
