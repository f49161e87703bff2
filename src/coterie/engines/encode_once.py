"""Instructions as bytes: the same instruction for many clients is encoded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from coterie import codec
from coterie.types import ClientId, Instruction


class EncodedOnce:
    """The encoded ``instructions``, each to be taken once. Equal ones are encoded once, and kept until the last is
    taken.

    Two are equal if they hold the same tensor objects under the same keys, and equal ``info``: the tensors must not
    change meanwhile.
    """

    def __init__(self, instructions: Mapping[ClientId, Instruction]) -> None:
        self._all = dict(instructions)  # kept, so that no other tensor gets the id of one of theirs
        self._left = Counter(map(_name, self._all.values()))
        self._encoded: dict[str, bytes] = {}

    def take(self, client: ClientId) -> bytes:
        """The bytes of ``codec.encode`` for the client's instruction."""
        instruction = self._all[client]
        name = _name(instruction)
        blob = self._encoded.pop(name, None) or codec.encode(instruction)
        self._left[name] -= 1
        if self._left[name] > 0:
            self._encoded[name] = blob
        return blob


def _name(instruction: Instruction) -> str:
    return f"{[(key, id(tensor)) for key, tensor in instruction.tensors.items()]} {instruction.info}"
