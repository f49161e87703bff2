"""Shows the results of a run by round: the metric that chooses the best round, and the training loss."""

from __future__ import annotations

from collections.abc import Iterator

from coterie.report import plots
from coterie.report.plots import Picture
from coterie.report.read import Run
from coterie.report.tables import PERCENT, Table, words


def result_pictures(run: Run) -> Iterator[Picture]:
    """Curves by round: the primary metric of the clients and their mean, and the training loss."""
    name = words(run.primary)
    mean = {split: curve for split in run.splits if (curve := run.curve(split))}
    if mean:
        first = next(iter(mean))
        figure = plots.lines_by_round(
            mean,
            {client: run.curve(first, client) for client in run.clients},
            label=f"{name}, mean of the clients",
            percent=run.primary in PERCENT,
            mark=run.best,
        )
        note = f"Thin lines: {first}, each client."
        yield Picture("metric-by-round", f"{name[0].upper()}{name[1:]} by round", figure, note)
    if run.losses:
        figure = plots.lines_by_round({"training": [*run.losses.items()]}, label="mean loss", percent=False)
        yield Picture("loss-by-round", "Training loss by round", figure, "Mean over the clients that replied.")


def sample_tables(run: Run) -> list[Table]:
    """Some generated texts of each client in the last evaluation, beside the completions in the data."""
    samples = (run.last.samples if run.last else None) or {}
    rows = [
        (client, sample.prompt, sample.completion, sample.generated)
        for client in run.clients
        for sample in samples.get(client, ())
    ]
    return [Table("Samples", ["client", "prompt", "completion", "generated"], rows)] if rows else []
