"""With noise at the server and a sampled cohort, no method releases a client's tensors by themselves."""

from __future__ import annotations

from collections.abc import Iterator
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
from coterie.runs.private import Private
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


def private(folder: Path, name: str, settings: dict[str, Any], cohort: float = 0.5) -> Private:
    kind = method_named(name)
    if name == "smartfed":
        write_pool(folder / "pool", pools.made(halves.BASE.targets, {"one": 3, "two": 2}, prefix=""))
        settings = {"pool": str(folder / "pool")}
    method = kind(kind.Settings(**settings), Plan(rank=2, rounds=5, head="shared", privacy=PRIVACY))
    check_privacy(method, cohort < 1, "last")
    return Private(method, CLIENTS, RoundSettings(5, 0, cohort, sampling="poisson"), folder)


@pytest.mark.parametrize(("name", "settings"), cases(), ids=str)
def test_what_a_sampled_cohort_sends_is_in_a_group(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    pytest.importorskip("dp_accounting")
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
