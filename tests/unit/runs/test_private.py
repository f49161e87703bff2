"""Runs with ``[privacy]``: what is released, what it costs, and what a kill does to the ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import sites
import tiny
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.experiment import run
from coterie.files import write_json
from coterie.methods.fedit import FedIT
from coterie.methods.plan import Plan
from coterie.methods.privacy import PrivacySettings
from coterie.methods.releases import Release
from coterie.ops.accounting import Noised, Sampled, spent
from coterie.runs.cost import check_continued, check_planned_cost, cohort_size, noised, planned_cost
from coterie.runs.events import Event, Note, RoundDone, RoundStart
from coterie.runs.ledger import LEDGER, read_ledger
from coterie.runs.private import KEY, kept_noise
from coterie.runs.rounds import Runner
from coterie.runs.settings import RoundSettings
from coterie.runs.summary import SUMMARY
from coterie.types import CoterieError
from stop_run import stop_run

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


def test_a_run_that_is_killed_as_it_ends_leaves_no_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed just before the summary or just after it, which makes the run finished: the noise has no key any more."""
    mine = config(folder, {**SEEDED, "noise_source": "secure"}, rounds=1)
    for when in ("before", "after"):

        def killed(path: Path, value: Any, when: str = when) -> None:
            if when == "after":
                write_json(path, value)
            raise KilledError

        out = tmp_path / when
        with monkeypatch.context() as patch:
            patch.setattr("coterie.experiment.write_json", killed)
            with pytest.raises(KilledError):
                run(mine, out, root=folder)
        assert (out / SUMMARY).exists() == (when == "after")
        assert not (out / KEY).exists()
        assert run(mine, out, root=folder, resume=True).rounds == 1
        assert not (out / KEY).exists()
        assert len(read_ledger(out).entries) == 1


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


