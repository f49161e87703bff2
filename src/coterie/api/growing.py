"""A text that grows token by token: what of it is final, and where a stop string ends it."""

from __future__ import annotations

from dataclasses import dataclass

_HALF = "\N{REPLACEMENT CHARACTER}"  # what tokenizers show for a character of which bytes are missing


@dataclass
class GrowingText:
    """Text that is sent in pieces. A piece is final: no later token changes it, and no stop string begins in it."""

    stop: tuple[str, ...] = ()
    sent: str = ""
    stopped: bool = False

    def grow(self, whole: str, last: bool = False) -> str:
        """The next piece, given the ``whole`` text so far. ``last``: no more will come."""
        at = min((start for stop in self.stop if (start := whole.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.stopped, whole, last = True, whole[:at], True
        if not last:
            whole = whole.rstrip(_HALF)
            whole = whole[: len(whole) - self._begun(whole)]
        piece = whole[len(self.sent) :]
        self.sent += piece
        return piece

    def _begun(self, whole: str) -> int:
        """How many characters at the end of ``whole`` may be the beginning of a stop string."""
        return max(
            (n for stop in self.stop for n in range(1, min(len(stop), len(whole) + 1)) if whole.endswith(stop[:n])),
            default=0,
        )
