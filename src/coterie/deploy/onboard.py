"""``coterie serve --onboard``: sites that come after the end of a run get a model of it, by one message each.

The server sends a site what the method gives a newcomer. The site does the rest with its own rows, as ``coterie
onboard`` does, writes the bundle to its own folder, and answers with a count and its metrics. Of the run nothing
changes but the journal.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from coterie import codec
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.data.clients import SAFE_ID
from coterie.deploy.agreement import Agreement
from coterie.deploy.answers import decoded
from coterie.deploy.base_digest import digest_here
from coterie.deploy.events import Finished, Onboarded, ServerStarted
from coterie.deploy.journal import Journal
from coterie.deploy.limits import EVALUATION
from coterie.deploy.remote import RemoteEngine
from coterie.deploy.sites import Sites, read_known
from coterie.engines.base import Evaluation
from coterie.engines.checks import evaluation_fault
from coterie.flower.message import Message, Transport
from coterie.methods.base import Method
from coterie.ops.metrics import Metrics
from coterie.runs.checkpoint import Checkpoint
from coterie.runs.exported import exported
from coterie.runs.folder import read_config
from coterie.runs.summary import SUMMARY
from coterie.types import ClientId, CoterieError

KIND = "query.onboard"


@dataclass(frozen=True)
class Answer:
    """What a site says once it has joined: how many tensors it trained, and its test metrics before and after.

    Both are empty where it has no test rows, or sends no metrics.
    """

    trained: int
    before: Metrics = field(default_factory=dict)
    after: Metrics = field(default_factory=dict)


def check_newcomers(folder: Path, newcomers: Sequence[ClientId]) -> None:
    """Raise :class:`CoterieError` where the run in ``folder`` is not finished, or a site cannot join it afterwards."""
    if not (folder / SUMMARY).exists():
        raise CoterieError(
            f"{folder} is not finished, and --onboard is for sites that come after the end; list them in [federation] "
            "sites and continue with --resume"
        )
    known = {name.lower(): name for name in read_known(folder)}
    for name in newcomers:
        if not SAFE_ID.fullmatch(name):
            raise CoterieError(f"--onboard: {name!r} is not a valid site id")
        if name.lower() in known:
            raise CoterieError(
                f"--onboard: {known[name.lower()]} took part in this run and has its bundle (`coterie site export` "
                "there writes it again)"
            )


def onboard(transport: Transport, folder: Path, journal: Journal, agreement: Agreement) -> None:
    """Let the sites of ``agreement`` join the finished run in ``folder``, each as it connects.

    Raises :class:`CoterieError` that names the sites that did not come or could not join; the others have joined.
    """
    raw, root = read_config(folder)
    config = check_config(raw)
    method = config.make_method(root)
    start = exported(folder, method.State)
    base = config.federation.base or digest_here(config, root, folder)
    sites = Sites(transport, replace(agreement, base=base, finished=True), journal, read_known(folder))
    engine = RemoteEngine(sites)
    journal(ServerStarted(agreement.attempt, agreement.sites))
    left, failed = {*agreement.sites}, dict[ClientId, str]()
    end = sites.clock() + config.federation.wait
    while left:
        sites.refresh()
        if there := left & sites.nodes.keys():
            failed |= _exchange(engine, method, start, config, there)
            left -= there
            end = sites.clock() + config.federation.wait
        elif sites.clock() >= end:
            break
        else:
            sites.sleep(transport.pause)
    failed |= dict.fromkeys(left, f"not connected within {config.federation.wait:g} s; is `coterie join` running?")
    if failed:
        reasons = "; ".join(f"{client}: {reason}" for client, reason in sorted(failed.items()))
        raise CoterieError(f"not onboarded: {reasons}. Start again with --onboard {','.join(sorted(failed))}")
    journal(Finished())


def _exchange(
    engine: RemoteEngine, method: Method, start: Checkpoint[object], config: Config, newcomers: Collection[ClientId]
) -> dict[ClientId, str]:
    """Send to each of ``newcomers`` what it needs, and note who has joined; why the others have not."""
    infos = {info.id: info for info in engine.clients}
    bodies = {c: codec.encode(method.welcome(start.state, infos[c])) for c in newcomers}
    failed: dict[ClientId, str] = {}
    details = {"export": config.run.export}
    for arrival in engine.exchange(KIND, bodies, start.rnd, details, dict.fromkeys(bodies, EVALUATION)):
        answer, fault = _answer(arrival.answer)
        if answer is None:
            failed[arrival.client] = fault or "an answer without content"
        else:
            rows = infos[arrival.client].num_train
            engine.sites.note(Onboarded(arrival.client, start.rnd, rows, answer.trained, answer.before, answer.after))
    return failed


def _answer(answer: Message | str) -> tuple[Answer | None, str | None]:
    if isinstance(answer, str):
        return None, answer
    value, fault = decoded(Answer, answer.body)
    for metrics in (value.before, value.after) if value else ():
        fault = fault or (evaluation_fault(Evaluation({"test": metrics}), ("test",), (), 0) if metrics else None)
    return (None, fault) if fault else (value, None)
