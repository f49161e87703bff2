"""LoRA modules for four public datasets, reused for others: SmartFed and FedIT on the packaged encoder.

The pool: one LoRA each for sst2, trec, mrpc and sick, trained on its own on 1,500 rows. The targets: ``clinc150``, ten
domains of user requests with fifteen intents each, a client for each domain (nothing of it is in the pool); ``sst2
again``, eight clients with 24 rows each of the job that one module does. ``poisoned``: the pool has one module more,
sst2's turned round and twice as strong; ``noise``: one with sst2's A and a random B, four times as strong. Test
accuracy by round, bytes, the adapters' shares of the gates.

    python examples/fetch_data.py             # once
    python bench/reuse/run.py --rates         # the routers' rates, on a seed that is not reported
    python bench/reuse/run.py --routers --pools 0,1,2 --seeds 0,1,2
    python bench/reuse/run.py --untuned --pools 0,1,2 --seeds 0,1,2
    python bench/reuse/run.py --seeds 0,1     # goes on where it was stopped; runs lie in runs/reuse
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from _harness import RESULTS, datasets, measured_on, table

from coterie.adapters.bundle import read_bundle
from coterie.adapters.pool import POOL_FILE, write_pool
from coterie.adapters.read import WEIGHTS_FILE, build_pool
from coterie.config.load import check_config
from coterie.experiment import run
from coterie.ops.streams import stream
from coterie.types import Part

MODULES = ("sst2", "trec", "mrpc", "sick")
TRAIN = {"learning_rate": 2e-3, "batch_size": 8, "epochs": 2}
SHORT, LONG = 6, 48  # rounds: clinc150 takes about forty to learn, from scratch too


@dataclass(frozen=True)
class Case:
    name: str
    method: Mapping[str, Any]
    pool: str = "pool"  # or one with a poisoned module


SMARTFED = {"name": "smartfed", "router": "paper", "active": 4}
MAIN = [
    Case("SmartFed, K 4", SMARTFED),
    Case("SmartFed, K 4 + fresh", {**SMARTFED, "fresh_rank": 4}),
    Case("no EEQA", {**SMARTFED, "quota": "uniform"}),
    Case("FedIT", {"name": "fedit"}),
    Case("local", {"name": "local"}),
]
HELD_BACK = 100
# Each router's rate is the best of these on the seed that is held back and the first pool, by the mean over six rounds.
TRIED = {"paper": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)} | dict.fromkeys(
    ("signed", "response", "mixing"), (3.0, 10.0, 30.0, 60.0, 120.0, 240.0)
)
RATES = {"paper": 8.0, "signed": 120.0, "response": 30.0, "mixing": 120.0}

MORE = [
    Case("SmartFed, K 8", {**SMARTFED, "active": 8}),
    Case("whole-LoRA routing", {**SMARTFED, "granularity": "adapter", "active": 2}),
    Case("scale one", {**SMARTFED, "active": 8, "gate_scale": "one"}),
]
POISONED = [
    Case("SmartFed, K 4, poisoned", SMARTFED, "pool-poisoned"),
    Case("SmartFed, K 8, poisoned", {**SMARTFED, "active": 8}, "pool-poisoned"),
    Case("SmartFed, K 4, poisoned, drop_below 0.75", {**SMARTFED, "drop_below": 0.75}, "pool-poisoned"),
    Case("SmartFed, K 4, noise", SMARTFED, "pool-noise"),
    Case("SmartFed, K 4, noise, drop_below 0.5", {**SMARTFED, "drop_below": 0.5}, "pool-noise"),
]


def plan(first: bool) -> Iterator[tuple[str, Case, int]]:
    """Target, case, rounds. Everything with the first seed, the main comparison and the poison with every one."""
    yield from (("sst2 again", case, SHORT) for case in (*MAIN, *POISONED))
    yield from (("sst2 again", case, LONG // 2) for case in POISONED if case.method == SMARTFED)
    yield from (("clinc150", case, LONG) for case in MAIN)
    if first:
        yield from ((target, case, SHORT) for target in ("sst2 again", "clinc150") for case in MORE)


def plan_of_routers() -> Iterator[tuple[str, Case, int]]:
    """Each router with the pool and with the poisoned one, and FedIT, where a module does the same job."""
    yield "sst2 again", MAIN[3], SHORT
    for router, rate in RATES.items():
        yield "sst2 again", routed(router, rate), SHORT
        yield "sst2 again", routed(router, rate, "pool-poisoned"), SHORT


def plan_of_untuned() -> Iterator[tuple[str, Case, int]]:
    """The paper's router and the default one, with the rates that they have where none are set."""
    for router in ("paper", "signed"):
        method = {**SMARTFED, "router": router}
        yield "sst2 again", Case(f"SmartFed, {router}", method), SHORT
        yield "sst2 again", Case(f"SmartFed, {router}, poisoned", method, "pool-poisoned"), SHORT
        yield "clinc150", Case(f"SmartFed, {router} + fresh", {**method, "fresh_rank": 4}), LONG
    yield "sst2 again", Case("SmartFed, signed, poisoned", method, "pool-poisoned"), SHORT // 2  # for its weights then


