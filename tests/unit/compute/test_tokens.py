"""Tokenised rows: packed they take little memory and come back as they were; beyond a limit the oldest are given up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coterie.compute.tokens import Packed, TokenCache
from coterie.data.examples import Example
from coterie.data.rows import ClientData
from workplaces import client_of, make_workplace

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=9).map(tuple)
ROWS = st.booleans().flatmap(
    lambda typed: st.lists(
        st.builds(
            Example,
            ids=IDS,
            types=IDS if typed else st.none(),
            label=st.integers(0, 200),
            prompt=st.integers(0, 9),
            choices=st.lists(IDS, max_size=3).map(tuple),
        )
    )
)


@given(ROWS)
def test_examples_come_back_as_they_were(rows: list[Example]) -> None:
    assert Packed.of(rows).examples() == rows


def test_a_token_takes_four_bytes() -> None:
    rows = [Example(tuple(range(1000)), (0,) * 1000, 1) for _ in range(10)]
    assert 8 * 10_000 <= Packed.of(rows).nbytes < 8.2 * 10_000


def test_the_least_recently_used_are_given_up() -> None:
    row = Example(tuple(range(100)))
    cache = TokenCache(limit=3 * Packed.of([row]).nbytes)
    for name in "abc":
        cache[name, "train"] = [row]
    assert cache["a", "train"] == [row]
    cache["d", "train"] = [row]
    assert {name for name, _ in cache} == {"a", "c", "d"}
    cache["d", "train"] = [row, row]
    assert {name for name, _ in cache} == {"a", "d"}
    assert cache.nbytes <= cache.limit
    cache["e", "train"] = [row] * 9
    assert list(cache) == [("e", "train")], "a split that is larger than the limit is kept until the next one comes"
    del cache["e", "train"]
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_split_that_was_given_up_is_tokenised_again_and_its_lengths_are_known() -> None:
    workplace = make_workplace()
    clients = [client_of(workplace, name) for name in ("north", "south")]
    workplace.cache.limit = 1
    first = workplace.examples(clients[0], "train")
    lengths = workplace.lengths(clients[0], "train")
    workplace.examples(clients[1], "train")
    assert list(workplace.cache) == [("south", "train")]
    assert workplace.lengths(clients[0], "train") is lengths == [len(example.ids) for example in first]
    assert list(workplace.cache) == [("south", "train")]
    workplace.prepare(clients[0], "train")
    assert list(workplace.cache) == [("north", "train")]
    assert workplace.examples(clients[0], "train") == first
    assert workplace.lengths(ClientData(clients[0].info, {}), "test") == []
