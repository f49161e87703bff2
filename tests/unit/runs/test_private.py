"""Runs with ``[privacy]``: what is released, what it costs, and what a kill does to the ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import sites
import tiny
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.experiment import run
from coterie.ops.accounting import Noised, Sampled, spent
from coterie.runs.ledger import LEDGER, read_ledger
from coterie.runs.private import KEY, kept_noise
from coterie.runs.rounds import Runner
from coterie.types import CoterieError

SEEDED = {"unit": "client", "clip": 0.1, "noise_multiplier": 0.5, "noise_source": "seeded"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("private")
    tiny.folder(made / "model", "bert")
    sites.federation(made / "clients", "classification", clients=4, rows=8)
    return made


def config(folder: Path, privacy: dict[str, Any], method: dict[str, Any] | None = None, **run: Any) -> Config:
    torch.set_num_threads(1)
    engine = {"threads": 1, "device": "cpu", "clients_per_batch": run.pop("clients_per_batch", 1)}
    engine |= {"name": run.pop("engine", "local")}
    return check_config(
        {
            "model": {"path": str(folder / "model"), "max_length": 32},
            "data": {"folder": str(folder / "clients")},
            "task": {"kind": "classification", "head": run.pop("head", "personal")},
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
            "train": {"learning_rate": 0.02, "batch_size": 8, "epochs": 1},
            "method": method or {"name": "fedit"},
            "privacy": privacy,
            "robust": run.pop("robust", {}),
            "run": {"rounds": 2, "export": "last", **run},
            "engine": engine,
        }
    )


def experts(out: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(out.glob("experts/*/adapter_model.safetensors")))


def lines(out: Path, event: str) -> list[dict[str, Any]]:
    events = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in events if line["event"] == event]


def test_nothing_but_noisy_tensors_is_left_in_the_folder(folder: Path, tmp_path: Path) -> None:
    made = run(config(folder, {**SEEDED, "noise_source": "secure"}), tmp_path / "run", root=folder)
    assert made.privacy is not None
    assert (made.privacy.releases, made.privacy.noise_source) == ({"updates": 2}, "secure")
    assert made.mean == {}
    assert read_ledger(tmp_path / "run").spent(1e-5).epsilon == pytest.approx(made.privacy.epsilon)
    rounds = lines(tmp_path / "run", "round")
    assert len(rounds) == 2
    for line in rounds:
        assert line["privacy"]["epsilon"] > 0
        for entry in line["clients"].values():
            assert set(entry) == {"bytes_up", "bytes_down", "seconds"}
    assert rounds[0]["privacy"]["epsilon"] < rounds[1]["privacy"]["epsilon"] == pytest.approx(made.privacy.epsilon)
    assert not lines(tmp_path / "run", "truncated")
    assert not (tmp_path / "run" / KEY).exists()


def test_secure_noise_differs_from_run_to_run_and_seeded_noise_does_not(folder: Path, tmp_path: Path) -> None:
    made = {}
    for name, source in (("a", "secure"), ("b", "secure"), ("c", "seeded"), ("d", "seeded")):
        run(config(folder, {**SEEDED, "noise_source": source}, rounds=1), tmp_path / name, root=folder)
        made[name] = experts(tmp_path / name)
    assert made["a"] != made["b"]
    assert made["c"] == made["d"] != made["a"]


@pytest.mark.parametrize("noise_at", ["server", "client"])
def test_many_clients_in_a_pass_release_the_same(folder: Path, tmp_path: Path, noise_at: str) -> None:
    privacy = {**SEEDED, "noise_at": noise_at, "metrics": "unprotected"}
    one = run(config(folder, privacy), tmp_path / "one", root=folder)
    many = run(config(folder, privacy, clients_per_batch=4), tmp_path / "many", root=folder)
    assert one.privacy == many.privacy
    assert one.mean["test"]["loss"] == pytest.approx(many.mean["test"]["loss"], rel=1e-4)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("source", ["secure", "seeded"])
def test_a_killed_round_is_released_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Killed after the noisy model went out and before the checkpoint: the same noise again, counted once."""
    privacy = {**SEEDED, "noise_source": source, "metrics": "unprotected", "noise_multiplier": 0.0, "epsilon": 9.0}
    mine, out = config(folder, privacy), tmp_path / "run"  # nothing is left of the budget after the last round
    commit = Runner._commit

    def killed(self: Runner[Any], state: Any, rnd: int) -> Any:
        if rnd == 2:
            states.append(state.lora)
            raise KilledError
        return commit(self, state, rnd)

    states: list[Any] = []
    monkeypatch.setattr(Runner, "_commit", killed)
    with pytest.raises(KilledError):
        run(mine, out, root=folder)
    assert len(read_ledger(out).entries) == 2
    monkeypatch.setattr(Runner, "_commit", commit)
    seen: list[Any] = []
    aggregate = type(mine.make_method(folder)).aggregate
    monkeypatch.setattr(
        type(mine.make_method(folder)), "aggregate", lambda *of: seen.append(aggregate(*of)) or seen[-1]
    )
    made = run(mine, out, root=folder, resume=True)
    assert made.privacy is not None
    assert made.privacy.releases == {"updates": 2}
    assert (made.rounds, made.privacy.stopped) == (2, "")
    assert all(torch.equal(seen[-1].lora[key], value) for key, value in states[0].items())


def test_a_ledger_that_is_lost_comes_back_from_the_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, out, commit = config(folder, SEEDED), tmp_path / "run", Runner._commit

    def killed(self: Runner[Any], state: Any, rnd: int) -> Any:
        made = commit(self, state, rnd)
        if rnd == 1:
            raise KilledError
        return made

    monkeypatch.setattr(Runner, "_commit", killed)
    with pytest.raises(KilledError):
        run(mine, out, root=folder)
    monkeypatch.setattr(Runner, "_commit", commit)
    (out / LEDGER).unlink()
    made = run(mine, out, root=folder, resume=True)
    assert made.privacy is not None
    assert made.privacy.releases == {"updates": 2}


