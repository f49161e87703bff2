"""The codec: what goes in comes out bit for bit, and what is not whole is refused."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import coterie
from coterie.codec import CodecError, decode, encode
from coterie.types import NO_EXPERT, SHARED, ClientId, Instruction, Json, Key, Part, Personal, Reply, Tensors

A = Key("encoder.layer.0.query", 0, Part.A)
B = Key("encoder.layer.0.query", SHARED, Part.B)
HEAD = Key("classifier.weight", NO_EXPERT, Part.HEAD)


class Phase(StrEnum):
    WARMUP = "warmup"
    ROUNDS = "rounds"


@dataclass(frozen=True)
class Clusters:
    of: Mapping[ClientId, int]
    experts: Mapping[int, Tensors]
    keys: frozenset[Key] = frozenset()
    distance: Tensor | None = None


@dataclass(frozen=True)
class State:
    phase: Phase
    weighting: Literal["uniform", "examples"]
    clusters: Clusters | None
    sizes: tuple[int, ...] = ()
    span: tuple[int, str] = (0, "")
    scores: list[float] = field(default_factory=list)
    seen: frozenset[str] = frozenset()
    order: Sequence[Key] = ()
    notes: Json = None
    VERSION: ClassVar[int] = 1


@dataclass(frozen=True)
class One:
    value: Tensor


@dataclass(frozen=True)
class Scalars:
    text: str = ""
    count: int = 0
    rate: float = 0.0
    flag: bool = False


def same(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit, NaNs and signed zeros included."""
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def awkward(dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        tiny = torch.finfo(dtype).tiny
        values = [0.0, -0.0, 1 / 3, -1e4, tiny, tiny / 4, float("inf"), float("-inf"), float("nan")]
        return torch.tensor(values, dtype=torch.float64).to(dtype).reshape(3, 3)
    if dtype is torch.bool:
        return torch.tensor([[True, False], [False, True]])
    return torch.tensor([[torch.iinfo(dtype).min, 0], [7, torch.iinfo(dtype).max]], dtype=dtype)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    value = awkward(dtype)
    assert same(decode(One, encode(One(value))).value, value)


def shapes_and_strides() -> dict[str, Tensor]:
    whole = torch.arange(24.0).reshape(4, 6)
    return {
        "0-dim": torch.tensor(1.5),
        "empty": torch.empty(0),
        "empty with a shape": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "transposed": whole.T,
        "rows of a larger storage": whole[1:3],
        "every second column": whole[:, ::2],
        "one number spread out": torch.tensor(2.0).expand(3, 4),
        "a parameter": nn.Parameter(torch.ones(2, 2)),
        "part of a graph": nn.Parameter(torch.ones(2, 2)) * 2,
    }


@pytest.mark.parametrize(("name", "value"), shapes_and_strides().items(), ids=list(shapes_and_strides()))
def test_every_shape_and_stride_comes_back(name: str, value: Tensor) -> None:
    read = decode(One, encode(One(value))).value
    assert same(read, value)
    assert not read.requires_grad


def test_a_view_costs_its_own_bytes_and_not_its_storage() -> None:
    assert len(encode(One(torch.zeros(1000, 1000)[:2]))) < 10_000


def test_one_tensor_under_two_keys_is_written_twice() -> None:
    start = torch.rand(2, 3)
    whole = torch.rand(4, 3)
    value = Reply({A: start, A._replace(expert=1): start, B: whole[:2], B._replace(expert=4): whole[2:]})
    read = decode(Reply, encode(value))
    assert all(same(read.tensors[key], tensor) for key, tensor in value.tensors.items())
    read.tensors[A].zero_()
    assert same(read.tensors[A._replace(expert=1)], start)


@pytest.mark.parametrize("kind", [Instruction, Reply, Personal])
def test_what_travels_comes_back(kind: type[Any]) -> None:
    info = {"phase": "warmup", "own": 2, "loss": 0.1, "list": [1, None, True], "nested": {"a/b": {"c": "\u00e9\u2028"}}}
    value = kind(
        tensors={A: torch.rand(2, 3), B: torch.rand(3, 2, dtype=torch.float64), HEAD: torch.ones(2)}, info=info
    )
    read = decode(kind, encode(value))
    assert type(read) is kind
    assert read.info == info
    assert list(read.tensors) == list(value.tensors)
    assert all(same(read.tensors[key], tensor) for key, tensor in value.tensors.items())


def test_a_methods_own_state_comes_back() -> None:
    experts = {0: {A: torch.rand(2, 3)}, 11: {A: torch.rand(2, 3), HEAD: torch.rand(1)}, -2: {}}
    value = State(
        Phase.ROUNDS,
        "examples",
        Clusters({"a": 0, "b/c~d": 11}, experts, frozenset({A, HEAD}), torch.rand(2, 2)),
        sizes=(3, 1, 2),
        span=(7, "seven"),
        scores=[0.1, float("inf"), 1e-300],
        seen=frozenset({"b", "a"}),
        order=(B, A),
        notes={"k": [{"deep": None}]},
    )
    read = decode(State, encode(value))
    assert read.clusters is not None
    assert read.clusters.of == {"a": 0, "b/c~d": 11}
    assert list(read.clusters.experts) == [0, 11, -2]
    assert same(read.clusters.experts[11][HEAD], experts[11][HEAD])
    assert read.clusters.distance is not None
    assert isinstance(read.phase, Phase)
    assert (read.sizes, read.span, read.scores, read.seen) == (value.sizes, value.span, value.scores, value.seen)
    assert read.order == [B, A]
    assert isinstance(read.order[0], Key)
    assert read.clusters.keys == {A, HEAD}
    assert read.notes == value.notes


def test_none_comes_back_as_none() -> None:
    read = decode(State, encode(State(Phase.WARMUP, "uniform", None)))
    assert read.clusters is None


def test_names_that_look_like_paths_do_not_collide() -> None:
    value = {"a/b": {"c": torch.zeros(1)}, "a": {"b/c": torch.ones(1)}, "a~1b": {"c": torch.full((1,), 2.0)}}
    read = decode(Mapping[str, Mapping[str, Tensor]], encode(value))  # type: ignore[type-abstract]
    assert {key: [t.item() for t in inner.values()] for key, inner in read.items()} == {
        "a/b": [0],
        "a": [1],
        "a~1b": [2],
    }


def test_the_same_value_gives_the_same_bytes() -> None:
    def value() -> Reply:
        generator = torch.Generator().manual_seed(3)
        tensors = {Key(f"m{i}", i, Part.A): torch.rand(3, 4, generator=generator).to(FLOATS[i % 4]) for i in range(8)}
        return Reply(tensors, 5, {"loss": 0.1, "b": [1, 2]})

    blob = encode(value())
    assert blob == encode(value())
    assert blob == encode(decode(Reply, blob))


def test_a_sets_order_does_not_reach_the_bytes() -> None:
    one, other = frozenset([0, 8]), frozenset([8, 0])
    assert list(one) != list(other)  # they collide in the set's table, so the first one in comes first
    assert encode(one) == encode(other)


def test_a_blob_is_a_plain_safetensors_file() -> None:
    read = load(encode(Reply({A: torch.ones(2)})))
    assert list(read) == [f"/tensors/{A}"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        ({"data": b"bytes"}, "bytes"),
        ([1, {2: {3.5: "x"}}], "float as a mapping's key"),
        ({True: 1}, "bool as a mapping's key"),
        ({1: "x", "1": "y"}, "two keys of one mapping"),
        (Enum("Colour", "RED").RED, "Colour"),  # type: ignore[attr-defined]
        (int, "type"),
    ],
    ids=["object", "bytes", "float key", "bool key", "equal keys", "enum", "type"],
)
def test_a_type_that_is_not_known_is_named(value: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=kind):
        encode(value)


