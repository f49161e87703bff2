"""What happens in a federation of sites, beside what happens in any run (:mod:`coterie.runs.events`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coterie.ops.metrics import Metrics
from coterie.runs.events import RUN, Event, kinds
from coterie.types import ClientId


@dataclass(frozen=True)
class ServerStarted(Event):
    """The server started, for the first time or again."""

    event = "attempt"

    attempt: int
    sites: Sequence[ClientId] = ()


@dataclass(frozen=True)
class Joined(Event):
    """A site joined the run as a node; ``instead_of`` is the node that it was before, if Flower still lists that.

    ``active``: the most experts per matrix that it activates on average; None: as many as the run.
    """

    event = "joined"

    client: ClientId
    node: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    base: str = ""
    rows: int = 0
    instead_of: str | None = None
    active: int | None = None


@dataclass(frozen=True)
class Back(Joined):
    """A site that took part before is back."""

    event = "back"


@dataclass(frozen=True)
class Refused(Event):
    """A node may not take part, for this reason."""

    event = "refused"

    node: str
    reason: str


@dataclass(frozen=True)
class Exchanged(Event):
    """A message to a site and its answer: bytes as encoded, seconds, and how many of these the site was at work."""

    event = "exchange"

    kind: str
    round: int
    client: ClientId
    failed: str | None
    bytes_down: int
    bytes_up: int
    seconds: float
    site_seconds: float | None


@dataclass(frozen=True)
class Late(Event):
    """An answer came after the server had stopped waiting for it, and was dropped."""

    event = "late"

    client: ClientId
    round: int
    text: str
    kind: str = "train"


@dataclass(frozen=True)
class Unreadable(Event):
    """An answer came that cannot be used."""

    event = "unreadable"

    kind: str
    round: int
    client: ClientId
    reason: str


@dataclass(frozen=True)
class Onboarded(Event):
    """A site joined the finished run: ``trained`` of its tensors were trained; its test metrics before and after."""

    event = "onboarded"

    client: ClientId
    round: int
    rows: int
    trained: int
    before: Metrics = field(default_factory=dict)
    after: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Stopped(Event):
    """The server stopped with an error."""

    event = "stopped"

    error: str


@dataclass(frozen=True)
class Finished(Event):
    """The run is finished."""

    event = "finished"


FEDERATION = {
    **RUN,
    **kinds(ServerStarted, Joined, Back, Refused, Exchanged, Late, Unreadable, Onboarded, Stopped, Finished),
}
