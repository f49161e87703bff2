"""What ``coterie status`` shows."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table

from coterie.cli.plain import escape
from coterie.deploy.status import Status, took_part
from coterie.ops.accounting import spent_text
from coterie.units import clock, size


def show(console: Console, status: Status) -> None:
    """Print a status: a line, a table of the sites, their last failures, the last notes."""
    loss = "" if status.loss is None else f", loss {status.loss:.3f}"
    again = f", started {status.attempts} times" if status.attempts > 1 else ""
    console.print(
        f"{escape(status.phase)}; {status.round} of {status.rounds} rounds done{loss}{again}", highlight=False
    )
    if status.spent:
        console.print(f"privacy: {spent_text(status.spent)} spent", highlight=False)
    table = Table(box=None, header_style="bold")
    limited = any(site.active is not None for site in status.sites.values())
    columns = ["site", "state", "took part in", "missed", "sent", "received", "seconds", "of these working"]
    for column in columns + ["active experts"] * limited:
        table.add_column(column, justify="left" if column in ("site", "state", "took part in") else "right")
    for client, site in sorted(status.sites.items()):
        missed = len({rnd for kind, rnd, _ in site.failures if kind == "train" and rnd not in site.rounds})
        state = f"{site.state}, {clock(time.time() - site.seen)} ago" if site.state == "connected" else site.state
        row = (client, state, took_part(site), str(missed), size(site.bytes_down), size(site.bytes_up))
        active = ["all" if site.active is None else f"at most {site.active}"] * limited
        table.add_row(*map(escape, row), f"{site.seconds:.1f}", f"{site.site_seconds:.1f}", *active)
    console.print(table)
    for client, site in sorted(status.sites.items()):
        for kind, rnd, reason in site.failures[-5:]:
            console.print(escape(f"{client}, {kind} of round {rnd}: {reason}"), highlight=False, soft_wrap=True)
    for text in status.notes[-5:]:
        console.print(escape(f"note: {text}"), highlight=False, soft_wrap=True)
