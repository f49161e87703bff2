"""One file holds a checkpoint; one that is not whole gives way to the one before it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from coterie.runs.checkpoint import Checkpoint, load_newest, save


@dataclass(frozen=True)
class Counted:
    number: int


def replace_header(path: Path, header: bytes) -> None:
    """Write another header, and the digest that goes with it."""
    magic, _, header_and_state = path.read_bytes().split(b"\n", 2)
    body = header + b"\n" + header_and_state.split(b"\n", 1)[1]
    path.write_bytes(magic + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def test_the_newest_is_loaded(tmp_path: Path) -> None:
    held = {"personal": {"a": 1}}
    for rnd in (1, 2):
        save(tmp_path, Checkpoint(rnd, Counted(rnd), 10 * rnd, held), keep=2)
    assert load_newest(tmp_path, Counted, pytest.fail) == Checkpoint(2, Counted(2), 20, held)


@pytest.mark.parametrize(
    "header",
    [
        b"not JSON",
        b"[1, 2]",
        b'{"rnd": 2}',
        b'{"rnd": "2", "metrics_bytes": 20, "held": {}}',
        b'{"rnd": 2, "metrics_bytes": 20, "held": {"personal": {"a": "x"}}}',
        b'{"rnd": ' + b"[" * 100_000,
        b'{"rnd": ' + b"1" * 4301 + b', "metrics_bytes": 20, "held": {}}',
    ],
)
def test_a_wrong_header_with_the_right_digest_gives_way(header: bytes, tmp_path: Path) -> None:
    for rnd in (1, 2):
        save(tmp_path, Checkpoint(rnd, Counted(rnd), 10 * rnd), keep=2)
    replace_header(tmp_path / "000002.ckpt", header)
    notes: list[str] = []
    assert load_newest(tmp_path, Counted, notes.append) == Checkpoint(1, Counted(1), 10)
    assert len(notes) == 1
    assert "its header is wrong" in notes[0]
