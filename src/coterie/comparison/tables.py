"""The tables of a comparison as text: in Markdown, in LaTeX, and as cells for a page or a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coterie.comparison.record import Against, Figures, Record
from coterie.comparison.variants import contenders
from coterie.ops.metrics import better
from coterie.report.plots import natural
from coterie.report.tables import PERCENT, words
from coterie.units import duration, operations, size

MISSING = "-"
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}


@dataclass(frozen=True)
class Cell:
    """A cell's text, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table: names of the columns, and rows of cells that start with the row's name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def overview(record: Record) -> Grid:
    """A row per variant: what it reaches, how sure that is, and what it costs."""
    rows = list(record.variants.values())
    unit = ", %" if record.primary in PERCENT else ""
    metric = record.primary
    columns: list[tuple[str, Sequence[Cell]]] = [
        ("method", [Cell(row.title) for row in rows]),
        (f"{words(metric)}{unit}", _marked([row.mean for row in rows], metric, [_mean(row, metric) for row in rows])),
        ("worst client", _best([row.worst for row in rows], metric)),
        (f"{tail_of(metric)}th percentile", _best([row.p10 for row in rows], metric)),
        ("against the best other", [Cell(_difference(row.against, record)) for row in rows]),
        ("p (Holm)", [Cell(p_value(row.against)) for row in rows]),
        (
            f"rounds to {number(record.target, metric)} on validation",
            _costs([row.target_round for row in rows], "{:.3g}".format),
        ),
        ("bytes", _costs([row.bytes for row in rows], size)),
        ("time", _costs([row.seconds for row in rows], duration)),
    ]
    if any(row.gflop is not None for row in rows):
        columns.append(("operations", _costs([row.gflop for row in rows], operations)))
    if any(row.beyond is not None for row in rows):
        columns.append(("on others' rows", _best([row.beyond for row in rows], metric)))
    if any(row.newcomers is not None for row in rows):
        columns.append(("newcomers", _best([row.newcomers for row in rows], metric)))
    if any(row.tuned for row in rows):
        columns.append(("tuned to", [Cell(", ".join(settings_of(row)) or MISSING) for row in rows]))
    title = f"Test {words(metric)} at the round that validation chose, {_seeds(record)}"
    return Grid(
        title, [name for name, _ in columns], [list(cells) for cells in zip(*(c for _, c in columns), strict=True)]
    )


def brief(record: Record) -> Grid:
    """:func:`overview` in short, for a terminal."""
    table = overview(record)
    rows = list(record.variants.values())
    columns = dict(zip(table.head, zip(*table.rows, strict=True), strict=True))
    wanted = [name for name in columns if name not in ("time", "operations", "tuned to")]
    names = {"against the best other": "against best", "worst client": "worst"}
    columns["against the best other"] = tuple(Cell(_alone(row.against, record.primary)) for row in rows)
    made = [(names.get(n, n).replace("percentile", "pct.").partition(" on ")[0], columns[n]) for n in wanted]
    made += [
        (key.rpartition(".")[2], tuple(Cell(_value_of(row, key)) for row in rows))
        for key in dict.fromkeys(setting.partition("=")[0] for row in rows for setting in settings_of(row))
    ]
    return Grid(table.title, [name for name, _ in made], list(zip(*(cells for _, cells in made), strict=True)))


def by_client(record: Record) -> Grid:
    """A row per client, a column per variant: means over the seeds, and the mean of the clients."""
    rows = list(record.variants.values())
    clients = sorted({client for row in rows for client in row.clients}, key=natural)
    body = [[Cell(client), *_best([row.clients.get(client) for row in rows], record.primary)] for client in clients]
    body.append([Cell("mean"), *_best([row.mean for row in rows], record.primary)])
    return Grid(f"Test {words(record.primary)} by client", ["client", *(row.title for row in rows)], body)


def markdown(record: Record) -> str:
    """Both tables and their notes, in Markdown."""
    parts = [_markdown(table) for table in (overview(record), by_client(record))]
    return "\n".join([*parts, *(f"- {note}" for note in (*missing(record), *notes(record))), ""])


def latex(record: Record) -> str:
    """Both tables in LaTeX, for booktabs; as comments, where methods are not compared alike and what is missing."""
    first = [r"% \usepackage{booktabs}", *(f"% {note}" for note in (*_unlike(record), *missing(record)))]
    return "\n".join([*first, *(_latex(table) for table in (overview(record), by_client(record)))])


def notes(record: Record) -> list[str]:
    """What a reader of the tables has to know."""
    texts = _unlike(record)
    if record.best is None and len(contenders(record.variants)) > 1:
        texts.append("No method is called the best: that goes by validation data, and not every run has any.")
    if any(row.interval for row in record.variants.values()):
        texts.append("±: half of the 95% interval over seeds (Student's t).")
    if any(row.against for row in record.variants.values()):
        texts.append(
            "Against the best other: the paired difference and its 95% bootstrap interval over clients; p of a "
            "permutation test over clients, adjusted for all methods (Holm). Which is best goes by validation data."
        )
    texts += [
        f"{title}, which trains on all clients' rows, counts as a reference and not as the best."
        for title in _aside(record)
    ]
    if any(row.beyond is not None for row in record.variants.values()):
        texts.append(
            "On others' rows: the mean of the clients' exported models on the test rows of other clients with the same "
            "labels."
        )
    if any(row.newcomers is not None for row in record.variants.values()):
        texts.append(
            "Newcomers: the mean of the clients that joined after the end; what others trained is frozen, and the rest "
            "is trained on their own rows."
        )
    for rounds in sorted({row.tuned.rounds for row in record.variants.values() if row.tuned and row.tuned.rounds}):
        texts.append(f"Rounds of the runs that chose settings: {rounds}.")
    edges: dict[str, list[str]] = {}
    for row in record.variants.values():
        for key in row.tuned.at_edge if row.tuned else ():
            edges.setdefault(key, []).append(row.title)
    for key, titles in edges.items():
        texts.append(
            f"{key} is at the edge of what was tried, where a wider grid may have a better value: {', '.join(titles)}."
        )
    return texts


