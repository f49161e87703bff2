"""A message as the content of one of Flower's."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, RecordDict

from coterie.flower.message import BrokenMessageError, Message, pack, unpack


def test_a_message_survives_flower_and_nothing_else_is_one() -> None:
    message = Message({"a": [1, None, "é"]}, bytes(range(256)))
    assert unpack(pack(message)) == message
    assert unpack(pack(Message())) == Message()
    for head in ("[1]", "{", "1", ""):
        content = pack(Message({}, b"x"))
        content["head"] = ConfigRecord({"json": head})
        with pytest.raises(BrokenMessageError):
            unpack(content)
    with pytest.raises(BrokenMessageError):
        unpack(RecordDict())
