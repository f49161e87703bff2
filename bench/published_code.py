"""A whole FedLEASE run: ``coterie run`` beside the method's own published code, on the same rows and the same encoder.

Needs a checkout of https://github.com/lei-wang-link/FedLEASE (measured with commit cf18cd6) and a Python that has what
it imports: ``pip install torch "transformers==4.40.2" "accelerate<1" datasets scikit-learn scipy matplotlib tqdm
bitsandbytes``. As published it does not import: line 567 of ``peft/tuners/lora.py`` is indented too far; this puts it
right: ``sed -i '567s/^ */                            /' peft/tuners/lora.py``. Nothing else of it is changed.

It runs as a process of its own like ours (:mod:`_published_code` hands it the rows). Both train one round of warm-up,
cluster by B, train four experts, one for each job, and evaluate all clients after each round. Theirs trains a *dummy
client* besides in the warm-up; ours writes checkpoints, experts, bundles and a report.

Times are of the whole process, from its start to its end: on the clock, and of its processor. The memory is its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _federation import Size, made_clients
from _harness import HERE, arguments, table, write

from coterie.nn.locate import resolve

AIMS = {"float32": 3.5, "bfloat16": 5.5}
CONFIG = """
[model]
path = "{model}"
max_length = 128

[data]
validation_fraction = 0.0
clients = [
{clients}
]

[lora]
rank = 4
alpha = 16.0
dropout = 0.05

[train]
batch_size = {batch}
epochs = 2
learning_rate = 3e-3

[method]
name = "fedlease"
distance = "B"
warmup_rounds = 1
max_experts = 4

[run]
rounds = {rounds}
evaluate_every = 1

[engine]
threads = 1
precision = "{precision}"
"""


@dataclass(frozen=True)
class Measured:
    """One process: seconds on the clock and of its processor, its peak memory, and what it came to."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    clusters: int
    accuracy: float


def measure(command: list[str], log: Path, environment: dict[str, str]) -> tuple[float, float, int]:
    """Run ``command`` to its end: seconds on the clock and of its processor, and the peak of its memory in bytes."""
    start = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment)
        _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command[:3])} failed: see {log}\n{log.read_text()[-2000:]}")
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def ours(folder: Path, entries: list[dict[str, Any]], options: argparse.Namespace, precision: str) -> Measured:
    clients = ",\n".join(
        "  {" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in entry.items()) + "}" for entry in entries
    )
    numbers = {"batch": options.batch, "rounds": options.rounds, "precision": precision, "model": options.model}
    (folder / "run.toml").write_text(CONFIG.format(clients=clients, **numbers))
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [sys.executable, "-m", "coterie", "run", str(folder / "run.toml"), "--out", str(out)]
    times = measure(command, folder / "ours.log", {})
    summary = json.loads((out / "summary.json").read_text())
    accuracy = statistics.fmean(client["test"]["accuracy"] for client in summary["clients"].values())
    return Measured(*times, len(list((out / "experts").glob("expert-*"))), accuracy)


def theirs(folder: Path, entries: list[dict[str, Any]], options: argparse.Namespace, precision: str) -> Measured:
    out = Path(tempfile.mkdtemp(dir=folder))
    given = {
        "model_name": resolve(options.model),
        "output_dir": str(out),
        "global_rounds": options.rounds,
        "warmup_rounds": 1,
        "max_clusters": 4,
        "batch_size": options.batch,
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    settings = {
        "checkout": str(options.checkout),
        "rows": str(folder),
        "jobs": [int(entry["group"].removeprefix("job-")) for entry in entries],
        "precision": precision,
        "arguments": [*words, "--tasks", *(entry["id"] for entry in entries)],
    }
    command = [str(options.python), str(HERE / "_published_code.py"), json.dumps(settings)]
    times = measure(command, folder / "theirs.log", {"PYTHONPATH": ""})
    (history,) = out.rglob("training_history.json")
    found = json.loads(history.read_text())
    last = [scores[-1]["eval_accuracy"] for scores in found["client_scores"].values()]
    return Measured(*times, found["optimal_n_clusters"], statistics.fmean(last))


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--checkout", type=Path, help="the published code; none: ours alone")
        parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the Python of its environment")
        parser.add_argument("--clients", type=int, default=8)
        parser.add_argument("--rows", type=int, default=100, help="training rows, and test rows, of a client")
        parser.add_argument("--batch", type=int, default=16)
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--repeats", type=int, default=3)
        parser.add_argument("--theirs-in-bfloat16", action="store_true", help="their code under autocast too")
        parser.add_argument("--model", default="minilm", help="or a folder of an encoder")

    options = arguments(str(__doc__), add)
    options.python = Path(os.path.abspath(options.python))
    if options.quick:
        options.rows, options.rounds, options.repeats = 4, 2, 1
    cases = {"coterie, float32": (ours, "float32"), "coterie, bfloat16": (ours, "bfloat16")}
    if options.checkout:
        options.checkout = options.checkout.resolve()
        cases["published, float32"] = (theirs, "float32")
    if options.checkout and options.theirs_in_bfloat16:
        cases["published, bfloat16"] = (theirs, "bfloat16")
    found: dict[str, list[Measured]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as made:
        entries = made_clients(Path(made), Size(options.clients, options.rows, options.rows))
        for turn in range(options.repeats):
            for name in list(cases)[:: -1 if turn % 2 else 1]:
                run, precision = cases[name]
                found[name].append(run(Path(made), entries, options, precision))
                print(name, found[name][-1], flush=True)
    show(found, options)


def show(found: dict[str, list[Measured]], options: argparse.Namespace) -> None:
    def median(name: str, what: str) -> float:
        return statistics.median(getattr(each, what) for each in found[name])

    whats = ("seconds", "processor_seconds", "peak_bytes", "clusters", "accuracy")
    table("a whole run", [{"": name, **{what: median(name, what) for what in whats}} for name in found])
    ratios = {}
    for precision, aim in AIMS.items():
        for against in (each for each in AIMS if f"published, {each}" in found):
            pairs = list(zip(found[f"published, {against}"], found[f"coterie, {precision}"], strict=True))
            ratios[f"coterie in {precision}, published in {against}"] = {
                "clock": statistics.median(a.seconds / b.seconds for a, b in pairs),
                "processor": statistics.median(a.processor_seconds / b.processor_seconds for a, b in pairs),
                "memory": statistics.median(a.peak_bytes / b.peak_bytes for a, b in pairs),
                "aim": aim if against == "float32" else None,
            }
    table("published over ours", [{"": name, **each} for name, each in ratios.items()])
    about = {key: getattr(options, key) for key in ("clients", "rows", "batch", "rounds", "repeats")}
    commit = _commit(options.checkout) if options.checkout else None
    runs = {name: [asdict(each) for each in all_] for name, all_ in found.items()}
    write("published_code", options, {**about, "published_commit": commit, "runs": runs, "published_over": ratios})


def _commit(checkout: Path) -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
