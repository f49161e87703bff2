"""``coterie site export``: writes a site's own experts again, or for the first time, without the server."""

from __future__ import annotations

from pathlib import Path

from coterie.deploy.received import newest_received
from coterie.deploy.site import load
from coterie.deploy.worker import Worker
from coterie.types import CoterieError


def export(path: Path, run: str = "") -> Path:
    """Write the bundle of the site's last run, or of ``run``, as the end of a run does; returns its folder.

    It is that of the last evaluation that the server sent. Raises :class:`CoterieError` where the site has received
    none, or has deleted its own state of that round.
    """
    site, root = load(path)
    worker = Worker(site, root)
    name, received = newest_received(worker.state, run)
    opened = worker.load(name, received.terms)
    client, rnd = opened.client, received.rnd
    for kind, newest in client.states.state_rounds(10**6).items():
        if client.id in newest and client.id not in client.states.state_rounds(rnd)[kind]:
            raise CoterieError(
                f"{opened.folder} has the state of round {newest[client.id]}, but no longer that of round {rnd}: "
                "the server evaluated that one last; join the run until its next evaluation"
            )
    worker.export(opened, received.body, rnd, received.export)
    return opened.folder / "export"