SAMPLE = Reply({A: torch.arange(6.0).reshape(2, 3), HEAD: torch.ones(2, dtype=torch.bfloat16)}, 12, {"loss": 0.25})


def test_every_truncation_is_refused() -> None:
    blob = encode(SAMPLE)
    for length in range(len(blob)):
        with pytest.raises(CodecError):
            decode(Reply, blob[:length])
    with pytest.raises(CodecError):
        decode(Reply, blob + b"\0")


def test_every_flipped_bit_is_refused() -> None:
    blob = encode(SAMPLE)
    undetected = []
    for place in range(len(blob)):
        damaged = bytearray(blob)
        damaged[place] ^= 1 << place % 8
        try:
            read = decode(Reply, bytes(damaged))
        except CodecError:
            continue
        undetected.append((place, read))
    assert undetected == []


def with_tree(text: str) -> bytes:
    """A whole blob around ``text``, checksum and all, as a foreign or malicious sender could write it."""
    from coterie.codec import _META, _checksum

    return save({}, metadata={_META: _checksum(text, {}) + text})


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[" * 100_000,
        "[]",
        "null",
        '"text"',
        '{"tensors":{},"num_examples":1}',
        '{"tensors":{},"num_examples":1,"info":{},"extra":1}',
        '{"tensors":[],"num_examples":1,"info":{}}',
        '{"tensors":{"m:0:A":{"$tensor":"nowhere"}},"num_examples":1,"info":{}}',
        '{"tensors":{"m:0:A":"text"},"num_examples":1,"info":{}}',
        '{"tensors":{"no key":{"$tensor":"x"}},"num_examples":1,"info":{}}',
        '{"tensors":{},"num_examples":"1","info":{}}',
        '{"tensors":{},"num_examples":true,"info":{}}',
        '{"tensors":{},"num_examples":1.5,"info":{}}',
        '{"tensors":{},"num_examples":1,"info":[]}',
    ],
    ids=lambda text: text[:60],
)
def test_a_tree_that_does_not_fit_is_refused(text: str) -> None:
    assert decode(Reply, with_tree('{"tensors":{},"num_examples":1,"info":{}}')) == Reply({}, 1, {})
    with pytest.raises(CodecError):
        decode(Reply, with_tree(text))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Phase, '"dinner"'),
        (Literal["a", "b"], '"c"'),
        (tuple[int, ...], '{"0":1}'),
        (tuple[str, ...], '"abc"'),
        (tuple[int, int], "[1,2,3]"),
        (list[int], '[1,"2"]'),
        (frozenset[str], '"abc"'),
        (Mapping[int, int], '{"x":1}'),
        (Mapping[int, int], '{"1":1,"01":2}'),
        (Mapping[bool, int], '{"True":1}'),
        (int | str, "1"),
        (int | str | None, "1"),
        (list, "[1]"),
        (Mapping, "{}"),
        (bytes, "[1]"),
        (str | None, "1"),
        (Scalars, '{"text":1,"count":0,"rate":0.0,"flag":false}'),
        (Scalars, '{"text":"","count":0,"rate":"0","flag":false}'),
        (Scalars, '{"text":"","count":0,"rate":0.0,"flag":0}'),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(CodecError):
        decode(kind, with_tree(text))


