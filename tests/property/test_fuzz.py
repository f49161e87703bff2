"""Bad input for every reader, a little of what `make fuzz` does, and the same each time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import fuzz
from coterie.types import CoterieError

INPUTS = 900  # for each reader; a minute of processor time for all


@pytest.mark.parametrize("reader", fuzz.READERS, ids=lambda reader: reader.name)
def test_bad_input_is_refused_or_read(reader: fuzz.Reader, tmp_path: Path) -> None:
    good = fuzz.prepared(reader, tmp_path)
    reader.read(tmp_path / reader.name)  # the example itself is read
    draw = random.Random(reader.name)
    faults = [fuzz.fault_of(reader, tmp_path, fuzz.changed(good, draw)) for _ in range(INPUTS)]
    assert [fault for fault in faults if fault] == []


def test_the_fuzzer_finds_a_bug(tmp_path: Path) -> None:
    def parse(path: Path) -> object:
        text = path.read_text(encoding="utf-8", errors="replace")
        if "{" not in text:
            raise CoterieError("documented")
        return text.split("run")[1]  # IndexError

    draw = random.Random(0)
    reader = fuzz.Reader("x.json", lambda path: (path.write_text('{"run": 1}'), None)[1], parse)
    good = fuzz.prepared(reader, tmp_path)
    faults = {fuzz.fault_of(reader, tmp_path, fuzz.changed(good, draw)) for _ in range(100)}
    assert None in faults
    assert any(fault and fault.startswith("IndexError at test_fuzz.py") for fault in faults)


def test_an_input_that_takes_too_long_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(path: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    reader = fuzz.Reader("x", lambda path: None, forever)
    assert "took more than 1 s" in str(fuzz.fault_of(reader, tmp_path, b""))


def test_an_input_that_takes_too_much_memory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "MEMORY", 2**26)

    def large(path: Path) -> object:
        if len(bytearray(2**27)):
            raise CoterieError("documented")

    refused = fuzz.Reader("x", lambda path: None, large)
    assert "MemoryError at x" in str(fuzz.fault_of(refused, tmp_path, b""))
    small = fuzz.Reader("x", lambda path: None, Path.read_bytes)
    assert fuzz.fault_of(small, tmp_path, b"") is None
