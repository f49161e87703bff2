"""The commands of a real federation: ``serve``, ``join``, ``status``, ``site check`` and ``keys``."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli import console
from coterie.cli.console import Markdown, Out, Resume, Set, default_folder, resumable, say, show_checks, show_keys
from coterie.types import CoterieError

if TYPE_CHECKING:
    from coterie.config.load import Raw
    from coterie.runs.events import Event

keys = typer.Typer(no_args_is_help=True, help="Keys of a federation: CA, server certificate, a key pair per site.")
site = typer.Typer(no_args_is_help=True, help="Check a site's own file, list its keys, write its experts.")

Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="no TLS, no authentication: for one machine, or a private network"),
]
SiteFile = Annotated[Path, typer.Argument(help="SITE.toml")]
KeyFolder = Annotated[Path, typer.Argument(help="the folder of keys")]


def register(app: typer.Typer) -> None:
    """Add all commands to the command line."""
    app.command()(serve)
    app.command()(join)
    app.command()(status)
    app.add_typer(site, name="site")
    app.add_typer(keys, name="keys")


def serve(
    config: Annotated[Path, typer.Argument(help="TOML file with \\[federation]")],
    overrides: Set = None,
    folder: Out = None,
    resume: Resume = False,
    insecure: Insecure = False,
    superlink: Annotated[str | None, typer.Option(help="HOST:PORT of a SuperLink that is already running")] = None,
    onboard: Annotated[
        str, typer.Option(help="of a finished run: ids of sites that get a model of it now, separated by commas")
    ] = "",
) -> None:
    """Run a federation of sites: wait for them, run the rounds, write the experts and the report."""
    _need_flower()
    from coterie.cli.progress import listener, show_summary
    from coterie.config.load import load_raw, override
    from coterie.deploy.agreement import federation_config
    from coterie.deploy.serve import serve as run

    settings = federation_config(_with_sites(override(load_raw(config), overrides or ()), config))
    folder = folder or default_folder(config.stem, settings.method_name, settings.run.seed)
    how = "continue with the same command and --resume"
    with resumable(folder, how), _ended_by_signal(), listener(console.out, settings.run.rounds) as show:

        def listen(event: Event) -> None:
            _say(event)
            show(event)

        summary = run(
            settings,
            folder,
            root=config.parent,
            resume=resume,
            insecure=insecure,
            superlink=superlink,
            onboard=_listed(onboard),
            listen=listen,
        )
    if onboard:
        return
    show_summary(console.out, summary, folder)


def _with_sites(raw: Raw, path: Path) -> Raw:
    """``raw``. Raises :class:`CoterieError` for a simulation's config, which any site could join."""
    if "federation" not in raw:
        raise CoterieError(
            f"{path} has no [federation]: it is for a simulation (`coterie run`); add it, with sites, to serve it"
        )
    return raw


def join(path: SiteFile, insecure: Insecure = False) -> None:
    """Take part in a federation with this site's data, until stopped."""
    _need_flower()
    from coterie.deploy.site import join as run
    from coterie.deploy.site import load

    settings, root = load(path)
    state = (root / settings.site.state).resolve()
    say(f"{settings.site.id} joins {settings.site.server}; log: {state / 'site.log'}")
    with _ended_by_signal():
        run(path, insecure)


def status(folder: Annotated[Path, typer.Argument(help="the folder of the server's run")]) -> None:
    """Show who took part in which round, why others did not, and the bytes and seconds of each site."""
    from coterie.cli.status import show
    from coterie.deploy.journal import JOURNAL
    from coterie.deploy.status import read_status

    if not (folder / JOURNAL).exists():
        raise CoterieError(f"{folder} was not written by `coterie serve`: it has no {JOURNAL}")
    show(console.out, read_status(folder))


@site.command("check")
def check_site(
    path: SiteFile,
    config: Annotated[
        Path | None, typer.Option(help="the server's config; without it, the defaults of a classification are tried")
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Check versions, keys, server, data and model before joining. The exit code is 1 if something is wrong."""
    from coterie.deploy.site_check import check

    results = list(check(path, config, insecure))
    marks = {True: "[green]ok[/]", False: "[red]no[/]"}
    show_checks([(marks[result.ok], result.name, result.value, result.fix) for result in results])
    raise typer.Exit(int(not all(result.ok for result in results)))


@site.command("export")
def export_site(
    path: SiteFile,
    run: Annotated[str, typer.Option(help="the run's folder in the site's state; by default the latest")] = "",
) -> None:
    """Write this site's own experts, as the end of a run does: for a run that ended early, or a disk that was full."""
    from coterie.deploy.site_export import export

    say(f"{export(path, run)}: the experts of this site")


@site.command("config")
def site_config(markdown: Markdown = False) -> None:
    """List every key of a SITE.toml with its type, default and meaning."""
    from coterie.config.describe import describe_site

    show_keys(list(describe_site()), markdown)


@keys.command("init")
def init_keys(
    folder: KeyFolder,
    sites: Annotated[str, typer.Option(help="ids of the sites, separated by commas")] = "",
    host: Annotated[str, typer.Option(help="addresses at which sites reach the server, separated by commas")] = "",
) -> None:
    """Make a CA, the server's certificate and a key pair for each site."""
    _need_flower()
    from coterie.deploy.keys import init_keys as make

    make(folder, _listed(sites), _listed(host))
    lines = [f"{folder / 'ca.crt'}: give it to every site", f"{folder / 'ca.key'}: keep it off the server"]
    lines += [f"{folder / 'sites' / name}: give it only to {name}, then delete it here" for name in _listed(sites)]
    for line in lines:
        say(line)


@keys.command("add")
def add_key(
    folder: KeyFolder,
    name: Annotated[str, typer.Argument(help="id of the site")],
    public: Annotated[Path | None, typer.Option(help="its public key; without it a key pair is made")] = None,
) -> None:
    """Add one more site. The server accepts it from its next start."""
    _need_flower()
    from coterie.deploy.keys import add_site

    add_site(folder, name, public)
    say(f"{folder / 'sites' / name}.pub")


@keys.command("site")
def make_site_key(
    path: Annotated[Path, typer.Argument(help="file for the private key; .pub goes beside it")],
) -> None:
    """At a site: make its key pair, so that the private half never leaves the site."""
    _need_flower()
    from coterie.deploy.keys import site_key

    site_key(path)
    say(f"give {path}.pub to whoever runs the server")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _need_flower() -> None:
    from coterie.machine import version

    if version("flwr") is None:
        raise CoterieError("this needs Flower: pip install 'coterie[flower]'")


def _say(event: Event) -> None:
    """Print what the network does; the listener of every run prints the rounds."""
    from coterie.deploy.events import Back, Joined, Late, Onboarded, Refused

    match event:
        case Back():
            say(f"{event.client} is back")
        case Joined():
            say(f"{event.client} joined with {event.rows} rows")
        case Refused():
            say(f"node {event.node} was refused: {event.reason}")
        case Late():
            say(event.text)
        case Onboarded():
            change = [f"{m} {event.before[m]:.3f} -> {v:.3f}" for m, v in event.after.items() if m in event.before]
            say(f"{event.client} has its model: {', '.join(change) or 'it sends no metrics'}")


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """End a command on SIGTERM as on Ctrl-C, together with everything that it started."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
