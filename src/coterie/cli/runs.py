"""The commands that run methods and show the results: ``run``, ``compare``, ``demo`` and ``report``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import console
from coterie.cli.console import Out, Resume, Set, default_folder, resumable, say
from coterie.types import CoterieError

ConfigFile = Annotated[Path, typer.Argument(help="a TOML file; all runs share it")]
RunFolder = Annotated[Path, typer.Argument(help="the folder of a run or a comparison")]
Methods = Annotated[
    str,
    typer.Option(help="methods, separated by commas, or all; fedamole:assignment=static sets an option of a method"),
]
Jobs = Annotated[int, typer.Option(min=1, help="runs at a time, each in a process of its own")]
Tune = Annotated[
    list[str] | None,
    typer.Option(help="section.key=value1,value2: each method takes what is best on validation data; repeatable"),
]
Target = Annotated[float | None, typer.Option(help="count rounds to this mean; default 95% of the best method's")]
Cross = Annotated[
    bool, typer.Option("--cross", help="also score each client's model on other clients' rows with the same labels")
]
Engine = Annotated[str | None, typer.Option(help="the same as --set engine.name=...: local or flower-sim")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (run, compare, demo, report):
        app.command()(command)


def run(
    config: Annotated[Path | None, typer.Argument(help="a TOML file; not needed with --resume")] = None,
    overrides: Set = None,
    folder: Out = None,
    resume: Resume = False,
    engine: Engine = None,
) -> None:
    """Run one method on one federation."""
    from coterie import experiment
    from coterie.cli.progress import listener, show_summary
    from coterie.config.load import check_config, load_config, override
    from coterie.runs.folder import read_config

    overrides = [*(overrides or ()), *([f"engine.name={engine}"] if engine else [])]
    if config is None:
        if not (resume and folder):
            raise CoterieError("give a config file, or --resume with --out and the run's folder")
        raw, root = read_config(folder)
        settings = check_config(override(raw, overrides))
    else:
        settings, root = load_config(config, overrides), config.parent
    name = config.stem if config else "run"
    folder = folder or default_folder(name, settings.method_name, settings.run.seed)
    how = "continue with the same command and --resume"
    with resumable(folder, how), listener(console.out, settings.run.rounds) as listen:
        summary = experiment.run(settings, folder, root=root, resume=resume, listen=listen)
    show_summary(console.out, summary, folder)


def compare(
    config: ConfigFile,
    methods: Methods = "fedlease,fedit,local",
    seeds: Annotated[str, typer.Option(help="seeds, separated by commas")] = "0",
    overrides: Set = None,
    folder: Annotated[Path | None, typer.Option("--out", help="the folder of all runs; default runs/NAME")] = None,
    jobs: Jobs = 1,
    tune: Tune = None,
    tune_seed: Annotated[int | None, typer.Option(min=0, help="the seed of tuning, which is not reported")] = None,
    tune_rounds: Annotated[int | None, typer.Option(min=1, help="the rounds of tuning; default the config's")] = None,
    target: Target = None,
    cross: Cross = False,
) -> None:
    """Run several methods on the same federation, and show them side by side. Run it again to continue."""
    from coterie import comparison
    from coterie.cli.compare import show
    from coterie.cli.progress import lines, listener

    folder = folder or Path("runs") / config.stem
    with resumable(folder, "continue with the same command"):
        compared = comparison.compare(
            config,
            folder,
            methods=methods.split(","),
            seeds=[_seed(text) for text in seeds.split(",")],
            overrides=overrides or (),
            jobs=jobs,
            tune=tune or (),
            tune_with=tune_seed,
            tune_rounds=tune_rounds,
            target=target,
            cross=cross,
            watch=partial(listener if jobs == 1 else lines, console.out),
            say=say,
        )
    show(console.out, compared, folder, target)
    if not compared.done or any(entry.why != "does not fit" for entry in compared.missing):
        raise typer.Exit(1)


def demo(
    folder: Annotated[Path, typer.Option("--out", help="the folder of the demo's runs and pictures")] = Path(
        "runs/demo"
    ),
) -> None:
    """Run FedLEASE, FedIT and local on organisations with different jobs, in a few minutes."""
    say("FedLEASE, FedIT and local on eight organisations; loading the model")
    from coterie.cli.demo import run_demo  # takes seconds

    run_demo(folder, console.out)


def report(
    folder: RunFolder,
    pictures: Annotated[bool, typer.Option("--pictures", help="also write each picture as a PNG")] = False,
) -> None:
    """Write the report of a run again, whether it has finished or not, or the page of a comparison."""
    from coterie.comparison.page import write_page
    from coterie.comparison.record import RECORD
    from coterie.deploy.journal import JOURNAL
    from coterie.report.page import write_report
    from coterie.runs.folder import read_config

    if (folder / RECORD).exists():
        say(f"page: {write_page(folder, pictures)}")
        return
    read_config(folder)
    if (folder / JOURNAL).exists():
        from coterie.deploy.status import write_sites

        write_sites(folder)
    say(f"report: {write_report(folder, pictures)}")


def _seed(text: str) -> int:
    if not text.strip().isdigit():
        raise CoterieError(f"--seeds takes whole numbers separated by commas, not {text!r}")
    return int(text)
