"""A federation of real processes on loopback: `coterie serve` and `coterie join`, ended by their ids."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

import sites
from coterie.config.load import load_config
from coterie.deploy.journal import read_journal
from coterie.deploy.processes import free_port
from coterie.experiment import run as experiment_run

MISBEHAVING = [sys.executable, str(Path(__file__).parent / "misbehaving.py")]
COTERIE = [sys.executable, "-c", "from coterie.cli.main import main; main()"]
PATIENCE = 700.0  # seconds for a step; a step that works takes far less


@dataclass
class Processes:
    """A folder with a server's config, sites' files and keys, and the processes started in it."""

    folder: Path
    insecure: bool
    temp: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def coterie(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COTERIE, *args], cwd=self.folder, capture_output=True, text=True, check=False)

    def deadline(self) -> float:
        """Make the rounds' deadline one that an exchange stays well below here and now, and return it in seconds.

        A start of `coterie` takes 1.5 s on idle cores, an exchange 5.
        """
        started = time.monotonic()
        assert self.coterie("version").returncode == 0
        found = min(60.0, max(14.0, 7 * (time.monotonic() - started))) // 1
        path = self.folder / "serve.toml"
        path.write_text(f"{path.read_text()}deadline = {found}\n")
        return found

    def start(self, name: str, *command: str) -> None:
        extra = ["--insecure"] if self.insecure else []
        with (self.folder / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                [*command, *extra],
                cwd=self.folder,
                env={**os.environ, "TMPDIR": str(self.temp)},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def serve(self, *more: str) -> None:
        self.start("serve", *COTERIE, "serve", "serve.toml", "--out", "run", *more)

    def join(self, site: str, plan: Mapping[str, str] | None = None) -> None:
        """Start a site; with a plan one that misbehaves."""
        command = COTERIE if plan is None else [*MISBEHAVING, json.dumps(plan)]
        self.start(site, *command, "join", f"{site}.toml")

    def kill(self, name: str) -> None:
        """SIGKILL, as a crash."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def power_cut(self, name: str) -> None:
        """SIGKILL to a command and all that it started: none of them has a last word."""
        below = psutil.Process(self.running[name].pid).children(recursive=True)
        self.running[name].send_signal(signal.SIGSTOP)  # else it would start again what died
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.kill(name)
        for left in self.temp.glob("coterie-*"):  # as a machine's start clears its folder of temporary files
            if not any(str(left) in part for p in self.alive() for part in _command(p)):
                shutil.rmtree(left)

    def alive(self) -> list[psutil.Process]:
        """All that was started here and runs, whoever its parent is by now."""
        return [p for p in psutil.process_iter() if _environment(p).get("TMPDIR") == str(self.temp)]

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
            return next((e for e in self.lines() if e["event"] == kind and fields.items() <= e.items()), None)

        return dict(self.until(found, f"event {kind} {fields}"))

    def lines(self) -> list[dict[str, Any]]:
        """The journal so far, as JSON."""
        return [entry.event.to_json() for entry in read_journal(self.run)]

    def next(self, kind: str) -> None:
        """Wait for one more event of that kind."""

        def number() -> int:
            return sum(event["event"] == kind for event in self.lines())

        seen = number()
        self.until(lambda: number() > seen, f"other {kind}")

    def finished(self) -> None:
        process = self.running.pop("serve")
        assert process.wait(PATIENCE) == 0, self.logs()

    def logs(self) -> str:
        paths = [*self.folder.glob("*.out"), *self.folder.glob("run/flower/*.log"), *self.folder.glob("state-*/*.log")]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in paths)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@contextmanager
def processes(
    folder: Path, sites_there: list[str], *, insecure: bool, run: str, federation: str, method: str = "fedlease"
) -> Iterator[Processes]:
    """Files for a server and its sites in ``folder``; whatever was started is gone at the end, and that is checked."""
    temp = Path(tempfile.mkdtemp(prefix="ct-"))  # short: a path of a socket may have about 100 characters
    made = Processes(folder, insecure, temp)
    write_files(folder, sites_there, run, federation, method)
    try:
        yield made
        for process in made.running.values():
            process.terminate()
        for process in made.running.values():
            process.wait(60)
        end = time.monotonic() + 60
        while left := made.alive():
            assert time.monotonic() < end, [_command(p) for p in left]
            time.sleep(0.2)
        assert not [*temp.glob("coterie-*")], "a socket was left behind"
    finally:
        for one in made.alive():
            with suppress(psutil.NoSuchProcess):
                one.kill()
        for process in made.running.values():
            process.wait()
        shutil.rmtree(temp)


def write_files(folder: Path, sites_there: list[str], run: str, federation: str, method: str) -> None:
    port = free_port()
    path = sites.config(folder, method=method, run=run)
    text = path.read_text().replace("warmup_rounds = 1", "warmup_rounds = 1\nexperts = 2")
    text = re.sub(r"rounds = 3\n", "", text, count=1) if "rounds" in run else text
    path.write_text(text)
    listed = ", ".join(f'"{s}"' for s in sites_there)
    text = text.replace('[data]\nfolder = "clients"\n', "")
    (folder / "serve.toml").write_text(f"{text}\n[federation]\nsites = [{listed}]\nport = {port}\n{federation}\n")
    for site in sites_there:
        write_site(folder, site, port)


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


def in_process(folder: Path, clients: tuple[str, ...]) -> Path:
    """The same federation, of the same clients, by `coterie run`."""
    torch.set_num_threads(1)
    for other in (folder / "clients").iterdir():
        if other.name not in clients:
            other.rename(folder / f"unused-{other.name}")
    experiment_run(load_config(folder / "run.toml"), folder / "whole", root=folder)
    return folder / "whole"


def experts(run: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "experts").rglob("*.safetensors"))}
    assert len(found) >= 2
    return found


def newest_state(run: Path) -> bytes:
    return max((run / "checkpoints").glob("*.ckpt")).read_bytes().split(b"\n", 3)[3]
