"""Differential privacy of clients: what each sent is cut to a length and hidden in noise, before any average.

A client's update (what it sent less what it started from) is cut as one vector to ``clip``: A, B, router and shared
head together. The server then needs one of two things (:mod:`coterie.methods.releases`):

- the mean over a group that shares an expert: the sum gets Gaussian noise of ``noise_multiplier * clip`` per value and
  is divided by the number of the group's clients, which does not depend on who replied. Every member's tensors are
  replaced by the start plus that result, as the rules of ``[robust]`` do, so that any mean over the group is it;
- each client's own values: those get the same noise, one client at a time.

All groups of a round together are one Gaussian mechanism, because the cut holds for all that a client sends: a small
group pays with more noise in its mean, not with more epsilon. Values that were measured and not trained (embeddings)
are a second vector, cut to ``embedding_clip``, and a release of their own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coterie.methods.releases import Release
from coterie.methods.robust import Group
from coterie.ops.accounting import Noised, multiplier_for
from coterie.ops.noise import Noise
from coterie.types import ClientId, Key, Part, Reply, Section, Tensors

Vector = dict[Key, Tensor]  # float64
_SMALLEST, _LARGEST = 1e-9, 1e9  # of a clip: beyond, products with float32 tensors lose digits


class PrivacySettings(Section):
    """What a run guarantees about its data. By default nothing."""

    unit: Literal["none", "client", "example"] = Field(
        "none",
        description="whose data is protected: none; client: all that one client contributes; example: one training row "
        "of a client, by noise that the client adds in every step of its training",
    )
    clip: float = Field(
        0.0,
        ge=0,
        le=_LARGEST,
        description="largest length of a client's whole update, or with unit = example of a row's gradient; what is "
        "longer is cut to it",
    )
    embedding_clip: float = Field(
        1.0,
        ge=_SMALLEST,
        le=_LARGEST,
        description="the same for what a client measures and does not train, such as mean embeddings; with unit = "
        "example, of one row",
    )
    noise_multiplier: float = Field(
        0.0, ge=0, le=1e5, description="standard deviation of the noise, times clip; 0: the least that keeps to epsilon"
    )
    epsilon: float = Field(
        0.0,
        ge=0,
        le=1e5,
        description="budget of the whole run: it stops before it would exceed this; 0: none. A "
        "run without one, whose rounds would cost more than 50, is refused",
    )
    delta: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="the delta of epsilon; at most 0.01, and well below 1 / the number of clients, or with unit = "
        "example of a client's rows",
    )
    noise_at: Literal["server", "client", "sum"] = Field(
        "server",
        description="server: it receives updates as they are, clips them and adds noise to each group's sum; client: "
        "each client clips and adds the whole noise itself, so that the server need not be trusted; with unit = "
        "example it always does; sum: each client clips and adds a part of the noise before secure aggregation, so "
        "that the sum has the whole",
    )
    colluding: float = Field(
        1 / 3,
        ge=0,
        lt=1,
        description="with noise_at = sum, fewer than this share of a sum's clients may work with the server: the "
        "others' noise is enough; at most 2 * [secure_aggregation] threshold - 1",
    )
    metrics: Literal["none", "unprotected"] = Field(
        "none",
        description="none: no client sends metrics; unprotected: metrics as they are, outside the guarantee, only in a "
        "simulation",
    )
    noise_source: Literal["secure", "seeded"] = Field(
        "secure", description="secure: noise and cohorts from the operating system's randomness; seeded: for tests"
    )

    @property
    def active(self) -> bool:
        """Whether anything is protected."""
        return self.unit != "none"

    @property
    def by_server(self) -> bool:
        """Whether the server adds the noise."""
        return self.unit == "client" and self.noise_at == "server"

    @property
    def by_client(self) -> bool:
        """Whether clients add the noise to their updates."""
        return self.unit == "client" and self.noise_at == "client"

    @property
    def by_sum(self) -> bool:
        """Whether clients add parts of the noise, which a secure sum makes whole."""
        return self.unit == "client" and self.noise_at == "sum"

    @property
    def at_clients(self) -> bool:
        """Whether clients add noise of any kind, so that the server gets nothing without it."""
        return self.by_client or self.by_sum or self.by_row

    @property
    def by_row(self) -> bool:
        """Whether clients add the noise in training, where it hides each row."""
        return self.unit == "example"

    @model_validator(mode="after")
    def _complete(self) -> PrivacySettings:
        if not self.active:
            if self.clip or self.noise_multiplier or self.epsilon:
                raise ValueError(
                    'clip, noise_multiplier and epsilon protect nobody without unit = "client" or "example"'
                )
            return self
        if not self.clip:
            raise ValueError(
                "noise without a clip hides nothing: set clip to the length of a usual update (or row's gradient)"
            )
        if self.clip < _SMALLEST:
            raise ValueError(f"clip is {self.clip:g}: floats round too coarsely below {_SMALLEST:g}")
        if not self.noise_multiplier and not self.epsilon:
            raise ValueError("set noise_multiplier, or epsilon and delta, from which it is calculated")
        return self


@dataclass(frozen=True)
class StandIn(Reply):
    """A reply that its client did not send: noise for a group of which nobody replied."""


def sent_by_clients(replies: Mapping[ClientId, Reply]) -> dict[ClientId, Reply]:
    """``replies`` without stand-ins, for what a state keeps of single clients."""
    return {client: reply for client, reply in replies.items() if not isinstance(reply, StandIn)}


@dataclass(frozen=True)
class Made:
    """The replies with noisy tensors; ``digest`` names the values before the noise, ``kinds`` what was released."""

    replies: Mapping[ClientId, Reply]
    digest: str
    kinds: frozenset[str]


UPDATES, EMBEDDINGS = "updates", "embeddings"


def kinds_of(keys: Iterable[Key]) -> frozenset[str]:
    """The releases that tensors with these ``keys`` are: :data:`UPDATES`, :data:`EMBEDDINGS`, both or none."""
    return frozenset(EMBEDDINGS if key.part is Part.EMBEDDING else UPDATES for key in keys)


def planned_kinds(releases: Sequence[Release], rounds: int) -> list[list[str]]:
    """The kinds of the releases that each of so many ``rounds`` makes if nobody fails."""
    tensors = [release for release in releases if release.carried == "tensors"]
    return [
        [
            kind
            for kind, measured in ((UPDATES, False), (EMBEDDINGS, True))
            if any(release.sent_in(rnd, rounds) and release.measured == measured for release in tensors)
        ]
        for rnd in range(1, rounds + 1)
    ]


def planned_releases(releases: Sequence[Release], rounds: int) -> int:
    """The releases that so many ``rounds`` make if nobody fails."""
    return sum(map(len, planned_kinds(releases, rounds)))


def client_multiplier(settings: PrivacySettings, releases: Sequence[Release], rounds: int) -> float:
    """The multiplier of a client that adds its own noise in every round."""
    if settings.noise_multiplier:
        return settings.noise_multiplier
    planned = (Noised(1.0),) * planned_releases(releases, rounds)
    return multiplier_for(settings.epsilon, settings.delta, planned)


def cut(settings: PrivacySettings, tensors: Tensors, start: Tensors) -> Vector:
    """The client's update, no longer than the clip, and what it measured, no longer than its own."""
    update = {key: tensors[key].double() - start[key].double() if key in start else tensors[key].double()
              for key in sorted(tensors)}  # fmt: skip
    update = {key: value.nan_to_num(0.0, 0.0, 0.0) for key, value in update.items()}  # nan has no length to cut
    factors = {
        kind: min(1.0, most / max(_norm(update, kind), 1e-300))
        for kind, most in ((UPDATES, settings.clip), (EMBEDDINGS, settings.embedding_clip))
    }
    return {key: value * factors[_kind(key)] for key, value in update.items()}


