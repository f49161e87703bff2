"""A whole comparison: settings are tuned, runs are carried out, and what there is is written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from coterie.comparison.collect import update
from coterie.comparison.cross import evaluate_cross, read_cross
from coterie.comparison.figures import Comparison
from coterie.comparison.jobs import FAULTS, Ended, Job, Missing, Watch, finished, run_here, silent
from coterie.comparison.newcomers import onboard_newcomers, read_newcomers
from coterie.comparison.processes import run_apart
from coterie.comparison.tuning import Choice, Grid, choose, grid_of, rounds_of_tuning, tune_seed
from coterie.comparison.variants import ALL, Point, config_for, variants_of
from coterie.config.load import Raw, load_raw, override, section_of
from coterie.types import CoterieError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Study:
    """What to compare: ``variants`` with ``seeds`` on the federation of ``raw``, each run in a folder below ``folder``.

    Relative paths in ``raw`` start at ``root``. ``jobs`` processes work at a time; with 1 the runs are in this process.
    Tuning uses the seed ``tune_with`` and ``tune_rounds`` rounds, by default the config's. ``choosing`` says that the
    variants are all methods, of which some may not fit the task. ``target`` is a mean that rounds are counted to. With
    ``cross`` every client's model is also scored on other clients' test rows.
    """

    raw: Raw
    variants: Sequence[str]
    seeds: Sequence[int]
    folder: Path
    root: Path
    jobs: int = 1
    grid: Grid = field(default_factory=lambda: Grid({}))
    tune_with: int | None = None
    tune_rounds: int | None = None
    target: float | None = None
    choosing: bool = False
    cross: bool = False


def compare(
    config: Path | str,
    out: Path | str,
    *,
    methods: Sequence[str] = ("fedlease", "fedit", "local"),
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
    jobs: int = 1,
    tune: Sequence[str] = (),
    tune_with: int | None = None,
    tune_rounds: int | None = None,
    target: float | None = None,
    cross: bool = False,
    watch: Watch = silent,
    say: Say = lambda text: None,
) -> Comparison:
    """Run every one of ``methods`` with every seed on the federation of a TOML file, each in a folder below ``out``.

    ``all`` stands for every registered method that fits the task. A run that has finished is reused, one that was cut
    short continues, one that fails does not stop the others. ``jobs`` runs are carried out at a time. ``tune`` lists
    settings with the values to try, as ``train.learning_rate=1e-3,2e-3``: each method takes what is best on validation
    data with the seed ``tune_with``, in runs of ``tune_rounds`` rounds (default: the config's). With ``cross`` every
    client's model is also scored on the test rows of other clients with the same labels. Clients that ``[data]
    newcomers`` names join every run after its end. Writes ``compare.json``, and ``compare.html`` with its tables.
    Raises :class:`CoterieError` for settings that cannot work.
    """
    path = Path(config)
    study = Study(
        override(load_raw(path), overrides), variants_of(methods), tuple(dict.fromkeys(seeds)), Path(out), path.parent,
        jobs=jobs, grid=grid_of(tune), tune_with=tune_with, tune_rounds=tune_rounds, target=target,
        choosing=ALL in {name.strip() for name in methods}, cross=cross,
    )  # fmt: skip
    return carry_out(study, watch, say)


def carry_out(study: Study, watch: Watch = silent, say: Say = lambda text: None) -> Comparison:
    """The comparison, with the runs that are there already.

    Writes ``compare.json`` after every run, and at the end the page and the tables.
    """
    rounds = rounds_of_tuning(study.tune_rounds, study.grid)
    choices, missing = _tune(study, rounds, watch, say) if study.grid.values else ({}, [])
    tuned_out = {entry.variant for entry in missing}
    points = {v: choices[v].settings if v in choices else () for v in study.variants if v not in tuned_out}
    jobs, unfit = _jobs(study, ((v, s, point) for s in study.seeds for v, point in points.items()))
    missing += unfit
    with closing(_ended(study, jobs, watch, say)) as all_ended:
        for ended in all_ended:
            missing += [ended.missing] if ended.missing else []
            if not ended.reused:
                _update(study, jobs, choices, missing)
    comparison = _update(study, jobs, choices, missing)
    if _afterwards(study, comparison, say):
        comparison = _update(study, jobs, choices, missing)
    if comparison.done:
        _page(study.folder, say)
    return comparison


def _page(folder: Path, say: Say) -> None:
    """Write the page. One that fails costs the comparison nothing else."""
    from coterie.comparison.page import write_page  # imports matplotlib

    try:
        write_page(folder)
    except FAULTS as fault:
        text = f"the page could not be written ({type(fault).__name__}: {fault}); compare.json has the figures"
        say(f"{text}. Once the cause is fixed: coterie report {folder}")


def _update(study: Study, jobs: Sequence[Job], choices: Mapping[str, Choice], missing: Sequence[Missing]) -> Comparison:
    return update(study.raw, study.folder, study.root, jobs, choices, missing, study.target)


def _afterwards(study: Study, comparison: Comparison, say: Say) -> bool:
    """Measure what is measured after the runs, where that is still to do. Whether there was anything."""
    cache: dict[str, object] = {}
    runs = [run.folder for by_seed in comparison.done.values() for run in by_seed.values()]
    newcomers = section_of(study.raw, "data").get("newcomers")
    left: list[tuple[Path, _After]] = []
    left += [(folder, _CROSS) for folder in runs if study.cross and read_cross(folder) is None]
    left += [(folder, _NEWCOMERS) for folder in runs if newcomers and read_newcomers(folder) is None]
    for folder, after in left:
        say(f"{folder.name}: {after.what}")
        try:
            after.measure(folder, cache)
        except FAULTS as fault:
            kind = "" if isinstance(fault, CoterieError) else f"{type(fault).__name__}: "
            say(f"{folder.name}: {after.not_done}: {kind}{fault}")
    return bool(left)


@dataclass(frozen=True)
class _After:
    """What is measured after a run, in words where it is and where it cannot be."""

    measure: Callable[[Path, dict[str, object]], object]
    what: str
    not_done: str


_CROSS = _After(evaluate_cross, "every client's model on other clients' rows", "not evaluated on other clients' rows")
_NEWCOMERS = _After(onboard_newcomers, "newcomers join", "newcomers cannot join")


def _tune(study: Study, rounds: Point, watch: Watch, say: Say) -> tuple[dict[str, Choice], list[Missing]]:
    """What each variant takes from the grid, and the variants without a choice, with the reason.

    ``rounds`` is a setting of every run of tuning, and in its folder's name: with others it is another run.
    """
    seed = tune_seed(study.tune_with, study.seeds)
    points = {variant: study.grid.points(variant) for variant in study.variants}
    several = ((v, seed, (*point, *rounds)) for v, mine in points.items() for point in mine if len(mine) > 1)
    jobs, faults = _jobs(study, several)
    tried: dict[str, dict[Point, Ended]] = {}
    with closing(_ended(study, jobs, watch, say)) as all_ended:
        for ended in all_ended:
            _validation(ended)  # the first run shows whether there is any
            tried.setdefault(ended.job.variant, {})[ended.job.point] = ended
            faults += [ended.missing] if ended.missing else []
    choices, missing = {}, []
    for variant, mine in points.items():
        choice = _choice(study.grid, seed, [tried.get(variant, {}).get((*point, *rounds)) for point in mine], mine)
        own = [fault for fault in faults if fault.variant == variant]
        unknown = [fault for fault in own if fault.why in ("in use", "other config")]  # it might have been the best
        if choice is None or unknown:
            missing.append(_of_tuning((unknown or own)[0]))
        elif choice.settings:
            choices[variant] = replace(choice, rounds=study.tune_rounds if choice.tried else None)
            edge = f" ({', '.join(choice.at_edge)} at the edge of the grid)" if choice.at_edge else ""
            say(f"{variant}: tuning chose {' '.join(choice.settings)}{edge}")
    return choices, missing


def _of_tuning(fault: Missing) -> Missing:
    """``fault``, as one that no later comparison takes for a reported run."""
    return replace(fault, why="tuning") if fault.why == "other config" else fault


def _choice(grid: Grid, seed: int, ended: Sequence[Ended | None], points: Sequence[Point]) -> Choice | None:
    if len(points) == 1:
        return Choice(points[0], seed, {})
    metric = next((e.summary.primary for e in ended if e and e.summary), "")
    values = {point: _validation(e) if e else None for point, e in zip(points, ended, strict=True)}
    return choose(grid, seed, metric, values)


def _validation(ended: Ended) -> float | None:
    if ended.summary is None:
        return None
    value = ended.summary.mean.get("validation", {}).get(ended.summary.primary)
    if value is None:
        raise CoterieError(
            "--tune chooses on validation data, and there are none; give validation files, or set [data] "
            "validation_fraction"
        )
    return value


def _jobs(study: Study, wanted: Iterable[tuple[str, int, Point]]) -> tuple[list[Job], list[Missing]]:
    """The runs to carry out, and those that the config does not fit: an error, unless all methods were requested."""
    jobs: list[Job] = []
    unfit: list[Missing] = []
    for variant, seed, point in wanted:
        try:
            config = config_for(study.raw, variant, seed, point)
        except CoterieError as fault:
            if not study.choosing:
                raise
            unfit.append(Missing(variant, seed, point, "does not fit", str(fault)))
            continue
        jobs.append(Job(variant, seed, point, config, study.folder, study.root))
    if unfit and not jobs:
        raise CoterieError(unfit[0].reason)
    return jobs, unfit


def _ended(study: Study, jobs: Sequence[Job], watch: Watch, say: Say) -> Generator[Ended, None, None]:
    """Every job as it ends: first those that had finished before. Closing it stops what is at work."""
    had = {job.name: ended for job in jobs if (ended := finished(job)) is not None}
    if reused := sum(ended.summary is not None for ended in had.values()):
        say(f"{reused} of {len(jobs)} runs have finished already and are reused")
    left = [job for job in jobs if job.name not in had]
    for ended in had.values():
        yield _reported(study, ended, say)
    running = run_here(left, watch) if study.jobs == 1 else run_apart(left, study.jobs, watch)
    with closing(running):
        for number, ended in enumerate(running, start=len(had) + 1):
            if ended.summary:
                say(f"{ended.job.label} has finished ({number} of {len(jobs)} runs)")
            yield _reported(study, ended, say)


def _reported(study: Study, ended: Ended, say: Say) -> Ended:
    if ended.missing is None:
        return ended
    fault = ended.missing
    if fault.why == "does not fit" and not study.choosing:
        fault = replace(fault, why="failed")
    say(f"{ended.job.label} {_SAID[fault.why]}: {fault.reason}")
    return replace(ended, result=fault)


_SAID: Mapping[str, str] = {
    "failed": "failed",
    "does not fit": "is left out",
    "in use": "is skipped",
    "other config": "is not reused",
}