def test_a_round_without_a_quorum_says_what_the_run_has_spent(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.runs.rounds.quorum_fault", lambda rnd, *of: "nobody" if rnd == 2 else None)
    with pytest.raises(CoterieError, match="nobody"):
        run(config(folder, {**SEEDED, "noise_at": "client"}), tmp_path / "run", root=folder)
    first, failed = lines(tmp_path / "run", "round")
    assert 0 < first["privacy"]["epsilon"] < failed["privacy"]["epsilon"]


def test_a_run_stops_before_it_would_exceed_its_budget(folder: Path, tmp_path: Path) -> None:
    one = run(config(folder, {**SEEDED, "noise_multiplier": 2.0}, rounds=1), tmp_path / "one", root=folder)
    assert one.privacy is not None
    budget = {**SEEDED, "noise_multiplier": 2.0, "epsilon": one.privacy.epsilon * 1.05}
    made = run(config(folder, budget, rounds=3), tmp_path / "run", root=folder)
    assert made.privacy is not None
    assert (made.rounds, made.exported_round) == (1, 1)
    assert made.privacy.epsilon == one.privacy.epsilon
    assert "stopped before round 2" in made.privacy.stopped


def test_the_round_that_a_run_stops_after_is_evaluated(folder: Path, tmp_path: Path) -> None:
    one = run(config(folder, {**SEEDED, "noise_multiplier": 2.0}, rounds=1), tmp_path / "one", root=folder)
    assert one.privacy is not None
    budget = {**SEEDED, "noise_multiplier": 2.0, "epsilon": one.privacy.epsilon * 1.05}
    of = config(folder, budget, rounds=9, evaluate_every=9)
    made = run(of, tmp_path / "run", root=folder)
    assert (made.rounds, made.exported_round, made.mean) == (1, 1, one.mean)
    (tmp_path / "run" / "summary.json").unlink()
    assert run(of, tmp_path / "run", root=folder, resume=True).mean == one.mean
    with pytest.raises(CoterieError, match=r"stopped before round 1: .* more noise"):
        run(config(folder, {**budget, "epsilon": one.privacy.epsilon * 0.5}), tmp_path / "none", root=folder)


def test_a_run_whose_noise_was_calculated_gets_no_more_rounds(folder: Path, tmp_path: Path) -> None:
    privacy, out = {"unit": "client", "clip": 0.1, "epsilon": 2.0, "noise_source": "seeded"}, tmp_path / "run"
    before = run(config(folder, privacy, rounds=2), out, root=folder)
    with pytest.raises(CoterieError, match=r"epsilon = 2 for 2 rounds, which spend all of it.*--out"):
        run(config(folder, privacy, rounds=4), out, root=folder, resume=True)
    assert run(config(folder, privacy, rounds=2), out, root=folder, resume=True) == before


def test_noise_that_was_calculated_spends_the_budget_and_no_more(folder: Path, tmp_path: Path) -> None:
    privacy = {"unit": "client", "clip": 0.1, "epsilon": 2.0, "noise_source": "seeded"}
    method = {"name": "fedlease", "warmup_rounds": 2, "max_experts": 3}
    made = run(config(folder, privacy, method, rounds=3), tmp_path / "run", root=folder)
    assert made.privacy is not None
    assert made.privacy.releases == {"embeddings": 1, "updates": 2}  # nothing leaves in the first warm-up round
    assert 1.99 < made.privacy.epsilon <= 2.0
    assert made.rounds == 3


class Measuring(FedIT):
    """A method that also needs the sum of what clients measure."""

    def releases(self) -> tuple[Release, ...]:
        return (*super().releases(), Release("means", measured=True))


def test_noise_that_is_calculated_for_two_releases_of_a_drawn_cohort_keeps_to_the_budget() -> None:
    """Both are of one draw, which hides less than two draws would."""
    settings = PrivacySettings.model_validate({"unit": "client", "clip": 1.0, "epsilon": 2.0})
    method = Measuring(FedIT.Settings(), Plan(rounds=3, privacy=settings, dropout=0.0))
    clients = {f"c{i}": 10 for i in range(100)}
    assert 1.99 < planned_cost(method, clients, RoundSettings(3, 0, cohort=0.1, sampling="poisson")).epsilon <= 2.0


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_a_sampled_cohort_costs_what_the_accountant_says_and_every_group_gets_noise(
    folder: Path, tmp_path: Path, sampling: str
) -> None:
    """Poisson cohorts may be empty: a round of noise alone."""
    of, privacy = {"rounds": 4, "head": "shared"}, {**SEEDED, "noise_multiplier": 1.0}
    made = run(config(folder, privacy, **of, cohort=0.25, sampling=sampling), tmp_path / "run", root=folder)
    assert made.privacy is not None
    assert made.privacy.releases == {"updates": 4}
    everyone = run(
        config(folder, {**SEEDED, "noise_multiplier": 1.0}, rounds=4, head="shared"), tmp_path / "all", root=folder
    )
    assert everyone.privacy is not None
    assert made.privacy.cohort == f"1 of 4, {sampling}"
    drawn = [Noised(1.0, cast(Sampled, sampling), 4, 1.0)] * 4
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
        ({**SEEDED, "delta": 0.5}, "fedit", {}, "delta is 0.5: the chance that everything shows; set it to 0.01"),
        ({**SEEDED, "noise_multiplier": 0.01}, "fedit", {"rounds": 10}, "would cost epsilon = 51,348 at delta"),
        ({**SEEDED, "noise_multiplier": 0.01}, "fedit", {"rounds": 10}, "(epsilon = 51348 beside it"),
        ({**SEEDED, "noise_multiplier": 0.0005, "noise_at": "client"}, "fedit", {}, "epsilon = inf at delta"),
        ({**SEEDED, "noise_multiplier": 0.05, "unit": "example"}, "fedit", {}, "and above 50 it protects nobody"),
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


def test_an_epsilon_set_by_hand_is_taken_at_its_word_and_the_run_warns(folder: Path, tmp_path: Path) -> None:
    run(config(folder, {**SEEDED, "noise_multiplier": 0.1, "epsilon": 200.0}), tmp_path / "run", root=folder)
    said = [line["text"] for line in lines(tmp_path / "run", "note")]
    warning = "epsilon = 200 protects nobody: do not call this run private"
    assert [text for text in said if warning in text]
    assert warning in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("unit", "clients", "rows"), [("client", 100, 50), ("example", 5, 100)])