def private_reply(
    settings: PrivacySettings,
    multiplier: float,
    reply: Reply,
    start: Tensors,
    noise: Noise,
    kept_info: Sequence[str],
    *purpose: str | int,
) -> Reply:
    """What a client sends: without counts and statistics, and with ``noise_at = "client"`` cut and noisy."""
    info = {name: reply.info[name] for name in kept_info if name in reply.info}
    tensors: Mapping[Key, Tensor] = reply.tensors
    if settings.by_client:
        update = cut(settings, reply.tensors, start)
        hidden = {
            key: value + _deviation(settings, multiplier, key) * noise.normal(tuple(value.shape), *purpose, str(key))
            for key, value in update.items()
        }
        tensors = {key: _moved(start, key, hidden[key]) for key in reply.tensors}
    return replace(reply, tensors=tensors, num_examples=1, info=info)


@dataclass(frozen=True)
class Released:
    """Adds the noise at the server. ``rate`` is the share of the clients that a round draws: sums are divided by it."""

    settings: PrivacySettings
    multiplier: float
    noise: Noise
    rate: float = 1.0

    def __call__(
        self,
        groups: Sequence[Group],
        replies: Mapping[ClientId, Reply],
        everyone: Mapping[ClientId, Reply],
        starts: Mapping[ClientId, Tensors],
        rnd: int,
    ) -> Made:
        """``replies`` with what the groups' noisy sums say.

        ``everyone`` has a reply of every client: those that sent nothing send their start, an update of 0. A group of
        which nobody replied is noise all the same; its first member stands in for it (:class:`StandIn`), without
        embeddings, which would be noise that looks like a measurement.
        """
        updates = {c: cut(self.settings, replies[c].tensors, starts[c]) for c in sorted(replies)}
        sums = [_sum(updates, group, everyone) for group in groups]
        shared = {(c, key) for group in groups for c in group.members for key in group.keys}
        standing = {group.members[0] for group in groups if not replies.keys() & {*group.members}}
        alone = {
            c: {key: updates[c][key] if c in updates else torch.zeros_like(value, dtype=torch.float64)
                for key, value in sorted(everyone[c].tensors.items())
                if (c, key) not in shared and (c in updates or key.part is not Part.EMBEDDING)}
            for c in sorted({*replies, *standing})
        }  # fmt: skip
        digest = _digest(rnd, [*sums, *alone.values()])
        purpose = self.noise.purpose(digest, rnd)
        made: dict[ClientId, dict[Key, Tensor]] = {c: {} for c in alone}
        for number, (group, total) in enumerate(zip(groups, sums, strict=True)):
            noisy = self._noisy(total, purpose, f"group {number}")
            for c in made.keys() & {*group.members}:
                made[c] |= {
                    key: _moved(starts[c], key, value / (self.rate * len(group.members)))
                    for key, value in noisy.items()
                }
        for c, values in alone.items():
            made[c] |= {k: _moved(starts[c], k, v) for k, v in self._noisy(values, purpose, f"client {c}").items()}
        kinds = kinds_of(key for c in made for key in made[c])
        return Made({c: _with(everyone[c], made[c], c in replies) for c in made}, digest, kinds)

    def _noisy(self, values: Vector, *purpose: str | int) -> Vector:
        return {
            key: value
            + _deviation(self.settings, self.multiplier, key)
            * self.noise.normal(tuple(value.shape), *purpose, str(key))
            for key, value in values.items()
        }


