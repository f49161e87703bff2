"""The readers that the fuzzer tries, each with a good example of what it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow
import pyarrow.parquet
import torch

import fuzz_secure
import secure_sums
import tiny
from coterie.adapters.about import ABOUT_FILE, read_about
from coterie.adapters.bundle import BUNDLE_FILE, read_bundle, write_bundle
from coterie.adapters.pool import POOL_FILE, read_pool, write_pool
from coterie.adapters.read import build_pool, read_adapter
from coterie.api.keys import new_key, read_keys
from coterie.codec import CodecError, decode, encode
from coterie.comparison.record import read_record
from coterie.config.load import load_config, load_site
from coterie.data.files import read_table
from coterie.data.parse import parse
from coterie.data.settings import Columns
from coterie.deploy.attempt import begin_attempt, read_attempt
from coterie.deploy.base_digest import files_digest
from coterie.deploy.events import Joined, Refused, ServerStarted
from coterie.deploy.head import Head, digest_of, read_head
from coterie.deploy.hello import Hello
from coterie.deploy.journal import JOURNAL, Journal, read_journal
from coterie.deploy.keys import known_sites, load_private, load_public, site_key
from coterie.deploy.private_site import Releases
from coterie.deploy.received import newest_received, received_file
from coterie.deploy.secure_site import note_opened
from coterie.deploy.sites import KNOWN, read_known
from coterie.deploy.status import read_status
from coterie.engines.store import PersonalStore, RoundStore
from coterie.flower.message import BrokenMessageError, head_of
from coterie.inference.records import read_records
from coterie.methods.privacy import PrivacySettings
from coterie.ops.accounting import Noised
from coterie.runs.checkpoint import Checkpoint, load_newest, save
from coterie.runs.events import CheckpointSaved, Note, RoundStart, read_events
from coterie.runs.folder import read_config
from coterie.runs.ledger import LEDGER, Entry, Ledger, read_ledger, write_ledger
from coterie.runs.private import KEY, kept_noise
from coterie.runs.summary import read_summary
from coterie.types import Bank, BaseSpec, ClientInfo, CoterieError, Instruction, Kept, Key, Part, Personal, Reply


@dataclass(frozen=True)
class Reader:
    """``read`` reads the file ``name`` in a folder that ``make`` filled; ``refuses``: the errors it documents."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...] = (CoterieError,)


ROWS = [{"text": f"row {i}", "label": ["no", "yes"][i % 2]} for i in range(4)]
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]} for _ in range(3)]
CONFIG = """[model]
path = "minilm"
[data]
folder = "clients"
validation_fraction = 0.1
[lora]
rank = 4
[method]
name = "fedlease"
warmup_rounds = 1
[methods.fedit]
[run]
rounds = 3
[engine]
device = "cpu"
"""
SITE = """[site]
id = "north"
server = "127.0.0.1:9092"
[model]
path = "minilm"
[data]
train = "north/train.jsonl"
[policy]
"""
SUMMARY = Path(__file__).parent / "fuzz_summary.json"


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: (path.write_text(text, encoding="utf-8"), None)[1]


def _lines(rows: list[Any]) -> Callable[[Path], None]:
    return _text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def _rows(path: Path) -> object:
    return parse({"train": read_table(path)}, Columns(), "classification", None)


def _chats(path: Path) -> object:
    return parse({"train": read_table(path)}, Columns(), "generation", None)


def _blob(value: object) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(encode(value)), None)[1]


def _lora() -> dict[Key, torch.Tensor]:
    return {Key("m", 0, Part.A): torch.ones(2, 3), Key("m", 0, Part.B): torch.zeros(4, 2)}


def _bundle(path: Path) -> None:
    write_bundle(path.parent, Bank(_lora(), scaling=1.0), tiny.about(client="north", task="generation"))
    assert path.name == BUNDLE_FILE


def _adapter(path: Path) -> None:
    write_bundle(path.parents[1], Bank(_lora(), scaling=1.0), tiny.about(client="north", task="generation"))


