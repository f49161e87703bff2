"""A round over Flower against one in process, and a worker that holds the base against loading it for every message.

Two sites on this machine, MiniLM, FedLEASE with two experts. With --quick no server is started.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _harness import arguments, table, write

from coterie import codec
from coterie.config import check_config
from coterie.data.federation import load_federation
from coterie.deployment import SiteSettings
from coterie.engines import local
from coterie.engines.parcel import Parcel
from coterie.federation.journal import read_journal
from coterie.federation.processes import free_port, start, stop
from coterie.federation.terms import federation_config, terms_of
from coterie.federation.worker import Worker
from coterie.method import method_named
from coterie.types import Instruction

SITES = {"north": ("invoice", "refund"), "south": ("fever", "cough")}
COTERIE = [sys.executable, "-c", "from coterie.cli import main; main()"]
COLD = """
import json, sys
from pathlib import Path
from coterie.deployment import SiteSettings
from coterie.engines.parcel import Parcel
from coterie.federation.worker import Worker
folder = Path(sys.argv[1])
site = SiteSettings.model_validate_json((folder / "cold.json").read_text())
head = json.loads((folder / "head.json").read_text())
assert "error" not in Worker(site, folder).answer(Parcel(head, (folder / "blob").read_bytes())).head
"""


def settings(folder: Path, rows: int, rounds: int, port: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The server's config and the sites' files, with their rows."""
    sites = {}
    for site, (one, other) in SITES.items():
        (folder / site).mkdir()
        for split, number in (("train", rows), ("validation", 8), ("test", 8)):
            texts = [{"text": f"about the {(one, other)[i % 2]}, case {i}", "label": i % 2} for i in range(number)]
            (folder / site / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        own = {"id": site, "server": f"127.0.0.1:{port}", "state": f"state-{site}"}
        data = {split: f"{site}/{split}.jsonl" for split in ("train", "validation", "test")}
        sites[site] = {"site": own, "data": data, "engine": {"device": "cpu", "threads": 1}}
    server = {
        "model": {"path": "minilm", "max_length": 32},
        "train": {"epochs": 1},
        "method": {"name": "fedlease", "warmup_rounds": 1, "experts": 2},
        "run": {"rounds": rounds, "evaluate_every": rounds},
        "engine": {"device": "cpu", "threads": 1},
        "federation": {"sites": list(SITES), "port": port},
    }
    return server, sites


def toml(sections: dict[str, dict[str, Any]]) -> str:
    lines = [f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in s.items()) for name, s in sections.items()]
    return "\n".join(lines)


def in_process(folder: Path, server: dict[str, Any], sites: dict[str, dict[str, Any]], rounds: int) -> dict[str, float]:
    """Median seconds of a round's training after the warm-up, and of the codec's part in it."""
    clients = [{"id": site, **parts["data"]} for site, parts in sites.items()]
    config = check_config({**server, "data": {"clients": clients}})
    engine = local.make(config, load_federation(config.data, "classification", 0, folder), folder / "here", folder, {})
    method = method_named("fedlease")(config.method_settings(), config.plan())
    state = method.init(engine.spec, engine.clients)
    seconds, coding = [], []
    for rnd in range(1, rounds + 1):
        instructions = method.configure(state, engine.clients, rnd)
        began = time.perf_counter()
        sent = dict(engine.train(method, instructions, rnd))
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        for ins in instructions.values():
            codec.decode(Instruction, codec.encode(ins))
        for delivery in sent.values():
            codec.encode(delivery.reply)
        coding.append(time.perf_counter() - began)
        state = method.aggregate(state, {c: d.reply for c, d in sent.items() if d.reply}, rnd)
    return {"seconds": statistics.median(seconds[1:]), "encoding": statistics.median(coding[1:])}


def worker_against_loading(
    folder: Path, server: dict[str, Any], site: dict[str, Any], repeats: int
) -> dict[str, float]:
    """Median seconds of a message to a worker that has the base, and to a process that is started for it."""
    settings = SiteSettings.model_validate_json(json.dumps(site))
    config = federation_config(server)
    head = {"kind": "train", "client": "north", "round": 1, "run": "bench", "attempt": 1, "since": 0, "keep": 0}
    head |= {"terms": terms_of(config)}
    worker = Worker(settings, folder)
    worker.answer(Parcel({**head, "kind": "query.hello"}))
    method = method_named("fedlease")(config.method_settings(), config.plan())
    engine = next(iter(worker.runs.values())).engine
    both = [engine.clients[0], replace(engine.clients[0], id="south")]
    state = method.init(engine.spec, both)
    blob = codec.encode(method.configure(state, engine.clients, 1)["north"])
    (folder / "cold.json").write_text(settings.model_dump_json())
    (folder / "head.json").write_text(json.dumps(head))
    (folder / "blob").write_bytes(blob)
    warm, cold = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        assert "error" not in worker.answer(Parcel(head, blob)).head
        warm.append(time.perf_counter() - began)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", COLD, str(folder)], check=True, capture_output=True)
        cold.append(time.perf_counter() - began)
    return {"worker": statistics.median(warm), "loading": statistics.median(cold)}


def over_flower(folder: Path, server: dict[str, Any], sites: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Median seconds of a round's training over loopback, from the server's journal, after the warm-up."""
    (folder / "serve.toml").write_text(toml(server))
    env, running = dict(os.environ), []
    try:
        for site, parts in sites.items():
            (folder / f"{site}.toml").write_text(toml(parts))
            join = [*COTERIE, "join", str(folder / f"{site}.toml"), "--insecure"]
            running.append(start(join, env, folder / f"{site}.log"))
        serve = [*COTERIE, "serve", str(folder / "serve.toml"), "--out", str(folder / "run"), "--insecure"]
        subprocess.run(serve, check=True, capture_output=True)
    finally:
        for process in running:
            stop(process)
    events = read_journal(folder / "run")
    train = [e for e in events if e["event"] == "exchange" and e["kind"] == "train" and e["round"] > 1]
    rounds = [[e for e in train if e["round"] == rnd] for rnd in sorted({e["round"] for e in train})]
    whole = statistics.median(max(e["seconds"] for e in rnd) for rnd in rounds)
    work = statistics.median(max(e["site_seconds"] for e in rnd) for rnd in rounds)
    size = statistics.median(e["bytes_down"] + e["bytes_up"] for e in train)
    return {"seconds": whole, "at_the_sites": work, "flower": whole - work, "bytes_per_site": size}


def main() -> None:
    options = arguments(__doc__ or "")
    rows, rounds, repeats = (8, 2, 1) if options.quick else (200, 5, 5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server, sites = settings(folder, rows, rounds, free_port())
        results: dict[str, Any] = {"rows": rows, "in_process": in_process(folder, server, sites, rounds)}
        results["message"] = worker_against_loading(folder, server, sites["north"], repeats)
        if not options.quick:
            results["over_flower"] = over_flower(folder, server, sites)
        for title, row in results.items():
            if isinstance(row, dict):
                table(title.replace("_", " "), [row])
        write("flower", options, results)


if __name__ == "__main__":
    main()
