"""A privacy ledger that is damaged is refused, with the file and what to do."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from coterie.methods.row_privacy import measured_of, step_of
from coterie.ops.accounting import Noised, Spent, of_one_draw, spent
from coterie.requests import Optim
from coterie.runs.ledger import LEDGER, Entry, Ledger, ledger_from, read_ledger, write_ledger
from coterie.types import CoterieError

MADE = Ledger((Entry(1, "updates", Noised(2.0), "a"), Entry(2, "steps", Noised(1.0, "poisson", 8, 4.0), "b", 8, 10)))


def test_a_ledger_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_ledger(tmp_path) == Ledger()
    write_ledger(tmp_path, MADE, MADE.spent(1e-5))
    assert read_ledger(tmp_path) == MADE == ledger_from(MADE.to_json(), "the checkpoint")
    assert MADE.to_json()[0].keys() == {"round", "kind", "noised", "name"}  # as before there were rows
    with pytest.raises(CoterieError, match=r"the checkpoint is not a privacy ledger .*; restore it"):
        ledger_from({"entries": []}, "the checkpoint")


def test_the_most_steps_of_any_rows_are_shown() -> None:
    fewer, other = (Entry(2, "steps", Noised(1.0), "c", rows, 4) for rows in (8, 9))
    assert Ledger((*MADE.entries, fewer, other)).of_rows() == {"steps": 14, "updates": 0}


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '"entries"', '{"entries": null}', '{"entries": [1]}', "\xff"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER).write_bytes(text.encode("latin-1"))
    with pytest.raises(CoterieError, match=r"privacy\.json is damaged \(.+\); restore it: without it nobody knows"):
        read_ledger(tmp_path)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Entry(1, "updates", Noised(math.nan), "a"), "a multiplier of nan"),
        (Entry(1, "updates", Noised(math.inf), "a"), "a multiplier of inf"),
        (Entry(1, "updates", Noised(-1.0), "a"), "a multiplier of -1"),
        (Entry(1, "updates", Noised(1.1e21), "a"), r"a multiplier of 1.1e\+21"),
        (Entry(1, "updates", Noised(1.0, "poisson", 4, 32.0), "a"), "32 of 4 members drawn"),
        (Entry(1, "updates", Noised(1.0, "poisson", 4, math.nan), "a"), "nan of 4 members drawn"),
        (Entry(1, "updates", Noised(1.0, "poisson", 4, 0.0), "a"), "0 of 4 members drawn"),
        (Entry(1, "updates", Noised(1.0, "fixed", 4, 0.5), "a"), "0.5 of 4 members drawn"),
        (Entry(1, "updates", Noised(1.0, "fixed", 0, 0), "a"), "0 of 0 members drawn"),
        (Entry(-1, "updates", Noised(1.0), "a"), "round -1"),
        (Entry(1, "steps", Noised(1.0), "a", -8), "-8 rows"),
        (Entry(1, "steps", Noised(1.0), "a", 8, 10**9 + 1), "1000000001 times"),
        (Entry(1, "steps", Noised(1.0), "a", 8, 0), "0 times"),
    ],
)
def test_a_release_that_no_run_makes_is_refused(tmp_path: Path, entry: Entry, reason: str) -> None:
    lines = json.loads(json.dumps(Ledger((MADE.entries[0], entry)).to_json()))
    with pytest.raises(CoterieError, match=f"the checkpoint is damaged .entry 2 has .*{reason}.*; restore it"):
        ledger_from(lines, "the checkpoint")
    (tmp_path / LEDGER).write_text(json.dumps({"entries": lines}))
    with pytest.raises(CoterieError, match=f"privacy.json is damaged .entry 2 has .*{reason}.*; restore it"):
        read_ledger(tmp_path)


@pytest.mark.parametrize("sampled", ["all", "fixed", "poisson"])
@pytest.mark.parametrize("multiplier", [0.0, 1e-200, 1e8, 1e21])
def test_the_cost_of_any_ledger_that_is_read_can_be_calculated(sampled: str, multiplier: float) -> None:
    drawn = {"all": 1.0, "fixed": 1.0, "poisson": 1e-3}[sampled]
    lines = [{"round": 1, "kind": "k", "name": f"{i}", "noised": {"multiplier": multiplier, "sampled": sampled,
              "members": 10**6, "drawn": drawn}} for i in range(3)]  # fmt: skip
    ledger = ledger_from(lines, "it")
    assert 0 <= ledger.spent(1e-5).epsilon <= math.inf


def test_noise_of_almost_nothing_hides_nothing() -> None:
    none = Noised(1e-200)
    (one,) = of_one_draw([none, replace(none, multiplier=2.0)])
    assert spent([one], 1e-5).epsilon == math.inf


@pytest.mark.parametrize(
    ("noise", "optim", "rows"),
    [
        (1e5, Optim(batch_size=1, steps=1), 10_000_000),  # a mean that is measured: rows / sqrt(steps) more noise
        (1.0, Optim(batch_size=1, epochs=100), 10_000_000),
    ],
)
def test_a_ledger_that_settings_allow_is_no_damage(tmp_path: Path, noise: float, optim: Optim, rows: int) -> None:
    made = Ledger(
        (
            Entry(1, "steps", step_of(noise, optim, rows), "a", rows, optim.steps_on(rows)),
            Entry(1, "embeddings", measured_of(noise, optim, rows), "a", rows),
        )
    )
    write_ledger(tmp_path, made, Spent(1.0, 1e-5, "RDP", 1.0))
    assert read_ledger(tmp_path) == made
