"""What one client may weigh: its update beside the others', its share of the examples."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie import codec
from coterie.engines.bounds import (
    capped_examples,
    large_updates,
    reply_limit,
    update_sizes,
    usual_rate,
    usual_share,
)
from coterie.requests import Optim
from coterie.types import Key, Part, Reply

A, B, HEAD = Key("layer.0.query", 0, Part.A), Key("layer.0.query", 0, Part.B), Key("head.weight", -1, Part.HEAD)
ONE_STEP = dict.fromkeys("abcdefgh", 1)


def reply(number: int) -> Reply:
    return Reply({}, number)


def test_an_update_is_what_came_minus_what_it_started_from() -> None:
    start = {A: torch.full((2, 3), 5.0), HEAD: torch.ones(4)}
    came = Reply({A: torch.full((2, 3), 7.0), B: torch.full((3, 2), 3.0), HEAD: torch.ones(5)}, 1)
    assert update_sizes(came, start) == {Part.A: 2.0, Part.B: 3.0, Part.HEAD: 1.0}  # a head of another shape as it is
    assert update_sizes(Reply(), start) == {}
    assert update_sizes(Reply({A: torch.zeros(0, 3)}, 1), start) == {}


def test_the_size_of_an_update_does_not_grow_with_its_tensors() -> None:
    experts = {Key("layer.0.query", e, Part.A): torch.full((2, 3), 2.0) for e in range(9)}
    assert update_sizes(Reply(experts, 1), {}) == {Part.A: 2.0}


@pytest.mark.parametrize("part", [Part.A, Part.B, Part.ROUTER])
def test_an_update_that_is_out_of_line_in_any_part_is_named(part: Part) -> None:
    sizes = {client: {Part.A: 1.0, Part.B: 0.1, Part.ROUTER: 3.0} for client in "abcd"}
    assert large_updates(sizes, ONE_STEP, 10) == {}
    sizes["c"] = {**sizes["c"], part: 50 * sizes["c"][part]}
    (fault,) = large_updates(sizes, ONE_STEP, 10).items()
    assert fault == (
        "c",
        f"the update of {part.value} is 50 times the round's median, more than 10 ([run] update_bound)",
    )
    assert large_updates(sizes, ONE_STEP, 50) == {}


def test_a_part_that_nobody_sends_hides_no_other() -> None:
    sizes = {client: {Part.B: 1.0} for client in "abc"} | {"d": {Part.B: 50.0}}
    assert [*large_updates(sizes, ONE_STEP, 10)] == ["d"]


def test_of_two_replies_neither_is_out_of_line() -> None:
    assert large_updates({"a": {Part.A: 1.0}, "b": {Part.A: 1e9}}, ONE_STEP, 10) == {}
    others = {"c": {Part.B: 1.0}, "d": {Part.B: 1.0}, "e": {Part.B: 1.0}}  # have no A
    assert large_updates({"a": {Part.A: 1.0}, "b": {Part.A: 1e9}, **others}, ONE_STEP, 10) == {}


def test_where_most_do_not_move_nobody_is_out_of_line() -> None:
    sizes = {"a": {Part.A: 0.0}, "b": {Part.A: 0.0}, "c": {Part.A: 1.0}}
    assert large_updates(sizes, ONE_STEP, 10) == {}


@pytest.mark.parametrize(("size", "left_out"), [(0.15, False), (0.25, True)])
def test_where_most_have_learned_all_that_they_can_the_others_may_go_on(size: float, left_out: bool) -> None:
    """25 steps at a rate of .02 move a number by .2 at most; ten times the median is .001."""
    sizes = {client: {Part.B: 1e-4} for client in "abcd"} | {"e": {Part.B: size}}
    assert bool(large_updates(sizes, dict.fromkeys("abcde", 25), 10, 0.02)) == left_out
    assert [*large_updates(sizes, dict.fromkeys("abcde", 25), 10)] == ["e"]


def test_an_embedding_is_not_trained_and_has_no_rate() -> None:
    sizes = {client: {Part.EMBEDDING: 1e-4} for client in "abcd"} | {"e": {Part.EMBEDDING: 0.01}}
    assert [*large_updates(sizes, dict.fromkeys("abcde", 25), 10, 0.02)] == ["e"]


def test_the_rate_of_a_round_is_adamws() -> None:
    assert usual_rate(Optim(learning_rate=0.04, round_decay=0.5), 3) == 0.01
    assert usual_rate(Optim(learning_rate=0.04, optimizer="sgd"), 3) == 0.0


@pytest.mark.parametrize("usual", [1, 6])
@pytest.mark.parametrize(("times", "allowed"), [(0.5, 10), (1, 10), (1.5, 15), (3, 30), (4, 40), (5, 40), (10**12, 40)])
def test_who_trains_longer_may_move_further_but_not_for_ever(times: float, allowed: float, usual: int) -> None:
    steps = {"a": 2 * usual, "b": 2 * usual, "c": int(2 * usual * times)}
    for size, left_out in ((0.99 * allowed, False), (1.01 * allowed, True)):
        found = large_updates({"a": {Part.A: 1.0}, "b": {Part.A: 1.0}, "c": {Part.A: size}}, steps, 10)
        assert bool(found) == left_out
    assert (f"its steps allow {allowed / 10:g} times that" in found["c"]) == (allowed > 10)


@given(st.lists(st.integers(1, 2**53 - 1), min_size=3, max_size=9), st.floats(0.01, 1.0))
def test_no_client_has_more_than_its_share(numbers: list[int], share: float) -> None:
    capped = list(capped_examples({str(i): reply(n) for i, n in enumerate(numbers)}, share).values())
    assert all(1 <= new <= old for new, old in zip(capped, numbers, strict=True))
    largest = max(share, 1 / len(numbers))
    assert max(capped) <= largest * sum(capped) * (1 + 1e-9) or max(capped) == 1
    if max(numbers) <= share * sum(numbers) * (1 - 1e-9):
        assert capped == numbers  # a cap that does not bind changes nothing
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    assert [capped[i] for i in order] == sorted(capped)


def test_a_client_that_claims_everything_counts_for_half() -> None:
    claims = {"a": reply(100), "b": reply(60), "c": reply(2**53 - 1)}
    assert capped_examples(claims, 0.5) == {"a": 100, "b": 60, "c": 160}
    assert capped_examples({"a": reply(1), "c": reply(99)}, 0.5) == {"a": 1, "c": 99}  # of two, either may be right


def test_the_share_holds_in_every_group() -> None:
    claims = {"a": reply(100), "b": reply(60), "c": reply(2**53 - 1), "d": reply(100), "e": reply(100)}
    assert capped_examples(claims, 0.5) == {"a": 100, "b": 60, "c": 360, "d": 100, "e": 100}
    apart = [("a", "b"), ("c", "d", "e")]
    assert capped_examples(claims, 0.5, apart) == {"a": 60, "b": 60, "c": 200, "d": 100, "e": 100}
    assert capped_examples(claims, 0.5, [*apart, ("c", "a")]) == {"a": 60, "b": 60, "c": 60, "d": 100, "e": 100}
    assert capped_examples(claims, 0.5, [("c",)])["c"] == 360  # of one client there is no share
    assert capped_examples({"a": reply(1), "c": reply(99)}, 0.5, [("a", "c")]) == {"a": 1, "c": 99}


def test_the_share_holds_in_a_long_chain_of_pairs() -> None:
    """What limits the first reaches the last, one pair after the other."""
    clients = [f"c{i:02}" for i in range(30)]
    claims = {client: reply(1 if client == "c00" else 1000) for client in clients}
    chain = list(pairwise(clients))
    for pairs in (chain, chain[::-1]):
        assert capped_examples(claims, None, pairs) == dict.fromkeys(clients, 1)


def test_a_reply_of_very_many_keys_is_beyond_its_limit() -> None:
    """They are counted before they are decoded: 200,000 keys take a gigabyte, and a quarter of them is beyond it."""
    expected = {Key(f"layer.{i}.query", 0, part): (8, 384) for i in range(12) for part in (Part.A, Part.B)}
    many = {Key("m", i, Part.A): torch.zeros(1, 1) for i in range(50_000)}
    assert len(codec.encode(Reply(many, 1))) > reply_limit(expected)


def test_a_reply_fits_its_limit() -> None:
    tensors = {
        Key("a.long.name." * 20 + str(i), i, part): torch.zeros(7, 5) for i in range(50) for part in (Part.A, Part.B)
    }
    info = {"importance": {f"module {i}": 0.123456789 for i in range(5000)}}
    size = len(codec.encode(Reply(tensors, 2**53 - 1, info)))
    assert size <= reply_limit(dict.fromkeys(tensors, (7, 5)))
    assert size >= reply_limit(dict.fromkeys(tensors, (7, 5))) - 2**21 - 600 * len(tensors)


@pytest.mark.parametrize("shape", [(1, 1), (100, 300)])
def test_each_tensor_fits_its_own_part_of_the_limit(shape: tuple[int, int]) -> None:
    """So that many tensors, or large ones, need nothing of what is left for the info."""
    expected = {Key(f"a.module.{i}", i, Part.A): shape for i in range(50)}
    size, empty = (len(codec.encode(Reply({key: torch.zeros(shape) for key in of}, 1))) for of in (expected, {}))
    assert 0 <= reply_limit(expected) - reply_limit({}) - (size - empty) <= 600 * len(expected)


@pytest.mark.parametrize(("clients", "share"), [(2, 0.5), (3, 0.5), (4, 0.5), (5, 0.4), (6, 1 / 3), (100, 1 / 3)])
def test_by_default_nobody_outweighs_the_others_and_less_among_many(clients: int, share: float) -> None:
    assert usual_share(clients) == pytest.approx(share)
    counts = capped_examples({"liar": reply(10**9)} | {str(i): reply(10) for i in range(clients - 1)}, None)
    if clients > 2:
        assert counts["liar"] / sum(counts.values()) == pytest.approx(share, abs=0.02)


def test_a_pair_with_a_small_share_counts_in_full() -> None:
    replies = {client: reply(36) for client in "abcdef"}
    assert capped_examples(replies, 0.35, [("a", "b")]) == dict.fromkeys("abcdef", 36)