def plan_of_rates() -> Iterator[tuple[str, Case, int]]:
    """The routers with several rates, to choose from."""
    yield from (("sst2 again", routed(router, rate), SHORT) for router, rates in TRIED.items() for rate in rates)


def routed(router: str, rate: float, pool: str = "pool") -> Case:
    """SmartFed with a router and its rate."""
    name = f"SmartFed, {router}, rate {rate:g}" + (", poisoned" if pool == "pool-poisoned" else "")
    return Case(name, {**SMARTFED, "router": router, "router_rate": rate, "router_decay": 1.0}, pool)


def planned(options: argparse.Namespace, first: bool) -> Iterator[tuple[str, Case, int]]:
    """What the options ask for."""
    if options.rates:
        return plan_of_rates()
    if options.untuned:
        return plan_of_untuned()
    return plan_of_routers() if options.routers else plan(first)


def targets(data: Path) -> dict[str, dict[str, Any]]:
    natural = {"name": "natural", "column": "domain", "own_labels": True}
    return {
        "sst2 again": {
            "datasets": [str(data / "sst2")],
            "partition": {"name": "by_dataset", "clients": 8},
            "train_rows": 24,
            "validation_rows": 8,
            "test_rows": 50,
        },
        "clinc150": {
            "datasets": [str(data / "clinc150")],
            "partition": natural,
            "train_rows": 45,
            "validation_rows": 15,
            "test_rows": 60,
        },
    }


def config(data: dict[str, Any], method: Mapping[str, Any], seed: int, rounds: int, **train: Any) -> dict[str, Any]:
    run: dict[str, Any] = {"rounds": rounds, "seed": seed} | ({"export": "last"} if rounds < SHORT else {})
    engine = {"threads": torch.get_num_threads(), "device": "cpu", "clients_per_batch": "auto"}
    return {
        "model": {"path": "minilm", "max_length": 48},
        "data": data,
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["query", "value"]},
        "train": TRAIN | train,
        "method": dict(method),
        "run": run | ({"evaluate_every": 4} if rounds > SHORT else {}),
        "engine": engine | ({"precision": "bfloat16"} if rounds > SHORT else {}),
    }


def make_modules(work: Path, data: Path, cache: dict[str, Any], draw: int) -> dict[str, Path]:
    """The adapters' folders by name; ``draw`` of their rows."""
    found = {}
    for name in MODULES:
        out = work / "modules" / name
        if not (out / "summary.json").exists():
            rows = {"train_rows": 1500, "validation_rows": 8, "test_rows": 200}
            alone = {"datasets": [str(data / name)], **rows}
            made = config(alone, {"name": "fedit"}, draw, 1, batch_size=16)
            run(check_config(made), out, root=work, resume=(out / "config.json").exists(), cache=cache)
        accuracy = json.loads((out / "summary.json").read_text())["mean"]["test"]["accuracy"]
        print(f"module {name}: test accuracy {accuracy:.3f}", flush=True)
        found[name] = out / "experts" / "global"
    return found


def make_pools(work: Path, adapters: Mapping[str, Path]) -> dict[str, Path]:
    """The pool, and one with each of the bad modules."""
    pools = {"pool": dict(adapters)}
    for kind, spoil in BAD.items():
        bad = work / "modules" / kind
        if not (bad / WEIGHTS_FILE).exists():
            shutil.copytree(adapters["sst2"], bad, ignore=shutil.ignore_patterns(WEIGHTS_FILE), dirs_exist_ok=True)
            save_file(spoil(load_file(adapters["sst2"] / WEIGHTS_FILE)), bad / WEIGHTS_FILE)
        pools["pool-noise" if kind == "noise" else "pool-poisoned"] = {**adapters, kind: bad}
    for name, members in pools.items():
        if not (work / name / POOL_FILE).exists():
            write_pool(work / name, build_pool([f"{module}={path}" for module, path in members.items()]))
    return {name: work / name for name in pools}


