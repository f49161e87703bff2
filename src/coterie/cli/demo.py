"""``coterie demo``: a federation of organisations with different jobs, on text that the project itself makes.

Eight organisations, two to a job: clinics that triage messages, banks that sort complaints, shops that rate reviews,
city offices that route requests. No one tells the methods who does what. FedLEASE finds the jobs from the clients' B
matrices; FedIT averages one LoRA over all; local trains alone.
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coterie.cli.compare import show
from coterie.cli.console import heading
from coterie.cli.progress import listener
from coterie.comparison import Results, compare_all, curves, table_of
from coterie.files import write_json
from coterie.report.plots import demo_picture
from coterie.types import CoterieError, Json
from coterie.units import clock

METHODS = ("fedlease", "fedit", "local")
_MARK = ".coterie-demo"
CONFIG: dict[str, Json] = {
    "model": {"path": "minilm", "max_length": 64},
    "data": {
        "datasets": ["demo:clinic", "demo:bank", "demo:shop", "demo:city"],
        "train_rows": 64,
        "validation_rows": 32,
        "test_rows": 64,
        "partition": {"name": "by_dataset", "clients": 2},
    },
    "lora": {"rank": 4},
    "train": {"learning_rate": 3e-3, "epochs": 2, "batch_size": 8},
    "methods": {"fedlease": {"warmup_rounds": 2}},
    "run": {"rounds": 8, "evaluate_every": 2},
    "engine": {"precision": "auto"},
}


def run_demo(folder: Path, console: Console) -> None:
    """Run the demo in ``folder`` (an older demo there makes room) and show what came of it.

    Writes a run folder per method with its report, ``demo.png`` and ``demo.json``.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise CoterieError(f"{folder} holds something else than a demo; name another folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    started = time.perf_counter()
    results = compare_all(CONFIG, METHODS, [0], folder, Path.cwd(), partial(listener, console))
    seconds = time.perf_counter() - started
    found = results["fedlease"][0]["describe"]
    groups = {c: row["group"] for c, row in results["fedlease"][0]["clients"].items()}
    drawn = curves(folder, results)
    demo_picture(folder / "demo.png", found["order"], found["distances"], found["clusters"], groups, drawn)
    write_json(folder / "demo.json", _record(results, seconds))
    _show_clusters(console, results)
    show(console, results, folder)
    console.print(f"picture: {folder / 'demo.png'}   ({clock(seconds)})", highlight=False, soft_wrap=True)


def _record(results: Results, seconds: float) -> dict[str, Json]:
    summary = results["fedlease"][0]
    found = {name: summary["describe"][name] for name in ("clusters", "silhouettes")}
    return {"methods": table_of(results), "seconds": seconds, **found, "machine": summary["machine"]}


def _show_clusters(console: Console, results: Results) -> None:
    """Who was put together, and how clear the choice of the number of clusters was."""
    summary = results["fedlease"][0]
    clusters, scores = summary["describe"]["clusters"], summary["describe"]["silhouettes"]
    number = max(clusters.values()) + 1
    text = ", ".join(f"{k}: {score:.2f}" for k, score in scores.items())
    heading(console, f"FedLEASE found {number} clusters (silhouettes {text})")
    table = Table(box=None, header_style="bold")
    table.add_column("expert")
    table.add_column("clients")
    for expert in range(number):
        table.add_row(str(expert), ", ".join(sorted(c for c, e in clusters.items() if e == expert)))
    console.print(table)
