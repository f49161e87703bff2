"""A round over Flower against one in process, and a worker that holds the base against loading it for every message.

Two sites on this machine, MiniLM, FedLEASE with two experts, one thread each. In process the sites train one after the
other, over Flower at the same time. A round over Flower is split: training and encoding by clocks, transfer by bytes
and the seconds that a MiB more takes in an exchange without work, Flower's own waiting by what is left; an empty
exchange is that waiting measured by itself. With --quick no server is started; --flower starts it all the same.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from _harness import arguments, table, write

from coterie import codec
from coterie.config.deployment import SiteSettings
from coterie.config.load import check_config
from coterie.data.clients import load_data
from coterie.deploy.agreement import federation_config, terms_of
from coterie.deploy.events import Exchanged
from coterie.deploy.head import digest_of
from coterie.deploy.journal import read_journal
from coterie.deploy.processes import free_port, start, stop, tail
from coterie.deploy.superlink import _PYPROJECT, SuperLink
from coterie.deploy.worker import Worker
from coterie.engines import local
from coterie.flower.message import Message
from coterie.methods.registry import method_named
from coterie.runs.events import RoundDone
from coterie.types import Instruction

SITES = {"north": ("invoice", "refund"), "south": ("fever", "cough")}
COTERIE = [sys.executable, "-c", "from coterie.cli.main import main; main()"]
COLD = """
import json, sys
from pathlib import Path
from coterie.config.deployment import SiteSettings
from coterie.flower.message import Message
from coterie.deploy.worker import Worker
folder = Path(sys.argv[1])
site = SiteSettings.model_validate_json((folder / "cold.json").read_text())
head = json.loads((folder / "head.json").read_text())
assert "error" not in Worker(site, folder).answer(Message(head, (folder / "blob").read_bytes())).head
"""
MEASURE = """
import json, time
from pathlib import Path
import torch
from coterie.flower.app import server_app
from coterie.deploy.agreement import Agreement
from coterie.deploy.events import Exchanged
from coterie.deploy.remote import RemoteEngine
from coterie.deploy.sites import Sites
from coterie.types import Instruction, Key, Part

home = Path({home!r})

def main(transport, config):
    ask = json.loads((home / "ask.json").read_text())
    seconds = []
    def note(event):
        if isinstance(event, Exchanged):
            assert event.failed is None, event
            seconds.append(event.seconds - event.site_seconds)
    agreement = Agreement("exchanges", ask["terms"], ask["hash"], 1, tuple(ask["sites"]), deadline=600.0)
    engine = RemoteEngine(Sites(transport, agreement, note))
    engine.sites.gather(0, 300)
    told = dict()
    for mib in ask["sizes"]:
        blob = Instruction(dict([(Key("bench", 0, Part.A), torch.zeros(mib * 2**18))]))
        seconds.clear()
        for _ in range(ask["repeats"]):
            limits = dict.fromkeys(ask["sites"], 2**40)
            for _ in engine._exchange("query.hello", dict.fromkeys(ask["sites"], blob), 0, dict(), limits):
                pass
        told[mib] = seconds[:]
    (home / "told.part").write_text(json.dumps(told))
    (home / "told.part").rename(home / "told.json")

