"""A site's side of secure sums: it keeps the tensors of its reply, and answers the steps with masked vectors.

What it keeps is in memory alone. A worker that is started again has nothing left of a session, and takes part in the
next one. On the disk is which sums of a round it has opened, over which sites: a server that repeats a round with other
sites, weights, tensors or experts could subtract one sum from another and see a single site's update. It gets no second
sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from coterie import codec
from coterie.config.deployment import SiteSettings
from coterie.deploy.head import Head, digest_of
from coterie.deploy.keys import known_sites, load_private, load_public
from coterie.engines.client import LocalClient
from coterie.files import read_json_as, write_json
from coterie.methods.base import Method
from coterie.methods.secure_client import check_session, update_of, vector_of, without_statistics
from coterie.methods.secure_start import begun
from coterie.methods.sum_noise import SumNoise
from coterie.ops.noise import SeededNoise
from coterie.runs.private import KEY, kept_noise
from coterie.runs.secure import noise_of
from coterie.secure.identity import Identity
from coterie.secure.session import SecureSumError, Session, Site
from coterie.secure.steps import Party
from coterie.types import CoterieError, Instruction, Reply

_OPENED = "opened.json"


@dataclass(frozen=True)
class SiteSums:
    """This site in the sums of one round of one attempt."""

    run: str
    rnd: int
    party: Party

    def answer(self, head: Head, body: bytes) -> bytes:
        """The answers in a step. Raises as :meth:`coterie.secure.steps.Party.answer`."""
        if (_run_of(head), head.rnd) != (self.run, self.rnd):
            raise SecureSumError(f"this site holds nothing of round {head.rnd}; it may have been restarted since")
        return self.party.answer(head.step, body)


def run_name(run: str, attempt: int, terms: str) -> str:
    """The name of a run in its sessions: another attempt is another run, and so are other terms, by their digest."""
    return f"{run} {attempt} {terms}"


def _run_of(head: Head) -> str:
    return run_name(head.run, head.attempt, digest_of(head.terms))


def identity_of(site: SiteSettings, root: Path) -> Identity:
    """The site's registered key and those of its peers. Raises :class:`CoterieError` where they are missing."""
    if not site.site.key or not site.site.peers:
        raise CoterieError(
            "secure aggregation signs with [site] key and checks the other sites' signatures with [site] peers, the "
            "folder of their public keys; set both"
        )
    private = load_private(root / site.site.key)
    peers = {name: load_public(path) for name, path in known_sites(root / site.site.peers).items()}
    return Identity(private, {**peers, site.site.id: private.public_key()})


def keep_for_sums(
    client: LocalClient, method: Method, identity: Identity, folder: Path, head: Head, body: bytes, blob: bytes
) -> tuple[SiteSums, bytes]:
    """What this site keeps of its encoded reply, ``blob``, to the instruction in ``body``; and the reply that it sends.

    The reply has no tensors, and of its statistics those that the server needs of each site.
    """
    settings, reply = method.plan.secure, codec.decode(Reply, blob)
    ins = codec.decode(Instruction, body)
    start = method.started_from(client.workplace.base.spec, None, client.info, ins, reply)
    noise = _noise(method, folder)
    update, name = update_of(reply, start, settings.clip, noise), _run_of(head)
    sent, uniform = begun(ins, start, method.instructs_alike), method.weighting == "uniform"
    party = Party(
        client.id,
        identity,
        lambda session: vector_of(update, client.id, session, noise),
        lambda session: check_session(settings, session, name, head.rnd, uniform, sent, noise),
        lambda session, survivors: note_opened(folder / _OPENED, session, survivors, sent.whole),
    )
    without = without_statistics(replace(reply, tensors={}), method.releases())
    return SiteSums(name, head.rnd, party), codec.encode(without)


def _noise(method: Method, folder: Path) -> SumNoise | None:
    """The noise of this site's part in a sum. Its key is kept: a round that is done again has the same noise."""
    privacy = method.plan.privacy
    if not privacy.by_sum:
        return None
    seeded = privacy.noise_source == "seeded"
    return noise_of(method, SeededNoise(method.plan.seed) if seeded else kept_noise(folder / KEY))


def note_opened(path: Path, session: Session, survivors: tuple[Site, ...], instruction: str) -> None:
    """Note that the sum of ``session`` is opened over ``survivors``, after this site got ``instruction`` (a digest).

    Raises :class:`SecureSumError` where the round had another instruction before, or a sum over one of the tensors was
    opened that is not this one again.
    """
    opened = read_json_as(path, _ROUNDS, "delete the folder of the run at this site") if path.exists() else {}
    of_round = opened.setdefault(str(session.rnd), {"instruction": instruction, "sums": []})
    if of_round["instruction"] != instruction:
        raise SecureSumError(f"round {session.rnd} was opened after another instruction before")
    now: _Sum = {"survivors": sorted(survivors), "tensors": sorted(session.tensors), "terms": session.terms}
    for before in of_round["sums"]:
        if before == now:
            return
        if {*before["tensors"]} & {*session.tensors}:
            over = f"over {', '.join(before['survivors'])} before; over {', '.join(sorted(survivors))}"
            other = "" if before["terms"] == now["terms"] else " and with other members, weights or tensors"
            raise SecureSumError(
                f"round {session.rnd} was opened {over}{other} too, the difference would be the update of single sites"
            )
    of_round["sums"].append(now)
    write_json(path, opened)


class _Sum(TypedDict):
    survivors: list[Site]
    tensors: list[str]
    terms: str


class _Opened(TypedDict):
    """The sums of a round."""

    instruction: str
    sums: list[_Sum]


_ROUNDS = TypeAdapter(dict[str, _Opened])
