"""The long-lived process of a site: holds the base, the data and the personal state, and answers messages.

It listens on a socket that only its own user can open. What it logs is what happened, never a row, a label or a
message of a library: kinds, rounds, sizes, seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from coterie import codec
from coterie.adapters.bundle import write_bundle
from coterie.compute.loading import workplaces
from coterie.config.deployment import Policy, SiteSettings
from coterie.config.load import load_site
from coterie.config.sections import Config
from coterie.data.clients import SAFE_ID, load_data
from coterie.data.rows import SPLITS, FederatedData
from coterie.deploy.agreement import config_at, digest_of
from coterie.deploy.hello import Hello
from coterie.deploy.policy import BoundedCompute, check_policy, check_ranks, check_upload, without_usage
from coterie.engines.client import Guard, LocalClient, client_bank, evaluate_client, train_client
from coterie.engines.store import ClientStates
from coterie.experiment import set_threads
from coterie.files import write_json
from coterie.flower.local_socket import listening, receive, send, user_of
from coterie.flower.message import BrokenMessageError, Message
from coterie.machine import environment
from coterie.methods.base import Method
from coterie.nn.locate import resolve
from coterie.types import CoterieError, DataError, Json, PrivateError, Reply

log = logging.getLogger("coterie.site")
_LOG_BYTES, _LOG_FILES = 5_000_000, 3
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class _Open:
    """A run that this site takes part in."""

    config: Config
    method: Method[Any]
    client: LocalClient
    folder: Path


@dataclass
class Worker:
    """Answers one message at a time. ``root`` is where the paths of SITE.toml start."""

    site: SiteSettings
    root: Path
    cache: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, _Open] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return (self.root / self.site.site.state).resolve()

    def answer(self, message: Message) -> Message:
        """The reply to one message; a fault that the other side can mend is the ``error`` in its head."""
        started = time.perf_counter()
        kind = str(message.head.get("kind", ""))
        try:
            made = self._answer(kind, message)
        except (CoterieError, codec.CodecError) as fault:
            made = Message({"error": told(fault)})
        seconds = time.perf_counter() - started
        log.info(
            "%s of round %s: %s, %d bytes in, %d out, %.1f s",
            kind if kind in _ANSWERS else "an unknown kind",
            message.head.get("round") if isinstance(message.head.get("round"), int) else "?",
            "refused" if "error" in made.head else "done",
            len(message.body),
            len(made.body),
            seconds,
        )
        return Message({**made.head, "seconds": seconds}, made.body)

    def _answer(self, kind: str, message: Message) -> Message:
        if kind not in _ANSWERS:
            raise CoterieError(f"this site knows no {kind!r}")
        head = _checked_head(message.head)
        run = self._open(head)
        if kind == "query.hello":
            return self._hello(run, head)
        if head["client"] != self.site.site.id:
            raise CoterieError(f"this is {self.site.site.id}, the message is for {head['client']}")
        answers = {"train": self._train, "evaluate": self._evaluate, "query.bank": self._bank}
        return answers[kind](run, head, message.body)

    # one answer per kind ----------------------------------------------------------------------------------------------

    def _hello(self, run: _Open, head: Mapping[str, Json]) -> Message:
        with _model_told():
            base = fingerprint(resolve(run.config.model.path, self.root), self.state / "base.json")
        versions = environment()["versions"]
        info, spec = run.client.info, run.client.workplace.base.spec
        return Message({}, codec.encode(Hello(info, spec, digest_of(head["terms"]), base, versions)))

    def _train(self, run: _Open, head: Mapping[str, Json], blob: bytes) -> Message:
        if not 1 <= head["round"] <= self.site.policy.max_rounds:
            raise CoterieError(
                f"this site takes part in rounds 1 to {self.site.policy.max_rounds} ([policy] max_rounds)"
            )
        outcome = train_client(run.client, run.method, blob, head["round"])
        return Message({"error": outcome.error} if outcome.error else {}, outcome.blob)

    def _evaluate(self, run: _Open, head: Mapping[str, Json], blob: bytes) -> Message:
        if not self.site.policy.upload_metrics:
            raise CoterieError("this site sends no metrics ([policy] upload_metrics)")
        usage = bool(head.get("usage")) and self.site.policy.upload_usage
        splits = tuple(head.get("splits", ()))
        return Message({}, evaluate_client(run.client, run.method, blob, head["round"], splits, usage).blob)

    def _bank(self, run: _Open, head: Mapping[str, Json], blob: bytes) -> Message:
        """Write this site's own experts to its own disk; send them only where the policy says so."""
        bank, about = client_bank(run.client, run.method, blob, head["round"]), run.client.info
        base, task = resolve(run.config.model.path, self.root), run.config.task.kind
        info = {"client": about.id, "labels": about.labels, "method": run.method.name, "round": head["round"]}
        transposed = any(target.transposed for target in run.client.workplace.base.spec.targets)
        info |= {"base": base, "task": task}
        write_bundle(run.folder / "export", bank, info, fan_in_fan_out=transposed)
        return Message({}, codec.encode(bank) if self.site.policy.upload_bank else b"")

    # runs -------------------------------------------------------------------------------------------------------------

    def _open(self, head: Mapping[str, Json]) -> _Open:
        """The run of a message, with the personal state that the server's attempt starts from."""
        key = f"{head['run']} {digest_of(head['terms'])}"
        if key not in self.runs:
            self.runs = {key: self._load(head)}  # one at a time: another run's data are not kept
        run = self.runs[key]
        book = run.folder / "attempt.json"
        last = json.loads(book.read_text(encoding="utf-8")) if book.exists() else 0
        if head["attempt"] < last:
            raise CoterieError(f"the message is of attempt {head['attempt']}, and attempt {last} has begun")
        if head["attempt"] > last and head["kind"] != "query.hello":  # when it greets, a server has read no checkpoint
            run.client.states.restore(head["since"])
            write_json(book, head["attempt"])
        run.client.states.prune(head["keep"])
        return run

    def _load(self, head: Mapping[str, Json]) -> _Open:
        config = config_at(self.site, head["terms"])
        check_policy(self.site.policy, config)
        set_threads(config)
        federation = self.federation(config)
        method = config.make_method(self.root)
        folder = self.state / str(head["run"])
        with _model_told():
            workplace = workplaces(config, self.root, self.cache)[0]
        while len(self.cache) > 1:  # the base of an earlier run with other terms
            self.cache.pop(next(iter(self.cache)))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (rows,) = federation.clients
        client = LocalClient(workplace, rows, ClientStates.of(config, folder), guard_of(self.site.policy))
        return _Open(config, method, client, folder)

    def federation(self, config: Config) -> FederatedData:
        """This site's rows. Raises :class:`DataError`, whose text may quote them: for ``coterie site check`` alone."""
        try:
            return load_data(config.data, config.task.kind, config.run.seed, self.root)
        except OSError as fault:
            raise DataError(f"{fault.filename}: {fault.strerror}") from fault


