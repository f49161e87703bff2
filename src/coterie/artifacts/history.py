"""What was run: the runs below a folder, what two of them differ in, and all results as a table of pandas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from coterie.config.load import flat, method_name, section_of
from coterie.files import read_json, read_json_as
from coterie.runs.checkpoint import newest_round
from coterie.runs.folder import read_config
from coterie.runs.summary import SUMMARY, Summary, read_summary
from coterie.types import CoterieError

if TYPE_CHECKING:
    from pandas import DataFrame

MANIFEST = "manifest.json"
COLUMNS = ("run", "method", "seed", "state", "metric", "test", "worst", "bytes")


@dataclass(frozen=True)
class RunEntry:
    """A run's folder, its settings by dotted key, and its summary, None until it is finished.

    ``fault`` says what is wrong with a run that cannot be read, which has no summary and perhaps no settings.
    """

    folder: Path
    settings: Mapping[str, object]
    summary: Summary | None
    round: int | None
    fault: str = ""

    @property
    def method(self) -> str:
        return str(self.settings.get("method.name", ""))

    @property
    def seed(self) -> int:
        return int(str(self.settings.get("run.seed", 0)))

    @property
    def state(self) -> str:
        """``finished``, or how far it is; ``damaged`` where it cannot be read."""
        if self.fault:
            return "damaged"
        if self.summary:
            return "finished"
        return f"round {self.round or 0} of {self.settings.get('run.rounds', '?')}"

    @property
    def test(self) -> float | None:
        """The mean over clients of the metric that validation chose by, on test rows."""
        return self.summary.mean.get("test", {}).get(self.summary.primary) if self.summary else None


def runs_in(folder: Path) -> list[RunEntry]:
    """Every run in ``folder`` and below it, by name; one that cannot be read says why.

    Raises :class:`CoterieError` where there is none.
    """
    found = sorted(path.parent for path in folder.rglob("config.json") if _is_run(path))
    if not found:
        raise CoterieError(f"there is no run in {folder} or below it")
    return [_entry_or_fault(path) for path in found]


def entry_of(folder: Path) -> RunEntry:
    """The run in ``folder``. Raises :class:`CoterieError` where there is none, and for one that cannot be read."""
    return _with_summary(_begun(folder))


def _entry_or_fault(folder: Path) -> RunEntry:
    entry = RunEntry(folder, {}, None, None)
    try:
        entry = _begun(folder)
        return _with_summary(entry)
    except CoterieError as fault:
        return replace(entry, fault=str(fault))


def _begun(folder: Path) -> RunEntry:
    raw, _ = read_config(folder)
    settings = dict(flat(raw))
    settings.setdefault("method.name", method_name(raw))
    settings.setdefault("run.seed", section_of(raw, "run").get("seed", 0))
    return RunEntry(folder, settings, None, newest_round(folder / "checkpoints"))


def _with_summary(entry: RunEntry) -> RunEntry:
    path = entry.folder / SUMMARY
    return replace(entry, summary=read_summary(path)) if path.is_file() else entry


def chosen(entries: Sequence[RunEntry], filters: Sequence[str], sort: str) -> list[RunEntry]:
    """The runs with every ``section.key=value``, sorted by a column of :data:`COLUMNS`, best and largest first.

    Raises :class:`CoterieError` for a filter of another form, and for an unknown column.
    """
    wanted = [_filter(text) for text in filters]
    left = [e for e in entries if all(_shown(e.settings.get(key)) == value for key, value in wanted)]
    if sort not in COLUMNS:
        raise CoterieError(f"--sort {sort!r}: the columns are {', '.join(COLUMNS)}")
    if sort in ("run", "method", "seed", "state", "metric"):
        keys = {"run": lambda e: str(e.folder), "method": lambda e: e.method, "seed": lambda e: e.seed}
        return sorted(left, key=keys.get(sort, lambda e: e.state if sort == "state" else _metric(e)))
    return sorted(left, key=lambda e: (_number(e, sort) is None, -(_number(e, sort) or 0.0)))


def _number(entry: RunEntry, column: str) -> float | None:
    summary = entry.summary
    if summary is None:
        return None
    if column == "worst":
        return summary.worst.value if summary.worst else None
    return float(summary.bytes.up + summary.bytes.down) if column == "bytes" else entry.test


def _metric(entry: RunEntry) -> str:
    return entry.summary.primary if entry.summary else ""


@dataclass(frozen=True)
class Difference:
    """A setting, a fact of the data or a result that two runs have not in common: its name, and its value in each."""

    name: str
    before: str
    after: str


def differences(one: Path, other: Path) -> dict[str, list[Difference]]:
    """What two runs differ in: ``settings``, ``data`` and ``results``, each by dotted name."""
    a, b = entry_of(one), entry_of(other)
    return {
        "settings": _differing(a.settings, b.settings),
        "data": _differing(_manifest(one), _manifest(other)),
        "results": _differing(_results(a.summary), _results(b.summary)),
    }


def results(folder: Path | str) -> DataFrame:
    """A row for every client of every finished run in ``folder`` and below it, as a pandas DataFrame.

    The columns are ``run``, ``method``, ``seed``, ``best_round``, ``client``, ``group``, the client's rows
    (``num_train`` ...), its bytes, and its metrics (``test_accuracy``, ``validation_loss`` ...).
    Raises :class:`CoterieError` without pandas, where there is no run, and for a run that cannot be read.
    """
    try:
        from pandas import DataFrame
    except ImportError as fault:
        raise CoterieError("coterie.results needs pandas: pip install pandas") from fault
    return DataFrame([row for entry in runs_in(Path(folder)) for row in _rows(Path(folder), entry)])


def _rows(folder: Path, entry: RunEntry) -> Iterator[dict[str, object]]:
    if entry.fault:
        raise CoterieError(entry.fault)
    if entry.summary is None:
        return
    run = {
        "run": str(entry.folder.relative_to(folder)),
        "method": entry.method,
        "seed": entry.seed,
        "best_round": entry.summary.best_round,
    }
    for client, of in entry.summary.clients.items():
        counts = {name: getattr(of, name) for name in ("num_train", "num_validation", "num_test")}
        traffic = {"bytes_up": of.bytes_up, "bytes_down": of.bytes_down}
        metrics = {f"test_{name}": value for name, value in of.test.items()}
        metrics |= {f"validation_{name}": value for name, value in of.validation.items()}
        yield {**run, "client": client, "group": of.group, **counts, **traffic, **metrics}


def _is_run(path: Path) -> bool:
    """Whether a config.json is a run's: a model's has that name too. A damaged one may be."""
    try:
        content = read_json(path)
    except CoterieError:
        return True
    return isinstance(content, dict) and {"root", "config"} <= content.keys()


def _manifest(folder: Path) -> Mapping[str, object]:
    path = folder / MANIFEST
    return dict(flat(read_json_as(path, _MANIFEST))) if path.is_file() else {}


def _results(summary: Summary | None) -> Mapping[str, object]:
    if summary is None:
        return {"state": "not finished"}
    by_client = {f"{client}.{name}": value for client, of in summary.clients.items() for name, value in of.test.items()}
    means = {f"mean.{split}.{name}": v for split, of in summary.mean.items() for name, v in of.items()}
    traffic = {"bytes.up": summary.bytes.up, "bytes.down": summary.bytes.down}
    return {"best_round": summary.best_round, **means, **by_client, **traffic}


def _differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[Difference]:
    names = [name for name in {**one, **other} if one.get(name, _NONE) != other.get(name, _NONE)]
    return [Difference(name, _shown(one.get(name, _NONE)), _shown(other.get(name, _NONE))) for name in sorted(names)]


_NONE = object()


def _shown(value: object) -> str:
    if value is _NONE:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _filter(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise CoterieError(f"--where {text!r} is not of the form section.key=value")
    return key.strip(), value.strip()


_MANIFEST: TypeAdapter[Mapping[str, object]] = TypeAdapter(dict[str, object])
