"""What a request may say: OpenAI's fields that this service honours. Any other is refused rather than ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from coterie.types import Section

_STOPS, _STOP_LENGTH = 4, 256  # characters


def _zero(value: float | None) -> float | None:
    if value:
        raise ValueError("this service has no such penalty; leave it out")
    return value


def _one(value: int | None) -> int | None:
    if value not in (None, 1):
        raise ValueError("this service writes one text per request; leave it out")
    return value


def _no(value: bool | int | None) -> bool | int | None:
    if value:
        raise ValueError("this service does not offer it; leave it out")
    return value


Penalty = Annotated[float | None, AfterValidator(_zero)]
One = Annotated[int | None, AfterValidator(_one)]
Off = Annotated[bool | int | None, AfterValidator(_no)]
Stop = Annotated[str, Field(min_length=1, max_length=_STOP_LENGTH)]


class _Body(Section):
    model: Annotated[str, Field(max_length=256)]
    user: Annotated[str | None, Field(max_length=256)] = None


class StreamOptions(Section):
    """Whether a stream ends with what it took."""

    include_usage: bool = False


class _Writing(_Body):
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    experts: bool = False
    n: One = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    logprobs: Off = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(Section):
    """A part of a message. Only text is taken."""

    type: Literal["text"]
    text: str


class Message(Section):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(_Writing):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None


class CompletionBody(_Writing):
    """Of ``/v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    best_of: One = None
    echo: Off = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class Pair(Section):
    """A text to classify, and a second one where the task has pairs."""

    text: str
    text_pair: str | None = None


class ClassifyBody(_Body):
    """Of ``/v1/classify``."""

    input: str | Annotated[list[str | Pair], Field(min_length=1)]
    experts: bool = False

    @property
    def texts(self) -> tuple[tuple[str, str | None], ...]:
        """The texts and their pairs."""
        each = [self.input] if isinstance(self.input, str) else self.input
        return tuple((one, None) if isinstance(one, str) else (one.text, one.text_pair) for one in each)


class EmbeddingsBody(_Body):
    """Of ``/v1/embeddings``."""

    input: str | Annotated[list[str], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Off = None

    @property
    def texts(self) -> tuple[tuple[str, str | None], ...]:
        """The texts."""
        return ((self.input, None),) if isinstance(self.input, str) else tuple((text, None) for text in self.input)
