"""What the service computes on request: jobs, what they send while they run, and the faults that end them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from coterie.data.rows import Turn
from coterie.types import CoterieError


class RequestError(CoterieError):
    """A request that gets no answer. Its text is for whoever sent the request, and quotes nothing of it.

    ``status`` is the HTTP status, ``code`` names the fault, ``param`` is the field of the request that is wrong, and
    ``retry_after`` is in seconds.
    """

    def __init__(
        self, text: str, status: int = 400, code: str = "", param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


class GoneError(Exception):
    """The client hung up before it had an answer."""


@dataclass(frozen=True)
class Encode:
    """Texts (or pairs of texts) to classify or to embed. ``experts``: also which experts each token used."""

    client: int
    texts: tuple[tuple[str, str | None], ...]
    want: Literal["labels", "embedding"] = "labels"
    experts: bool = False


@dataclass(frozen=True)
class Generate:
    """A text to write after ``prompt``: a text as it is, or a chat.

    ``max_tokens`` None: as many as the service and the model allow. ``temperature`` 0: the most likely token each
    time. ``stream``: :class:`Piece` after :class:`Piece` as the text grows.
    """

    client: int
    prompt: str | tuple[Turn, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    experts: bool = False


@dataclass(frozen=True)
class LayerExperts:
    """Which experts the tokens of a text used in a layer: a weight for every token and expert.

    The weights are means over the layer's matrices that have these experts.
    """

    layer: str
    experts: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class TokenExperts:
    """Which experts each token used, by layer. ``layers`` is empty where the method has no router."""

    tokens: tuple[str, ...]
    layers: tuple[LayerExperts, ...]


@dataclass(frozen=True)
class Encoded:
    """Of one text: a probability for each label or an embedding, its tokens, and whether it was cut."""

    values: tuple[float, ...]
    tokens: int
    cut: bool
    experts: TokenExperts | None = None


@dataclass(frozen=True)
class Piece:
    """More of a text that is being written."""

    text: str


@dataclass(frozen=True)
class Written:
    """The end of a text: the whole text, why it ended, and what it took. ``tokens`` are those that were made."""

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    tokens: int
    experts: TokenExperts | None = None


Event = Piece | Written | tuple[Encoded, ...] | RequestError


@dataclass(eq=False)
class Job:
    """A request on its way. ``deliver`` gets its events; the last one is no :class:`Piece`.

    ``deadline`` is a time of :func:`time.monotonic`, ``cancelled`` is set when nobody waits for the answer any more.
    """

    request: Encode | Generate
    deadline: float
    deliver: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: bool = False

    def end(self, event: Event) -> None:
        """Deliver the last event, once."""
        if not self.ended:
            self.ended = True
            self.deliver(event)

    def over(self, now: float) -> bool:
        """Whether there is nothing left to do for it; one that is too late gets its fault."""
        if not self.ended and now >= self.deadline:
            self.end(RequestError("the answer took longer than the service allows", 504, "timeout"))
        return self.ended or self.cancelled.is_set()
