"""A whole run from a config: data, engine, rounds, and what a run leaves behind.

:func:`run` is what ``coterie run`` does, and ``coterie.run`` in Python:

    import coterie
    summary = coterie.run("clinic.toml", "runs/clinic")
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from coterie.adapters.about import About, Texts
from coterie.config.load import flat, load_config
from coterie.config.sections import Config
from coterie.data.clients import load_data
from coterie.data.rows import FederatedData
from coterie.engines.base import Engine
from coterie.engines.registry import engine_named
from coterie.files import write_json
from coterie.machine import default_threads, reset_peak_memory
from coterie.methods.base import Method
from coterie.runs.checkpoint import Checkpoint
from coterie.runs.cost import check_continued, check_planned_cost
from coterie.runs.events import METRICS, Listener, Note, Ready, read_events
from coterie.runs.extend import extend, rounds_before
from coterie.runs.folder import REPORT, check_folder, claim, explain_full_disk, lock_folder, plain
from coterie.runs.private import Private
from coterie.runs.rounds import Runner
from coterie.runs.settings import RoundSettings
from coterie.runs.summary import PRIMARY, SUMMARY, Summary, read_summary, summarise
from coterie.runs.trackers import Tracked, check_tracker
from coterie.runs.tracking import tracking
from coterie.types import Bank, BaseSpec, ClientInfo, CoterieError, ExportedAs, Part, Tensors

# What drawing and writing a page raises, beside the faults of this package.
_REPORT_FAULTS = (
    CoterieError,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Opened:
    """A run that is ready to start: its method, its engine, its data."""

    config: Config
    method: Method
    engine: Engine
    federation: FederatedData
    root: Path


def run(
    config: Config | Path | str,
    out: Path | str,
    *,
    root: Path | None = None,
    resume: bool = False,
    listen: Listener = lambda event: None,
    cache: dict[str, object] | None = None,
) -> Summary:
    """Run ``config`` in the folder ``out`` to its end and return its summary.

    ``config`` is a config or the path of its TOML file. Relative paths in it start at ``root``, by default the file's
    folder, or else the working folder. ``cache`` lets several runs in one process share what is loaded (the base).
    Everything is checked before the folder is made. Raises :class:`CoterieError`: see :mod:`coterie.runs.folder` and
    :class:`coterie.runs.rounds.Runner`.
    """
    folder = Path(out)
    if not isinstance(config, Config):
        root = Path(config).parent if root is None else root
        config = load_config(Path(config))
    check_folder(folder, config, resume)
    before = rounds_before(folder, config) if resume else None
    if resume and before is None and (folder / SUMMARY).exists():
        listen(Note(f"{folder} is finished; nothing to do"))
        if not (folder / REPORT).exists():  # the run was stopped before it, or it failed
            _report(folder, listen)
        return read_summary(folder / SUMMARY)
    opened = open_run(config, folder, root or Path.cwd(), cache if cache is not None else {})
    with closing(opened.engine):
        opened.method.init(opened.engine.spec, opened.engine.clients)
        warned = privacy_warnings(opened, resume, before)
        reset_peak_memory()
        return _carry_out(opened, folder, resume, listen, before, warned)


def privacy_warnings(opened: Opened, begun: bool, before: int | None = None) -> list[str]:
    """What has to be said of the guarantee of a run that has ``begun``.

    ``before``: the rounds that it has so far, where it gets more. Raises :class:`CoterieError` for a guarantee that
    protects nobody: of a new run, and of one that only more rounds make so.
    """
    method, rounds = opened.method, rounds_of(opened.config)
    if not method.plan.privacy.active:
        return []
    clients = {client.id: client.num_train for client in opened.engine.clients}
    if begun:
        return check_continued(method, clients, rounds, before)
    check_planned_cost(method, clients, rounds)
    return []


def _carry_out(
    opened: Opened, folder: Path, resume: bool, listen: Listener, before: int | None, warned: Sequence[str]
) -> Summary:
    """Take the folder, run the rounds, finish. ``before``: the rounds that the run has so far, where it gets more."""
    config, federation = opened.config, opened.federation
    with lock_folder(folder), explain_full_disk(folder):
        claim(folder, config, opened.root, federation.manifest, resume)
        if before is not None:
            extend(folder, config, before, opened.method.State)
        with tracked(config, folder, resume, listen) as listening:
            listening(Ready(len(opened.engine.clients), config.run.rounds, str(folder)))
            rounds, notes = rounds_of(config), federation.notes
            runner = Runner(opened.method, opened.engine, rounds, folder, listening, notes, warned=warned)
            exported = runner.exported(runner.run())
            return finish(opened, exported, folder, listening, runner.private)


def tracked(config: Config, folder: Path, resumed: bool, listen: Listener) -> AbstractContextManager[Listener]:
    """``listen``, and beside it the trackers of ``[run] tracking``, for a ``with`` block (:func:`tracking`)."""
    return tracking(config.run.tracking, Tracked(folder, dict(flat(plain(config))), resumed), listen)


def open_run(config: Config, folder: Path, root: Path, cache: dict[str, object]) -> Opened:
    """The run's method, engine and data, loaded and checked, and the threads set; nothing is written."""
    set_threads(config)
    for name in config.run.tracking:
        check_tracker(name)
    method = config.make_method(root)
    federation = load_data(config.data, config.task.kind, config.run.seed, root)
    engine = engine_named(config.engine.name)(config, federation, folder, root, cache)
    return Opened(config, method, engine, federation, root)


