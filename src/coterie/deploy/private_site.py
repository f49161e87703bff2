"""A site's side of ``[privacy]``: what it refuses, and the replies with its own noise, of which each is made once.

A server that sends an instruction twice would otherwise get two replies with fresh noise, whose mean hides less. So the
reply to a round is on the disk before it is sent; the same instruction gets the same bytes again, and any other
instruction for that round gets none. The files are the site's ledger: it sends no more than its noise is for.

Where the noise is in training (``unit = "example"``), what a client keeps of a round has that noise too, and shows in
what it sends later. So no round is trained anew once its reply is on the disk, or a later one's: the states come from
there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from coterie import codec
from coterie.config.deployment import Policy
from coterie.deploy.head import Head, digest_of
from coterie.engines.client import LocalClient
from coterie.files import write_atomic
from coterie.methods.base import Method
from coterie.methods.privacy import PrivacySettings, client_multiplier, kinds_of, planned_releases
from coterie.methods.row_privacy import planned_of, row_multiplier
from coterie.ops.accounting import Noised, spent
from coterie.types import Bank, CoterieError, Personal, Reply

T = TypeVar("T")
_FOLDER = "released"
_PERSONAL, _TRAINED = ".personal", ".trained"


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


def check_cost(policy: Policy, method: Method, rows: int) -> None:
    """Raise :class:`CoterieError` where the noise that this site adds itself is less than its policy wants.

    The cost is that of all planned rounds, calculated here: a server cannot make it look smaller.
    """
    if not policy.max_epsilon:
        return
    cost = own_cost(method, rows, policy.max_delta)
    if cost is None:
        raise CoterieError(
            "this site takes part only with noise of its own ([policy] max_epsilon); set [privacy] unit = "
            '"example", or noise_at = "client", at the server'
        )
    if cost > policy.max_epsilon * (1 + 1e-9):
        raise CoterieError(
            f"the run would cost this site epsilon = {cost:.3g} at delta = {policy.max_delta:g}, more than [policy] "
            f"max_epsilon = {policy.max_epsilon:g}; lower [privacy] epsilon, or raise noise_multiplier, at the server"
        )


def own_cost(method: Method, rows: int, delta: float) -> float | None:
    """The epsilon that all planned rounds cost a site with so many ``rows``; None where the noise is not its own."""
    settings, plan = method.plan.privacy, method.plan
    if settings.by_row:
        multiplier = row_multiplier(settings, plan.optim, rows, plan.rounds, method.releases())
        return spent(planned_of(multiplier, plan.optim, rows, plan.rounds, method.releases()), delta).epsilon
    if settings.by_client:
        noised = Noised(client_multiplier(settings, method.releases(), plan.rounds))
        return spent([noised] * planned_releases(method.releases(), plan.rounds), delta).epsilon
    return None


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
    client: LocalClient

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
            if self.by_row and sent.round > head.rnd and not self._path(head.rnd).exists():
                raise CoterieError(
                    f"this site has answered round {sent.round}, and trains no earlier one: [privacy] counts each "
                    "round once"
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
        path = self._path(head.rnd)
        if path.exists():
            return _read(path)[1]
        kinds = tuple(sorted(kinds_of(codec.decode(Reply, blob).tensors)))
        if not kinds and not self.by_row:
            return blob
        by_row = self.by_row  # a reply is one release there, of all that training has made
        planned = self.rounds if by_row else planned_releases(self.method.releases(), self.rounds)
        made = sum(1 if by_row else len(_read(file)[0].kinds) for file in self._files())
        if made + (1 if by_row else len(kinds)) > planned:
            raise CoterieError(f"this site has made {made} noisy releases, and its noise is for {planned} in this run")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if by_row:
            self._keep_states(head.rnd)
        write_atomic(path, _encoded(_sent(head, body, kinds), blob))
        return blob

    def answered(self, rnd: int) -> bytes | None:
        """The reply to a round that is not trained anew, whose states are put back; None for any other round."""
        path = self._path(rnd)
        if not self.by_row or not path.exists():
            return None
        name, states = self.client.id, self.client.states
        states.personal.save(name, rnd, _state(Personal, path.with_suffix(_PERSONAL)))
        if states.trained:
            states.trained.save(name, rnd, _state(Bank, path.with_suffix(_TRAINED)))
        return _read(path)[1]

    def _keep_states(self, rnd: int) -> None:
        path, name, states = self._path(rnd), self.client.id, self.client.states
        if personal := states.personal.load(name, rnd):
            write_atomic(path.with_suffix(_PERSONAL), codec.encode(personal))
        if states.trained and (bank := states.trained.load(name, rnd)):
            write_atomic(path.with_suffix(_TRAINED), codec.encode(bank))

    @property
    def by_row(self) -> bool:
        return self.method.plan.privacy.by_row

    def prune(self, oldest: int) -> None:
        """Drop the bytes of replies to rounds before ``oldest``; that they were sent stays on record."""
        for path in self._files():
            if int(path.name) < oldest and path.stat().st_size:
                sent, blob = _read(path)
                if blob:
                    write_atomic(path, _encoded(sent, b""))
                for suffix in (_PERSONAL, _TRAINED):
                    path.with_suffix(suffix).unlink(missing_ok=True)

    def _path(self, rnd: int) -> Path:
        return self.folder / _FOLDER / f"{rnd:06}"

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
            f"{_damaged(path)}; leave the run: without it nobody knows what the site has sent"
        ) from fault


def _state(kind: type[T], path: Path) -> T:
    """What the client kept of a round. Raises :class:`CoterieError` where it is gone or damaged."""
    try:
        return codec.decode(kind, path.read_bytes())
    except (codec.CodecError, FileNotFoundError) as fault:
        raise CoterieError(f"{_damaged(path)}; restore it: the round counts once, and is not trained anew") from fault


def _damaged(path: Path) -> str:
    return f"{path.parent.name}/{path.name} of the run at this site is damaged"


_SENT = TypeAdapter(Sent)