def test_clients_that_add_noise_count_every_attempt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, out = config(folder, {**SEEDED, "noise_source": "secure", "noise_at": "client"}), tmp_path / "run"
    evaluate = Runner._evaluate

    def killed(self: Runner[Any], state: Any, rnd: int) -> None:
        if rnd == 2:
            raise KilledError
        evaluate(self, state, rnd)

    monkeypatch.setattr(Runner, "_evaluate", killed)
    with pytest.raises(KilledError):
        run(mine, out, root=folder)
    monkeypatch.setattr(Runner, "_evaluate", evaluate)
    made = run(mine, out, root=folder, resume=True)
    assert made.privacy is not None
    assert made.privacy.releases == {"updates": 3}


def test_a_run_stops_before_it_would_exceed_its_budget(folder: Path, tmp_path: Path) -> None:
    one = run(config(folder, {**SEEDED, "noise_multiplier": 2.0}, rounds=1), tmp_path / "one", root=folder)
    assert one.privacy is not None
    budget = {**SEEDED, "noise_multiplier": 2.0, "epsilon": one.privacy.epsilon * 1.05}
    made = run(config(folder, budget, rounds=3), tmp_path / "run", root=folder)
    assert made.privacy is not None
    assert (made.rounds, made.exported_round) == (1, 1)
    assert made.privacy.epsilon == one.privacy.epsilon
    assert "stopped before round 2" in made.privacy.stopped


def test_noise_that_was_calculated_spends_the_budget_and_no_more(folder: Path, tmp_path: Path) -> None:
    privacy = {"unit": "client", "clip": 0.1, "epsilon": 2.0, "noise_source": "seeded"}
    method = {"name": "fedlease", "warmup_rounds": 2, "max_experts": 3}
    made = run(config(folder, privacy, method, rounds=3), tmp_path / "run", root=folder)
    assert made.privacy is not None
    assert made.privacy.releases == {"embeddings": 1, "updates": 2}  # nothing leaves in the first warm-up round
    assert 1.99 < made.privacy.epsilon <= 2.0
    assert made.rounds == 3


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_a_sampled_cohort_costs_what_the_accountant_says_and_every_group_gets_noise(
    folder: Path, tmp_path: Path, sampling: str
) -> None:
    """Poisson cohorts may be empty: a round of noise alone."""
    of = {"cohort": 0.25, "sampling": sampling, "rounds": 4, "head": "shared"}
    made = run(config(folder, SEEDED, **of), tmp_path / "run", root=folder)
    assert made.privacy is not None
    assert made.privacy.releases == {"updates": 4}
    everyone = run(config(folder, SEEDED, rounds=4, head="shared"), tmp_path / "all", root=folder)
    assert everyone.privacy is not None
    assert made.privacy.cohort == f"1 of 4, {sampling}"
    drawn = [Noised(0.5, cast(Sampled, sampling), 4, 1.0)] * 4
    assert made.privacy.epsilon == pytest.approx(spent(drawn, 1e-5).epsilon)
    if sampling == "poisson":  # a fixed size protects from more: one client exchanged for another
        assert made.privacy.epsilon < everyone.privacy.epsilon


@pytest.mark.parametrize(
    ("privacy", "method", "rest", "says"),
    [
        ({"unit": "client", "noise_multiplier": 1.0}, "fedit", {}, "noise without a clip"),
        ({"unit": "client", "clip": 1.0}, "fedit", {}, "set noise_multiplier"),
        ({"clip": 1.0, "noise_multiplier": 1.0}, "fedit", {}, 'without unit = "client"'),
        (SEEDED, {"name": "fedlease", "weighting": "examples"}, {}, 'weighting = "uniform"'),
        (SEEDED, "flora", {}, "no clipped mean"),
        (SEEDED, "flexlora", {}, "no clipped mean"),
        (SEEDED, "local", {}, "leave [privacy] out"),
        (SEEDED, "ifca", {}, 'set [method] name = "fedit"'),
        (SEEDED, "fedlease", {"cohort": 0.5}, "[run] cohort = 1"),
        (SEEDED, "fedamole", {"sampling": "poisson"}, 'assignment = "static"'),
        (SEEDED, "fedit", {"robust": {"rule": "median"}}, 'noise_at = "client"'),
        ({**SEEDED, "metrics": "unprotected"}, "fedit", {"export": "best"}, 'export = "last"'),
    ],
)
def test_what_only_looks_private_is_refused(
    folder: Path, tmp_path: Path, privacy: Any, method: Any, rest: Any, says: str
) -> None:
    settings = method if isinstance(method, dict) else {"name": method}
    with pytest.raises(CoterieError) as refused:
        run(config(folder, privacy, settings, **rest), tmp_path / "run", root=folder)
    assert says in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_key_of_the_noise_is_written_whole_for_its_owner_alone_and_refused_in_part(tmp_path: Path) -> None:
    path = tmp_path / "run" / "privacy.key"
    noise = kept_noise(path)
    assert path.stat().st_mode & 0o077 == 0
    assert torch.equal(noise.normal((3,), "a"), kept_noise(path).normal((3,), "a"))
    path.write_bytes(b"")  # as a process leaves it that was killed as it wrote: each start would draw other noise
    with pytest.raises(CoterieError, match="is damaged: it has 0 bytes, and the key of the noise has 32"):
        kept_noise(path)
