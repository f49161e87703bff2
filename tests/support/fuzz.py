"""Bad input for every reader: a good example of what each reads is changed at random, in bytes or in structure.

A reader may return, or refuse with a :class:`CoterieError` or the error that it documents. Anything else is a bug, as
is an input that takes more than ``SECONDS`` or ``MEMORY``.

``python tests/support/fuzz.py --seconds 3600`` looks for bugs until the time is up (`make fuzz`) and keeps each input
that shows one; ``--keep FOLDER`` says where. tests/property/test_fuzz.py does a little of it, the same each time.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from coterie import codec
from coterie.runs import checkpoint
from fuzz_readers import READERS, Reader

SECONDS = 10
MEMORY = 2**30  # bytes beyond what the process had before
ODD = (
    None, True, 0, -1, 2**63, 1e308, float("nan"), "", " ", "\x00", "a" * 5000, "é\u202e", "../../x", [], {}, [[]],
    {"$tensor": "x"}, ["a", 1], {"name": None},
)  # fmt: skip
CHANGES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda of: of[:0], lambda of: of.reshape(-1), lambda of: of.to(torch.float64), lambda of: of.to(torch.uint8),
    lambda of: of.repeat(2, *[1] * (of.dim() - 1)), lambda of: torch.full_like(of.float(), float("nan")),
)  # fmt: skip
TOKENS = (b"\x00", b"\xff\xfe", b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b"\r\n", b",", b"=", b"-", b"1e999",
          b"\xed\xa0\x80", b"null", b"NaN", b"\xef\xbb\xbf", b"[" * 3000, b"9" * 5000)  # fmt: skip


class SlowError(Exception):
    """An input that takes too long."""


# how it is changed ----------------------------------------------------------------------------------------------------


def changed(content: bytes, draw: random.Random) -> bytes:
    """``content`` with one to four changes, of bytes or, half of the time, of structure, with checksums that fit."""
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
    """One value replaced, removed or moved: of the JSON, of one of its lines, or of what the codec wrote; else None."""
    if content.startswith(checkpoint._MAGIC):
        body = content[len(checkpoint._MAGIC) + 65 :]
        line, _, state = body.partition(b"\n")
        parts = [line, state]
        at = draw.randrange(2)
        parts[at] = _restructured(parts[at], draw) or parts[at]
        body = b"\n".join(parts)
        return checkpoint._MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    if (other := _recoded(content, draw)) is not None:
        return other
    try:
        one = content[:1] == b"{" and b"\n{" not in content and content.rstrip().endswith(b"}")
        lines = [content] if one else content.split(b"\n")
        at = draw.randrange(len(lines))
        value = json.loads(lines[at].decode())
    except ValueError:
        return None
    lines[at] = json.dumps(_with_odd(value, draw)).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _recoded(content: bytes, draw: random.Random) -> bytes | None:
    """A safetensors file with another head; or what the codec wrote, with another tree or other tensors."""
    size = int.from_bytes(content[:8], "little")
    if not 2 <= size <= len(content) - 8 or content[8:9] != b"{":
        return None
    head = json.loads(content[8 : 8 + size])
    meta = head.get("__metadata__", {}).get(codec._META)
    if meta is None or draw.random() < 0.2:
        text = json.dumps(_with_odd(head, draw)).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + content[8 + size :]
    tensors = load(content)
    if tensors and draw.random() < 0.3:
        name = draw.choice(sorted(tensors))
        tensors[name] = draw.choice(CHANGES)(tensors[name])
        text = meta[8:]
    else:
        text = json.dumps(_with_odd(json.loads(meta[8:]), draw))
    return save(tensors, metadata={codec._META: codec._checksum(text, tensors) + text})


def _with_odd(value: Any, draw: random.Random) -> Any:
    holder = {"": value}
    inside, key = draw.choice(list(_places(holder)))
    if draw.random() < 0.3 and isinstance(inside, dict) and inside is not holder:
        del inside[key]
    else:
        inside[key] = copy.deepcopy(draw.choice([*ODD, value]))
    return holder[""]


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
    before, fault = _memory(anew=True), None
    try:
        with _limited():
            reader.read(path)
    except reader.refuses:
        pass
    except Exception as other:  # noqa: BLE001
        frames = traceback.extract_tb(other.__traceback__)
        where = next((frame for frame in reversed(frames) if "coterie" in Path(frame.filename).parts), frames[-1])
        fault = f"{type(other).__name__} at {Path(where.filename).name}:{where.lineno}: {str(other)[:200]}"
    if fault is None and _memory() > before + MEMORY:
        fault = f"MemoryError at {reader.name}: took more than {MEMORY} bytes"
    return fault


def _memory(*, anew: bool = False) -> int:
    """The most memory of this process in bytes, since it began or (Linux) since the last call that counts ``anew``."""
    if anew:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    options.add_argument("--only", nargs="*", metavar="READER", help="names of readers, such as privacy.json")
    given = options.parse_args()
    readers = [reader for reader in READERS if not given.only or reader.name in given.only]
    draw, found, tried = random.Random(given.seed), set[tuple[str, str]](), 0
    end = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as name:
        examples = []
        for number, reader in enumerate(readers):
            folder = Path(name) / str(number)
            examples.append((reader, folder, prepared(reader, folder)))
        while time.monotonic() < end:
            reader, folder, good = draw.choice(examples)
            content = changed(good, draw)
            fault = fault_of(reader, folder, content)
            tried += 1
            if fault and (place := (reader.name, fault.rpartition(":")[0].split(": ")[0])) not in found:
                found.add(place)
                given.keep.mkdir(parents=True, exist_ok=True)
                kept = given.keep / f"{len(found)}-{Path(reader.name).name}"
                kept.write_bytes(content)
                print(f"{kept}: {fault}", flush=True)
    print(f"{tried:,} inputs for {len(readers)} readers, seed {given.seed}: {len(found)} faults")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
