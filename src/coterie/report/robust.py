"""Shows what the rules of ``[robust]`` made of the clients' updates."""

from __future__ import annotations

from statistics import fmean

from coterie.report.read import Run
from coterie.report.tables import Table

HEAD = ("client", "rounds", "pointed away", "shortened", "to, at least", "mean norm, times the median", "lowest cosine")


def robust_tables(run: Run) -> list[Table]:
    """A row for each client, who pointed away most often first; no table for a run without a rule."""
    weighed = [event.robust for _, event in sorted(run.rounds.items()) if event.robust]
    rows = []
    for client in sorted({client for of in weighed for client in of}):
        mine = [of[client] for of in weighed if client in of]
        away, shortened = (sum(w.outlying for w in mine), sum(w.clipped < 1 for w in mine))
        least = f"{min(w.clipped for w in mine):.0%}" if shortened else None
        norm, cosine = f"{fmean(w.norm for w in mine):.3g}", f"{min(w.cosine for w in mine):.2f}"
        rows.append((client, len(mine), away, shortened, least, norm, cosine))
    rows.sort(key=lambda row: (-row[2], row[0]))
    return [Table("Robust aggregation: what the rule made of each client's update", HEAD, rows)] if rows else []
