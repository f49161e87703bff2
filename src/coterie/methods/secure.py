"""Secure aggregation: of each group that shares an expert the server learns a sum, and no client's update by itself.

It is applied where the rules of ``[robust]`` are (:mod:`coterie.methods.robust`), to the same groups: a cluster, the
holders of an expert, or all. Every member sends, masked (:mod:`coterie.secure`),

    (p_i u_i, p_i),   u_i = min(1, clip / |u_i|) (x_i - start_i),   p_i = w_i / sum over the members of w_j

as integers, with |u_i| the norm of all that it sends, taken as one vector. Members' tensors are then replaced with
sum p_i (start_i + u_i) / sum p_i over the survivors, so any mean over the group is that result, and no method needs to
know of sums. The weight w_i is the number of examples, at most what the server allows to anybody, or 1.

A group whose sum is not opened keeps what it had, and so does what is in no sum. What a client does is in
:mod:`coterie.methods.secure_client`; with ``[privacy] noise_at = "sum"`` it adds a part of the noise
(:mod:`coterie.methods.sum_noise`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from coterie.methods.releases import Release, each_of
from coterie.methods.robust import Group
from coterie.methods.secure_start import Begun
from coterie.methods.sum_noise import SumNoise
from coterie.ops.mean import mean
from coterie.secure import fixed_point
from coterie.secure.collector import Opened
from coterie.secure.session import FEWEST, SecureSumError, Session, needed_of
from coterie.types import ClientId, CoterieError, Key, Reply, Section, Tensors

_FEWEST_NEIGHBOURS = 10
_ROUNDING = 1e-9
_BESIDE = 2  # numbers beside the tensors' values: p_i, and whether the update was shortened


class SecureAggregationSettings(Section):
    """Whether the server sees sums over groups of clients alone, and when it may open one."""

    enabled: bool = Field(
        False, description="hide each client's update: the server learns sums over groups that share an expert"
    )
    threshold: float = Field(
        2 / 3, gt=0.5, le=1, description="share of a group's clients that must be left, or its sum is not opened"
    )
    min_group: int = Field(
        FEWEST,
        ge=FEWEST,
        description="fewest clients in a sum, at least 3: of two, each can compute the other's update from it",
    )
    clip: float = Field(
        100.0, gt=0, description="clients shorten updates with a larger norm to it; the range of the sums"
    )
    bits: int = Field(
        40, ge=16, le=56, description="bits of a value in a sum: the grid has 2 ** (bits - 1) steps from 0 to clip"
    )
    neighbours: int = Field(
        50,
        ge=0,
        description="other clients that each one shares masks and keys with (rounded up to an even number); 0: all. A "
        "group that is not larger shares with all",
    )

    @field_validator("neighbours")
    @classmethod
    def _enough_neighbours(cls, neighbours: int) -> int:
        if 0 < neighbours < _FEWEST_NEIGHBOURS:
            raise ValueError(
                f"must be 0 or at least {_FEWEST_NEIGHBOURS}: with fewer, sites that vanish cut a group into parts"
            )
        return neighbours


def refusal(settings: SecureAggregationSettings, releases: Sequence[Release], robust: bool) -> str | None:
    """Why a method with these ``releases`` has no secure sums, with the alternative; None if it has."""
    if not settings.enabled:
        return None
    if robust:
        return (
            "[robust] compares the clients' updates, which are hidden: leave [robust] out. [secure_aggregation] clip "
            "then bounds what honest clients send; a client that ignores it is not caught"
        )
    if not releases:
        return "the method sends nothing that could be added up; leave [secure_aggregation] out"
    for release in each_of(releases):
        if release.carried == "tensors":
            why = f": {release.why}" if release.why else ""
            fix = f"set {release.instead}" if release.instead else "choose a method that averages, such as fedit"
            return f"the server needs each client's own {release.what}{why}; {fix}, or leave [secure_aggregation] out"
    return None


def in_the_clear(releases: Sequence[Release]) -> frozenset[str]:
    """The names in a reply's ``info`` that the server needs of each client: they are sent as they are."""
    return frozenset(name for release in each_of(releases) if release.carried == "info" for name in release.names)