def finish(
    opened: Opened, exported: Checkpoint[object], folder: Path, listen: Listener, private: Private | None = None
) -> Summary:
    """Write the experts and the clients' bundles of the round ``exported``, ``summary.json`` and the report.

    Returns the summary.
    """

    config, method, engine = opened.config, opened.method, opened.engine
    summary = summarise(
        read_events(folder / METRICS),
        engine.clients,
        method=method.name,
        title=method.title,
        evaluated=config.evaluated,
        task=config.task.kind,
        seed=config.run.seed,
        exported_round=exported.rnd,
    )
    summary = replace(summary, privacy=private.guarantee() if private else None)
    as_set = config.run.export == "last" or exported.rnd == summary.best_round
    about = about_export(config, opened.root, exported.rnd, config.run.export if as_set else "last")
    _export(opened, exported, about, folder)
    if private:
        private.finish()  # first: nothing that is stopped after the summary is done again
    write_json(folder / SUMMARY, summary.to_json())  # a run with a summary is finished
    _report(folder, listen)
    return summary


def _report(folder: Path, listen: Listener) -> None:
    """Write the report. A report that fails, whatever in the data it fails on, costs the run nothing but the page."""
    from coterie.report.page import write_report  # imports matplotlib

    try:
        write_report(folder)
    except _REPORT_FAULTS as fault:
        text = f"the report could not be written ({type(fault).__name__}: {fault}); {SUMMARY} has the results"
        listen(Note(f"{text}. Once the cause is fixed: coterie report {folder}"))


def about_export(config: Config, root: Path, rnd: int, export: ExportedAs) -> About:
    """What a reader must know of what is exported of round ``rnd``."""
    from coterie.compute.loading import chat_template_of
    from coterie.nn.locate import folder_of, shared_name

    name, here = (find(config.model.path, root) for find in (shared_name, folder_of))
    return About(
        config.method_name,
        rnd,
        export,
        config.task.kind,
        name,
        here,
        max_length=config.model.max_length,
        chat_template=chat_template_of(config, root),
        texts=_about_texts(config),
    )


def _about_texts(config: Config) -> Texts | None:
    """How a run of generation treats texts; None for other tasks."""
    task = config.task
    if task.kind != "generation":
        return None
    scores = tuple(name for name in task.scores if ":" not in name) if task.generate else ()
    return Texts(
        task.turns,
        task.objective,
        task.beta,
        scores,
        task.max_new_tokens,
        task.temperature,
        task.top_p,
        config.run.seed,
    )


def about_base(about: About, spec: BaseSpec, tensors: Tensors) -> About:
    """``about`` with the digest of the base's weights where ``tensors`` adapt them."""
    from coterie.nn.weights import fingerprint

    modules = {key.module for key in tensors if key.part is Part.A}
    return replace(about, base_sha256=fingerprint({t.name: t.weights for t in spec.targets}, modules))


def _export(opened: Opened, exported: Checkpoint[object], about: About, folder: Path) -> None:
    from coterie.adapters.write import write_adapter

    config, method, engine = opened.config, opened.method, opened.engine
    for name, tensors in method.experts(exported.state).items():
        write_adapter(
            folder / "experts" / name,
            tensors,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            about=about_base(about, engine.spec, tensors),
            fan_in_fan_out=_transposed(engine.spec),
        )
    infos = {client.id: client for client in engine.clients}
    state = method.admit(exported.state, engine.clients)  # clients may have come after that round
    instructions = method.configure(state, engine.clients, exported.rnd + 1)
    for client, bank in engine.banks(method, instructions, exported.rnd, about.export):
        write_own(folder / "clients" / client, bank, about, engine.spec, infos[client])


def write_own(folder: Path, bank: Bank, about: About, spec: BaseSpec, client: ClientInfo) -> None:
    """Write the bundle of a client: its ``bank``, with what ``about`` and the client say of it."""
    from coterie.adapters.bundle import write_bundle

    own = replace(about_base(about, spec, bank.tensors), client=client.id, labels=client.labels)
    write_bundle(folder, bank, own, fan_in_fan_out=_transposed(spec))


def _transposed(spec: BaseSpec) -> bool:
    return any(target.transposed for target in spec.targets)


def set_threads(config: Config) -> None:
    """Use as many CPU threads as the config says; results on a CPU depend on their number in the last bits."""
    torch.set_num_threads(config.engine.threads or default_threads())


def rounds_of(config: Config) -> RoundSettings:
    """The settings of the rounds in ``config``."""
    run = config.run
    return RoundSettings(
        run.rounds,
        run.seed,
        run.cohort,
        run.quorum,
        run.norm_bound,
        run.update_bound,
        run.max_share,
        run.evaluate_every,
        run.keep_checkpoints,
        run.export,
        run.sampling,
        PRIMARY[config.task.kind],
    )