def _pool(path: Path) -> None:
    base = tiny.folder(path.parent / "base", "llama")
    made = tiny.model("llama")
    write_bundle(path.parent / "one", tiny.bank(tiny.targets(made), gate="constant"), tiny.about(task="generation"))
    write_pool(path.parent, build_pool([str(path.parent / "one" / "adapter")], str(base)))


def _checkpoint(path: Path) -> None:
    save(path.parent, Checkpoint(3, Reply(_lora(), 3, {"a": 1}), 10, {"client": {"north": 2}}), keep=2)


def _metrics(path: Path) -> None:
    events = [Note("a note"), RoundStart(1, ("north",)), CheckpointSaved(1)]
    path.write_text("".join(json.dumps(event.to_json()) + "\n" for event in events), encoding="utf-8")


def _journal(path: Path) -> None:
    for event in (ServerStarted(1, ("north",)), Joined("north", "7", {"coterie": "0.1.0"}, rows=3), Refused("8", "no")):
        Journal(path)(event)


def _ledger(path: Path) -> None:
    made = Ledger((Entry(1, "updates", Noised(2.0), "a"), Entry(2, "steps", Noised(1.0, "poisson", 8, 4.0), "b", 8, 3)))
    write_ledger(path.parent, made, made.spent(1e-5))


def _spent(path: Path) -> object:
    return read_status(path.parent), read_ledger(path.parent).spent(1e-5)


def _opened(path: Path) -> object:
    (path.parent / "next").unlink(missing_ok=True)
    (path.parent / "next").write_bytes(path.read_bytes())
    return note_opened(path.parent / "next", secure_sums.session(4, rnd=2), ("s0", "s1"), "sent")


def _private_site(folder: Path) -> Releases:
    method = SimpleNamespace(plan=SimpleNamespace(privacy=PrivacySettings(unit="example", clip=1, noise_multiplier=1)))
    states = SimpleNamespace(personal=PersonalStore(folder), trained=RoundStore(folder / "trained", Bank))
    return Releases(folder, cast(Any, method), 3, cast(Any, SimpleNamespace(id="north", states=states)))


def _released(path: Path) -> None:
    about = {"round": 1, "instruction": hashlib.sha256(b"").hexdigest(), "terms": digest_of({}), "kinds": ["updates"]}
    path.write_bytes(json.dumps(about).encode() + b"\n" + encode(Reply(_lora(), 3, {})))
    path.with_suffix(".personal").write_bytes(encode(_personal()))
    path.with_suffix(".trained").write_bytes(encode(Bank(_lora(), scaling=1.0)))


def _answered(path: Path) -> object:
    site = _private_site(path.parents[1])
    reply = site.answered(1)
    site.check(Head("train", "north", 1, "run", 1, 0, 0, (), {}), b"")
    return reply


def _personal() -> Personal:
    return Personal(_lora(), {"cluster": 1}, Kept("pool", _lora()))


def _store(path: Path) -> None:
    PersonalStore(path.parents[2]).save("north", 3, _personal())


def _hello(path: Path) -> None:
    info = ClientInfo("north", 9, labels=("no", "yes"), active=4)
    path.write_bytes(encode({"north": Hello(info, BaseSpec(()), "terms", "0" * 64, {"coterie": "0.1.0"})}))


def _received(path: Path) -> None:
    head = Head("evaluate", "north", 1, "run", 1, 0, 0, (), {"task": {}})
    (content,) = received_file(path.parent, head, encode(Instruction(_lora(), {}))).values()
    path.write_bytes(content)


def _digest(path: Path) -> object:
    base = path.parent / "base"
    if not base.is_dir():
        tiny.folder(base, "llama")
    return files_digest(str(base), path)


def _attempt(path: Path) -> None:
    begin_attempt(path.parent, {"0" * 64: "north"}, ["south"])


def _public(path: Path) -> object:
    return {name: load_public(file) for name, file in known_sites(path.parent).items()}


