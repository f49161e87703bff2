"""The study: all methods on one federation, each with the learning rate that suits it, over three seeds.

The configs beside this file are the federations. Every method is tuned over the same learning rates on validation data
with a seed that is not reported. What is finished is not repeated, so the command goes on where it stopped. More
methods or seeds may follow later, on any machine: they join what ``bench/results/study-FEDERATION.json`` has, and a
method that has a learning rate there keeps it. ``--anew`` forgets that file, as it has to after a change of the rounds.

    python examples/fetch_data.py sst2 trec sick clinc150          # once
    python bench/study/run.py four-tasks --methods fedlease,local,fedit
    python bench/study/run.py four-tasks --show                    # the published table, without a run
    python bench/study/page.py                                     # put the tables and the pictures into docs/
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from _harness import RESULTS, banking, datasets
from claims import SYSTEMS
from joined import check_rounds, publish

from coterie.comparison import compare
from coterie.comparison.record import RECORD, Record, read_record
from coterie.comparison.tables import markdown, settings_of
from coterie.config.load import load_config

HERE = Path(__file__).parent
METHODS = (
    "fedlease", "local", "fedsa_lora", "ifca", "fedit", "feddpa", "fedalt", "fedamole", "fdlora", "ffa_lora", "fedprox",
    "flexlora", "hetlora", "flora", "fedex_lora", "rolora", "centralised",
    *(form for forms in SYSTEMS.values() for form in forms),
)  # fmt: skip
RATES = "train.learning_rate=1e-3,2e-3,4e-3"
TUNING = {"four-tasks": 9, "clinc150": 16, "sick": 9}  # rounds of the runs that choose the rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("federation", choices=sorted(TUNING))
    parser.add_argument("--methods", default=",".join(METHODS), help="methods and variants, separated by commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where the runs lie")
    parser.add_argument("--anew", action="store_true", help="forget the figures that were published before")
    parser.add_argument("--show", action="store_true", help="print the published table, and run nothing")
    chosen = parser.parse_args()
    path = RESULTS / f"study-{chosen.federation}.json"
    methods = chosen.methods.split(",")
    before = None if chosen.anew else read_record(path)
    if chosen.show:
        print(markdown(before) if before else f"there is no {path}")
        return
    config = HERE / f"{chosen.federation}.toml"
    if before:
        check_rounds(before, load_config(config).run.rounds)
    banking(datasets(), HERE / "data" / "banking")
    out = chosen.work / chosen.federation
    for method in methods:
        compare(
            config,
            out,
            methods=[method],
            seeds=[int(seed) for seed in chosen.seeds.split(",")],
            tune=[_tuned(before, method) or RATES],
            tune_rounds=TUNING[chosen.federation],
            jobs=chosen.jobs,
            target=before.target if before else None,
            say=lambda text: print(text, flush=True),
        )
    print(markdown(publish(out / RECORD, path, methods, chosen.anew)))


def _tuned(published: Record | None, method: str) -> str | None:
    """The learning rate that tuning chose for a published method."""
    row = published.variants.get(method) if published else None
    return " ".join(settings_of(row)) if row else None


if __name__ == "__main__":
    main()