app = server_app(main)
"""


def settings(folder: Path, rows: int, rounds: int, port: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The server's config and the sites' files, with their rows."""
    sites = {}
    for site, (one, other) in SITES.items():
        (folder / site).mkdir()
        for split, number in (("train", rows), ("validation", 8), ("test", 8)):
            texts = [{"text": f"about the {(one, other)[i % 2]}, {split} {i}", "label": i % 2} for i in range(number)]
            (folder / site / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        own = {"id": site, "server": f"127.0.0.1:{port}", "state": f"state-{site}"}
        data = {split: f"{site}/{split}.jsonl" for split in ("train", "validation", "test")}
        sites[site] = {"site": own, "data": data, "engine": {"device": "cpu", "threads": 1}}
    server = {
        "model": {"path": "minilm", "max_length": 32},
        "train": {"epochs": 1},
        "method": {"name": "fedlease", "distance": "B", "warmup_rounds": 1, "experts": 2},
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
    engine = local.make(config, load_data(config.data, "classification", 0, folder), folder / "here", folder, {})
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
    head |= {"kept_rounds": [], "terms": terms_of(config)}
    worker = Worker(settings, folder)
    worker.answer(Message({**head, "kind": "query.hello"}))
    method = method_named("fedlease")(config.method_settings(), config.plan())
    client = next(iter(worker.runs.values())).client
    state = method.init(client.workplace.base.spec, [client.info, replace(client.info, id="south")])
    blob = codec.encode(method.configure(state, [client.info], 1)["north"])
    (folder / "cold.json").write_text(settings.model_dump_json())
    (folder / "head.json").write_text(json.dumps(head))
    (folder / "blob").write_bytes(blob)
    warm, cold = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        assert "error" not in worker.answer(Message(head, blob)).head
        warm.append(time.perf_counter() - began)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", COLD, str(folder)], check=True, capture_output=True)
        cold.append(time.perf_counter() - began)
    return {"worker": statistics.median(warm), "loading": statistics.median(cold)}


@contextmanager
def sites_joined(folder: Path, sites: dict[str, dict[str, Any]]) -> Iterator[None]:
    """`coterie join` for every site, ended at the end of the block."""
    running = []
    try:
        for site, parts in sites.items():
            (folder / f"{site}.toml").write_text(toml(parts))
            join = [*COTERIE, "join", str(folder / f"{site}.toml"), "--insecure"]
            running.append(start(join, dict(os.environ), folder / f"{site}.log"))
        yield
    finally:
        for process in running:
            stop(process)


def over_flower(folder: Path, server: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a round's training over loopback, from the server's journal, after the warm-up."""
    (folder / "serve.toml").write_text(toml(server))
    serve = [*COTERIE, "serve", str(folder / "serve.toml"), "--out", str(folder / "run"), "--insecure"]
    done = subprocess.run(serve, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [entry.event for entry in read_journal(folder / "run")]
    assert not [e for e in events if isinstance(e, RoundDone) and e.failed]
    train = [e for e in events if isinstance(e, Exchanged) and e.kind == "train" and e.round > 1]
    rounds = [[e for e in train if e.round == rnd] for rnd in sorted({e.round for e in train})]
    last = [max(rnd, key=lambda e: e.seconds) for rnd in rounds]  # the site that the round waited for
    size = statistics.median(e.bytes_down + e.bytes_up for e in train)
    return {
        "seconds": statistics.median(e.seconds for e in last),
        "at_the_site": statistics.median(e.site_seconds for e in last),
        "bytes_per_site": size,
    }


def exchanges(folder: Path, server: dict[str, Any], repeats: int, mib: int) -> dict[str, float]:
    """Median seconds in Flower of an exchange without work: with nothing in it, and with ``mib`` MiB to each site."""
    config, home, port = federation_config(server), folder / "flower", server["federation"]["port"]
    terms = terms_of(config)
    ask = {"terms": terms, "hash": digest_of(terms), "sites": list(SITES), "sizes": [0, mib], "repeats": repeats}
    (home / "app").mkdir(parents=True)
    (home / "ask.json").write_text(json.dumps(ask))
    (home / "app" / "pyproject.toml").write_text(app_of(home))
    (home / "app" / "coterie_server.py").write_text(MEASURE.format(home=str(home)))
    link = SuperLink(home, "127.0.0.1", port, None)
    try:
        link.connect()
        link.start()
        run = link._flwr("run", str(home / "app"), "coterie")["run-id"]
        while not (home / "told.json").exists():
            assert not link.status(str(run)).startswith("finished"), tail(link.log)
            time.sleep(5)
    finally:
        link.stop()
    told = json.loads((home / "told.json").read_text())
    empty, full = (statistics.median(told[str(size)]) for size in ask["sizes"])
    return {"empty": empty, "full": full, "full_mib": mib, "seconds_per_mib": max(0.0, full - empty) / mib}


def app_of(home: Path) -> str:
    """The pyproject.toml of the app that measures."""
    return _PYPROJECT.replace("{folder}", json.dumps(str(home)))


def split(here: dict[str, float], over: dict[str, float], empty: dict[str, float]) -> dict[str, float]:
    """A round over Flower in its parts, seconds; what Flower waits for is what the others leave."""
    encoding = here["encoding"] / len(SITES)
    training = over["at_the_site"] - encoding / 2  # half of it is the server's
    transfer = over["bytes_per_site"] / 2**20 * empty["seconds_per_mib"]
    waiting = over["seconds"] - training - encoding - transfer
    parts = {"training": training, "encoding": encoding, "transfer": transfer, "flower_waits": waiting}
    return {"round": over["seconds"], **parts, "an_empty_exchange": empty["empty"]}


def main() -> None:
    options = arguments(__doc__ or "", lambda parser: parser.add_argument("--flower", action="store_true"))
    rows, rounds, repeats, mib = (8, 2, 1, 4) if options.quick else (200, 5, 5, 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server, sites = settings(folder, rows, rounds, free_port())
        results: dict[str, Any] = {"rows": rows, "in_process": in_process(folder, server, sites, rounds)}
        results["message"] = worker_against_loading(folder, server, sites["north"], repeats)
        if options.flower or not options.quick:
            with sites_joined(folder, sites):
                results["exchange"] = exchanges(folder, server, repeats, mib)
                results["over_flower"] = over_flower(folder, server)
            results["split"] = split(results["in_process"], results["over_flower"], results["exchange"])
        for title, row in results.items():
            if isinstance(row, dict):
                table(title.replace("_", " "), [row])
        write("flower", options, results)


if __name__ == "__main__":
    main()
