"""Local with ranks by client: nothing is averaged, so each client has its own from the first round on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.engines.bank_checks import bank_fault
from coterie.methods.local import Local
from coterie.methods.parts import head_of
from coterie.methods.plan import MethodSettings, Plan
from coterie.methods.ranks import rank_of
from coterie.types import ClientInfo, CoterieError, Part
from halves import BASE, CLIENTS, Play, driven

NAMED = {"client-0": 1, "client-1": 4, "client-3": 5}  # and client-2 has the plan's 3


def make(ranks: Any, rank: int = 3) -> Local:
    return Local(MethodSettings(), Plan(rank=rank, ranks=ranks, alpha=4))


@pytest.mark.parametrize("ranks", [NAMED, (1, 4, 3, 5)], ids=["by name", "by a list"])
def test_each_client_trains_its_own_rank_from_the_first_rows_of_one_a(ranks: Any) -> None:
    play = Play(make(ranks))
    expected = dict(zip(play.clients, (1, 4, 3, 5), strict=True))
    starts = play.banks()
    for _ in range(2):
        replies = play.round()
        assert not any(reply.tensors for reply in replies.values())
        for client, rank in expected.items():
            (request,) = play.asked[client]
            bank = play.banks()[client]
            assert request.trainable == bank.tensors.keys()
            assert (rank_of(bank.tensors), bank.scaling) == (rank, 4 / rank)
            assert all(torch.equal(value, bank.tensors[key]) for key, value in play.personal[client].tensors.items())
    widest = starts["client-3"].tensors
    for client, bank in starts.items():
        for key, value in bank.tensors.items():
            assert key.part is not Part.A or torch.equal(value, widest[key][: expected[client]])
            assert key.part is not Part.B or not value.any()


def test_without_ranks_the_server_sends_nothing() -> None:
    method = make(())
    sent = method.configure(method.init(BASE, CLIENTS), CLIENTS, 1)
    assert all(not ins.tensors and not ins.info for ins in sent.values())


def test_who_comes_later_has_the_plans_rank_or_the_largest() -> None:
    late = ClientInfo("late", 5, labels=("yes", "no"))
    for ranks, rank in ((NAMED, 3), ((1, 2), 2)):
        method = make(ranks)
        state = method.init(BASE, CLIENTS)
        ins = method.configure(method.admit(state, [late]), [late], 2)["late"]
        assert rank_of(method.bank(ins, late, method.begin(BASE, late)).tensors) == rank
        found, _ = driven(method.onboard(method.welcome(state, late), BASE, late), late)
        assert bank_fault(found.bank, BASE, late.labels) is None
        assert rank_of(found.bank.tensors) == rank
        assert found.trainable == found.bank.tensors.keys()
        assert head_of(found.bank.tensors)


def test_the_rank_of_nobody_is_refused() -> None:
    with pytest.raises(CoterieError, match="there is no client 'client-9'"):
        make({"client-9": 2}).init(BASE, CLIENTS)
