"""API keys: who may use which client's model. The file holds their SHA-256 alone."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from coterie.text import name_fault, reason_of
from coterie.types import CoterieError, Section

_PREFIX = "coterie-"  # so that a scanner of leaked secrets can tell what it found


class _Entry(Section):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    clients: list[str] | Literal["*"]


class _File(Section):
    keys: Annotated[list[_Entry], Field(min_length=1, max_length=10_000)]


@dataclass(frozen=True)
class Caller:
    """Who sends a request: the name of a key, and the clients whose models it may use (None: all)."""

    name: str = "-"
    clients: frozenset[str] | None = None

    def may_use(self, client: str) -> bool:
        """Whether the key gives access to the model of ``client``."""
        return self.clients is None or client in self.clients


@dataclass(frozen=True)
class Keys:
    """The keys of a service: pairs of a SHA-256 and whose key it is. Without any, everyone may use every model."""

    known: tuple[tuple[bytes, Caller], ...] = ()

    def caller(self, key: str) -> Caller | None:
        """Whose key ``key`` is; None for an unknown one. Takes as long for every key, known or not."""
        if not self.known:
            return Caller()
        digest, caller = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest(), None
        for known, whose in self.known:
            if hmac.compare_digest(known, digest):
                caller = whose
        return caller


def read_keys(path: Path, clients: Sequence[str]) -> Keys:
    """The keys in the TOML file ``path``, for a service that has the models of ``clients``.

    Raises :class:`CoterieError` for a file that is damaged, names that occur twice, and clients that are not served.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        entries = _File.model_validate(content).keys
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CoterieError(f"{path}: {where}: {first['msg']}; `coterie api-key NAME` writes an entry") from fault
    except (ValueError, RecursionError) as fault:
        raise CoterieError(f"{path} is not TOML: {reason_of(fault)}") from fault
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            raise CoterieError(f"{path} has two keys with the name {entry.name!r}; give each its own")
        if hidden := name_fault(entry.name):
            raise CoterieError(f"{path}: the name {hidden}; remove it")
        if unknown := [client for client in entry.clients if entry.clients != "*" and client not in clients]:
            raise CoterieError(
                f"{path}: the key {entry.name!r} is for {unknown[0]!r}, which is not served; served are "
                f"{', '.join(clients)}"
            )
    return Keys(
        tuple(
            (bytes.fromhex(e.sha256), Caller(e.name, None if e.clients == "*" else frozenset(e.clients)))
            for e in entries
        )
    )


def new_key(name: str, clients: Sequence[str]) -> tuple[str, str]:
    """A new key of 256 random bits, and its entry in the file of keys. No clients: all of them."""
    if hidden := name_fault(name):
        raise CoterieError(f"the name {hidden}; remove it")
    key = _PREFIX + secrets.token_urlsafe(32)
    allowed = ", ".join(map(_quoted, clients))
    lines = ["[[keys]]", f"name = {_quoted(name)}", f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"']
    return key, "\n".join([*lines, f"clients = [{allowed}]" if clients else 'clients = "*"'])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
