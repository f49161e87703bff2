"""Instructions that many clients are sent are encoded once, and nobody shares a tensor by that."""

from __future__ import annotations

import pytest
import torch

from coterie import codec
from coterie.engines import blobs
from coterie.engines.blobs import Blobs
from coterie.types import Instruction, Key, Part, Tensors

KEY = Key("layer", 0, Part.A)


def tensors(value: float) -> Tensors:
    return {KEY: torch.full((2, 3), value)}


def test_every_instruction_is_its_own_bytes() -> None:
    one, made = tensors(1.0), Blobs()
    other = {KEY: one[KEY].clone()}
    all_of_them = [
        Instruction(one, {"expert": 1}),
        Instruction(one, {"expert": True}),
        Instruction(one, {"expert": 1.0}),
        Instruction(one, {}),
        Instruction(other, {"expert": 1}),
        Instruction({Key("layer", 1, Part.A): one[KEY]}, {"expert": 1}),
        Instruction(tensors(2.0), {"expert": 1}),
    ]
    for _ in range(2):
        for instruction in all_of_them:
            assert made.of(instruction) == codec.encode(instruction)


def test_the_same_is_encoded_once_among_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    one, made, calls = tensors(1.0), Blobs(), list[int]()
    encode = codec.encode
    monkeypatch.setattr(blobs.codec, "encode", lambda value: calls.append(1) or encode(value))
    for _ in range(5):
        made.of(Instruction(dict(one), {"expert": 1}))
    assert len(calls) == 1
    for number in range(blobs._KEPT):
        made.of(Instruction(one, {"expert": number + 2}))
    made.of(Instruction(one, {"expert": 1}))
    assert len(calls) == 1 + blobs._KEPT + 1
    assert len(made._made) == blobs._KEPT


def test_what_one_client_does_to_its_tensors_no_other_sees() -> None:
    made, instruction = Blobs(), Instruction(tensors(1.0))
    first = codec.decode(Instruction, made.of(instruction))
    first.tensors[KEY].add_(1.0)
    second = codec.decode(Instruction, made.of(instruction))
    assert torch.equal(second.tensors[KEY], instruction.tensors[KEY])
