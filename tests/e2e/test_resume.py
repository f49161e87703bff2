"""A run that is killed at any moment goes on, and ends with the same bits as one that was not."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import coterie.files
import sites
from coterie.methods.registry import methods
from coterie.runs.events import Event, Note, Resumed, RoundStart
from coterie.runs.folder import lock_folder
from coterie.types import CoterieError
from killed_runs import go_on, killed, results, run
from stop_run import stop_run


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # a forked child cannot use the parent's threads


FEW = {"rows": 4, "others": 2}  # one step a round and client: what is held is the same bits
CASES = {  # method, architecture, more of the config
    "fedlease": ("fedlease", "bert", ""),
    "fedlease, half a cohort": ("fedlease", "bert", "cohort = 0.6"),
    "fedamole": ("fedamole", "bert", ""),
    "fedamole, half a cohort": ("fedamole", "llama", "cohort = 0.6"),
    "fedit, generation": ("fedit", "llama", ""),
    "local": ("local", "bert", "keep_checkpoints = 4"),
    "flora, half a cohort": ("flora", "bert", "cohort = 0.6"),
    "fedsa_lora, half a cohort": ("fedsa_lora", "bert", "cohort = 0.6"),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    method, arch, more = CASES[name]
    path = sites.config(tmp_path, arch, method=method, run=more, **FEW)
    if name == "fedlease":
        path.write_text(path.read_text().replace("[lora]", 'head = "shared"\n[lora]'))
    if name == "fedlease, half a cohort":
        path.write_text(
            path.read_text().replace("warmup_rounds", 'download = "used"\ndownload_threshold = 0.4\nwarmup_rounds')
        )
    started = time.perf_counter()
    run(path, tmp_path / "whole")
    seconds = time.perf_counter() - started
    draw, whole, out = random.Random(name), results(tmp_path / "whole"), tmp_path / "killed"
    for attempt in range(20):  # a run that finishes before enough kills is compared, and another one begins
        kills = 0
        while not (out / "summary.json").exists():
            kills += killed(partial(go_on, path, out), draw.uniform(0.1, 0.9) * seconds if kills < 2 else None)
        assert results(out) == whole
        if kills >= 2:
            return
        # The first run may have taken far longer than one in a warm child, so kills that came too late come sooner.
        seconds, out = seconds * 0.7, tmp_path / f"killed-{attempt}"
    pytest.fail("no run was killed twice")


@pytest.mark.parametrize("method", sorted(methods().keys() - {"smartfed", *(case[0] for case in CASES.values())}))
def test_a_run_that_stops_in_its_last_round_goes_on_with_every_method(method: str, tmp_path: Path) -> None:
    path = sites.config(tmp_path, method=method, **FEW)
    run(path, tmp_path / "whole")
    stop_run(run, path, tmp_path / "parts", when=lambda event: isinstance(event, RoundStart) and event.round == 3)
    run(path, tmp_path / "parts", resume=True)
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_killed_before_every_write_ends_with_the_same_bits(tmp_path: Path) -> None:
    path = sites.config(tmp_path, **FEW)
    run(path, tmp_path / "whole")
    whole, out = results(tmp_path / "whole"), tmp_path / "killed"

    def dies_at(write: int) -> None:
        done, replace = 0, os.replace

        def counting(*args: Any) -> None:
            nonlocal done
            done += 1
            if done == write:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)

        coterie.files.os.replace = counting  # type: ignore[assignment]
        go_on(path, out)

    kills = 0
    for write in (1, 2, 3, 5, 7, 4, 9, 6, 3, 1, 2, 8):
        kills += killed(partial(dies_at, write))
    go_on(path, out)
    assert kills >= 8
    assert results(out) == whole


def test_a_corrupt_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    path = sites.config(tmp_path, **FEW)
    run(path, tmp_path / "whole")
    whole = results(tmp_path / "whole")
    (tmp_path / "whole" / "summary.json").unlink()
    newest = max((tmp_path / "whole" / "checkpoints").glob("*.ckpt"))
    blob = bytearray(newest.read_bytes())
    blob[len(blob) // 2] ^= 1
    newest.write_bytes(bytes(blob))
    heard: list[Event] = []
    run(path, tmp_path / "whole", resume=True, listen=heard.append)
    notes = [event.text for event in heard if isinstance(event, Note)]
    assert len(notes) == 1
    assert newest.name in notes[0]
    assert "falling back" in notes[0]
    assert Resumed(2) in heard
    assert results(tmp_path / "whole") == whole


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = sites.config(tmp_path, **FEW), tmp_path / "out"
    run(path, tmp_path / "whole")

    def full(handle: int) -> None:
        if (out / "checkpoints" / "000002.ckpt").exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(coterie.files.os, "fsync", full)
    with pytest.raises(CoterieError, match=r"disk is full .*; the checkpoint of round 2 is kept.*--resume"):
        run(path, out)
    assert not list(out.rglob("*.tmp"))
    monkeypatch.undo()
    run(path, out, resume=True)
    assert results(out) == results(tmp_path / "whole")


def test_a_full_disk_at_the_end_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = sites.config(tmp_path, **FEW), tmp_path / "out"
    run(path, tmp_path / "whole")

    def full(handle: int) -> None:
        if (out / "experts").exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(coterie.files.os, "fsync", full)
    with pytest.raises(CoterieError, match=r"disk is full .*; the checkpoint of round 3 is kept.*--resume"):
        run(path, out)
    monkeypatch.undo()
    run(path, out, resume=True)
    assert results(out) == results(tmp_path / "whole")


def test_without_a_whole_checkpoint_nothing_is_touched(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local", **FEW), tmp_path / "out"
    run(path, out)
    (out / "summary.json").unlink()
    for checkpoint in (out / "checkpoints").glob("*.ckpt"):
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(CoterieError, match=r"ckpt cannot be used \(.*\), and neither can an earlier one"):
        run(path, out, resume=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local", **FEW), tmp_path / "out"
    with lock_folder(out), pytest.raises(CoterieError, match="another process is using"):
        run(path, out)
    run(path, out)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local", **FEW), tmp_path / "out"
    summary = run(path, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert run(path, out, resume=True) == summary
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(CoterieError, match="contains a run; continue with --resume, or name another folder with --out"):
        run(path, out)


def test_resume_refuses_another_config_and_other_data(tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="local", **FEW), tmp_path / "out"
    run(path, out)
    (out / "summary.json").unlink()
    text = path.read_text()
    path.write_text(text.replace("learning_rate = 0.01", "learning_rate = 0.02").replace("rank = 2", "rank = 4"))
    says = r"differs in lora\.rank, train\.learning_rate: restore these \(lora\.rank = 2, train\.learning_rate = 0\.01"
    with pytest.raises(CoterieError, match=says):
        run(path, out, resume=True)
    path.write_text(text)
    rows = (tmp_path / "clients" / "mood-0" / "train.jsonl").read_text().splitlines()
    (tmp_path / "clients" / "mood-0" / "train.jsonl").write_text("\n".join(rows[1:]))
    with pytest.raises(CoterieError, match="the data are not those"):
        run(path, out, resume=True)
    with pytest.raises(CoterieError, match="no run to resume"):
        run(path, tmp_path / "nothing", resume=True)
    for content in ("[]", "{}", '{"config": {}}', '{"root": "/"}'):
        (out / "config.json").write_text(content)
        with pytest.raises(CoterieError, match=r"config\.json is damaged: it has no config and root; restore it"):
            run(path, out, resume=True)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "summary.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path, out = sites.config(tmp_path, method="local", **FEW), tmp_path / "out"
    run(path, out)
    (out / name).write_bytes((out / name).read_bytes()[:-9])
    if name == "manifest.json":
        (out / "summary.json").unlink()
    with pytest.raises(CoterieError, match=rf"{name} is damaged \(.*\); restore it"):
        run(path, out, resume=True)


def stopped(tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A run that lacks only its end, and what comes of it."""
    path, out = sites.config(tmp_path, **FEW), tmp_path / "out"
    run(path, out)
    whole = results(out)
    (out / "summary.json").unlink()
    return path, out, whole


@pytest.mark.parametrize("what", ["a state", "metrics"])
def test_a_checkpoint_whose_run_folder_lost_something_falls_back(tmp_path: Path, what: str) -> None:
    path, out, whole = stopped(tmp_path)
    if what == "metrics":
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    else:
        max((out / "personal" / "mood-0").iterdir()).unlink()
    notes: list[str] = []
    run(path, out, resume=True, listen=lambda event: notes.extend([event.text] if isinstance(event, Note) else []))
    reason = "metrics.jsonl is shorter" if what == "metrics" else r"the personal state .*missing for 1 client.*mood-0"
    assert any(re.search(rf"000003.ckpt cannot be used \(.*{reason}.*falling back", note) for note in notes)
    assert results(out) == whole


@pytest.mark.parametrize("folder", ["personal", "checkpoints"])
def test_a_folder_that_is_gone_is_told_and_nothing_is_touched(tmp_path: Path, folder: str) -> None:
    path, out, _ = stopped(tmp_path)
    shutil.rmtree(out / folder)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(CoterieError, match=r"personal state of that round is missing|lists rounds, but .*checkpoints"):
        run(path, out, resume=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"} == before