class _ModelError(PrivateError):
    told = "this site cannot load its model; `coterie site check` there says why"


@contextmanager
def _model_told() -> Iterator[None]:
    """Faults of the base as a :class:`PrivateError`: their texts hold paths and what libraries said."""
    try:
        yield
    except (CoterieError, OSError) as fault:
        raise _ModelError(str(fault)) from fault


def guard_of(policy: Policy) -> Guard:
    """What ``policy`` allows of a round: ranks, steps, what leaves this site."""

    def release(reply: Reply) -> Reply:
        check_upload(policy, reply)
        return without_usage(policy, reply)

    return Guard(
        admit=lambda ins: check_ranks(policy, ins),
        compute=lambda compute: BoundedCompute(compute, policy.max_steps),
        release=release,
        wording=told,
    )


def told(fault: Exception) -> str:
    """What the server hears of a fault: nothing that quotes rows or names paths. The log says where that was."""
    if not isinstance(fault, PrivateError):
        return str(fault)
    log.warning("%s at %s", type(fault).__name__, _where(fault))
    return fault.told


_ANSWERS = ("query.hello", "train", "evaluate", "query.bank")
_ROUND_BOUND = 10**6  # the files of a site's states have six digits
_HEAD: dict[str, type] = {
    "kind": str,
    "client": str,
    "round": int,
    "run": str,
    "attempt": int,
    "since": int,
    "keep": int,
    "terms": dict,
}


def _checked_head(head: Mapping[str, Json]) -> Mapping[str, Json]:
    for name, kind in _HEAD.items():
        if type(head.get(name)) is not kind:
            raise CoterieError(f"the message's {name} is no {kind.__name__}")
        if kind is int and not 0 <= head[name] < _ROUND_BOUND:
            raise CoterieError(f"the message's {name} is {head[name]}; it is at least 0 and below {_ROUND_BOUND}")
    splits = head.get("splits", [])
    if not isinstance(splits, list) or not all(split in SPLITS for split in splits):
        raise CoterieError(f"the message's splits are some of {', '.join(SPLITS)}")
    if not SAFE_ID.fullmatch(head["run"]):
        raise CoterieError("the message's run cannot name a folder")
    return head


def fingerprint(path: str, book: Path) -> str:
    """SHA-256 over the config and the weights of a base, or its name where it is no folder; remembered in ``book``."""
    folder = Path(path)
    if not folder.is_dir():
        return hashlib.sha256(path.encode()).hexdigest()
    files = sorted([folder / "config.json", *(file for glob in _WEIGHTS for file in folder.glob(glob))])
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    known = json.loads(book.read_text(encoding="utf-8")) if book.exists() else {}
    if known.get("files") == [str(folder), stamp]:
        return str(known["sha256"])
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    write_json(book, {"files": [str(folder), stamp], "sha256": total.hexdigest()})
    return total.hexdigest()


def serve_forever(worker: Worker, path: Path) -> None:
    """Answer whoever of this user connects to the socket at ``path``, one after another."""
    with listening(path) as door:
        log.info("ready, process %d", os.getpid())
        while True:
            link, _ = door.accept()
            with link:
                _serve_one(worker, link)


def _serve_one(worker: Worker, link: socket.socket) -> None:
    try:
        if user_of(link) != os.getuid():
            log.warning("another user tried to connect")
            return
        link.settimeout(60)
        message = receive(link)
        if _left(link):
            log.info("a message whose sender gave up was skipped")
            return
        reply = worker.answer(message)
        send(link, reply)
    except (OSError, BrokenMessageError) as fault:
        log.warning("a connection failed: %s", type(fault).__name__)


def _left(link: socket.socket) -> bool:
    """Whether the other side has closed the connection: it waited in line behind another message, and gave up."""
    ready, _, _ = select.select([link], [], [], 0)
    return bool(ready) and link.recv(1, socket.MSG_PEEK) == b""


def work(path: str, door: str) -> None:
    """The worker's process: loads nothing before it is asked, and answers until it is ended."""
    worker = Worker(load_site(Path(path)), Path(path).resolve().parent)
    worker.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = RotatingFileHandler(worker.state / "site.log", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    sys.excepthook = _without_text
    serve_forever(worker, Path(door))


def _without_text(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """Log where the worker failed, and not what it said: a message may quote a row."""
    log.error("the worker failed with %s at %s", kind.__name__, _where(fault))


def _where(fault: BaseException) -> str:
    """The files and lines that a fault came through, the innermost first."""
    frames = traceback.extract_tb(fault.__traceback__)
    return " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
