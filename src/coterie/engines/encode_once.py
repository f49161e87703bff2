"""Instructions as bytes: many clients are sent the same, which is encoded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from coterie import codec
from coterie.types import Instruction


class Blobs:
    """What the codec makes of ``instructions``, each of which is asked for once; kept until the last of its likes is.

    Two are alike if they hold the same tensor objects under the same keys, and equal ``info``: so the tensors must not
    change meanwhile.
    """

    def __init__(self, instructions: Iterable[Instruction]) -> None:
        self._all = list(instructions)  # while these are here, no other tensor has the id of one of theirs
        self._left = Counter(map(_name, self._all))
        self._made: dict[str, bytes] = {}

    def of(self, instruction: Instruction) -> bytes:
        """The bytes of ``codec.encode(instruction)``."""
        name = _name(instruction)
        blob = self._made.pop(name, None) or codec.encode(instruction)
        self._left[name] -= 1
        if self._left[name] > 0:
            self._made[name] = blob
        return blob


def _name(instruction: Instruction) -> str:
    return f"{[(key, id(tensor)) for key, tensor in instruction.tensors.items()]} {instruction.info}"