READERS = [
    Reader("config.toml", _text(CONFIG), load_config),
    Reader("site.toml", _text(SITE), load_site),
    Reader("train.jsonl", _lines(ROWS), _rows),
    Reader("chats.jsonl", _lines(CHATS), _chats),
    Reader("train.csv", _text("text,label\r\na,yes\r\n\"b, \"\"c\"\"\",no\r\n"), _rows),
    Reader("train.parquet", _parquet, _rows),
    Reader("predict.jsonl", _lines(ROWS), lambda path: list(read_records(path))),
    Reader("predict.csv", _text("text,label\na,yes\nb,no\n"), lambda path: list(read_records(path))),
    Reader("reply.bin", _blob(Reply(_lora(), 3, {"loss": 1.5, "steps": [1, 2]})),
           lambda path: decode(Reply, path.read_bytes()), (CodecError,)),
    Reader("instruction.bin", _blob(Instruction(_lora(), {"a": [1]})),
           lambda path: decode(Instruction, path.read_bytes()), (CodecError,)),
    Reader("head.json", _text(json.dumps({
        "kind": "train", "client": "north", "round": 1, "run": "run", "attempt": 1, "since": 0, "keep": 0,
        "kept_rounds": [1], "terms": {"task": {}}, "splits": ["test"], "usage": True, "export": "last",
    })), lambda path: read_head(head_of(path.read_bytes().decode(errors="replace"))),
           (CoterieError, BrokenMessageError)),
    Reader(BUNDLE_FILE, _bundle, lambda path: read_bundle(path.parent)),
    Reader("adapter/adapter_config.json", _adapter, lambda path: read_adapter(path.parent)),
    Reader("adapter/adapter_model.safetensors", _adapter, lambda path: read_adapter(path.parent)),
    Reader(POOL_FILE, _pool, lambda path: read_pool(path.parent)),
    Reader("000003.ckpt", _checkpoint, lambda path: load_newest(path.parent, Reply, lambda text: None)),
    Reader("config.json", _text(json.dumps({"root": "/tmp", "config": {"run": {"rounds": 3}}})),
           lambda path: read_config(path.parent)),
    Reader("metrics.jsonl", _metrics, read_events),
    Reader("summary.json", lambda path: (path.write_bytes(SUMMARY.read_bytes()), None)[1], read_summary),
    Reader("compare.json", _text(json.dumps({"format": 1, "primary": "accuracy", "variants": {}, "missing": []})),
           read_record),
    Reader(JOURNAL, _journal, lambda path: read_journal(path.parent)),
    Reader("north", site_key, load_private),
    Reader("north.pub", lambda path: site_key(path.with_suffix("")), _public),
    Reader("api-keys.toml", _text("\n".join(new_key("a", ["north"])[1:] + new_key("b", [])[1:])),
           lambda path: read_keys(path, ["north"])),
    Reader(LEDGER, _ledger, _spent),
    Reader("opened.json", lambda path: note_opened(path, secure_sums.session(4), ("s0", "s1"), "sent"), _opened),
    Reader("released/000001", _released, _answered),
    Reader("released/000001.personal", lambda path: _released(path.with_suffix("")),
           lambda path: _answered(path.with_suffix(""))),
    Reader("received", _received, lambda path: newest_received(path.parents[1], path.parent.name)),
    Reader("personal/north/000003.safetensors", _store, lambda path: PersonalStore(path.parents[2]).load("north", 3)),
    Reader("kept/pool.safetensors", lambda path: PersonalStore(path.parents[1]).save("north", 3, _personal()),
           lambda path: PersonalStore(path.parents[1]).load("north", 3)),
    Reader(KEY, lambda path: (kept_noise(path), None)[1], kept_noise),
    Reader("attempt.json", _attempt, lambda path: read_attempt(path.parent)),
    Reader("base.json", _digest, _digest),
    Reader(KNOWN, _hello, lambda path: read_known(path.parent)),
    Reader(f"adapter/{ABOUT_FILE}", _adapter, lambda path: read_about(path.parent)),
    *(Reader(f"{step}.answer", partial(fuzz_secure.make_answer, step), partial(fuzz_secure.read_answer, step),
             (CoterieError, CodecError)) for step in fuzz_secure.STEPS),
    *(Reader(f"{step}.message", partial(fuzz_secure.make_message, step), partial(fuzz_secure.read_message, step),
             (CoterieError, CodecError)) for step in fuzz_secure.STEPS),
]  # fmt: skip
