"""How many experts have to be active, and whether EEQA helps where they are few: SmartFed by its budget.

Sort in letters over a pool as in bench/skills/run.py, but of five modules of rank 8: N = 40 experts a matrix. The
budget is 2, 3, 4 or 8 of them on average, or all. Each budget is divided evenly (no EEQA), and by each importance that
clients can measure. Budgets of 2 and 3 have a floor of 1, so that there is something to divide; the others the default
of 2.

    python bench/skills/active.py --pools 0,1,2 --seeds 0,1,2    # goes on where it was stopped; runs in runs/skills
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from prepare import Modules
from run import Bench, Case

sys.path.insert(0, str(Path(__file__).parents[1]))
from _harness import RESULTS, measured_on, table

TARGET, SHARE, N = "sort in letters", 100, 40
BUDGETS = (2, 3, 4, 8, N)
IMPORTANCES = ("first_order", "gate_mass", "ablation")
ROUTERS: dict[str, dict[str, Any]] = {"paper": {"router": "paper"}, "signed": {"router": "signed", "sparse": True}}


def cases(routers: Sequence[str], budgets: Sequence[int]) -> Iterator[tuple[dict[str, Any], Case]]:
    """What tells the cases apart, and the cases. With all experts active there is nothing to divide."""
    for router in routers:
        for active in budgets:
            for importance in ("none", *IMPORTANCES) if active < N else ("none",):
                quota = {"quota": "uniform"} if importance == "none" else {"importance": importance}
                method = {"name": "smartfed", "active": active, "floor": 1 if active < 4 else 2, **quota}
                about = {"router": router, "active": active, "EEQA": importance}
                yield about, Case(f"active {router} {active} {importance}", {**method, **ROUTERS[router]})


def averaged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over pools and seeds of the last round's accuracy and of the mean over rounds, for each case."""
    names = ("router", "active", "EEQA")
    known = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    of = {case: [row["accuracy"] for row in rows if tuple(row[name] for name in names) == case] for case in known}
    return [
        {
            **dict(zip(names, case, strict=True)),
            "runs": len(of[case]),
            "last": mean(values[-1] for values in of[case]),
            "over rounds": mean(map(mean, of[case])),
            "least": min(values[-1] for values in of[case]),
        }
        for case in known
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test: two tiny runs, no figures")
    parser.add_argument("--work", type=Path, default=Path("runs/skills"), help="base, modules, pools and runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: bench/results)")
    parser.add_argument("--seeds", default="0,1,2", help="of the clients' rows and of training")
    parser.add_argument("--pools", default="0,1,2", help="draws of the modules' rows")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help=f"active experts on average; {N}: all")
    parser.add_argument("--routers", default="paper", help=", ".join(ROUTERS))
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    pools, seeds, budgets = (list(map(int, of.split(","))) for of in (options.pools, options.seeds, options.budgets))
    chosen = list(cases(options.routers.split(","), budgets))
    if options.quick:
        pools, seeds, chosen = [0], [0], chosen[:2]
    rows = []
    for pool in pools:
        bench = Bench(options.work.resolve(), options.quick, Modules(pool, rank=8))
        for seed in seeds:
            for about, case in chosen:
                rows.append({**about, **bench.run(TARGET, case, SHARE, seed)})
                print(f"pool {pool}, seed {seed}, {case.name}: {rows[-1]['accuracy'][-1]:.3f}", flush=True)
    table("accuracy by active experts", averaged(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"bench": "active", "quick": options.quick, "mean": averaged(rows), "rows": rows}
    (options.out / "active.json").write_text(json.dumps({**found, "measured_on": measured_on()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
