"""What is on the disk: personal states by round, checkpoints that are whole or not used, files written atomically."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie import files
from coterie.engines.store import PersonalStore, RoundStore
from coterie.files import remove_parts, write_atomic, write_json
from coterie.runs import checkpoint
from coterie.runs.checkpoint import Checkpoint
from coterie.types import CoterieError, Kept, Key, Part, Personal, Tensors

KEY = Key("encoder.q", 0, Part.A)


def personal(number: int) -> Personal:
    return Personal({KEY: torch.full((2, 3), float(number), dtype=torch.bfloat16)}, {"round": number})


def number_of(state: Personal | None) -> int | None:
    return None if state is None else int(state.info["round"])


# personal states -----------------------------------------------------------------------------------------------------


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = RoundStore(tmp_path / "personal", Personal)
    value = torch.tensor([[1 / 3, -0.0, 2e-40, float("inf")]])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        store.save("north", 1, Personal({KEY: value.to(dtype)}, {"cluster": 2, "list": [1, None]}))
        again = RoundStore(tmp_path / "personal", Personal).load("north", 1)
        assert again is not None
        assert again.info == {"cluster": 2, "list": [1, None]}
        assert again.tensors[KEY].dtype == dtype
        assert torch.equal(again.tensors[KEY].view(torch.uint8), value.to(dtype).view(torch.uint8))


def test_what_a_client_keeps_unchanged_is_written_once_for_all(tmp_path: Path) -> None:
    store, large = PersonalStore(tmp_path), {KEY: torch.arange(30_000.0)}
    for rnd, client in ((1, "north"), (1, "south"), (2, "north")):
        store.save(client, rnd, replace(personal(rnd), kept=Kept("a" * 64, large)))
    (path,) = (tmp_path / "kept").iterdir()
    states = list((tmp_path / "personal").rglob("*.safetensors"))
    assert len(states) == 3
    assert max(state.stat().st_size for state in states) < 1000 < path.stat().st_size
    written = path.stat().st_mtime_ns
    north, south = (PersonalStore(tmp_path).load(client, 2) for client in ("north", "south"))
    assert north is not None
    assert south is not None
    assert (number_of(north), number_of(south)) == (2, 1)
    assert north.kept is not None
    assert torch.equal(north.kept.tensors[KEY], large[KEY])
    assert south.kept == north.kept, "not shared in memory"
    store.save("north", 3, replace(north, info={"round": 3}))
    store.forget_after(2)
    store.prune(2)
    assert number_of(store.load("north", 9)) == 2
    assert [p.stat().st_mtime_ns for p in (tmp_path / "kept").iterdir()] == [written]


def test_what_is_kept_may_be_lost_but_not_damaged_unnoticed(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path)
    store.save("north", 1, replace(personal(1), kept=Kept("a" * 64, {KEY: torch.ones(3)})))
    (path,) = (tmp_path / "kept").iterdir()
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(CoterieError, match="is damaged"):
        store.load("north", 1)
    path.unlink()
    found = store.load("north", 1)
    assert found is not None
    assert (found.kept, number_of(found)) == (None, 1)


def test_load_takes_the_newest_version_up_to_a_round(tmp_path: Path) -> None:
    store = RoundStore(tmp_path, Personal)
    assert store.load("north", 9) is None
    for rnd in (2, 5, 11):
        store.save("north", rnd, personal(rnd))
    store.save("south", 3, personal(33))
    assert [number_of(store.load("north", until)) for until in (0, 1, 2, 4, 5, 10, 11, 99)] == [
        None, None, 2, 2, 5, 5, 11, 11,
    ]  # fmt: skip
    assert number_of(store.load("south", 9)) == 33
    assert store.load("sou", 9) is None
    store.save("north", 5, personal(55))
    assert number_of(store.load("north", 5)) == 55


def test_forget_after_leaves_what_was_committed(tmp_path: Path) -> None:
    store = RoundStore(tmp_path, Personal)
    for client, rounds in {"north": (1, 2, 3), "south": (2,), "west": (3, 4)}.items():
        for rnd in rounds:
            store.save(client, rnd, personal(rnd))
    store.forget_after(2)
    assert [number_of(store.load(c, 99)) for c in ("north", "south", "west")] == [2, 2, None]
    store.forget_after(0)
    assert [number_of(store.load(c, 99)) for c in ("north", "south", "west")] == [None] * 3
    RoundStore(tmp_path / "none", Personal).forget_after(0)
    RoundStore(tmp_path / "none", Personal).prune(3)


def test_a_damaged_state_is_named_and_not_taken_for_none(tmp_path: Path) -> None:
    store = RoundStore(tmp_path, Personal)
    store.save("north", 1, personal(1))
    store.save("north", 2, personal(2))
    path = tmp_path / "north" / "000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CoterieError, match=rf"{path} is damaged"):
        store.load("north", 2)
    assert number_of(store.load("north", 1)) == 1


@settings(deadline=None, max_examples=20)
@given(versions=st.lists(st.sets(st.integers(1, 12), max_size=6), min_size=1, max_size=3), oldest=st.integers(-1, 13))
def test_prune_keeps_what_a_checkpoint_from_that_round_on_needs_and_nothing_else(
    versions: list[set[int]], oldest: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = RoundStore(tmp_path_factory.mktemp("personal"), Personal)
    for client, rounds in enumerate(versions):
        for rnd in rounds:
            store.save(f"c{client}", rnd, personal(rnd))
    wanted = range(max(oldest, 0), 15)
    before = [[number_of(store.load(f"c{c}", until)) for until in wanted] for c in range(len(versions))]
    store.prune(oldest)
    assert [[number_of(store.load(f"c{c}", until)) for until in wanted] for c in range(len(versions))] == before
    left = sum(1 for _ in store.folder.rglob("*.safetensors"))
    assert left == sum(len({number for number in row if number is not None}) for row in before)


# checkpoints ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    lora: Tensors
    clusters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class OtherState:
    experts: Tensors


def state(number: float) -> State:
    return State({KEY: torch.full((3, 2), number)}, {"north": int(number)})


def save(folder: Path, *rounds: int, keep: int = 9) -> list[Path]:
    return [checkpoint.save(folder, Checkpoint(rnd, state(rnd), 10 * rnd), keep) for rnd in rounds]


def load(folder: Path, kind: type[Any] = State) -> tuple[Checkpoint | None, list[str]]:
    notes: list[str] = []
    return checkpoint.load_newest(folder, kind, notes.append), notes


def round_of(found: Checkpoint | None) -> int | None:
    return None if found is None else found.rnd


def test_the_newest_checkpoint_comes_back(tmp_path: Path) -> None:
    assert load(tmp_path / "none") == (None, [])
    save(tmp_path, 1, 2, 10)
    found, notes = load(tmp_path)
    assert found is not None
    assert (found.rnd, found.metrics_bytes, notes) == (10, 100, [])
    assert found.state.clusters == {"north": 10}
    assert torch.equal(found.state.lora[KEY], torch.full((3, 2), 10.0))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, *range(8, 13), keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000010.ckpt", "000011.ckpt", "000012.ckpt"]


def test_any_damage_falls_back_and_says_which_file(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 1, 2)
    blob = bad.read_bytes()
    assert len(blob) > 300
    damaged = [blob[:cut] for cut in (0, 1, 20, 21, 50, 85, 86, 87, 120, len(blob) // 2, len(blob) - 1)]
    damaged += [blob[:i] + bytes([blob[i] ^ 1]) + blob[i + 1 :] for i in range(0, len(blob), 7)]
    damaged += [blob + b"\0", b"coterie checkpoint 2" + blob[20:], b"not a checkpoint"]
    for damage in damaged:
        bad.write_bytes(damage)
        found, notes = load(tmp_path)
        assert round_of(found) == 1
        assert len(notes) == 1
        assert str(bad) in notes[0]
        assert "falling back" in notes[0]
        assert [path.name for path in tmp_path.iterdir()] == [good.name], "the next save may not keep the damaged one"
    bad.write_bytes(blob)
    assert round_of(load(tmp_path)[0]) == 2


def test_where_all_are_damaged_it_stops_and_touches_nothing(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3)
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in paths}
    notes: list[str] = []
    with pytest.raises(CoterieError, match=r"ckpt cannot be used .*, and neither can an earlier one; restore what"):
        checkpoint.load_newest(tmp_path, State, notes.append)
    assert [str(path) in note for path, note in zip(reversed(paths), notes, strict=True)] == [True] * 3
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_whole_checkpoint_of_another_state_is_not_called_corrupt(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    with pytest.raises(CoterieError, match=r"000002\.ckpt is whole, but .*OtherState has the fields"):
        load(tmp_path, OtherState)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_round_of_the_newest_checkpoint_is_in_its_name(tmp_path: Path) -> None:
    assert checkpoint.newest_round(tmp_path / "none") is None
    save(tmp_path, 9, 10)
    assert checkpoint.newest_round(tmp_path) == 10


def test_what_is_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    (tmp_path / ".000002.ckpt.77.tmp").write_bytes(path.read_bytes()[:100])
    found, notes = load(tmp_path)
    assert (round_of(found), notes) == (1, [])


def test_a_full_disk_loses_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001.ckpt", "000002.ckpt"]
    assert round_of(load(tmp_path)[0]) == 2


# files ---------------------------------------------------------------------------------------------------------------


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, b"old")
    write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")
    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "other.bin", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]
    assert path.read_bytes() == b"old"


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(files.os, "replace", lambda *names: (done.append("replace"), replace(*names)))
    write_atomic(tmp_path / "file.bin", b"x")
    assert done == ["sync", "replace", "sync"], "the file, its name, then the folder that holds the name"


def test_a_killed_write_leaves_a_part_that_remove_parts_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file.bin"
    write_atomic(path, b"old")

    def killed(*names: Any) -> None:
        raise KeyboardInterrupt  # as for SIGKILL, nothing of write_atomic runs after it

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
    others = [tmp_path / name for name in ("notes.tmp", ".hidden", "deep/x.bin")]
    for other in others:
        other.write_bytes(b"mine")
    (part,) = [p for p in tmp_path.rglob("*") if p.is_file() and p not in (path, *others)]
    assert part.name.startswith(f".{path.name}.")
    remove_parts(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted([path, *others])
    assert path.read_bytes() == b"old"


def test_write_json(tmp_path: Path) -> None:
    value = {"name": "Zoë", "list": [1, 2.5, None, True], "nested": {"a": {}}}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text()
    assert json.loads(text) == value
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 5


@pytest.mark.parametrize("name", ["", "..", "../../x", "a/b", "a" * 5000, "\x00"])
def test_a_state_that_names_no_file_is_refused(name: str, tmp_path: Path) -> None:
    store = PersonalStore(tmp_path)
    odd = replace(personal(1), kept=Kept(name, {}))
    RoundStore(tmp_path / "personal", Personal).save("north", 1, odd)
    for attempt in (lambda: store.load("north", 1), lambda: store.save("north", 2, odd)):
        with pytest.raises(
            CoterieError, match=r"a client's state in .* is damaged: .* is not a valid file name; restore the folder"
        ):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["personal"]