def _unlike(record: Record) -> list[str]:
    """Where variants are not compared under the same conditions."""
    rows, texts = list(record.variants.values()), []
    if len({row.evaluated for row in rows}) > 1:
        titles = {way: [row.title for row in rows if row.evaluated == way] for way in ("received", "trained")}
        mixed = "; ".join(f"{way}: {', '.join(of)}" for way, of in titles.items())
        texts.append(
            f"The methods are evaluated differently ({mixed}): received is what the server sends, trained is what a "
            "client trained last. --set run.evaluate=trained (or received) evaluates all the same way."
        )
    if len({tuple(row.seeds) for row in rows}) > 1:
        seeds = "; ".join(f"{row.title}: {', '.join(map(str, row.seeds))}" for row in rows)
        texts.append(f"The methods have different seeds ({seeds}).")
    return texts


def missing(record: Record) -> list[str]:
    """The runs without a result."""
    return [
        f"No result of {' '.join([entry.variant, *entry.settings])}, seed {entry.seed} ({entry.why}): "
        f"{' '.join(entry.reason.split())}"
        for entry in record.missing
    ]


def leader(record: Record) -> str:
    """Which variant has the best mean, as a sentence; nothing where none is known."""
    if record.best is None:
        return ""
    names = "".join(f", {title} aside" for title in _aside(record))
    return f"{record.variants[record.best].title} has the best validation mean{names}."


def _aside(record: Record) -> list[str]:
    """The titles of the references: variants that cannot be the best."""
    federated = contenders(record.variants)
    return [row.title for v, row in record.variants.items() if v not in federated]


def number(value: float | None, metric: str) -> str:
    """A metric's value: in per cent, without the sign, where the metric is a share."""
    if value is None:
        return MISSING
    text = f"{100 * value:.1f}" if metric in PERCENT else f"{value:.3f}"
    return text if float(text) else text.removeprefix("-")


def tail_of(metric: str) -> int:
    """The percentile that nine in ten clients are better than."""
    return 90 if better(metric, 0.0, 1.0) else 10


def p_value(against: Against | None) -> str:
    """Holm's p-value."""
    if against is None:
        return MISSING
    return f"{against.p_holm:.3f}" if against.p_holm >= 0.001 else "<0.001"


def _mean(row: Figures, metric: str) -> str:
    half = None if row.interval is None or row.mean is None else row.interval.high - row.mean
    return number(row.mean, metric) + (f" ± {number(half, metric)}" if half is not None else "")


def _difference(against: Against | None, record: Record) -> str:
    if against is None:
        return MISSING
    low, high = (signed(value, record.primary) for value in against.interval)
    other = record.variants[against.variant].title
    return f"{signed(against.difference, record.primary)} [{low}, {high}] to {other}"


def _alone(against: Against | None, metric: str) -> str:
    return MISSING if against is None else signed(against.difference, metric)


def _value_of(row: Figures, key: str) -> str:
    """What ``key`` was tuned to."""
    values = dict(setting.split("=", 1) for setting in settings_of(row))
    return values.get(key, MISSING)


def settings_of(row: Figures) -> Sequence[str]:
    """What tuning chose for a variant."""
    return row.tuned.settings if row.tuned else ()


def signed(value: float, metric: str) -> str:
    """A difference of a metric, with its sign."""
    text = number(value, metric)
    return text if text.startswith("-") or not float(text) else f"+{text}"


def _seeds(record: Record) -> str:
    counts = sorted({len(row.seeds) for row in record.variants.values()})
    text = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{text} seed{'' if counts == [1] else 's'}"


def _best(values: Sequence[float | None], metric: str) -> list[Cell]:
    return _marked(values, metric, [number(value, metric) for value in values])


def _marked(values: Sequence[float | None], metric: str, texts: Sequence[str]) -> list[Cell]:
    rounded = [None if value is None else round(value, 9) for value in values]  # means differ in their last bits
    best = (min if better(metric, 0.0, 1.0) else max)((value for value in rounded if value is not None), default=None)
    return [Cell(text, value is not None and value == best) for value, text in zip(rounded, texts, strict=True)]


def _costs(values: Sequence[float | None], show: Callable[[float], str]) -> list[Cell]:
    return [Cell(MISSING if value is None else show(value)) for value in values]


def _markdown(table: Grid) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [f"{table.title}.", "", row(table.head), "| --- |" + " ---: |" * (len(table.head) - 1)]
    lines += [row([f"**{cell.text}**" if cell.best else cell.text for cell in cells]) for cells in table.rows]
    return "\n".join([*lines, ""])


def _latex(table: Grid) -> str:
    def row(cells: Sequence[str]) -> str:
        return "  " + " & ".join(cells) + r" \\"

    body = [
        row([f"\\textbf{{{_escaped(c.text)}}}" if c.best else _escaped(c.text) for c in cells]) for cells in table.rows
    ]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{_escaped(table.title)}.}}",
            f"  \\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
            r"  \toprule",
            row([_escaped(name) for name in table.head]),
            r"  \midrule",
            *body,
            r"  \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    text = re.sub(r"[&%$#_{}\\~^]", lambda found: _LATEX[found[0]], text)
    return text.replace("±", r"$\pm$").replace("<", "$<$")
