"""Runs with ``[privacy] unit = "example"``: what they cost, what is refused, and what a kill does to the ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sites
import tiny
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.experiment import run
from coterie.methods.row_privacy import lot, measured_of, row_multiplier, step_of
from coterie.ops.accounting import Noised, spent
from coterie.requests import Optim
from coterie.runs.ledger import Entry, Ledger, read_ledger
from coterie.types import CoterieError

ROWS, CLIENTS = 8, 3
SEEDED = {"unit": "example", "clip": 0.5, "noise_multiplier": 1.0, "noise_source": "seeded"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rows")
    tiny.folder(made / "model", "bert")
    sites.federation(made / "clients", "classification", clients=CLIENTS, rows=ROWS)
    return made


def config(folder: Path, privacy: dict[str, Any], method: dict[str, Any] | None = None, **changes: Any) -> Config:
    torch.set_num_threads(1)
    raw: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "max_length": 32},
        "data": {"folder": str(folder / "clients")},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
        "train": {"learning_rate": 0.02, "batch_size": 4, "epochs": 1},
        "method": method or {"name": "fedit"},
        "privacy": privacy,
        "run": {"rounds": 2, "export": "last"},
        "engine": {"threads": 1, "device": "cpu"},
    }
    for name, values in changes.items():
        raw[name] = {**raw.get(name, {}), **values}
    return check_config(raw)


def experts(out: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(out.glob("experts/*/adapter_model.safetensors")))


def num_train(out: Path) -> int:
    (rows,) = {entry.rows for entry in read_ledger(out).entries}
    return rows


def test_every_step_of_every_round_is_counted(folder: Path, tmp_path: Path) -> None:
    done = run(config(folder, SEEDED), tmp_path / "run")
    rows = num_train(tmp_path / "run")
    optim = Optim(batch_size=4, epochs=1)
    assert done.privacy is not None
    assert done.privacy.releases == {"steps of a client": 2 * optim.steps_on(rows)}
    assert done.privacy.unit == "example"
    assert done.privacy.noise_at == "client"
    assert done.privacy.neighbours == "one example's contribution replaced by none"
    expected = spent([Noised(1.0, "poisson", rows, 4)] * (2 * optim.steps_on(rows)), 1e-5)
    assert done.privacy.epsilon == expected.epsilon
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [event for event in last if event["event"] == "round"]
    assert rounds[-1]["privacy"]["epsilon"] == expected.epsilon
    assert not any(client.get("said") for event in rounds for client in event["clients"].values())  # no loss, no tokens
    assert "Differential privacy of each example" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_noise_is_calculated_from_the_budget_and_the_run_keeps_to_it(folder: Path, tmp_path: Path) -> None:
    privacy = {**SEEDED, "noise_multiplier": 0, "epsilon": 4.0, "delta": 1e-3}
    done = run(config(folder, privacy), tmp_path / "run")
    assert done.privacy is not None
    assert 3.9 < done.privacy.epsilon <= 4.0
    assert not done.privacy.stopped


def test_a_run_ends_before_the_round_that_would_spend_more(folder: Path, tmp_path: Path) -> None:
    optim = Optim(batch_size=4, epochs=1)
    one = spent([step_of(1.0, optim, ROWS)] * optim.steps_on(ROWS), 1e-5).epsilon
    done = run(config(folder, {**SEEDED, "epsilon": 1.01 * one}), tmp_path / "run")
    assert done.privacy is not None
    assert done.privacy.stopped.startswith("stopped before round 2")
    assert done.privacy.epsilon <= 1.01 * one


def test_a_resumed_run_counts_what_was_begun_and_has_the_same_experts(folder: Path, tmp_path: Path) -> None:
    from coterie.runs.rounds import Runner

    whole = tmp_path / "whole"
    run(config(folder, SEEDED), whole)
    secure = {**SEEDED, "noise_source": "secure"}

    class KilledError(Exception):
        pass

    def kill(*_: Any) -> None:
        raise KilledError

    original = Runner._evaluate
    for privacy, name, times in ((SEEDED, "seeded", 2), (secure, "secure", 3)):
        out = tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Runner, "_evaluate", lambda self, state, rnd: kill() if rnd == 2 else original(self, state, rnd)
            )
            with pytest.raises(KilledError):
                run(config(folder, privacy), out)
        run(config(folder, privacy), out, resume=True)
        assert len(read_ledger(out).entries) == times  # fresh noise is counted again
        assert (experts(out) == experts(whole)) == (name == "seeded")


def test_clients_with_other_numbers_of_rows_are_apart_and_the_highest_cost_counts() -> None:
    few, many = (Entry(1, "steps", Noised(1.0, "poisson", n, 4), f"{n}", n, 10) for n in (8, 800))
    cost = {n: spent([Noised(1.0, "poisson", n, 4)] * 10, 1e-5).epsilon for n in (8, 800)}
    assert Ledger((few, many)).spent(1e-5).epsilon == max(cost.values()) == cost[8]
    assert Ledger((many,)).spent(1e-5).epsilon == cost[800] < cost[8]
    assert Ledger((few, many)).spent(1e-5, [Entry(2, "steps", few.noised, "2", 8, 10)]).epsilon > cost[8]
    assert Ledger((few, many)).of_rows() == {"steps": 10}


def test_a_step_of_all_rows_is_not_sampled() -> None:
    optim = Optim(batch_size=4, accumulate=4)
    assert lot(optim, 10) == 10
    assert step_of(2.0, optim, 10) == Noised(2.0)
    assert step_of(2.0, optim, 100) == Noised(2.0, "poisson", 100, 16)
    from coterie.methods.privacy import PrivacySettings

    settings = PrivacySettings(unit="example", clip=1.0, epsilon=3.0)
    chosen = row_multiplier(settings, optim, 10, 5)
    assert spent([step_of(chosen, optim, 10)] * (5 * optim.steps_on(10)), 1e-5).epsilon <= 3.0


@pytest.mark.parametrize(
    ("method", "changes", "setting"),
    [
        ({"name": "fedlease"}, {}, r"set \[method\] distance = \"B\""),
        ({"name": "fedlease", "distance": "B", "download": "used"}, {}, r"set \[method\] download = \"all\""),
        ({"name": "fedamole"}, {}, r"set \[method\] balance = 0"),
        ({"name": "fedamole", "balance": 0, "embed_rows": "held_out"}, {}, r"set \[method\] embed_rows = \"all\""),
        ({"name": "ifca"}, {}, "choose a cluster by the losses of their rows"),
        ({"name": "fdlora"}, {}, "train twice in some rounds"),
        ({"name": "feddpa"}, {}, "train twice in a round, and measure"),
        ({"name": "local"}, {}, "it sends no tensors"),
        ({"name": "centralised"}, {}, "in one place"),
        (None, {"lora": {"dropout": 0.1}}, r"set \[lora\] dropout = 0"),
        (None, {"model": {"gradient_checkpointing": True}}, r"set \[model\] gradient_checkpointing = false"),
    ],
)
def test_what_would_have_no_noise_is_refused(
    folder: Path, method: dict[str, Any] | None, changes: dict[str, Any], setting: str
) -> None:
    with pytest.raises(CoterieError, match=setting):
        config(folder, SEEDED, method, **changes).make_method(folder)


def test_embeddings_are_one_more_entry_of_the_ledger(folder: Path, tmp_path: Path) -> None:
    chooses = {"name": "fedamole", "balance": 0, "embed_rows": "all", "experts": 3, "clients_per_expert": 2}
    changes = {"train": {"batch_size": 16}, "engine": {"clients_per_batch": CLIENTS}}
    done = run(config(folder, SEEDED, chooses, **changes), tmp_path / "run")
    rows, optim = num_train(tmp_path / "run"), Optim(batch_size=16, epochs=1)
    steps = optim.steps_on(rows)
    assert done.privacy is not None
    assert done.privacy.releases == {"steps of a client": 2 * steps, "embeddings": 1}
    expected = [*[step_of(1.0, optim, rows)] * (2 * steps), measured_of(1.0, optim, rows)]
    assert done.privacy.epsilon == pytest.approx(spent(expected, 1e-5).epsilon)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["failed"] for event in events if event["event"] == "round"] == [{}, {}]


TRAIN_ONCE: list[dict[str, Any]] = [
    {"name": "ffa_lora"},
    {"name": "fedlease", "distance": "B", "warmup_rounds": 1},
    {"name": "fedamole", "assignment": "static", "balance": 0, "embed_rows": "all"},
]


@pytest.mark.parametrize(
    ("method", "size"),
    [*((of, CLIENTS) for of in TRAIN_ONCE), (TRAIN_ONCE[0], "auto")],
    ids=lambda of: of["name"] if isinstance(of, dict) else str(of),
)
def test_methods_that_train_once_run_alone_and_in_shared_passes(
    folder: Path, tmp_path: Path, method: dict[str, Any], size: Any
) -> None:
    alone = run(config(folder, SEEDED, method), tmp_path / "alone")
    many = run(config(folder, SEEDED, method, engine={"clients_per_batch": size}), tmp_path / "many")
    assert alone.privacy is not None
    assert alone.privacy.epsilon > 0
    assert many.privacy == alone.privacy
    one, other = (tensors(tmp_path / name) for name in ("alone", "many"))
    assert one.keys() == other.keys()
    assert len(one) >= 4
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)
    assert '"failed": {"' not in "".join(path.read_text() for path in tmp_path.glob("*/metrics.jsonl"))


def tensors(out: Path) -> dict[str, torch.Tensor]:
    paths = sorted(out.glob("experts/*/adapter_model.safetensors"))
    return {f"{path.parent.name} {name}": value for path in paths for name, value in load_file(path).items()}
