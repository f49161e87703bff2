"""What clients keep on disk from round to round: one file per client and round, written atomically."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from coterie import codec
from coterie.config.sections import Config
from coterie.data.clients import SAFE_ID
from coterie.files import write_atomic
from coterie.types import Bank, ClientId, Kept, Key, Personal, PrivateError, Tensors

T = TypeVar("T")


@dataclass(frozen=True)
class RoundStore(Generic[T]):
    """Every client's versions of a value of type ``kind``: ``folder/<client>/<round>.safetensors``.

    A round reads the newest version from before it. So a round that is killed halfway starts again from the same
    state, and the clients' states always match the server's checkpoint.
    """

    folder: Path
    kind: type[T]

    def load(self, client: ClientId, until: int) -> T | None:
        """The newest version of a round up to ``until``; None where there is none."""
        rounds = [rnd for rnd in self._rounds(client) if rnd <= until]
        if not rounds:
            return None
        path = self._path(client, max(rounds))
        return _decoded(self.kind, path)

    def size(self, client: ClientId, until: int) -> int:
        """The size in bytes of the file that :meth:`load` would read."""
        rounds = [rnd for rnd in self._rounds(client) if rnd <= until]
        return self._path(client, max(rounds)).stat().st_size if rounds else 0

    def save(self, client: ClientId, rnd: int, value: T) -> None:
        """Keep ``value`` as the client's after round ``rnd``."""
        write_atomic(self._path(client, rnd), codec.encode(value))

    def state_rounds(self, until: int) -> dict[ClientId, int]:
        """The round, up to ``until``, of every client's newest version."""
        versions = {client: [rnd for rnd in self._rounds(client) if rnd <= until] for client in self._clients()}
        return {client: max(rounds) for client, rounds in versions.items() if rounds}

    def forget_after(self, rnd: int) -> None:
        """Delete the versions of rounds after ``rnd``: they were not committed."""
        for client in self._clients():
            for later in (r for r in self._rounds(client) if r > rnd):
                self._path(client, later).unlink()

    def prune(self, rnd: int, kept_rounds: Collection[int] = ()) -> None:
        """Delete the versions that no checkpoint from round ``rnd`` on needs, nor any of the rounds ``kept_rounds``."""
        for client in self._clients():
            rounds = self._rounds(client)
            needed = {max((r for r in rounds if r <= of), default=0) for of in (rnd, *kept_rounds)}
            for old in (r for r in rounds if r <= rnd and r not in needed):
                self._path(client, old).unlink()

    def _clients(self) -> list[ClientId]:
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []

    def _rounds(self, client: ClientId) -> list[int]:
        folder = self.folder / client
        return sorted(int(p.stem) for p in folder.glob("*.safetensors")) if folder.is_dir() else []

    def _path(self, client: ClientId, rnd: int) -> Path:
        return self.folder / client / f"{rnd:06d}.safetensors"


@dataclass(frozen=True)
class PersonalStore:
    """The personal states in ``folder/personal``; in ``folder/kept``, once, what clients keep unchanged.

    A state's file only names the latter, by its hash: a large pool is not written for every round and every client.
    """

    folder: Path

    def load(self, client: ClientId, until: int) -> Personal | None:
        """As :meth:`RoundStore.load`; without ``kept`` if that file is missing."""
        state = self._rounds.load(client, until)
        if state is None or state.kept is None:
            return state
        path = self._path(state.kept)
        kept = Kept(state.kept.name, _read(path, path.stat().st_mtime_ns)) if path.exists() else None
        return replace(state, kept=kept)

    def size(self, client: ClientId, until: int) -> int:
        """As :meth:`RoundStore.size`, without what is kept unchanged."""
        return self._rounds.size(client, until)

    def save(self, client: ClientId, rnd: int, value: Personal) -> None:
        """Keep ``value`` as the client's after round ``rnd``."""
        if value.kept is not None:
            path = self._path(value.kept)
            if not path.exists():
                write_atomic(path, codec.encode(value.kept.tensors))
            value = replace(value, kept=replace(value.kept, tensors={}))
        self._rounds.save(client, rnd, value)

    def state_rounds(self, until: int) -> dict[ClientId, int]:
        """As :meth:`RoundStore.state_rounds`."""
        return self._rounds.state_rounds(until)

    def forget_after(self, rnd: int) -> None:
        """As :meth:`RoundStore.forget_after`. What is kept unchanged stays: it is the same in every round."""
        self._rounds.forget_after(rnd)

    def prune(self, rnd: int, kept_rounds: Collection[int] = ()) -> None:
        """As :meth:`RoundStore.prune`."""
        self._rounds.prune(rnd, kept_rounds)

    @property
    def _rounds(self) -> RoundStore[Personal]:
        return RoundStore(self.folder / "personal", Personal)

    def _path(self, kept: Kept) -> Path:
        if not SAFE_ID.fullmatch(kept.name):
            raise PrivateError(
                f"a client's state in {self.folder} is damaged: {kept.name[:40]!r} is not a valid file name; "
                "restore the folder from a backup, or begin a new run"
            )
        return self.folder / "kept" / f"{kept.name}.safetensors"


@dataclass(frozen=True)
class ClientStates:
    """What clients keep from round to round: personal states and, where clients evaluate and export what they trained
    last, those banks."""

    personal: PersonalStore
    trained: RoundStore[Bank] | None = None

    @staticmethod
    def of(config: Config, folder: Path) -> ClientStates:
        """The states of the run of ``config`` in ``folder``."""
        trained = RoundStore(folder / "trained", Bank) if config.evaluated == "trained" else None
        return ClientStates(PersonalStore(folder), trained)

    def restore(self, rnd: int) -> None:
        """Go back to the states after round ``rnd``."""
        self.personal.forget_after(rnd)
        if self.trained:
            self.trained.forget_after(rnd)

    def state_rounds(self, rnd: int) -> dict[str, dict[ClientId, int]]:
        """From which round each client's state is, after round ``rnd``."""
        trained = {"trained": self.trained.state_rounds(rnd)} if self.trained else {}
        return {"personal": self.personal.state_rounds(rnd), **trained}

    def prune(self, rnd: int, kept_rounds: Collection[int] = ()) -> None:
        """Delete the states that only rounds before ``rnd`` need, and none of the rounds ``kept_rounds``."""
        self.personal.prune(rnd, kept_rounds)
        if self.trained:
            self.trained.prune(rnd, kept_rounds)


@lru_cache(maxsize=2)  # in memory, too, a simulation's clients share what is kept
def _read(path: Path, changed: int) -> Tensors:
    return _decoded(dict[Key, Tensor], path, "delete it: the server sends it again to a client that does not have it")


def _decoded(kind: type[T], path: Path, advice: str = "restore it, or begin a new run") -> T:
    try:
        return codec.decode(kind, path.read_bytes())
    except codec.CodecError as fault:
        raise PrivateError(
            f"{path} is damaged, or was written by another version of Coterie ({fault}); {advice}"
        ) from fault