def test_a_delta_at_which_one_may_be_published_in_full_is_refused(unit: str, clients: int, rows: int) -> None:
    settings = PrivacySettings.model_validate({"unit": unit, "clip": 1.0, "noise_multiplier": 3.0, "delta": 0.01})
    method = FedIT(FedIT.Settings(), Plan(rounds=1, privacy=settings, dropout=0.0))
    check_planned_cost(method, {f"c{i}": rows - 1 for i in range(clients - 1)}, RoundSettings(1, 0))
    says = r"(with 100 clients|client c0 has 100 training rows), .*publishing one of them at random in full"
    with pytest.raises(CoterieError, match=says):
        check_planned_cost(method, {f"c{i}": 3 if i else rows for i in range(clients)}, RoundSettings(1, 0))


def test_the_client_whose_rows_cost_too_much_is_named() -> None:
    settings = PrivacySettings.model_validate({"unit": "example", "clip": 1.0, "noise_multiplier": 1.0})
    method = FedIT(FedIT.Settings(), Plan(rounds=100, privacy=settings, dropout=0.0))
    with pytest.raises(CoterieError) as refused:
        check_planned_cost(method, {"large": 5000, "few": 2}, RoundSettings(100, 0))
    assert "would cost client few, which has 2 training rows, epsilon = " in str(refused.value)
    assert "leave this client out" in str(refused.value)
    check_planned_cost(method, {"large": 5000}, RoundSettings(100, 0))


@pytest.mark.parametrize(
    ("cohort", "sampling", "at", "size", "as_drawn"),
    [
        (0.25, "fixed", "server", 2, Noised(3.0, "fixed", 10, 2)),
        (0.01, "fixed", "server", 1, Noised(3.0, "fixed", 10, 1)),
        (0.25, "poisson", "server", 2.5, Noised(3.0, "poisson", 10, 2.5)),
        (1.0, "poisson", "server", 10, Noised(3.0)),
        (0.25, "poisson", "client", 2.5, Noised(3.0)),
    ],
)
def test_drawing_hides_whom_it_leaves_out_and_nobody_who_adds_noise_itself(
    cohort: float, sampling: Sampled, at: str, size: float, as_drawn: Noised
) -> None:
    settings = PrivacySettings.model_validate({**SEEDED, "noise_at": at})
    rounds = RoundSettings(1, 0, cohort=cohort, sampling=sampling)
    assert cohort_size(rounds, 10) == size
    assert noised(settings, rounds, 10, 3.0) == as_drawn


def refusal(rounds: int, before: int | None = None, clients: int = 4, **privacy: object) -> str:
    """What is said of a new run, or of one that has ``before`` rounds and gets so many."""
    settings = PrivacySettings.model_validate({**SEEDED, **privacy})
    method = FedIT(FedIT.Settings(), Plan(rounds=rounds, privacy=settings, dropout=0.0))
    rows, of = {f"c{i}": 8 for i in range(clients)}, RoundSettings(rounds, 0)
    try:
        if before is None:
            check_planned_cost(method, rows, of)
            return ""
        return "".join(check_continued(method, rows, of, before))
    except CoterieError as fault:
        return str(fault)


def test_a_refusal_names_an_epsilon_that_the_config_may_have() -> None:
    assert refusal(1, noise_multiplier=0.02).endswith(
        "is calculated (epsilon = 1463 beside it runs all the same, and says so)"
    )
    assert refusal(1, noise_multiplier=0.002).endswith("from which it is calculated")
    assert "over 1 round, and" in refusal(1, noise_multiplier=0.02)
    assert "over 2 rounds, and" in refusal(2, noise_multiplier=0.02)
    assert refusal(1, noise_multiplier=0.02, epsilon=1463.0) == ""


def test_only_what_more_rounds_cost_is_held_against_them() -> None:
    cheap, dear = {"noise_multiplier": 0.4}, {"noise_multiplier": 0.1}
    assert refusal(2, 1, **cheap) == refusal(2, **cheap) == ""
    assert "it is the extension from 1 round that costs too much" in refusal(20, 1, **cheap)
    assert "The run began so and continues" in refusal(20, 1, **dear)


