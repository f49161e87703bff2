"""The commands that serve a run's models over HTTP: ``api`` and ``api-key``."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.console import prose, say
from coterie.text import printable
from coterie.types import CoterieError

if TYPE_CHECKING:
    import torch

RunFolder = Annotated[Path, typer.Argument(help="the folder of a finished run, or of a client's bundle")]
Clients = Annotated[str | None, typer.Option(help="clients, separated by commas; default all")]
Host = Annotated[str, typer.Option(help="the address to listen on; others than this machine's own need --keys")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")]
KeysFile = Annotated[Path | None, typer.Option("--keys", help="a file of API keys, made of entries by coterie api-key")]
Base = Annotated[str | None, typer.Option(help="the base's folder or hub name; default what the bundles name")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Precision = Annotated[str, typer.Option(help="of the base's weights: float32, or bfloat16 for half the memory")]
Rows = Annotated[int, typer.Option(min=1, help="texts that share a pass")]
Waiting = Annotated[int, typer.Option(min=1, help="requests that may wait for a pass; more are refused")]
PerKey = Annotated[int, typer.Option(min=1, help="requests of one key that may run or wait at once")]
MaxTokens = Annotated[int, typer.Option(min=1, help="the most tokens that a request may have written")]
PromptTokens = Annotated[int, typer.Option(min=1, help="the most tokens of a prompt")]
BodyKib = Annotated[int, typer.Option(min=1, help="the most KiB of a request's body")]
Seconds = Annotated[float, typer.Option(min=1, help="the most seconds that an answer may take")]
Certificate = Annotated[Path | None, typer.Option(help="a PEM file with the certificate for TLS")]
PrivateKey = Annotated[Path | None, typer.Option(help="a PEM file with the certificate's private key")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(api)
    app.command("api-key")(api_key)


def api(
    run: RunFolder,
    clients: Clients = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    keys: KeysFile = None,
    base: Base = None,
    device: Device = "cpu",
    precision: Precision = "float32",
    rows: Rows = 16,
    waiting: Waiting = 64,
    per_key: PerKey = 64,
    max_tokens: MaxTokens = 1024,
    prompt_tokens: PromptTokens = 4096,
    body_kib: BodyKib = 256,
    seconds: Seconds = 120,
    certificate: Certificate = None,
    private_key: PrivateKey = None,
) -> None:
    """Serve the clients' models of a run: OpenAI's routes under /v1, and a page at /."""
    _check_installed()
    from coterie.api.limits import Limits
    from coterie.api.server import Service, ready

    dtype = _dtype(precision)
    limits = Limits(
        rows=rows, waiting=waiting, per_key=per_key, max_tokens=max_tokens, prompt_tokens=prompt_tokens,
        body_bytes=1024 * body_kib, seconds=seconds,
    )  # fmt: skip
    names = _names(clients)
    _start_log()
    say(f"loading the models of {run}")
    with ready(Service(run, names, host, port, keys, certificate, private_key, base, device, dtype, limits)) as service:
        prose(f"models: {', '.join(service.models.names)}")
        say(f"open {service.address} in a browser, or give {service.address}v1 to a client of OpenAI's; Ctrl-C stops")
        sys.stdout.flush()  # a pipe would keep the address to itself
        service.run()


def api_key(
    name: Annotated[str, typer.Argument(help="whose key it is; in the log instead of the key")],
    clients: Annotated[
        str | None, typer.Option(help="the clients whose models it opens, by commas; default all")
    ] = None,
) -> None:
    """Make an API key, and show its entry for the file of keys. The key itself is stored nowhere."""
    _check_installed()
    from coterie.api.keys import new_key

    key, entry = new_key(name, _names(clients))
    say(f"key for {printable(name)}: {key}\n\nadd to the file that --keys names:\n\n{entry}")


def _names(clients: str | None) -> tuple[str, ...]:
    """The clients that ``--clients`` names; none where it is not given, which stands for all."""
    names = tuple(name for name in map(str.strip, (clients or "").split(",")) if name)
    if clients is not None and not names:
        raise CoterieError("--clients names no client; name some, separated by commas, or leave it out for all clients")
    return names


def _dtype(precision: str) -> torch.dtype:
    import torch

    if precision not in ("float32", "bfloat16"):
        raise CoterieError(f"--precision is float32 or bfloat16, not {precision!r}")
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _start_log() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("coterie.api").setLevel(logging.INFO)


def _check_installed() -> None:
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise CoterieError(f"serving models needs {' and '.join(missing)}: pip install 'coterie[api]'")