def turned_round(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA that does the opposite, twice as strongly."""
    return {name: value * -2 if ".lora_B." in name else value for name, value in tensors.items()}


def noise(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA that looks at the same and answers at random, four times as strongly."""
    made = dict(tensors)
    for name in sorted(made):
        if ".lora_B." in name:
            draw = torch.randn(made[name].shape, generator=stream(0, "noise", name))
            made[name] = draw * (4 * made[name].norm() / draw.norm())
    return made


BAD = {"poison": turned_round, "noise": noise}


def row_of(out: Path, rounds: int) -> dict[str, Any]:
    """What a finished run in ``out`` has to say of its first ``rounds`` rounds."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    events = [event for event in events if event.get("round", 0) <= rounds]
    tests = {str(e["round"]): e["mean"]["test"] for e in events if e["event"] == "evaluation"}
    accuracy, loss = ({rnd: test[what] for rnd, test in tests.items()} for what in ("accuracy", "loss"))
    trained = [e for e in events if e["event"] == "round"]
    moved = sum(c["bytes_up"] + c["bytes_down"] for e in trained for c in e["clients"].values())
    told: dict[str, Any] = {}
    for event in trained:
        told |= event["describe"]
    kept = {name: told[name] for name in ("use", "dropped") if name in told}
    uses = [e["describe"]["use"] for e in trained if "use" in e["describe"]]
    signed = json.loads((out / "config.json").read_text())["config"]["method"].get("router") == "signed"
    weights = mean_weights(out, events) if signed else {}
    more = {"uses": uses} if uses else {}
    return {"accuracy": accuracy, "loss": loss, "KiB": moved // 1024, **kept, **more, **weights}


def mean_weights(out: Path, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Each adapter's mean weight in the exported round of a run with ``signed`` routers, over ranks and matrices.

    Below 0 an adapter is turned round. ``forward``: the share of its weights above 0 in the sum of all by size. The
    clients' routers are the same.
    """
    adapters = next(e for e in events if e["event"] == "start_state")["describe"]["adapters"]
    bank, _ = read_bundle(min((out / "clients").iterdir()))
    routers = torch.stack([value[:, 0] for key, value in sorted(bank.tensors.items()) if key.part is Part.ROUTER])
    of = {name: routers[:, first : first + rank] for name, (first, rank) in adapters.items()}
    size = routers.abs().sum()
    return {
        "weights": {name: float(weights.mean()) for name, weights in of.items()},
        "forward": {name: float(weights.clamp(min=0).sum() / size) for name, weights in of.items()},
    }


def show(found: list[dict[str, Any]]) -> None:
    for target, rounds in dict.fromkeys((row["target"], row["rounds"]) for row in found):
        here = [row for row in found if (row["target"], row["rounds"]) == (target, rounds)]
        shown = [
            {"case": row["case"], "seed": row["seed"], "pool": row["pool"], **row["accuracy"], "KiB": row["KiB"]}
            for row in here
        ]
        table(f"{target}: test accuracy by round, mean over the clients", shown)
        shares = [
            {"case": row["case"], "seed": row["seed"], "pool": row["pool"], **row["use"]}
            for row in here
            if row.get("use")
        ]
        if shares:
            table(f"{target}: the adapters' shares of the gates' weight at the last measurement", shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the datasets (default: examples/data or ../shared/data)")
    parser.add_argument("--work", type=Path, default=Path("runs/reuse"), help="modules, pools and runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: bench/results)")
    parser.add_argument("--seeds", default="0", help="with commas between them")
    parser.add_argument("--routers", action="store_true", help="compare SmartFed's routers alone, on sst2 again")
    parser.add_argument("--untuned", action="store_true", help="compare two routers with the rates that are theirs")
    parser.add_argument("--rates", action="store_true", help="only try rates of the routers, on sst2 again; no JSON")
    parser.add_argument("--pools", default="0", help="draws of the modules' rows, with commas between them")
    parser.add_argument("--only", default="", help="only what has these words in 'target, case;', with | between them")
    parser.add_argument("--finished", action="store_true", help="make no run, only write down those that are finished")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, data, cache = options.work.resolve(), datasets(options.data).resolve(), dict[str, Any]()
    rows, found = targets(data), []
    seeds = [HELD_BACK] if options.rates else list(map(int, options.seeds.split(",")))
    draws = list(map(int, options.pools.split(",")))
    for draw in draws:
        place = work / f"draw-{draw}" if draw else work
        pools = make_pools(place, make_modules(place, data, cache, draw))
        for seed in seeds:
            for target, case, rounds in planned(options, seed == seeds[0]):
                if not all(word in f"{target}, {case.name};" for word in options.only.split("|")):
                    continue
                smartfed = case.method["name"] == "smartfed"
                if draw != draws[0] and (not smartfed or (options.untuned and rounds == LONG)):
                    continue  # it has no pool, or takes long
                method = {**case.method, "pool": str(pools[case.pool])} if smartfed else case.method
                long = f"-{rounds}" if rounds != SHORT else ""
                name = f"{target}-{case.name}-{seed}{long}".replace(" ", "-").replace(",", "")
                out = (place if smartfed else work) / "runs" / name
                made = check_config(config(rows[target], method, seed, rounds))
                if not (out / "summary.json").exists():
                    if options.finished:
                        continue
                    run(made, out, root=work, resume=(out / "config.json").exists(), cache=cache)
                row = {"target": target, "case": case.name, "seed": seed, "pool": draw, "rounds": rounds}
                found.append(row | row_of(out, rounds))
                print(target, case.name, seed, draw, *(f"{v:.3f}" for v in found[-1]["accuracy"].values()), flush=True)
    show(found)
    if options.only or options.rates:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    name = "reuse-untuned" if options.untuned else "reuse-routers" if options.routers else "reuse"
    content = {"bench": name, "quick": False, "rows": found, "measured_on": measured_on()}
    (options.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
