"""A run's figures in trackers, on request: ``[run] tracking = ["mlflow"]`` (see :mod:`coterie.runs.trackers`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from coterie.config.sections import Tracker
from coterie.runs.events import Evaluated, Event, Listener, Note, RoundDone
from coterie.runs.trackers import Numbers, Sink, Tracked, faults_of, opened


@contextmanager
def tracking(names: Sequence[Tracker], run: Tracked, listen: Listener) -> Iterator[Listener]:
    """``listen`` with every event, and the trackers ``names`` with its losses, bytes and metrics, for a ``with`` block.

    A tracker that fails later on is a note, and gets no more: a run does not end for it.
    Raises :class:`CoterieError` for a tracker that is not installed or that cannot start.
    """
    with ExitStack() as stack:
        sinks = [_Sending(name, stack.enter_context(opened(name, run))) for name in dict.fromkeys(names)]

        def both(event: Event) -> None:
            listen(event)
            if (numbers := numbers_of(event)) is None:
                return
            for sink in sinks:
                if fault := sink.send(*numbers):
                    listen(Note(fault))

        yield both


def numbers_of(event: Event) -> tuple[Numbers, int] | None:
    """The figures of an event by name, as in "loss/north", and its round; None for an event without any."""
    match event:
        case RoundDone():
            numbers: dict[str, float] = {}
            for client, entry in event.clients.items():
                said = {"loss": entry.loss, "bytes_up": entry.bytes_up, "bytes_down": entry.bytes_down}
                numbers |= _named({name: value for name, value in said.items() if value is not None}, client)
            return numbers, event.round
        case Evaluated():
            numbers = {}
            for who, scores in {"mean": event.mean, **event.clients}.items():
                for split, metrics in scores.items():
                    numbers |= _named({f"{split} {name}": value for name, value in metrics.items()}, who)
            return numbers, event.round
        case _:
            return None


def _named(numbers: Mapping[str, float], who: str) -> dict[str, float]:
    return {f"{name}/{who}": value for name, value in numbers.items()}


@dataclass
class _Sending:
    """A tracker until it fails."""

    name: Tracker
    sink: Sink
    failed: bool = False

    def send(self, numbers: Numbers, rnd: int) -> str:
        """Log ``numbers``; what to say where that fails, else ""."""
        if self.failed:
            return ""
        try:
            self.sink.log(numbers, rnd)
        except faults_of(self.name) as fault:
            self.failed = True
            return f"{self.name} takes no more figures ({fault}); metrics.jsonl has all of them"
        return ""
