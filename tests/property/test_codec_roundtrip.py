"""Whatever a key or a value is, it comes back."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.codec import CodecError, decode, encode
from coterie.types import NO_EXPERT, SHARED, Key, Part, Reply

quick = settings(deadline=None, max_examples=100)

names = st.text(min_size=0, max_size=20) | st.from_regex(r"[a-z:.~/0-9]{1,20}", fullmatch=True)
keys = st.builds(Key, names, st.sampled_from([NO_EXPERT, SHARED]) | st.integers(0, 10**6), st.sampled_from(Part))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    values = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    result = (values / 7).to(draw(dtypes))
    return result.mT if result.ndim > 1 and draw(st.booleans()) else result


@quick
@given(keys)
def test_a_key_and_its_text_are_inverse(key: Key) -> None:
    assert Key.parse(str(key)) == key


@quick
@given(st.text(max_size=12) | st.from_regex(r"[a-z:]{0,3}:[-+ _0-9shared]{1,6}:(A|B|head)", fullmatch=True))
def test_a_text_is_the_text_of_at_most_one_key(text: str) -> None:
    try:
        key = Key.parse(text)
    except ValueError:
        return
    assert str(key) == text


@quick
@given(
    st.dictionaries(keys, tensors(), max_size=5),
    st.integers(0, 2**40),
    st.dictionaries(st.text(max_size=8), json_values, max_size=4),
)
def test_a_reply_comes_back(tensors: dict[Key, torch.Tensor], count: int, info: dict[str, Any]) -> None:
    blob = encode(Reply(tensors, count, info))
    read = decode(Reply, blob)
    assert (read.num_examples, read.info) == (count, info)
    assert list(read.tensors) == list(tensors)
    for key, tensor in tensors.items():
        assert read.tensors[key].dtype == tensor.dtype
        assert read.tensors[key].shape == tensor.shape
        assert torch.equal(read.tensors[key], tensor)
    assert encode(read) == blob


@quick
@given(st.binary(max_size=80), st.integers(0, 400))
def test_damage_never_passes_for_a_value(junk: bytes, place: int) -> None:
    blob = encode(Reply({Key("m", 0, Part.A): torch.ones(2, 3)}, 1, {"a": [1]}))
    damaged = blob[:place] + junk + blob[place + len(junk) :]
    try:
        read = decode(Reply, damaged)
    except CodecError:
        return
    # Only blanks and the header's own freedom of writing JSON may differ.
    assert encode(read) == blob
