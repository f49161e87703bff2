"""``coterie demo``: a federation of organisations with different jobs, on text that the project generates.

Eight organisations, two to a job: clinics that triage messages, banks that sort complaints, shops that rate reviews,
city offices that route requests. The methods do not know which job a client does. FedLEASE finds the jobs from the
clients' B matrices; FedIT averages one LoRA over all; local trains alone.
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
from coterie.comparison import title_of
from coterie.comparison.figures import clusters_of, curves, record_of
from coterie.comparison.record import write_record
from coterie.comparison.study import Study, carry_out
from coterie.methods.findings import Clusters
from coterie.types import CoterieError
from coterie.units import clock

METHODS = ("fedlease", "fedit", "local")
_MARK = ".coterie-demo"
CONFIG: dict[str, object] = {
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
    """Run the demo in ``folder`` (an older demo there is deleted) and show its results.

    Writes a run folder per method with its report, ``demo.png`` and ``demo.json``.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise CoterieError(f"{folder} holds files that are not a demo; name another folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    started = time.perf_counter()
    comparison = carry_out(Study(CONFIG, METHODS, (0,), folder, Path.cwd()), partial(listener, console))
    seconds = time.perf_counter() - started
    if comparison.missing:
        raise CoterieError(comparison.missing[0].reason)
    results = comparison.results
    variant, clusters = clusters_of(results) or ("", None)
    if clusters:
        from coterie.report.plots import demo_picture  # imports matplotlib

        groups = {client: row.group for client, row in results[variant][0].clients.items()}
        demo_picture(folder / "demo.png", clusters, groups, curves(comparison))
        _show_clusters(console, variant, clusters)
    write_record(folder / "demo.json", record_of(comparison))
    show(console, comparison, folder)
    console.print(f"picture: {folder / 'demo.png'}   ({clock(seconds)})", highlight=False, soft_wrap=True)
    served = folder / f"{METHODS[0]}-0"
    console.print(f"try a client's model in a browser: coterie api {served}", highlight=False, soft_wrap=True)


def _show_clusters(console: Console, variant: str, clusters: Clusters) -> None:
    """Show the clusters, and the silhouettes that their number was chosen by."""
    text = ", ".join(f"{k}: {score:.3f}" for k, score in clusters.silhouettes.items())
    heading(console, f"{title_of(variant)} found {clusters.number} clusters (silhouettes {text})")
    table = Table(box=None, header_style="bold")
    table.add_column("expert")
    table.add_column("clients")
    for number in sorted(set(clusters.members.values())):
        table.add_row(str(number), ", ".join(sorted(c for c, of in clusters.members.items() if of == number)))
    console.print(table)
