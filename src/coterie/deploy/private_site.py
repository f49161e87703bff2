"""A site's side of ``[privacy]``: what it refuses, and the replies with its own noise, of which each is made once.

A server that sends an instruction twice would otherwise get two replies with fresh noise, whose mean hides less. So the
reply to a round is on the disk before it is sent; the same instruction gets the same bytes again, and any other
instruction for that round gets none. The files are the site's ledger: it sends no more than its noise is for.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coterie import codec
from coterie.deploy.head import Head, digest_of
from coterie.files import write_atomic
from coterie.methods.base import Method
from coterie.methods.privacy import PrivacySettings, kinds_of, planned_kinds
from coterie.types import CoterieError, Reply

_FOLDER = "released"


def check_privacy_of_sites(settings: PrivacySettings) -> None:
    """Raise :class:`CoterieError` for settings of ``[privacy]`` that a simulation alone may have."""
    if not settings.active:
        return
    if settings.metrics != "none":
        raise CoterieError(
            f'[privacy] metrics = "{settings.metrics}": sites would send metrics without noise; set it to "none"'
        )
    if settings.noise_source != "secure":
        raise CoterieError(
            f'[privacy] noise_source = "{settings.noise_source}": whoever knows the seed could subtract the noise; set '
            'it to "secure"'
        )


@dataclass(frozen=True)
class Sent:
    """What a site released in a round: the SHA-256 of the instruction and of the run's terms, the kinds of tensors."""

    round: int
    instruction: str
    terms: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Releases:
    """The replies with this site's own noise, in the ``folder`` of a run of ``rounds``."""

    folder: Path
    method: Method
    rounds: int

    def check(self, head: Head, body: bytes) -> None:
        """Raise :class:`CoterieError` for an instruction that gets no reply, before anything is trained."""
        if head.rnd > self.rounds:
            raise CoterieError(f"round {head.rnd}: the noise of this site is for the {self.rounds} rounds of the run")
        now = _sent(head, body)
        for path in self._files():
            sent, blob = _read(path)
            if sent.terms != now.terms:
                raise CoterieError(
                    "this site has added noise in this run under other terms; begin a new run, and count what both "
                    "have spent"
                )
            if sent.round == head.rnd and (sent.instruction != now.instruction or not blob):
                raise CoterieError(
                    f"this site has answered round {head.rnd} before, to another instruction or too long ago; a second "
                    "reply would show more than [privacy] counts"
                )

    def once(self, head: Head, body: bytes, blob: bytes) -> bytes:
        """The encoded reply to send: that of the first time, or ``blob``, which is on the disk once this returns.

        Raises :class:`CoterieError` where it would be more than the site's noise is for.
        """
        path = self.folder / _FOLDER / f"{head.rnd:06}"
        if path.exists():
            return _read(path)[1]
        kinds = tuple(sorted(kinds_of(codec.decode(Reply, blob).tensors)))
        if not kinds:
            return blob
        planned = len(planned_kinds(self.method.releases(), self.rounds))
        made = sum(len(_read(file)[0].kinds) for file in self._files())
        if made + len(kinds) > planned:
            raise CoterieError(f"this site has made {made} noisy releases, and its noise is for {planned} in this run")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomic(path, _encoded(_sent(head, body, kinds), blob))
        return blob

    def prune(self, oldest: int) -> None:
        """Drop the bytes of replies to rounds before ``oldest``; that they were sent stays on record."""
        for path in self._files():
            if int(path.name) < oldest and path.stat().st_size:
                sent, blob = _read(path)
                if blob:
                    write_atomic(path, _encoded(sent, b""))

    def _files(self) -> list[Path]:
        return sorted((self.folder / _FOLDER).glob("[0-9]" * 6))


def _sent(head: Head, body: bytes, kinds: tuple[str, ...] = ()) -> Sent:
    return Sent(head.rnd, hashlib.sha256(body).hexdigest(), digest_of(head.terms), kinds)


def _encoded(sent: Sent, blob: bytes) -> bytes:
    return json.dumps(asdict(sent)).encode() + b"\n" + blob


def _read(path: Path) -> tuple[Sent, bytes]:
    about, _, blob = path.read_bytes().partition(b"\n")
    try:
        return _SENT.validate_json(about), blob
    except ValidationError as fault:
        raise CoterieError(
            f"{path.parent.name}/{path.name} of the run at this site is damaged; leave the run: without it nobody "
            "knows what the site has sent"
        ) from fault


_SENT = TypeAdapter(Sent)
