"""Instructions as bytes: many clients are sent the same, which is encoded once."""

from __future__ import annotations

import threading
from collections import OrderedDict

from coterie import codec
from coterie.types import Instruction

_KEPT = 32  # of the latest instructions: as many as a run has experts, and not as many as it has clients


class Blobs:
    """What the codec makes of the instructions of one round. May be called from several threads.

    Two are the same if they hold the same tensor objects under the same keys, and equal ``info``: so the tensors must
    not change meanwhile.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[str, tuple[Instruction, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, instruction: Instruction) -> bytes:
        """The bytes of ``codec.encode(instruction)``."""
        name = f"{[(key, id(tensor)) for key, tensor in instruction.tensors.items()]} {instruction.info}"
        with self._lock:
            found = self._made.get(name)
            if found is None:
                # The instruction is kept with its bytes: while it is, no other tensor has the id of one of its own.
                found = self._made[name] = instruction, codec.encode(instruction)
            self._made.move_to_end(name)
            if len(self._made) > _KEPT:
                self._made.popitem(last=False)
            return found[1]
