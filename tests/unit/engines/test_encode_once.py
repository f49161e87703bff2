"""Instructions that many clients are sent are encoded once, and nobody shares a tensor by that."""

from __future__ import annotations

import pytest
import torch

from coterie import codec
from coterie.engines import encode_once
from coterie.engines.encode_once import EncodedOnce
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
    instructions = {f"c{i}": instruction for i, instruction in enumerate(all_of_them)}
    messages = EncodedOnce(instructions)
    for client in [*instructions, "c0"]:  # one of them twice
        assert messages.take(client) == codec.encode(instructions[client])


def test_the_same_is_encoded_once_and_given_up_after_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    one, calls = tensors(1.0), list[int]()
    encode = codec.encode
    monkeypatch.setattr(encode_once.codec, "encode", lambda value: calls.append(1) or encode(value))
    alike = [Instruction(dict(one), {"expert": 1}) for _ in range(5)]
    others = [Instruction(one, {"expert": number}) for number in range(2, 9)]
    all_of_them = [*alike[:3], *others, *alike[3:]]
    messages = EncodedOnce({f"c{i}": instruction for i, instruction in enumerate(all_of_them)})
    for i in range(3 + len(others)):
        messages.take(f"c{i}")
    assert (len(calls), len(messages._encoded)) == (1 + len(others), 1)
    for i in (-2, -1):
        messages.take(f"c{len(all_of_them) + i}")
    assert (len(calls), len(messages._encoded)) == (1 + len(others), 0)


def test_what_one_client_does_to_its_tensors_no_other_sees() -> None:
    instruction = Instruction(tensors(1.0))
    messages = EncodedOnce({"north": instruction, "south": instruction})
    first = codec.decode(Instruction, messages.take("north"))
    first.tensors[KEY].add_(1.0)
    second = codec.decode(Instruction, messages.take("south"))
    assert torch.equal(second.tensors[KEY], instruction.tensors[KEY])
