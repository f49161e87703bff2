"""What a method lets leave a client: one declaration, read by ``[privacy]``, by secure aggregation and by the docs.

A method lists its releases (:meth:`coterie.methods.base.Method.releases`); what every method sends beside them is
:data:`COMMON`. Each says what the server needs of it. Of a release that is read as a sum, the server needs nothing but
the sum over a group of clients: noise may be added to that sum, and masks may hide what it is made of. Of one that is
read by client, it needs each client's own value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Reads = Literal["sum", "each", "nothing"]
Carried = Literal["tensors", "info", "count", "evaluation", "joining", "failure", "bank"]

SERVER = "the server"
EVERYONE = "all clients"


@dataclass(frozen=True)
class Release:
    """One thing that leaves a client.

    ``carried``: where it travels: among a reply's tensors, in its ``info`` (under ``names``), as its count of examples,
    in an evaluation, when a client joins, in place of a reply, or with the bank that is exported. ``reads``: whether
    the server needs the sum over a group, each client's own value, or nothing of it (then it can be left out). ``to``:
    who receives it, or what is made of it. ``when``: how often. ``why``: for what the server reads it by client.
    ``instead``: the setting under which it is not sent, or not read by client; "" if there is none. ``measured``: it is
    no trained tensor, and starts from nothing. ``mean_of_rows``: it is a mean over rows, each of which can be cut and
    hidden by itself.
    ``of_rows``: it is made from the client's rows. It is sent in the rounds ``first``, ``first`` +
    ``every``, ... up to ``last``, which counts from the end where it is 0 (the last round) or negative.
    """

    what: str
    carried: Carried = "tensors"
    reads: Reads = "sum"
    to: str = EVERYONE
    when: str = "every round"
    names: tuple[str, ...] = ()
    why: str = ""
    instead: str = ""
    measured: bool = False
    mean_of_rows: bool = False
    of_rows: bool = True
    first: int = 1
    every: int = 1
    last: int = 0

    def sent_in(self, rnd: int, rounds: int) -> bool:
        """Whether it is sent in round ``rnd`` of ``rounds``."""
        last = self.last if self.last > 0 else rounds + self.last
        return self.first <= rnd <= last and (rnd - self.first) % self.every == 0


COMMON: Sequence[Release] = (
    Release(
        "loss, tokens, steps, operations and energy of its training",
        "info",
        "nothing",
        SERVER,
        names=("loss", "tokens", "steps", "gflop", "gflop_active"),
    ),
    Release("number of training examples, a weight in means", "count", "sum", SERVER),
    Release(
        "metrics of validation and test rows",
        "evaluation",
        "nothing",
        SERVER,
        when="every evaluated round",
    ),
    Release("use of the experts", "evaluation", "nothing", SERVER, when="after the last round"),
    Release(
        "counts of rows, names of labels; `[data] group` and `[site] active` where they are set",
        "joining",
        "each",
        SERVER,
        when="once, when it joins",
        why="the server plans rounds by them",
    ),
    Release(
        "versions of its libraries, SHA-256 of its base",
        "joining",
        "each",
        SERVER,
        when="once, when it joins",
        why="all sites need the same",
        of_rows=False,
    ),
    Release(
        "why it failed: a step at which its loss was not finite, a limit of its policy",
        "failure",
        "each",
        SERVER,
        when="where it fails or refuses",
        why="the run says why a client is left out",
    ),
    Release(
        "the whole bank, personal head included",
        "bank",
        "nothing",
        SERVER,
        when="at the end, if the site allows it",
        instead="[policy] upload_bank = false",
    ),
)


def head_release(shared: bool) -> tuple[Release, ...]:
    """The release of the head, where heads are shared."""
    to = "clients with the same labels"
    return (Release("head", to=to, instead='[task] head = "personal"'),) if shared else ()


def each_of(releases: Sequence[Release]) -> list[Release]:
    """Those of ``releases`` that the server reads by client."""
    return [release for release in releases if release.reads == "each"]
