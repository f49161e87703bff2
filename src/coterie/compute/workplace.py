"""What all clients of a process share: the base, the task, and every split tokenised once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch

from coterie.compute.tokens import Split, TokenCache
from coterie.data.examples import Example
from coterie.data.rows import ClientData
from coterie.data.tasks import Task
from coterie.data.truncation import Truncation, truncation_of_all
from coterie.nn.base import Base
from coterie.nn.placement import computing_devices
from coterie.nn.prompt_cache import PromptCache
from coterie.ops.streams import stream
from coterie.requests import HoldOut
from coterie.types import ClientId, CoterieError

_LARGE = 256 * 2**20  # bytes of logits in float32 from which a loss takes them in chunks
_CHUNK = _LARGE // 4


class StoppedError(Exception):
    """Another thread has stopped this one."""


@dataclass(frozen=True)
class Steps:
    """Clients that train together have taken ``taken`` of their ``of`` optimiser steps."""

    clients: tuple[ClientId, ...]
    taken: int
    of: int


def _ignore(steps: Steps) -> None:
    """Do nothing."""


@dataclass
class Workplace:
    """What all clients on a device share: the base, the task, the seed, and every split tokenised once.

    ``tokenising`` is held while the tokenizer works: it serves one thread at a time. Once ``stop`` is set, the next
    forward pass raises :class:`StoppedError`. ``all_clients`` is set in a simulation of a method that trains on the
    rows of several clients together. ``loss_chunk`` is the number of tokens whose logits a loss holds at once; 0: all.
    ``joules_per_tflop`` estimates energy where it is not measured; 0: no estimate. ``notes`` are what the user should
    know; who reads them empties the list.
    """

    base: Base
    task: Task
    seed: int
    eval_batch_size: int = 64
    precision: str = "float32"
    loss_chunk: int | Literal["auto"] = 0
    joules_per_tflop: float = 0.0
    notes: list[str] = field(default_factory=list)
    noted: set[str] = field(default_factory=set)
    cache: TokenCache = field(default_factory=TokenCache)
    known: dict[Split, list[int]] = field(default_factory=dict)  # the rows' lengths, of all splits
    truncations: dict[Split, Truncation] = field(default_factory=dict)  # of all splits that were tokenised
    references: dict[Split, list[tuple[float, float]]] = field(default_factory=dict)  # log p by the base, of pairs
    tokenising: threading.RLock = field(default_factory=threading.RLock)
    stop: threading.Event = field(default_factory=threading.Event)
    all_clients: Mapping[ClientId, ClientData] = field(default_factory=dict)
    report: Callable[[Steps], None] = _ignore

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All that the base computes on."""
        return computing_devices(self.base.model)

    @property
    def prompt_cache(self) -> PromptCache | None:
        """How candidates share a prompt; None: not at all, with rows of this task."""
        cache = self.base.prompt_cache
        return cache and cache.up_to(self.task.max_length)

    def current(self) -> AbstractContextManager[object]:
        """Makes the device the thread's current one, for kernels that do not name a device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 autocast, or nothing for float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def rows_of_each(self, clients: int) -> int:
        """The number of each client's rows in an evaluation pass that ``clients`` clients share."""
        return -(-self.eval_batch_size // clients)

    def note(self, text: str) -> None:
        """Keep a note for the user, once."""
        if text not in self.noted:
            self.noted.add(text)
            self.notes.append(text)

    def chunk(self, tokens: int, vocabulary: int) -> int:
        """The tokens whose logits are computed at once in a pass of ``tokens`` tokens; 0: all of them.

        ``auto`` takes chunks of 64 MiB where the logits would take more than 256 MiB in float32.
        """
        if self.loss_chunk != "auto":
            return self.loss_chunk
        return max(1, _CHUNK // (4 * vocabulary)) if 4 * tokens * vocabulary > _LARGE else 0

    def examples(self, client: ClientData, split: str) -> list[Example]:
        """The tokenised rows of a client's split. Raises :class:`CoterieError` where it has none."""
        key = client.info.id, split
        with self.tokenising:
            if key in self.cache:
                return self.cache[key]
            if not client.splits.get(split):
                has = ", ".join(name for name, rows in client.splits.items() if rows)
                raise CoterieError(f"client {client.info.id} has no {split} rows; it has {has or 'none at all'}")
            made = self.cache[key] = [self.task.encode(row) for row in client.splits[split]]
            self.truncations[key] = Truncation.of(made)
            return made

    def truncation(self, clients: Iterable[ClientData]) -> Truncation:
        """What is cut off all rows of ``clients``, which are tokenised for it; as :func:`truncation_of_all`."""
        with self.tokenising:
            return truncation_of_all(clients, self._truncation)

    def _truncation(self, client: ClientData, split: str) -> Truncation:
        self.prepare(client, split)
        return self.truncations[client.info.id, split]

    def prepare(self, client: ClientData, split: str) -> None:
        """Have the rows of a split tokenised for :meth:`examples`; raises as that does."""
        with self.tokenising:
            if (client.info.id, split) not in self.cache:
                self.examples(client, split)

    def lengths(self, client: ClientData, split: str) -> Sequence[int]:
        """The tokens of each row of a split, kept when the tokens themselves are dropped; empty without rows.

        Raises as the task does for a row that it cannot encode.
        """
        key = client.info.id, split
        with self.tokenising:
            if key not in self.known:
                rows = self.examples(client, split) if client.splits.get(split) else []
                self.known[key] = [len(e.ids) for e in rows]
            return self.known[key]

    def divided(self, client: ClientData, split: str, hold_out: HoldOut) -> tuple[list[Example], list[Example]]:
        """The examples of a split that ``hold_out`` leaves, and those that it sets aside.

        Raises :class:`CoterieError` where it leaves none.
        """
        examples = self.examples(client, split)
        order = torch.randperm(len(examples), generator=stream(self.seed, client.info.id, "hold out", split)).tolist()
        aside = set(order[: hold_out.count(len(examples))])
        if len(aside) == len(examples):
            raise CoterieError(
                f"client {client.info.id} has {len(examples)} {split} row(s), and all of them are set aside "
                f"(a share of {hold_out.fraction:g}); give it more rows"
            )
        left = [example for i, example in enumerate(examples) if i not in aside]
        return left, [examples[i] for i in sorted(aside)]

    def some(self, client: ClientData, rnd: int, examples: list[Example], at_most: int) -> list[Example]:
        """``at_most`` of the client's ``examples`` (0: all), drawn by the run's seed, the round and the client."""
        if not 0 < at_most < len(examples):
            return examples
        draw = stream(self.seed, rnd, client.info.id, "some")
        return [examples[i] for i in torch.randperm(len(examples), generator=draw)[:at_most].tolist()]
