"""The routes under ``/v1``: OpenAI's, and ``/v1/classify``."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from coterie.api import answers
from coterie.api.answers import TextShape
from coterie.api.asking import Desk
from coterie.api.bodies import ChatBody, ClassifyBody, CompletionBody, EmbeddingsBody
from coterie.api.jobs import Encode, Encoded, Generate, Piece, RequestError, Written
from coterie.api.keys import Caller
from coterie.api.limits import Limits
from coterie.api.metrics import Metrics
from coterie.api.reading import Reader
from coterie.data.rows import Turn
from coterie.types import Json

_ROLES = {"developer": "system"}  # templates know the older name


@dataclass(frozen=True)
class Routes:
    """What each route does."""

    reader: Reader
    desk: Desk
    limits: Limits
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))

    async def models(self, request: Request) -> Response:
        """The models that the key may use."""
        caller, served = self.reader.caller(request), self.reader.served
        listed = [self._model(number) for number, name in enumerate(served.names) if caller.may_use(name)]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: Request, name: str) -> Response:
        """One model."""
        number = self.reader.number_of(self.reader.caller(request), name)
        return JSONResponse(self._model(number))

    def _model(self, number: int) -> dict[str, Json]:
        served = self.reader.served
        return answers.model(served.names[number], served.abouts[number], self.started, self.limits.max_tokens)

    async def classify(self, request: Request) -> Response:
        """Labels of texts, with probabilities."""
        caller = self.reader.caller(request)
        body = await self.reader.body(request, ClassifyBody)
        client = self.reader.number_of(caller, body.model)
        work = Encode(client, self._few(body.texts), "labels", body.experts)
        if body.experts and len(body.texts) > self.limits.experts_texts:
            most = self.limits.experts_texts
            raise RequestError(f"experts are shown of at most {most} texts in a request", 400, "too_many", "experts")
        labels = self.reader.served.abouts[client].labels
        return JSONResponse(answers.classified(body.model, labels, await self._encoded(request, caller, work)))

    async def embeddings(self, request: Request) -> Response:
        """Embeddings of texts."""
        caller = self.reader.caller(request)
        body = await self.reader.body(request, EmbeddingsBody)
        work = Encode(self.reader.number_of(caller, body.model), self._few(body.texts), "embedding")
        encoded = await self._encoded(request, caller, work)
        return JSONResponse(answers.embedded(body.model, encoded, body.encoding_format))

    async def chat(self, request: Request) -> Response:
        """The next message of a chat."""
        caller = self.reader.caller(request)
        body = await self.reader.body(request, ChatBody)
        if len(body.messages) > self.limits.messages:
            raise RequestError(f"at most {self.limits.messages} messages", 400, "too_many", "messages")
        turns = tuple(Turn(_ROLES.get(message.role, message.role), message.text) for message in body.messages)
        return await self._text(request, caller, body, turns, body.max_completion_tokens or body.max_tokens)

    async def completions(self, request: Request) -> Response:
        """What follows a text."""
        caller = self.reader.caller(request)
        body = await self.reader.body(request, CompletionBody)
        return await self._text(request, caller, body, body.text, body.max_tokens)

    def _few(self, texts: tuple[tuple[str, str | None], ...]) -> tuple[tuple[str, str | None], ...]:
        if len(texts) > self.limits.texts:
            raise RequestError(f"at most {self.limits.texts} texts in a request", 400, "too_many", "input")
        return texts

    async def _encoded(self, request: Request, caller: Caller, work: Encode) -> tuple[Encoded, ...]:
        encoded = await self.desk.whole(request, caller, work)
        assert not isinstance(encoded, Written)
        self.metrics.tokens["prompt"] += sum(one.tokens for one in encoded)
        return encoded

    async def _text(
        self,
        request: Request,
        caller: Caller,
        body: ChatBody | CompletionBody,
        prompt: str | tuple[Turn, ...],
        most: int | None,
    ) -> Response:
        """A text in one piece, or as server-sent events."""
        if most is not None and most > self.limits.max_tokens:
            raise RequestError(
                f"this service writes at most {self.limits.max_tokens} tokens", 400, "too_many_tokens", "max_tokens"
            )
        work = Generate(
            self.reader.number_of(caller, body.model), prompt, most, body.temperature or 0.0, body.top_p or 1.0,
            body.seed, body.stops, bool(body.stream), body.experts,
        )  # fmt: skip
        chat = isinstance(body, ChatBody)
        shape = TextShape(
            f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time()), body.model, chat
        )
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(shape, self.desk.pieces(request, caller, work), usage)
            first = await anext(events)  # a request that is refused gets a status of its own
            return StreamingResponse(_after(first, events), media_type="text/event-stream")
        written = await self.desk.whole(request, caller, work)
        assert isinstance(written, Written)
        self._count(written)
        return JSONResponse(shape.whole(written))

    async def _events(
        self, shape: TextShape, pieces: AsyncIterator[Piece | Written], usage: bool
    ) -> AsyncIterator[str]:
        """The lines of a stream. A fault after the first piece is an event, as the status is sent already."""
        begun = False
        try:
            async with aclosing(pieces) as each:  # type: ignore[type-var]
                async for event in each:
                    if not begun and shape.chat:
                        yield _event(shape.chunk("", role=True))
                    begun = True
                    if isinstance(event, Piece):
                        yield _event(shape.chunk(event.text))
                        continue
                    self._count(event)
                    yield _event(shape.chunk(None, event.finish))
                    if usage:
                        yield _event(shape.last(event))
                    yield "data: [DONE]\n\n"
        except RequestError as fault:
            if not begun:
                raise
            yield _event(answers.error(fault))

    def _count(self, written: Written) -> None:
        self.metrics.tokens["prompt"] += written.prompt_tokens
        self.metrics.tokens["completion"] += written.tokens


async def _after(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    async with aclosing(events) as rest:  # type: ignore[type-var]
        yield first
        async for event in rest:
            yield event


def _event(value: object) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
