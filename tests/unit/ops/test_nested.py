"""Clusters by texts and then by LoRAs: what each may decide."""

from __future__ import annotations

import pytest
import torch

from coterie.methods.fedlease.grounds import grounds_of
from coterie.ops.centred import centred_distances, gram
from coterie.ops.cluster import Way, cluster
from coterie.ops.nested import nested
from coterie.ops.streams import stream

SIZE = 400


def vectors(name: str, groups: str, apart: float) -> list[list[torch.Tensor]]:
    """A vector for each letter: the same letter, the same direction, ``apart`` times as large as the noise."""
    draw = {letter: torch.randn(SIZE, generator=stream(0, name, letter)) for letter in sorted(set(groups))}
    return [
        [apart * draw[letter] + torch.randn(SIZE, generator=stream(1, name, str(i)))] for i, letter in enumerate(groups)
    ]


def found(texts: str, loras: str, most: int = 8, exactly: int = 0, *, text: float = 3.0, lora: float = 1.0) -> str:
    d = centred_distances(gram(vectors("texts", texts, text)))
    made = nested(d, gram(vectors("loras", loras, lora)), most, exactly=exactly)
    number = len(set(made.labels))
    assert cluster(made.distances, number, min_clusters=number, threshold=-2).labels == made.labels
    return "".join("abcdefgh"[label] for label in made.labels)


@pytest.mark.parametrize(
    ("texts", "loras", "expected"),
    [
        ("aaaabbbb", "aaaaaaaa", "aaaabbbb"),
        ("aaaaaaaa", "aaaabbbb", "aaaabbbb"),
        ("aaaabbbb", "aabbccdd", "aabbccdd"),
        ("aaaaaaaa", "aaaaaaaa", "aaaaaaaa"),
        ("aaabbbb", "abcdddd", "aaabbbb"),  # three are too few to be split
    ],
)
def test_texts_first_and_loras_within(texts: str, loras: str, expected: str) -> None:
    assert found(texts, loras) == expected


def test_loras_that_have_learned_nothing_split_nothing() -> None:
    assert found("aaaabbbb", "aabbccdd", lora=0.0) == "aaaabbbb"


def test_the_clearest_split_comes_first_where_there_is_no_room_for_all() -> None:
    texts = centred_distances(gram(vectors("texts", "aaaabbbb", 3.0)))
    weak, strong = vectors("loras", "aabbcccc", 0.6)[:4], vectors("loras", "aaaaccdd", 3.0)[4:]
    made = nested(texts, gram([*weak, *strong]), 3)
    assert made.labels == (0, 0, 0, 0, 1, 1, 2, 2)
    assert {text: split.silhouette > split.enough for text, split in made.by_loras.items()} == {0: True, 1: True}


@pytest.mark.parametrize(
    ("texts", "loras", "most", "expected"),
    [
        ("aaaaaaaabbbb", "aabbccddeeee", 5, "aabbccddeeee"),
        ("aaaaaaaabbbb", "aabbccddeeee", 4, "three"),
        ("aaaaaaaabbbb", "aabbccddeeee", 2, "aaaaaaaabbbb"),
        ("aaaabbbb", "aabbcccc", 2, "aaaabbbb"),
    ],
)
def test_a_split_has_as_many_parts_as_there_is_room_for(texts: str, loras: str, most: int, expected: str) -> None:
    d = centred_distances(gram(vectors("texts", texts, 3.0)))
    made = nested(d, gram(vectors("loras", loras, 3.0)), most)
    labels = "".join("abcdefgh"[label] for label in made.labels)
    if expected == "three":  # of four jobs, two share a part; which, the silhouette says
        assert len(set(labels[:8])) == 3
        assert all(labels[i] == labels[i + 1] for i in range(0, 8, 2))
        assert len(set(labels[8:])) == 1
    else:
        assert labels == expected
    split = made.by_loras[0]
    assert split.no_room == (most < len(set(loras)))
    stopped = (
        f"with {split.parts}, where {split.enough:.3f} is enough, but [method] max_experts = {most} leaves no room"
    )
    assert (stopped in grounds_of(made)) == split.no_room


@pytest.mark.parametrize(
    ("loras", "least", "expected"),
    [
        ("aabbcccc", 2, "aabbcccc"),
        ("aabbcccc", 3, "aaaabbbb"),
        ("aaaaaabb", 3, "aaaaaaaa"),
        ("aaaabbbb", 4, "aaaabbbb"),
    ],
)
def test_no_part_is_smaller_than_the_least(loras: str, least: int, expected: str) -> None:
    texts = "aaaabbbb" if loras == "aabbcccc" else "a" * 8
    d = centred_distances(gram(vectors("texts", texts, 3.0)))
    made = nested(d, gram(vectors("loras", loras, 1.0)), 8, least=least)
    assert "".join("abcdefgh"[label] for label in made.labels) == expected
    assert any(split.small for split in made.by_loras.values()) == (least == 3)


@pytest.mark.parametrize(("exactly", "expected"), [(1, "aaaaaaaa"), (2, "aaaabbbb"), (3, "aaaabbcc"), (4, "aabbccdd")])
def test_exactly_so_many(exactly: int, expected: str) -> None:
    assert found("aaaabbbb", "aabbccdd", exactly=exactly) == expected


@pytest.mark.parametrize("linkage", ["kmeans", "spectral"])
@pytest.mark.parametrize(
    ("exactly", "expected"), [(1, "aaaaaaaa"), (2, "aaaabbbb"), (3, "aaaabbcc"), (4, "aabbccdd"), (8, "abcdefgh")]
)
def test_exactly_so_many_without_a_tree_for_what_is_split(linkage: Way, exactly: int, expected: str) -> None:
    texts = centred_distances(gram(vectors("texts", "aaaabbbb", 3.0)))
    made = nested(texts, gram(vectors("loras", "aabbccdd", 1.0)), 8, exactly=exactly, linkage=linkage)
    assert "".join("abcdefgh"[label] for label in made.labels) == expected
