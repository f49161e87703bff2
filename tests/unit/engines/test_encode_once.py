"""Instructions that many clients are sent are encoded once, and nobody shares a tensor by that."""

from __future__ import annotations

import pytest
import torch

from coterie import codec
from coterie.engines import encode_once as blobs
from coterie.engines.encode_once import Blobs
from coterie.types import Instruction, Key, Part, Tensors

KEY = Key("layer", 0, Part.A)


def tensors(value: float) -> Tensors:
    return {KEY: torch.full((2, 3), value)}


def test_every_instruction_is_its_own_bytes() -> None:
    one = tensors(1.0)
    other = {KEY: one[KEY].clone()}
    all_of_them = [
        Instruction(one, {"expert": 1}),
        Instruction(one, {"expert": True}),
        Instruction(one, {"expert": 1.0}),
        Instruction(one, {}),
        Instruction(other, {"expert": 1}),
        Instruction({Key("layer", 1, Part.A): one[KEY]}, {"expert": 1}),
        Instruction(tensors(2.0), {"expert": 1}),
    ] * 2
    made = Blobs(all_of_them)
    for instruction in [*all_of_them, all_of_them[0]]:  # once more than was told
        assert made.of(instruction) == codec.encode(instruction)


def test_the_same_is_encoded_once_and_given_up_after_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    one, calls = tensors(1.0), list[int]()
    encode = codec.encode
    monkeypatch.setattr(blobs.codec, "encode", lambda value: calls.append(1) or encode(value))
    alike = [Instruction(dict(one), {"expert": 1}) for _ in range(5)]
    others = [Instruction(one, {"expert": number}) for number in range(2, 9)]
    made = Blobs([*alike[:3], *others, *alike[3:]])
    for instruction in [*alike[:3], *others]:
        made.of(instruction)
    assert (len(calls), len(made._made)) == (1 + len(others), 1)
    for instruction in alike[3:]:
        made.of(instruction)
    assert (len(calls), len(made._made)) == (1 + len(others), 0)


def test_what_one_client_does_to_its_tensors_no_other_sees() -> None:
    instruction = Instruction(tensors(1.0))
    made = Blobs([instruction, instruction])
    first = codec.decode(Instruction, made.of(instruction))
    first.tensors[KEY].add_(1.0)
    second = codec.decode(Instruction, made.of(instruction))
    assert torch.equal(second.tensors[KEY], instruction.tensors[KEY])
