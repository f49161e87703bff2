"""What the service answers, in OpenAI's shapes."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from coterie.adapters.about import About
from coterie.api.jobs import Encoded, RequestError, TokenExperts, Written
from coterie.text import plain_text
from coterie.types import Json


def error(fault: RequestError) -> dict[str, Json]:
    """A fault in the shape that OpenAI's clients read."""
    kind = "invalid_request_error" if fault.status < 500 and fault.status != 429 else "server_error"
    kind = "rate_limit_error" if fault.status == 429 else kind
    message = plain_text(str(fault))
    return {"error": {"message": message, "type": kind, "param": fault.param, "code": fault.code or None}}


def model(name: str, about: About, created: int, max_tokens: int) -> dict[str, Json]:
    """One client's model, with what a page needs to know of it."""
    known = {
        "task": about.task,
        "labels": about.labels,
        "method": about.method,
        "round": about.round,
        "base": about.base,
    }
    openai = {"id": name, "object": "model", "created": created, "owned_by": "coterie"}
    return {**openai, **known, "max_tokens": max_tokens}


def classified(name: str, labels: Sequence[str] | None, encoded: Sequence[Encoded]) -> dict[str, Json]:
    """Labels with their probabilities."""
    data: list[dict[str, Json]] = []
    for index, one in enumerate(encoded):
        names = labels or [str(number) for number in range(len(one.values))]
        probabilities = dict(zip(names, one.values, strict=True))
        best = max(probabilities, key=lambda label: probabilities[label])
        data.append({"index": index, "label": best, "probabilities": probabilities, "truncated": one.cut})
        if one.experts is not None:
            data[-1]["experts"] = experts(one.experts)
    return {"object": "list", "model": name, "data": data, "usage": _read(encoded)}


def embedded(name: str, encoded: Sequence[Encoded], encoding: Literal["float", "base64"]) -> dict[str, Json]:
    """Embeddings: lists of numbers, or the bytes of little-endian float32."""
    data = [
        {"object": "embedding", "index": i, "embedding": _vector(one.values, encoding)} for i, one in enumerate(encoded)
    ]
    return {"object": "list", "model": name, "data": data, "usage": _read(encoded)}


def experts(of: TokenExperts) -> dict[str, Json]:
    """Which experts each token used, by layer."""
    layers = [{"layer": one.layer, "experts": one.experts, "weights": one.weights} for one in of.layers]
    return {"tokens": of.tokens, "layers": layers}


def usage(of: Written) -> dict[str, int]:
    """What a text took."""
    total = of.prompt_tokens + of.tokens
    return {"prompt_tokens": of.prompt_tokens, "completion_tokens": of.tokens, "total_tokens": total}


@dataclass(frozen=True)
class TextShape:
    """The shape of a text's answer: a chat's, or a plain completion's."""

    id: str
    created: int
    model: str
    chat: bool

    def whole(self, of: Written) -> dict[str, Json]:
        """The answer in one piece."""
        kind = "chat.completion" if self.chat else "text_completion"
        body: dict[str, Json] = (
            {"message": {"role": "assistant", "content": of.text}} if self.chat else {"text": of.text}
        )
        made = self._made(kind, [{"index": 0, **body, "finish_reason": of.finish, "logprobs": None}])
        return {**made, "usage": usage(of), **({"experts": experts(of.experts)} if of.experts else {})}

    def chunk(self, text: str | None, finish: str | None = None, role: bool = False) -> dict[str, Json]:
        """A piece of the answer."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        delta = {**({"role": "assistant"} if role else {}), **({} if text is None else {"content": text})}
        body: dict[str, Json] = {"delta": delta} if self.chat else {"text": text or ""}
        return self._made(kind, [{"index": 0, **body, "finish_reason": finish, "logprobs": None}])

    def last(self, of: Written) -> dict[str, Json]:
        """What a stream took."""
        made = self._made("chat.completion.chunk" if self.chat else "text_completion", [])
        return {**made, "usage": usage(of), **({"experts": experts(of.experts)} if of.experts else {})}

    def _made(self, kind: str, choices: list[Mapping[str, Json]]) -> dict[str, Json]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _read(encoded: Sequence[Encoded]) -> dict[str, int]:
    tokens = sum(one.tokens for one in encoded)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _vector(values: Sequence[float], encoding: Literal["float", "base64"]) -> list[float] | str:
    if encoding == "float":
        return list(values)
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")
