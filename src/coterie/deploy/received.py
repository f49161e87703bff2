"""What a site keeps of the server's last instruction, so that it can write its export later, without the server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coterie import codec
from coterie.deploy.head import Head
from coterie.text import parse_json
from coterie.types import CoterieError, ExportedAs, Instruction, Json

_FILE = "received"


@dataclass(frozen=True)
class Received:
    """The encoded instruction that makes the site's bank after round ``rnd``, the terms of the run, and what the server
    says of that round."""

    body: bytes
    rnd: int
    terms: Mapping[str, Json]
    export: ExportedAs


def received_file(folder: Path, head: Head, body: bytes) -> dict[Path, bytes]:
    """The file in the run's ``folder`` that keeps the instruction in ``body``, and its content: JSON, then the body."""
    about = json.dumps({"round": head.rnd, "terms": dict(head.terms), "export": head.export})
    return {folder / _FILE: about.encode() + b"\n" + body}


def newest_received(state: Path, run: str = "") -> tuple[str, Received]:
    """The name of ``run``, by default the last one of the site with this ``state``, and what it received.

    Raises :class:`CoterieError` where there is none.
    """
    files = sorted(state.glob(f"{run or '*'}/{_FILE}"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        what = f"the run {run}" if run else "any run"
        raise CoterieError(
            f"{state} has no instruction of {what}; the server sends one with each evaluation and at the end: join the "
            "run, or check [site] state"
        )
    about, _, body = files[-1].read_bytes().partition(b"\n")
    try:
        codec.decode(Instruction, body)
        head = _HEAD.validate_python(parse_json(about))
        return files[-1].parent.name, Received(body, head.round, head.terms, head.export)
    except ValueError as fault:  # of JSON, UTF-8, the codec or pydantic
        reason = fault.errors()[0]["msg"] if isinstance(fault, ValidationError) else fault
        raise CoterieError(f"{files[-1]} is damaged ({reason}); join the run to receive it again") from fault


@dataclass(frozen=True)
class _Head:
    round: int
    terms: dict[str, Json]
    export: ExportedAs


_HEAD = TypeAdapter(_Head)