def _with(reply: Reply, tensors: Tensors, sent: bool) -> Reply:
    return replace(reply, tensors=tensors) if sent else StandIn(tensors, reply.num_examples, reply.info)


def _sum(updates: Mapping[ClientId, Vector], group: Group, everyone: Mapping[ClientId, Reply]) -> Vector:
    shapes = everyone[group.members[0]].tensors
    total = {key: torch.zeros_like(shapes[key], dtype=torch.float64) for key in sorted(group.keys)}
    for client in group.members:
        for key in total.keys() if client in updates else ():
            total[key] += updates[client][key]
    return total


def _deviation(settings: PrivacySettings, multiplier: float, key: Key) -> float:
    return multiplier * (settings.embedding_clip if _kind(key) == EMBEDDINGS else settings.clip)


def _kind(key: Key) -> str:
    return EMBEDDINGS if key.part is Part.EMBEDDING else UPDATES


def _norm(update: Mapping[Key, Tensor], kind: str) -> float:
    return math.sqrt(sum(float(value.square().sum()) for key, value in update.items() if _kind(key) == kind))


def _moved(start: Tensors, key: Key, update: Tensor) -> Tensor:
    return (start[key].double() + update if key in start else update).float()


def _digest(rnd: int, vectors: Iterable[Vector]) -> str:
    """SHA-256 of the values before the noise; it never leaves the server's folder."""
    digest = hashlib.sha256(str(rnd).encode())
    for vector in vectors:
        for key, value in vector.items():
            digest.update(str(key).encode() + b"\x00" + value.contiguous().numpy().tobytes())
    return digest.hexdigest()
