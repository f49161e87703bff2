"""What methods declare that they send is what they send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pools
import short_runs
from coterie.engines.local import LocalEngine
from coterie.methods.parts import label_space
from coterie.methods.plan import Plan
from coterie.methods.registry import method_named, methods
from coterie.methods.releases import COMMON, each_of
from coterie.types import ClientId, Key, Part, Reply
from few_rounds import OPTIM, ROUNDS, SETTINGS


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def special(name: str, **settings: Any) -> Any:
    kind = method_named(name)
    pool = {"pool": pools.for_tiny()} if name == "smartfed" else {}
    plan = Plan(rank=2, alpha=4, dropout=0.1, optim=OPTIM, head="shared", rounds=ROUNDS)
    return kind(kind.Settings(**{**SETTINGS.get(name, {}), **pool, **settings}), plan)


@pytest.mark.parametrize("name", sorted(methods().keys() - {"centralised"}))
def test_what_is_sent_was_declared(name: str, tmp_path: Path) -> None:
    method = special(name)
    over = short_runs.clients("mood-0", "mood-1", "size-0", "size-1")
    releases = method.releases()
    declared = {key for release in (*COMMON, *releases) if release.carried == "info" for key in release.names}
    by_client = any(release.carried == "tensors" for release in each_of(releases))
    sent: set[Key] = set()
    ungrouped: set[tuple[ClientId, Key]] = set()
    for replies, groups in rounds(method, over, tmp_path):
        for client, reply in replies.items():
            assert set(reply.info) <= declared
            sent |= reply.tensors.keys()
            grouped = {key for group in groups if client in group.members for key in group.keys}
            ungrouped |= {(client, key) for key in reply.tensors.keys() - grouped}
    assert bool(sent) == any(release.carried == "tensors" for release in releases)
    assert any(key.part is Part.HEAD for key in sent) == any(release.what == "head" for release in releases)
    assert by_client or not ungrouped, "the server reads tensors by client that are declared as sums"
    assert bool(ungrouped) == (by_client and not method.no_rules)


def rounds(method: Any, over: Any, folder: Path) -> Any:
    """The replies of every round, and what the method averages together of them."""
    engine: LocalEngine = short_runs.engine_of(over, folder)
    spaces = {client.id: label_space(client) for client in engine.clients}
    state = method.init(engine.spec, engine.clients)
    for rnd in range(1, ROUNDS + 1):
        deliveries = dict(engine.train(method, method.configure(state, engine.clients, rnd), rnd))
        replies: dict[ClientId, Reply] = {c: d.reply for c, d in deliveries.items() if d.reply is not None}
        assert len(replies) == len(over)
        yield replies, method.groups(state, replies, spaces)
        state = method.aggregate(state, replies, rnd)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedlease", {"allocation": "oracle", "download": "all"}),
        ("fedamole", {"assignment": "static"}),
    ],
)
def test_the_setting_named_ends_the_reading_by_client(name: str, settings: dict[str, Any]) -> None:
    before = each_of(special(name).releases())
    assert before
    named = {f'{name} = "{value}"' for name, value in settings.items()}
    assert all(any(one in release.instead for one in named) for release in before)
    assert all(any(one in release.instead for release in before) for one in named)
    assert each_of(special(name, **settings).releases()) == []
