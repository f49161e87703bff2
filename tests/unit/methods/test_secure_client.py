"""No server can choose the weights of a secure sum so that only one site's update is left in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coterie.methods.robust import Group
from coterie.methods.secure import Members, SecureAggregationSettings, sessions_of
from coterie.methods.secure_client import Update, check_session, vector_of
from coterie.methods.secure_start import begun
from coterie.secure import fixed_point
from coterie.secure.session import SecureSumError, Session
from coterie.types import Instruction, Key, Part, Reply, Tensors

ON, ONE = SecureAggregationSettings(enabled=True), Key("q", 0, Part.A)
ROWS = {"a": 200, "b": 200, "c": 200, "d": 600}
START: Tensors = {ONE: torch.ones(400)}
SENT = begun(Instruction(START), START, True)


def honest() -> Session:
    replies = {c: Reply(START, n) for c, n in ROWS.items()}
    members = Members(1, replies, dict.fromkeys(ROWS, START), dict.fromkeys(ROWS, SENT), ROWS)
    (made,) = sessions_of(ON, [Group(tuple(ROWS), frozenset({ONE}))], members, False, "run").values()
    return made


def update(size: float, rows: int = 200) -> Update:
    return Update({ONE: size * torch.randn(400, generator=torch.Generator().manual_seed(1)).double()}, rows, False)


def check(session: Session) -> None:
    check_session(ON, session, "run", 1, False, SENT)


def test_weights_are_divided_by_no_more_than_the_members_can_have() -> None:
    check(honest())
    check(replace(honest(), total=4 * 600.0))
    with pytest.raises(SecureSumError, match="divided by 2401, and its 4 sites have at most 600 examples each"):
        check(replace(honest(), total=4 * 600.0 + 1))


def test_an_update_that_would_be_rounded_away_is_not_sent() -> None:
    """The session says that a site may have very many examples, so that each of a few hundred hardly counts."""
    step = ON.clip / 2 ** (ON.bits - 1)
    huge = replace(honest(), most_examples=10**10, total=4e10)
    check(huge)
    for size, session in ((0.01, huge), (1e-4, replace(honest(), most_examples=10**8, total=4e8))):
        with pytest.raises(SecureSumError, match=r"this client's update is .* steps of the grid at most, and 4 are"):
            vector_of(update(size), "a", session)
    for size in (0.01, 1e-6, 0.0):  # what training changes, however little, and a client that changed nothing
        sent = fixed_point.decode(vector_of(update(size), "a", honest()), ON.clip, ON.bits)[:-2]
        share = 200 / 1200
        assert (abs(sent - share * update(size).tensors[ONE].numpy()) <= step).all()
        assert bool(sent.any()) == bool(size)