def test_rows_are_as_dear_as_those_of_whoever_has_the_dearest() -> None:
    settings = PrivacySettings.model_validate({**SEEDED, "unit": "example", "noise_multiplier": 2.0})
    method = FedIT(FedIT.Settings(), Plan(rounds=2, privacy=settings, dropout=0.0))
    cost = {n: planned_cost(method, {"a": n}, RoundSettings(2, 0)).epsilon for n in (40, 4000)}
    assert cost[40] > cost[4000]
    assert planned_cost(method, {"a": 4000, "b": 40, "c": 4000}, RoundSettings(2, 0)).epsilon == cost[40]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As versions were that refused nothing that protects nobody."""
    with monkeypatch.context() as patch:
        patch.setattr("coterie.runs.cost.unprotected", lambda *args: None)
        yield patch


LITTLE = {**SEEDED, "noise_multiplier": 0.1}


@pytest.mark.parametrize("privacy", [LITTLE, {**SEEDED, "delta": 0.5}, {**SEEDED, "delta": 0.3, "epsilon": 900.0}])
def test_a_run_that_began_before_the_refusal_continues_and_says_so(
    folder: Path, tmp_path: Path, unchecked: pytest.MonkeyPatch, privacy: dict[str, Any]
) -> None:
    out, of = tmp_path / "run", config(folder, privacy)
    undisturbed = run(of, tmp_path / "whole", root=folder)
    stopped_in_round_2(of, out, folder)
    unchecked.undo()
    said: list[str] = []
    made = run(of, out, root=folder, resume=True, listen=lambda e: said.append(e.text) if isinstance(e, Note) else None)
    assert made.privacy == undisturbed.privacy
    assert [text for text in said if "The run began so and continues: do not call it private" in text]
    assert "do not call it private" in (out / "report.html").read_text(encoding="utf-8")
    with pytest.raises(CoterieError):
        run(of, tmp_path / "new", root=folder)


def stopped_in_round_2(of: Config, out: Path, root: Path) -> None:
    stop_run(run, of, out, root=root, when=lambda event: isinstance(event, RoundStart) and event.round == 2)


def test_more_rounds_that_cost_too_much_are_refused_as_such_and_change_nothing(folder: Path, tmp_path: Path) -> None:
    out, cheap = tmp_path / "run", {**SEEDED, "noise_multiplier": 0.4}
    before = run(config(folder, cheap, rounds=2), out, root=folder)
    with pytest.raises(CoterieError) as refused:
        run(config(folder, cheap, rounds=20), out, root=folder, resume=True)
    says = "it is the extension from 2 rounds that costs too much; give fewer rounds (run.rounds = 2 continues"
    assert says in str(refused.value)
    assert "--out" in str(refused.value)
    assert "epsilon, from which" not in str(refused.value)  # the config of a run cannot change
    assert run(config(folder, cheap, rounds=2), out, root=folder, resume=True) == before
    assert run(config(folder, cheap, rounds=3), out, root=folder, resume=True).rounds == 3


def test_a_run_that_was_extended_before_the_refusal_continues(
    folder: Path, tmp_path: Path, unchecked: pytest.MonkeyPatch
) -> None:
    out, cheap = tmp_path / "run", {**SEEDED, "noise_multiplier": 0.4}
    run(config(folder, cheap, rounds=1), out, root=folder)
    longer = config(folder, cheap, rounds=20)
    with pytest.raises(KeyboardInterrupt):
        run(longer, out, root=folder, resume=True, listen=killed)
    unchecked.undo()
    assert run(longer, out, root=folder, resume=True).rounds == 20


def killed(event: Event) -> None:
    if isinstance(event, RoundDone) and event.round == 1:
        raise KeyboardInterrupt


def test_the_key_of_the_noise_is_written_whole_for_its_owner_alone_and_refused_in_part(tmp_path: Path) -> None:
    path = tmp_path / "run" / "privacy.key"
    noise = kept_noise(path)
    assert path.stat().st_mode & 0o077 == 0
    assert torch.equal(noise.normal((3,), "a"), kept_noise(path).normal((3,), "a"))
    path.write_bytes(b"")  # as a process leaves it that was killed as it wrote: each start would draw other noise
    with pytest.raises(CoterieError, match="is damaged: it has 0 bytes, and the key of the noise has 32"):
        kept_noise(path)
