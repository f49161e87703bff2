"""What all clients of a process share: the base, the task, and every split tokenised once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from coterie.data.rows import ClientData
from coterie.data.tasks import Example, Task
from coterie.nn.base import Base
from coterie.ops.streams import stream
from coterie.types import CoterieError, HoldOut


@dataclass
class Workplace:
    """What all clients of a process share: the base, the task, the seed, and every split tokenised once."""

    base: Base
    task: Task
    seed: int
    eval_batch_size: int = 64
    precision: str = "float32"
    cache: dict[tuple[str, str], list[Example]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.base.model.parameters()).device

    def examples(self, client: ClientData, split: str) -> list[Example]:
        """The tokenised rows of a client's split. Raises :class:`CoterieError` where it has none."""
        key = client.info.id, split
        if key not in self.cache:
            if not client.splits.get(split):
                has = ", ".join(name for name, rows in client.splits.items() if rows)
                raise CoterieError(f"client {client.info.id} has no {split} rows; it has {has or 'none at all'}")
            self.cache[key] = [self.task.encode(row) for row in client.splits[split]]
        return self.cache[key]

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


def autocast(place: Workplace) -> AbstractContextManager[None]:
    """bfloat16 autocast, or nothing for float32."""
    return torch.autocast(place.device.type, torch.bfloat16, enabled=place.precision == "bfloat16")
