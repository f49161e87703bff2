"""Prometheus metrics of a federation, made from its journal on request, and served on 127.0.0.1 only."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from coterie.deploy.journal import read_journal
from coterie.deploy.status import Status, status_of
from coterie.types import CoterieError

_HELP = {
    "coterie_round": ("gauge", "Last round that ended"),
    "coterie_rounds": ("gauge", "Rounds of the run"),
    "coterie_sites": ("gauge", "Sites of the run: those listed and those that joined"),
    "coterie_attempts_total": ("counter", "Starts of the server"),
    "coterie_replies_total": ("counter", "Answers that arrived, by site and kind"),
    "coterie_failures_total": ("counter", "Answers that did not arrive or were not used, by site and kind"),
    "coterie_late_total": ("counter", "Answers that arrived too late, by site"),
    "coterie_sent_bytes_total": ("counter", "Bytes to a site, as encoded"),
    "coterie_received_bytes_total": ("counter", "Bytes from a site, as encoded"),
    "coterie_exchange_seconds_total": ("counter", "Seconds from a message to its answer, by site"),
    "coterie_site_seconds_total": ("counter", "Seconds of that during which the site worked"),
    "coterie_loss": ("gauge", "Mean training loss of the last round"),
}


def render(status: Status) -> str:
    """The metrics in Prometheus' text format."""
    rows: dict[str, list[tuple[dict[str, str], float]]] = {name: [] for name in _HELP}
    rows["coterie_round"].append(({}, status.round))
    rows["coterie_rounds"].append(({}, status.rounds))
    rows["coterie_sites"].append(({}, len(status.sites)))
    rows["coterie_attempts_total"].append(({}, status.attempts))
    if status.loss is not None:
        rows["coterie_loss"].append(({}, status.loss))
    for client, site in status.sites.items():
        at = {"site": client}
        for kind, number in sorted(site.replies.items()):
            rows["coterie_replies_total"].append(({**at, "kind": kind}, number))
        for kind, number in sorted(Counter(kind for kind, _, _ in site.failures).items()):
            rows["coterie_failures_total"].append(({**at, "kind": kind}, number))
        rows["coterie_late_total"].append((at, site.late))
        rows["coterie_sent_bytes_total"].append((at, site.bytes_down))
        rows["coterie_received_bytes_total"].append((at, site.bytes_up))
        rows["coterie_exchange_seconds_total"].append((at, site.seconds))
        rows["coterie_site_seconds_total"].append((at, site.site_seconds))
    lines = []
    for name, (kind, text) in _HELP.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labels(labels)} {value:g}" for labels, value in rows[name]]
    return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items()) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Page(BaseHTTPRequestHandler):
    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if self.path != "/metrics":
            self.send_error(404)
            return
        page = render(status_of(read_journal(self.folder))).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args: object) -> None: ...


@contextmanager
def exporter(folder: Path, port: int) -> Iterator[int]:
    """Serve the metrics of the run in ``folder`` at ``http://127.0.0.1:port/metrics`` for a ``with`` block.

    Raises :class:`CoterieError` for a port that is not free.
    """
    try:
        http = ThreadingHTTPServer(("127.0.0.1", port), partial(_Page, folder))
    except OSError as fault:
        raise CoterieError(f"[federation] metrics_port = {port}: {fault.strerror}; choose another") from fault
    with http as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