@dataclass(frozen=True)
class Sum:
    """What became of a group's sum: its members, who is in it, how many shortened their update; or why it is closed.

    ``vanished`` has the step before which each other member was lost.
    """

    members: Sequence[ClientId]
    survivors: Sequence[ClientId] = ()
    vanished: Mapping[ClientId, str] | None = None
    shortened: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Members:
    """The clients that the sums of round ``rnd`` are over.

    ``replies``: what each sent; where sites keep their tensors, these have the right shapes alone. Their numbers of
    examples are those that a client may count for. ``starts``: what each started from; ``begun``: digests of what each
    was sent. ``examples``: how many each has, which may be more than its reply says.
    """

    rnd: int
    replies: Mapping[ClientId, Reply]
    starts: Mapping[ClientId, Tensors]
    begun: Mapping[ClientId, Begun]
    examples: Mapping[ClientId, int]

    def start(self, client: ClientId, key: Key) -> Tensor:
        """Where ``key`` starts at ``client``: zeros where the client makes the start by itself."""
        start = self.starts[client].get(key)
        return torch.zeros_like(self.replies[client].tensors[key]) if start is None else start


def sessions_of(
    settings: SecureAggregationSettings,
    groups: Sequence[Group],
    clients: Members,
    uniform: bool,
    run: str,
    noise: SumNoise | None = None,
) -> dict[str, Session]:
    """A session for each set of members, by a name.

    A client weighs as many examples as it has, at most as many as the replies of the session's members allow to
    anybody; with ``uniform`` it weighs 1.
    """
    replies = clients.replies
    keys: dict[tuple[ClientId, ...], set[Key]] = {}
    for group in groups:
        keys.setdefault(tuple(sorted(group.members)), set()).update(group.keys)
    made = {}
    for number, members in enumerate(sorted(keys), start=1):
        tensors = {key: replies[members[0]].tensors[key] for key in sorted(keys[members])}
        most = 0 if uniform else max(replies[c].num_examples for c in members)
        made[f"{number}"] = Session(
            run=run,
            rnd=clients.rnd,
            group=f"{number}: {', '.join(members)}",
            members=members,
            length=sum(value.numel() for value in tensors.values()) + _BESIDE,
            layout=tuple(entry_of(key, value.shape) for key, value in tensors.items()),
            most_examples=most,
            total=float(sum(weighs(most, clients.examples[c]) for c in members)),
            bound=bound_of(settings, noise, len(members)),
            bits=settings.bits,
            threshold=settings.threshold,
            min_group=settings.min_group,
            neighbours=settings.neighbours,
            start=tuple(clients.begun[members[0]].of(key) for key in tensors),
            instruction=clients.begun[members[0]].instruction,
        )
    return made


def bound_of(settings: SecureAggregationSettings, noise: SumNoise | None, members: int) -> float:
    """The range of a sum over so many ``members``."""
    if noise is None:
        return settings.clip
    return noise.bound(members, needed_of(members, settings.threshold, settings.min_group))


def in_no_sum(groups: Sequence[Group], replies: Mapping[ClientId, Reply]) -> list[ClientId]:
    """The clients that have tensors in none of ``groups``: nobody may see these, so they stay as they were."""
    summed = {(client, key) for group in groups for client in group.members for key in group.keys}
    return sorted(c for c, reply in replies.items() if any((c, key) not in summed for key in reply.tensors))


def too_small(settings: SecureAggregationSettings, groups: Sequence[Group]) -> str | None:
    """Which group could never be opened, and the fix; None if all could."""
    for group in groups:
        if len(group.members) < (needed := needed_of(len(group.members), settings.threshold, settings.min_group)):
            return (
                f"[secure_aggregation] the sum over {', '.join(group.members)} would never be opened: {needed} clients "
                "are needed ([secure_aggregation] min_group); make the groups larger, or keep what they share personal"
            )
    return None


