"""What a whole run with ``[privacy]`` is planned to cost, and the refusal of one that protects nobody."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from coterie.methods.base import Method
from coterie.methods.privacy import PrivacySettings, planned_kinds
from coterie.methods.row_privacy import planned_of, row_multiplier
from coterie.ops.accounting import Noised, Spent, multiplier_for, of_one_draw, spent
from coterie.runs.settings import RoundSettings
from coterie.types import ClientId, CoterieError

MOST = 50.0  # an epsilon beyond which the guarantee says nothing: odds of e^50 to one
_MOST_DELTA = 1e-2
_NAMED = 1e5  # the largest epsilon that a config may name


def cohort_size(rounds: RoundSettings, clients: int) -> float:
    """The clients of a round, of so many; with Poisson sampling, as expected."""
    return rounds.cohort * clients if rounds.sampling == "poisson" else max(1, round(rounds.cohort * clients))


def noised(settings: PrivacySettings, rounds: RoundSettings, clients: int, multiplier: float) -> Noised:
    """One release of a run with so many clients. Who adds its own noise is known to take part."""
    size = cohort_size(rounds, clients)
    if settings.at_clients or size >= clients:
        return Noised(multiplier)
    return Noised(multiplier, rounds.sampling, clients, size)


def multiplier_of(settings: PrivacySettings, method: Method, clients: int, rounds: RoundSettings) -> float:
    """``noise_multiplier``, or the least with which all planned releases keep to ``epsilon``."""
    if settings.noise_multiplier:
        return settings.noise_multiplier
    return multiplier_for(
        settings.epsilon, settings.delta, _planned(method, rounds, noised(settings, rounds, clients, 1.0))
    )


def _planned(method: Method, rounds: RoundSettings, one: Noised) -> tuple[Noised, ...]:
    """All releases of a run if none is made twice, as the accountant sees them; ``one`` of them."""
    kinds = planned_kinds(method.releases(), rounds.rounds)
    return tuple(release for of in kinds for release in of_one_draw([one] * len(of)))


def planned_cost(method: Method, clients: Mapping[ClientId, int], rounds: RoundSettings) -> Spent:
    """What all rounds of a run cost if none is done twice.

    ``clients``: the training rows of each, of which ``unit = "example"`` counts the dearest.
    """
    settings = method.plan.privacy
    if settings.by_row:
        return max((_cost_of_rows(method, n, rounds) for n in sorted({*clients.values()})), key=lambda of: of.epsilon)
    number = len(clients)
    one = noised(settings, rounds, number, multiplier_of(settings, method, number, rounds))
    return spent(_planned(method, rounds, one), settings.delta)


def _cost_of_rows(method: Method, rows: int, rounds: RoundSettings) -> Spent:
    """What all rounds cost the rows of a client that has so many."""
    settings, optim, releases = method.plan.privacy, method.plan.optim, method.releases()
    multiplier = row_multiplier(settings, optim, rows, rounds.rounds, releases)
    return spent(planned_of(multiplier, optim, rows, rounds.rounds, releases), settings.delta)


@dataclass(frozen=True)
class Unprotected:
    """Why a guarantee protects nobody, and what to change in a new run."""

    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.why}; {self.fix}"


def unprotected(method: Method, clients: Mapping[ClientId, int], rounds: RoundSettings) -> Unprotected | None:
    """Why the guarantee of a run with these ``clients`` would protect nobody; None where it protects.

    An ``epsilon`` that is set by hand is taken at its word, however large: :func:`warnings` says so.
    """
    settings = method.plan.privacy
    if fault := unprotected_by_delta(settings, clients):
        return fault
    if settings.epsilon:
        return None
    return _dear_rows(method, clients, rounds) if settings.by_row else _dear(method, clients, rounds)


def unprotected_by_delta(settings: PrivacySettings, clients: Mapping[ClientId, int]) -> Unprotected | None:
    """The same, as far as ``delta`` alone is the reason."""
    delta = settings.delta
    if delta > _MOST_DELTA:
        return Unprotected(
            f"[privacy] delta is {delta:g}: the chance that everything shows",
            f"set it to {_MOST_DELTA:g} or less, and well below 1 / the number of clients (or of a client's rows)",
        )
    if not settings.by_row and delta * len(clients) >= 1:
        return Unprotected(
            f"[privacy] delta = {delta:g}: with {len(clients)} clients, publishing one of them at random in full "
            "would keep to it",
            f"set it well below 1 / {len(clients)}",
        )
    name = max(clients, key=lambda client: clients[client], default="") if settings.by_row else ""
    if name and delta * clients[name] >= 1:
        return Unprotected(
            f"[privacy] delta = {delta:g}: client {name} has {clients[name]} training rows, and publishing one of them "
            "at random in full would keep to it",
            f"set delta well below 1 / {clients[name]}, or leave this client out",
        )
    return None


def _dear(method: Method, clients: Mapping[ClientId, int], rounds: RoundSettings) -> Unprotected | None:
    cost = planned_cost(method, clients, rounds).epsilon
    fix = f"raise noise_multiplier, or set epsilon, from which it is calculated{_named(cost)}"
    return Unprotected(_cost_text(method, cost, "", rounds), fix) if cost > MOST else None


def _dear_rows(method: Method, clients: Mapping[ClientId, int], rounds: RoundSettings) -> Unprotected | None:
    """Names the client whose rows cost most."""
    each = {n: _cost_of_rows(method, n, rounds).epsilon for n in sorted({*clients.values()})}
    name = max(clients, key=lambda client: each[clients[client]])
    cost = each[clients[name]]
    if cost <= MOST:
        return None
    whose = f"client {name}, which has {clients[name]} training rows, "
    return Unprotected(
        _cost_text(method, cost, whose, rounds),
        "raise noise_multiplier, train fewer steps, leave this client out, or set epsilon, from which each client's "
        f"noise is calculated{_named(cost)}",
    )


def _cost_text(method: Method, cost: float, whose: str, rounds: RoundSettings) -> str:
    settings = method.plan.privacy
    return (
        f"[privacy] noise_multiplier = {settings.noise_multiplier:g} would cost {whose}epsilon = {cost:,.0f} at delta "
        f"= {settings.delta:g} over {_count(rounds.rounds)}, and above {MOST:g} it protects nobody"
    )


def _named(cost: float) -> str:
    return f" (epsilon = {math.ceil(cost)} beside it runs all the same, and says so)" if cost <= _NAMED else ""


def _count(rounds: int) -> str:
    return f"{rounds} round{'s' * (rounds > 1)}"


def check_planned_cost(method: Method, clients: Mapping[ClientId, int], rounds: RoundSettings) -> None:
    """Raise :class:`CoterieError` for a new run whose guarantee would protect nobody, with the setting to change."""
    if fault := unprotected(method, clients, rounds):
        raise CoterieError(str(fault))


def check_continued(
    method: Method, clients: Mapping[ClientId, int], rounds: RoundSettings, before: int | None = None
) -> list[str]:
    """What has to be said of a run that continues: one that began without protection ends so, because nobody can
    change its settings now.

    ``before``: the rounds that it has so far, where it gets more. Raises :class:`CoterieError` where it is these with
    which the guarantee protects nobody.
    """
    settings = method.plan.privacy
    if before is not None and settings.epsilon and not settings.noise_multiplier:
        raise CoterieError(
            f"the noise of this run was calculated from [privacy] epsilon = {settings.epsilon:g} for "
            f"{_count(before)}, which spend all of it, and more rounds would have needed more noise from the first on: "
            f"run.rounds = {before} continues the run as it began; for more, start a new run with --out"
        )
    fault = unprotected(method, clients, rounds)
    if fault is None:
        return []
    if before is not None and not unprotected(method, clients, replace(rounds, rounds=before)):
        raise CoterieError(
            f"{fault.why}: it is the extension from {_count(before)} that costs too much; give fewer rounds "
            f"(run.rounds = {before} continues the run as it began), or start a new run with more noise with --out"
        )
    return [f"{fault.why}. The run began so and continues: do not call it private, and for the next run {fault.fix}"]


def warnings(settings: PrivacySettings) -> Iterator[str]:
    """What a reader of the run has to know of its guarantee."""
    if settings.epsilon > MOST:
        yield (
            f"[privacy] epsilon = {settings.epsilon:g} protects nobody: do not call this run private (above {MOST:g} "
            "the guarantee says nothing)"
        )
