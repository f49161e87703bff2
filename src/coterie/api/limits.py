"""What one request, one key and the whole service may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of a service.

    ``rows`` share a pass, ``waiting`` requests wait for one, ``per_key`` requests of a key (without keys: of everyone)
    run or wait. ``seconds`` is what an answer may take, ``read_seconds`` what a client may take to send its request.
    ``connections`` are open at once.
    """

    rows: int = 16
    waiting: int = 64
    per_key: int = 64
    texts: int = 64
    experts_texts: int = 8
    messages: int = 256
    body_bytes: int = 256 * 1024
    prompt_tokens: int = 4096
    max_tokens: int = 1024
    seconds: float = 120.0
    read_seconds: float = 15.0
    connections: int = 256
