"""Shows what a run with ``[privacy]`` guarantees."""

from __future__ import annotations

from coterie.report.read import Run
from coterie.report.tables import Table
from coterie.runs.guarantee import Guarantee

METRICS = {"none": "not sent", "unprotected": "as they are, outside the guarantee: of a simulation, not to be shown"}
SOURCES = {
    "secure": "the operating system's randomness",
    "seeded": "the run's seed, for tests: whoever knows it sees through",
}
DRAWN = "has to stay secret: epsilon is for whoever sees the experts alone, not the run's folder or a tracker"


def adds(made: Guarantee) -> str:
    """Who adds the noise, and whom that protects from."""
    if made.noise_at != "sum":
        return f"the {made.noise_at}"
    return (
        "the clients in parts, before their secure sum: enough if fewer than "
        f"{made.colluding:.0%} of its clients work with the server"
    )


def privacy_tables(run: Run) -> list[Table]:
    """One table; none for a run without ``[privacy]``."""
    made = run.summary.privacy if run.summary else None
    if made is None:
        return []
    rows: list[tuple[object, ...]] = [
        ("epsilon, delta", f"{made.epsilon:.4g}, {made.delta:g} ({made.accountant})"),
        ("what it compares", made.neighbours),
        ("noise", f"{made.noise_multiplier:.4g} times the clip {made.clip:g}, added by {adds(made)}"),
        ("noise comes from", SOURCES[made.noise_source]),
        ("clients of a round", made.cohort),
        *([("who was drawn", DRAWN)] if made.unit == "client" and made.accountant != "exact" else []),
        ("releases counted", ", ".join(f"{number} of {kind}" for kind, number in made.releases.items())),
        ("metrics", METRICS[made.metrics]),
        *([("ended", made.stopped)] if made.stopped else []),
    ]
    return [Table(f"Differential privacy of each {made.unit}", ("what", "of this run"), rows)]
