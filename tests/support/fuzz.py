"""Bad input for every reader: a good example of what each reads is changed at random, in bytes or in structure.

A reader may return, or refuse with a :class:`CoterieError` or the error that it documents. Anything else is a bug, as
is an input that takes more than ``SECONDS`` or ``MEMORY``.

``python tests/support/fuzz.py --seconds 3600`` looks for bugs until the time is up (`make fuzz`) and keeps each input
that shows one; ``--keep FOLDER`` says where. tests/property/test_fuzz.py does a little of it, the same each time.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

import tiny
from coterie.adapters.bundle import BUNDLE_FILE, read_bundle, write_bundle
from coterie.adapters.pool import POOL_FILE, read_pool, write_pool
from coterie.adapters.read import build_pool, read_adapter
from coterie.codec import CodecError, decode, encode
from coterie.comparison.record import read_record
from coterie.config.load import load_config, load_site
from coterie.data.files import read_table
from coterie.data.parse import parse
from coterie.data.settings import Columns
from coterie.deploy.events import Joined, Refused, ServerStarted
from coterie.deploy.head import read_head
from coterie.deploy.journal import JOURNAL, Journal, read_journal
from coterie.flower.message import BrokenMessageError, head_of
from coterie.inference.records import read_records
from coterie.runs.checkpoint import Checkpoint, load_newest, save
from coterie.runs.events import CheckpointSaved, Note, RoundStart, read_events
from coterie.runs.folder import read_config
from coterie.runs.summary import read_summary
from coterie.types import Bank, CoterieError, Instruction, Key, Part, Reply

SECONDS = 10
MEMORY = 2**30  # bytes beyond what the process had at its start
ODD = (
    None, True, 0, -1, 2**63, 1e308, float("nan"), "", " ", "\x00", "a" * 5000, "é\u202e", "../../x", [], {}, [[]],
    {"$tensor": "x"}, ["a", 1], {"name": None},
)  # fmt: skip
TOKENS = (b"\x00", b"\xff\xfe", b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b"\r\n", b",", b"=", b"-", b"1e999",
          b"\xed\xa0\x80", b"null", b"NaN", b"\xef\xbb\xbf", b"[" * 3000, b"9" * 5000)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """``read`` reads the file ``name`` in a folder that ``make`` filled; ``refuses``: the errors it documents."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...] = (CoterieError,)


class SlowError(Exception):
    """An input that takes too long."""


# what is read ---------------------------------------------------------------------------------------------------------

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
]  # fmt: skip


# how it is changed ----------------------------------------------------------------------------------------------------


def changed(content: bytes, draw: random.Random) -> bytes:
    """``content`` with one to four changes; JSON, half of the time, changed in its structure."""
    if draw.random() < 0.5 and (other := _restructured(content, draw)) is not None:
        return other
    for _ in range(draw.randint(1, 4)):
        content = _bytes_changed(content, draw)
    return content


def _bytes_changed(content: bytes, draw: random.Random) -> bytes:
    start = draw.randint(0, len(content))
    end = min(len(content), start + draw.choice([1, 1, 2, 8, 64]))
    match draw.randint(0, 5):
        case 0:
            return content[:start] + bytes([draw.randrange(256)]) + content[start + 1 :]
        case 1:
            return content[:start] + content[end:]
        case 2:
            return content[:start]
        case 3:
            return content[:start] + content[start:end] * draw.choice([2, 3, 200]) + content[end:]
        case 4:
            return content[:start] + draw.choice(TOKENS) + content[start:]
        case _:
            other = draw.randint(0, len(content))
            return content[:start] + content[other : other + end - start] + content[end:]


def _restructured(content: bytes, draw: random.Random) -> bytes | None:
    """One value of the JSON (of one of its lines) replaced, removed or moved; None where it is not JSON."""
    try:
        one = content[:1] == b"{" and b"\n{" not in content
        lines = [content.decode()] if one else content.decode().split("\n")
        at = draw.randrange(len(lines))
        value = json.loads(lines[at])
    except ValueError:
        return None
    holder = {"": value}
    places = list(_places(holder))
    inside, key = draw.choice(places)
    if draw.random() < 0.3 and isinstance(inside, dict) and inside is not holder:
        del inside[key]
    else:
        inside[key] = copy.deepcopy(draw.choice([*ODD, value]))
    lines[at] = json.dumps(holder[""])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])


# how it is tried ------------------------------------------------------------------------------------------------------


def fault_of(reader: Reader, folder: Path, content: bytes) -> str | None:
    """What is wrong with how ``reader`` takes ``content``: the end of a traceback, or None if all is well."""
    path = folder / reader.name
    path.write_bytes(content)
    try:
        with _limited():
            reader.read(path)
    except reader.refuses:
        return None
    except Exception as fault:  # noqa: BLE001
        frames = traceback.extract_tb(fault.__traceback__)
        where = next((frame for frame in reversed(frames) if "coterie" in Path(frame.filename).parts), frames[-1])
        return f"{type(fault).__name__} at {Path(where.filename).name}:{where.lineno}: {str(fault)[:200]}"
    return None


@contextmanager
def _limited() -> Iterator[None]:
    """At most ``SECONDS``. On the main thread of a Unix process."""

    def late(*_: object) -> None:
        raise SlowError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def prepared(reader: Reader, folder: Path) -> bytes:
    """A good example in ``folder``, and its bytes."""
    path = folder / reader.name
    path.parent.mkdir(parents=True, exist_ok=True)
    reader.make(path)
    return path.read_bytes()


def main() -> None:
    """Look for bugs until the time is up."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=3600)
    options.add_argument("--seed", type=int, default=int(time.time()))
    options.add_argument("--keep", type=Path, default=Path("runs/fuzz"))
    given = options.parse_args()
    draw, found, tried = random.Random(given.seed), set[tuple[str, str]](), 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    end = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as name:
        examples = []
        for number, reader in enumerate(READERS):
            folder = Path(name) / str(number)
            examples.append((reader, folder, prepared(reader, folder)))
        while time.monotonic() < end:
            reader, folder, good = draw.choice(examples)
            content = changed(good, draw)
            fault = fault_of(reader, folder, content)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if fault is None and peak > used + MEMORY:
                fault, used = f"MemoryError at {reader.name}: took more than 1 GiB", peak
            tried += 1
            if fault and (place := (reader.name, fault.rpartition(":")[0].split(": ")[0])) not in found:
                found.add(place)
                given.keep.mkdir(parents=True, exist_ok=True)
                kept = given.keep / f"{len(found)}-{Path(reader.name).name}"
                kept.write_bytes(content)
                print(f"{kept}: {fault}", flush=True)
    print(f"{tried:,} inputs for {len(READERS)} readers, seed {given.seed}: {len(found)} faults")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