def applied(
    sessions: Mapping[str, Session],
    opened: Mapping[str, Opened | str],
    clients: Members,
    noise: SumNoise | None = None,
) -> tuple[dict[ClientId, Reply], dict[str, Sum]]:
    """The clients' replies with the mean of each sum that was opened, and where they started elsewhere; and the sums.

    A client that is in no opened sum, though one that it belongs to was opened, is left out.
    """
    changed = {c: {key: clients.start(c, key) for key in reply.tensors} for c, reply in clients.replies.items()}
    left_out: set[ClientId] = set()
    done: dict[str, Sum] = {}
    for name, session in sessions.items():
        try:
            means, done[session.group] = _opened(session, opened[name], clients, noise)
        except SecureSumError as fault:
            done[session.group] = Sum(session.members, error=str(fault))
            continue
        left_out |= {*session.members} - {*done[session.group].survivors}
        for client in session.members:
            changed[client] |= means
    return {c: replace(r, tensors=changed[c]) for c, r in clients.replies.items() if c not in left_out}, done


def _opened(
    session: Session, result: Opened | str, clients: Members, noise: SumNoise | None
) -> tuple[dict[Key, Tensor], Sum]:
    """The survivors' mean of each tensor, and the sum. Raises :class:`SecureSumError` where there is none."""
    if isinstance(result, str):
        raise SecureSumError(result)
    numbers = fixed_point.decode(result.total, session.bound, session.bits)
    weight, shortened = numbers[-2] / session.bound, numbers[-1] / session.bound
    shares = [weighs(session.most_examples, clients.examples[c]) for c in result.survivors]
    grid = len(session.members) * 2.0 ** (1 - session.bits)
    if abs(weight - sum(shares) / session.total) > grid + _ROUNDING:
        raise SecureSumError(f"its weights add up to {weight:g} in place of {sum(shares) / session.total:g}")
    most = noise.longest(session, len(result.survivors)) if noise else session.bound
    longest = most * (1 + _ROUNDING) + session.bound * grid * session.length**0.5 / weight
    if (norm := float(np.linalg.norm(numbers[:-_BESIDE] / weight))) > longest:
        raise SecureSumError(f"its mean is {norm:.3g} long, and no client may send more than {most:g}")
    means, at = {}, 0
    for key, shape in layout_of(session):
        size = int(np.prod(shape))
        update = torch.from_numpy(numbers[at : at + size] / weight).reshape(shape)
        before = [clients.start(c, key) for c in result.survivors]
        same = all(torch.equal(before[0], other) for other in before[1:])
        start = before[0] if same else mean([{key: each} for each in before], shares)[key]
        means[key] = (start.double() + update).to(start.dtype)
        at += size
    return means, Sum(session.members, result.survivors, result.vanished, round(shortened))


def layout_of(session: Session) -> Iterator[tuple[Key, tuple[int, ...]]]:
    """The tensors in a session's vector, in order, with their shapes. Raises :class:`SecureSumError`."""
    for text in session.layout:
        name, _, shape = text.rpartition(" ")
        try:
            key, sizes = Key.parse(name), tuple(int(size) for size in shape.split("x"))
        except ValueError as fault:
            raise SecureSumError(f"the session's layout has {text[:80]!r}, which names no tensor") from fault
        if text != entry_of(key, sizes):  # two ways to write a key would be two tensors
            raise SecureSumError(f"the session's layout has {text[:80]!r} in place of {entry_of(key, sizes)!r}")
        yield key, sizes


def entry_of(key: Key, shape: Sequence[int]) -> str:
    """A tensor's entry in a session's layout."""
    return f"{key} {'x'.join(map(str, shape))}"


def weighs(most: int, examples: int) -> float:
    """What a client with so many examples weighs, where ``most`` is the most that count; 0: all weigh 1."""
    return float(min(examples, most)) if most else 1.0


def check_members(settings: SecureAggregationSettings, clients: int) -> None:
    """Raises :class:`CoterieError` where the sum over all clients could overflow 64 bits."""
    if settings.enabled and clients > fixed_point.most_members(settings.bits):
        raise CoterieError(
            f"[secure_aggregation] bits = {settings.bits}: {clients} such values could overflow 64 bits; set bits to "
            f"{63 - clients.bit_length()} or less"
        )