def test_an_int_may_stand_for_a_float_and_keeps_its_bytes() -> None:
    blob = encode(Scalars(rate=1))
    assert decode(Scalars, blob) == Scalars(rate=1)
    assert encode(decode(Scalars, blob)) == blob


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        save({"x": torch.ones(2)}),
        save({"x": torch.ones(2)}, metadata={"coterie": ""}),
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 24) + json.dumps({"__metadata__": [1]}).encode().ljust(24),
    ],
    ids=lambda blob: blob[:24].hex(),
)
def test_other_files_are_refused(blob: bytes) -> None:
    with pytest.raises(CodecError, match="cannot decode"):
        decode(Reply, blob)


def test_half_of_a_character_is_refused() -> None:
    with pytest.raises(CodecError, match=r"U\+D800"):
        decode(Reply, encode(Reply(info={"name": "big\ud800"})))
    assert decode(Reply, encode(Reply(info={"name": "big 👍"}))).info == {"name": "big 👍"}


def test_the_fault_names_the_type_and_the_reason() -> None:
    with pytest.raises(CodecError, match=r"as Reply: Reply has the fields .*, the bytes hold \['value'\]"):
        decode(Reply, encode(One(torch.ones(1))))


UNSAFE = re.compile(
    r"^\s*(import|from)\s+(_?c?pickle|cloudpickle|dill|shelve|joblib|marshal)\b|allow_pickle\s*=\s*True"
    r"|\btorch\.(load|save)\(|\bread_pickle\b",
    re.MULTILINE,
)


@pytest.mark.parametrize(
    "line", ["import pickle", "    from pickle import loads", "x = torch.load(path)", "np.load(p, allow_pickle=True)"]
)
def test_the_search_for_pickle_finds_it(line: str) -> None:
    assert UNSAFE.search(f"import os\n{line}\n")


def test_no_pickle_in_the_package() -> None:
    paths = sorted(Path(coterie.__file__).parent.rglob("*.py"))
    assert len(paths) >= 12
    assert [str(path) for path in paths if UNSAFE.search(path.read_text(encoding="utf-8"))] == []
