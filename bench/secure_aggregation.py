"""A round's messages and processor time with secure sums against plain replies, without training.

Every client has one LoRA of the packaged encoder (rank 8 on query and value: 73,728 values in 24 tensors). Plain: the
replies are encoded, decoded and averaged. Secure: the five steps of :mod:`coterie.secure`, over the same bytes as in a
federation, with all clients in this process; also with a sixth of them gone before they send their values.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from _harness import arguments, interleaved, table, write

from coterie import codec
from coterie.methods.robust import Group
from coterie.methods.secure import Members, SecureAggregationSettings, applied, sessions_of
from coterie.methods.secure_client import update_of, vector_of
from coterie.methods.secure_start import Begun
from coterie.ops.mean import mean
from coterie.secure.identity import identities
from coterie.secure.steps import STEPS, Ask, Party, in_process, sums
from coterie.types import Key, Part, Reply

CASES = ((3, 50), (8, 50), (50, 0), (50, 20))  # clients, neighbours
TARGETS, WIDTH, RANK = 12, 384, 8


def replies_of(clients: int, targets: int) -> dict[str, Reply]:
    """Replies of random values, as small as updates are."""
    draw = torch.Generator().manual_seed(0)
    keys = [Key(f"layer.{i}", 0, part) for i in range(targets) for part in (Part.A, Part.B)]
    shapes = {Part.A: (RANK, WIDTH), Part.B: (WIDTH, RANK)}
    return {
        f"c{number:02d}": Reply({k: 0.01 * torch.randn(shapes[k.part], generator=draw) for k in keys}, 100 + number)
        for number in range(clients)
    }


class Counted:
    """Carries the steps to clients, counts their bytes, and loses ``gone`` of them before they send their values."""

    def __init__(self, ask: Ask, gone: Sequence[str] = ()) -> None:
        self.ask, self.gone = ask, frozenset(gone)
        self.down = dict.fromkeys(STEPS, 0)
        self.up = dict.fromkeys(STEPS, 0)

    def __call__(self, step: str, messages: Mapping[str, bytes]) -> dict[str, bytes]:
        late = STEPS.index(step) >= STEPS.index("values")
        answers = dict(self.ask(step, {c: m for c, m in messages.items() if not (late and c in self.gone)}))
        self.down[step] += sum(map(len, messages.values()))
        self.up[step] += sum(map(len, answers.values()))
        return answers


def plain(replies: Mapping[str, Reply]) -> int:
    """The bytes that clients send in the clear."""
    sent = {client: codec.encode(reply) for client, reply in replies.items()}
    received = [codec.decode(Reply, blob) for blob in sent.values()]
    mean([reply.tensors for reply in received], [float(reply.num_examples) for reply in received])
    return sum(map(len, sent.values()))


def secure(replies: Mapping[str, Reply], known: Any, neighbours: int, gone: Sequence[str] = ()) -> Counted:
    """A round with secure sums: what the steps have carried."""
    settings = SecureAggregationSettings(enabled=True, neighbours=neighbours)
    groups = [Group(tuple(replies), frozenset(next(iter(replies.values())).tensors))]
    examples, nothing = {c: reply.num_examples for c, reply in replies.items()}, Begun({}, "", "")
    clients = Members(1, replies, {c: {} for c in replies}, dict.fromkeys(replies, nothing), examples)
    sessions = sessions_of(settings, groups, clients, uniform=False, run="bench")
    updates = {c: update_of(reply, {}, settings.clip) for c, reply in replies.items()}
    parties = {c: Party(c, known[c], lambda of, c=c: vector_of(updates[c], c, of)) for c in replies}  # type: ignore[misc]
    counted = Counted(in_process(parties), gone)
    _, done = applied(sessions, sums(sessions, counted), clients)
    (result,) = done.values()
    assert len(result.survivors) == len(replies) - len(gone), result.error
    return counted


def measure(clients: int, neighbours: int, targets: int, repeats: int) -> dict[str, Any]:
    replies, known = replies_of(clients, targets), identities([f"c{number:02d}" for number in range(clients)])
    gone = sorted(replies)[: clients // 6]
    cases = {
        "plain": lambda: plain(replies),
        "secure": lambda: secure(replies, known, neighbours),
        "gone": lambda: secure(replies, known, neighbours, gone),
    }
    times = interleaved({name: (lambda work=work: work) for name, work in cases.items()}, repeats, warmup=0)
    counted, clear = secure(replies, known, neighbours), plain(replies)
    up, down = sum(counted.up.values()), sum(counted.down.values())
    return {
        "clients": clients,
        "neighbours": neighbours or clients - 1,
        "plain_up_kib_per_client": clear / clients / 1024,
        "secure_up_kib_per_client": up / clients / 1024,
        "secure_down_kib_per_client": down / clients / 1024,
        "up_ratio": up / clear,
        "up_by_step": counted.up,
        "down_by_step": counted.down,
        **{f"{name}_cpu_s": statistics.median(times.cpu[name]) for name in cases},
        "gone_before_values": len(gone),
    }


def main() -> None:
    options = arguments(__doc__ or "")
    cases, targets = (((3, 50),), 1) if options.quick else (CASES, TARGETS)
    rows = [measure(n, k, targets, 1 if n > 8 or options.quick else 3) for n, k in cases]
    table("secure aggregation", [{k: v for k, v in row.items() if "by_step" not in k} for row in rows])
    write("secure_aggregation", options, {"values_per_client": 2 * targets * WIDTH * RANK, "rows": rows})


if __name__ == "__main__":
    main()
