"""Makes ``report.html`` of a run folder: one file with its pictures inside, no script, nothing fetched.

Reads what the run wrote and nothing else, so a report can be made again at any time, also of a run that is still going
or was killed. A finding of the method is shown by the module of this package that names its type as ``FINDING``; any
other state of the method, and of later versions, becomes plain tables.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from coterie import report
from coterie.files import write_atomic
from coterie.methods.findings import Finding
from coterie.report import plots
from coterie.report.plots import Picture
from coterie.report.privacy import privacy_tables
from coterie.report.read import Run, read_run
from coterie.report.results import result_pictures, sample_tables
from coterie.report.robust import robust_tables
from coterie.report.tables import PERCENT, Table, label, show, tables, words
from coterie.report.usage import usage_pictures
from coterie.runs.folder import REPORT
from coterie.runs.summary import Summary
from coterie.text import printable

PICTURE_FOLDER = "pictures"

Show = Callable[[Finding, Run], Iterator[Picture | Table]]


def write_report(folder: Path, pictures: bool = False, summary: Summary | None = None) -> Path:
    """Write ``report.html`` in ``folder`` (with ``pictures`` each picture as a PNG too) and return its path.

    ``summary`` stands for ``summary.json`` where that is not written yet. Raises :class:`CoterieError` for a folder
    that holds no run and for a file in it that is damaged.
    """
    run = read_run(folder, summary)
    results = list(result_pictures(run))
    shown = [item for finding in run.findings for item in _shown(finding, run)]
    method = [*(item for item in shown if isinstance(item, Picture)), *usage_pictures(run)]
    if pictures:
        for picture in [*results, *method]:
            plots.png(picture.figure, folder / PICTURE_FOLDER / f"{picture.name}.png")
    page = (
        environment()
        .get_template("report.html.jinja")
        .render(
            run=run,
            results=results,
            samples=sample_tables(run),
            method=method,
            state=[*privacy_tables(run), *robust_tables(run), *(item for item in shown if isinstance(item, Table))],
            settings=tables(run.config, "Settings"),
            data=[*tables(run.sites, "Over the network"), *tables(run.manifest, "Data")],
            machine=_machine(run),
        )
    )
    write_atomic(folder / REPORT, page.encode())
    return folder / REPORT


def _shown(finding: Finding, run: Run) -> Iterator[Picture | Table]:
    """The pictures and tables of ``finding``; none if no module shows its type."""
    show_one = _modules().get(type(finding))
    return show_one(finding, run) if show_one else iter(())


@cache
def _modules() -> dict[type[Finding], Show]:
    """The function that shows each type of finding: ``show`` of the modules of this package that define ``FINDING``."""
    modules = [importlib.import_module(f"{report.__name__}.{m.name}") for m in pkgutil.iter_modules(report.__path__)]
    return {module.FINDING: module.show for module in modules if hasattr(module, "FINDING")}


def _machine(run: Run) -> list[Table]:
    if run.summary is None:
        return []
    return [*tables(run.summary.versions, "Versions"), *tables(run.summary.machine or {}, "Machine")]


def _visible(value: object) -> object:
    """Text without characters that would hide, or turn the direction of, what is around them."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def environment() -> Environment:
    """What renders the pages: templates of this package, and filters that make values readable."""
    env = Environment(
        loader=PackageLoader("coterie.report"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"show": show, "words": words, "label": label}
    env.filters["svg"] = lambda drawn: Markup(plots.svg(drawn.figure, drawn.name))
    env.tests["percent"] = PERCENT.__contains__
    return env
