"""A federation of real processes on loopback: `coterie serve` and `coterie join`, ended by their ids."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import sites
from coterie.federation.journal import read_journal
from coterie.federation.processes import free_port

COTERIE = [sys.executable, "-c", "from coterie.cli import main; main()"]
PATIENCE = 700.0  # seconds for a step; a step that works takes far less


@dataclass
class Processes:
    """A folder with a server's config, sites' files and keys, and the processes started in it."""

    folder: Path
    insecure: bool
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def coterie(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COTERIE, *args], cwd=self.folder, capture_output=True, text=True, check=False)

    def start(self, name: str, *args: str) -> None:
        extra = ["--insecure"] if self.insecure else []
        with (self.folder / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                [*COTERIE, *args, *extra], cwd=self.folder, stdout=out, stderr=out, start_new_session=True
            )

    def serve(self, *more: str) -> None:
        self.start("serve", "serve", "serve.toml", "--out", "run", *more)

    def join(self, site: str) -> None:
        self.start(site, "join", f"{site}.toml")

    def kill(self, name: str) -> None:
        """SIGKILL, as a crash."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def end(self, name: str) -> int:
        process = self.running.pop(name)
        process.terminate()
        return process.wait(60)

    def descendant(self, name: str, what: str) -> psutil.Process:
        """A process below ``name`` whose command line holds ``what``."""

        def found() -> psutil.Process | None:
            below = psutil.Process(self.running[name].pid).children(recursive=True)
            return next((p for p in below if any(what in part for part in p.cmdline())), None)

        return self.until(found, f"{what} below {name}")

    def until(self, found: Callable[[], Any], what: str) -> Any:
        """What ``found`` returns once it is something. Fails with the logs where that takes too long."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if value := found():
                return value
            time.sleep(0.2)
        raise AssertionError(f"no {what}; {self.logs()}")

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The first event of the journal of that kind with these fields."""

        def found() -> Mapping[str, Any] | None:
            process = self.running.get("serve")
            if process is not None and process.poll() not in (None, 0):
                raise AssertionError(f"the server ended with {process.returncode}; {self.logs()}")
            events = read_journal(self.run)
            return next((e for e in events if e["event"] == kind and fields.items() <= e.items()), None)

        return dict(self.until(found, f"event {kind} {fields}"))

    def next(self, kind: str) -> None:
        """Wait for one more event of that kind."""

        def number() -> int:
            return sum(event["event"] == kind for event in read_journal(self.run))

        seen = number()
        self.until(lambda: number() > seen, f"other {kind}")

    def finished(self) -> None:
        process = self.running.pop("serve")
        assert process.wait(PATIENCE) == 0, self.logs()

    def logs(self) -> str:
        paths = [*self.folder.glob("*.out"), *self.folder.glob("run/flower/*.log"), *self.folder.glob("state-*/*.log")]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in paths)


@contextmanager
def processes(
    folder: Path, sites_there: list[str], *, insecure: bool, run: str, federation: str
) -> Iterator[Processes]:
    """Files for a server and its sites in ``folder``; whatever was started is gone at the end, and that is checked."""
    made = Processes(folder, insecure)
    port = free_port()
    path = sites.config(folder, method="fedlease", run=run)
    text = path.read_text().replace("warmup_rounds = 1", "warmup_rounds = 1\nexperts = 2")
    text = re.sub(r"rounds = 3\n", "", text, count=1) if "rounds" in run else text
    path.write_text(text)
    listed = ", ".join(f'"{s}"' for s in sites_there)
    text = text.replace('[data]\nfolder = "clients"\n', "")
    (folder / "serve.toml").write_text(f"{text}\n[federation]\nsites = [{listed}]\nport = {port}\n{federation}\n")
    for site in sites_there:
        write_site(folder, site, port)
    before = set(psutil.pids())
    try:
        yield made
    finally:
        own = [psutil.Process(p.pid).children(recursive=True) for p in made.running.values() if p.poll() is None]
        for process in made.running.values():
            process.terminate()
        for process in made.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        _, alive = psutil.wait_procs([p for family in own for p in family], timeout=30)
        for process in alive:
            process.kill()
        assert [p for p in alive if p.pid not in before] == []


def write_site(folder: Path, site: str, port: int, key: str | None = None) -> None:
    rows = {split: f"clients/{site}/{split}.jsonl" for split in ("train", "validation", "test")}
    sections: dict[str, dict[str, Any]] = {
        "site": {
            "id": site,
            "server": f"127.0.0.1:{port}",
            "key": key or f"keys/sites/{site}",
            "ca": "keys/ca.crt",
            "state": f"state-{site}",
        },
        "model": {"path": "model"},
        "data": rows,
        "engine": {"device": "cpu", "threads": 1},
    }
    lines = [f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in s.items()) for name, s in sections.items()]
    (folder / f"{site}.toml").write_text("\n".join(lines))
