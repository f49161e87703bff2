"""What a site keeps of the server's last instruction, so that it can write its export later, without the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie import codec
from coterie.deploy.head import Head
from coterie.types import CoterieError, Instruction, Json

_FILE = "received.safetensors"


@dataclass(frozen=True)
class Received:
    """The instruction that makes the site's bank after round ``rnd``, and the terms of the run."""

    instruction: Instruction
    rnd: int
    terms: Mapping[str, Json]


def received_file(folder: Path, head: Head, body: bytes) -> dict[Path, bytes]:
    """The file in the run's ``folder`` that keeps the instruction in ``body``, and its content."""
    return {folder / _FILE: codec.encode(Received(codec.decode(Instruction, body), head.rnd, head.terms))}


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
    try:
        return files[-1].parent.name, codec.decode(Received, files[-1].read_bytes())
    except codec.CodecError as fault:
        raise CoterieError(f"{files[-1]} is damaged ({fault}); join the run to receive it again") from fault
