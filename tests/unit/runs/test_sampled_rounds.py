"""With noise at the server and a sampled cohort, no method releases a client's tensors by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import halves
import pools
from coterie.adapters.pool import write_pool
from coterie.config.privacy import check_privacy
from coterie.methods.parts import label_space
from coterie.methods.plan import Plan
from coterie.methods.privacy import PrivacySettings
from coterie.methods.registry import method_named, methods
from coterie.methods.robust import Group
from coterie.ops.accounting import Noised, Sampled, spent
from coterie.runs.ledger import Entry, Ledger
from coterie.runs.private import BudgetSpentError, Private
from coterie.runs.settings import RoundSettings
from coterie.types import ClientInfo, CoterieError, Reply

PRIVACY = PrivacySettings(unit="client", clip=1.0, noise_multiplier=1.0, noise_source="seeded")
CLIENTS = [ClientInfo(c, 4, labels=("no", "yes"), group="x" if c in "ab" else "y") for c in "abcdef"]
CHOICES = {"fedlease": ("allocation", ("learned", "oracle", "random")),
           "fedamole": ("assignment", ("dynamic", "static", "random", "homogeneous", "oracle"))}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {"fedlease": {"warmup_rounds": 2, "max_experts": 2}, "fedamole": {"experts": 6}}


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in methods():
        setting, choices = CHOICES.get(name, ("", ("",)))
        for choice in choices:
            yield name, SMALL.get(name, {}) | ({setting: choice} if setting else {})


def private(
    folder: Path, name: str, settings: dict[str, Any], cohort: float = 0.5, privacy: PrivacySettings = PRIVACY
) -> Private:
    kind = method_named(name)
    if name == "smartfed":
        write_pool(folder / "pool", pools.made(halves.BASE.targets, {"one": 3, "two": 2}, prefix=""))
        settings = {"pool": str(folder / "pool")}
    method = kind(kind.Settings(**settings), Plan(rank=2, rounds=5, head="shared", privacy=privacy))
    check_privacy(method, cohort < 1, "last")
    return Private(method, CLIENTS, RoundSettings(5, 0, cohort, sampling="poisson"), folder)


@pytest.mark.parametrize(("name", "settings"), cases(), ids=str)
def test_what_a_sampled_cohort_sends_is_in_a_group(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    try:
        made = private(tmp_path, name, settings)
    except CoterieError:
        return  # refused before the run
    state = made.method.init(halves.BASE, CLIENTS)
    spaces = {client.id: label_space(client) for client in CLIENTS}
    sent = 0
    for rnd in range(1, 6):
        everyone, starts = made.everyone(halves.BASE, state, {}, rnd)
        replies = {c: Reply(everyone[c].tensors, 1) for c in "ad"}
        groups = made.method.groups(state, everyone, spaces)
        shared = {(c, key) for group in groups for c in group.members for key in group.keys}
        assert shared == {(c, key) for c, reply in everyone.items() for key in reply.tensors}
        sent += len(shared)
        state = made.method.aggregate(state, made.release(groups, replies, everyone, starts, rnd), rnd)
    assert sent


def test_only_clients_that_replied_hold_smartfeds_pool_and_one_that_lost_it_stays_in_its_group(tmp_path: Path) -> None:
    made = private(tmp_path, "smartfed", {})
    method, state = made.method, made.method.init(halves.BASE, CLIENTS)
    spaces = {client.id: label_space(client) for client in CLIENTS}
    holders = []
    rounds: list[dict[str, dict[str, Any]]] = [{}, {"b": {}, "d": {}}, {"d": {"lacks_pool": True}}, {"d": {}}]
    for rnd, drawn in enumerate(rounds, start=1):
        everyone, _ = made.everyone(halves.BASE, state, {}, rnd)
        replies: dict[str, Reply] = {c: replace(everyone[c], info=info) for c, info in drawn.items()}
        before = state
        state = method.aggregate(state, made.released(halves.BASE, state, replies, spaces, rnd), rnd)
        assert any(not state.routers[key].equal(before.routers[key]) for key in state.routers), "noise, whoever replied"
        holders.append(state.holders)
    assert holders == [(), ("b", "d"), ("b",), ("b", "d")]
    assert {c for c, ins in method.configure(state, CLIENTS, 5).items() if ins.info["sent"]} == {*"acef"}


@pytest.mark.parametrize("name", ["fedamole", "fedlease"])
def test_a_stand_in_joins_nothing(tmp_path: Path, name: str) -> None:
    """What a state keeps of single clients is of those that sent something: a stand-in has no embeddings."""
    others = [*CLIENTS[:5], replace(CLIENTS[5], labels=("x", "y", "z"))]
    there = [*others, replace(others[5], id="e-late")]
    made = private(tmp_path, name, SMALL[name], cohort=1.0)
    made.clients, spaces = there, {client.id: label_space(client) for client in there}
    state: Any = made.method.init(halves.BASE, others)
    stood_in = []
    for rnd in range(1, 5):
        state = made.method.admit(state, there)
        everyone, _ = made.everyone(halves.BASE, state, {}, rnd)
        replies = {c: everyone[c] for c in ("abcde" if rnd > 2 else "abcdef")}
        released = made.released(halves.BASE, state, replies, spaces, rnd)
        stood_in += sorted(released.keys() - replies.keys())
        state = made.method.aggregate(state, released, rnd)
    joined = state.clients if name == "fedamole" else sorted(state.allocation.clusters)
    assert tuple(joined) == tuple("abcdef")
    assert ("e-late" in stood_in) == (name == "fedamole")  # in fedlease a client without a cluster is in no group


def test_fedlease_by_known_groups_and_the_averages_are_admitted(tmp_path: Path) -> None:
    for name in ("fedit", "ffa_lora", "rolora"):
        private(tmp_path, name, {})
    for allocation in ("oracle", "random"):
        private(tmp_path, "fedlease", {**SMALL["fedlease"], "allocation": allocation})
    with pytest.raises(CoterieError, match="by itself"):
        private(tmp_path, "fedlease", SMALL["fedlease"])


def test_a_release_that_would_show_who_was_drawn_is_an_error_and_is_not_counted(tmp_path: Path) -> None:
    made = private(tmp_path, "fedit", {})
    state = made.method.init(halves.BASE, CLIENTS)
    everyone, starts = made.everyone(halves.BASE, state, {}, 1)
    whole = [Group(tuple("abcdef"), frozenset(everyone["a"].tensors))]
    without = [Group(tuple("abcdef"), frozenset(sorted(everyone["a"].tensors)[1:]))]
    with pytest.raises(CoterieError, match="shows who was drawn"):
        made.release(without, {"a": everyone["a"]}, everyone, starts, 1)
    assert not made.ledger.entries
    assert private(tmp_path / "all", "fedit", {}, cohort=1.0).size == 6
    made.release(whole, {"a": everyone["a"]}, everyone, starts, 1)
    assert [entry.kind for entry in made.ledger.entries] == ["updates"]


@pytest.mark.parametrize("sampled", ["all", "fixed", "poisson"])
def test_two_releases_of_one_round_share_its_draw(sampled: Sampled) -> None:
    """A round that is done again with other values has the same cohort, so sampling hides it once."""
    one = Noised(0.8, sampled, 20, 2.0 if sampled != "all" else 20.0)
    again = Ledger((Entry(1, "updates", one, "a"), Entry(1, "updates", one, "b")))
    apart = Ledger((Entry(1, "updates", one, "a"), Entry(2, "updates", one, "b")))
    folded = replace(one, multiplier=0.8 / 2**0.5)
    assert again.spent(1e-5).epsilon == pytest.approx(spent([folded], 1e-5).epsilon)
    assert again.spent(1e-5).epsilon == apart.spent(1e-5).epsilon or sampled != "all"
    assert Ledger(again.entries[:1]).spent(1e-5, again.entries[1:]) == again.spent(1e-5)
    if sampled == "poisson":
        assert again.spent(1e-5).epsilon > apart.spent(1e-5).epsilon


def test_a_round_done_again_with_other_values_stops_the_run_before_it_exceeds_its_budget(tmp_path: Path) -> None:
    budget = spent([Noised(1.0)], 1e-5).epsilon * 1.05
    made = private(tmp_path, "fedit", {}, 1.0, PRIVACY.model_copy(update={"epsilon": budget}))
    state = made.method.init(halves.BASE, CLIENTS)
    everyone, starts = made.everyone(halves.BASE, state, {}, 1)
    groups = made.method.groups(state, everyone, {client.id: label_space(client) for client in CLIENTS})
    made.check_budget(state, 1)
    made.release(groups, {"a": everyone["a"]}, everyone, starts, 1)
    made.check_budget(state, 1)  # the same values would cost nothing
    made.release(groups, {"a": everyone["a"]}, everyone, starts, 1)
    moved = Reply({key: value + 1 for key, value in everyone["a"].tensors.items()}, 1)
    with pytest.raises(BudgetSpentError, match="stopped before round 1"):
        made.release(groups, {"a": moved}, everyone, starts, 1)
    with pytest.raises(BudgetSpentError, match="stopped before round 2"):
        made.check_budget(state, 2)
    assert len(made.ledger.entries) == 1
