"""What the service counts, in Prometheus' text format. No label holds a client's name or anything of a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from coterie.api.worker import Worker

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
_HELP = {
    "coterie_api_requests_total": ("counter", "Requests that ended, by route and status"),
    "coterie_api_request_seconds": ("histogram", "Seconds from a request's head to the end of its answer, by route"),
    "coterie_api_tokens_total": ("counter", "Tokens that were read (prompt) and written (completion)"),
    "coterie_api_waiting": ("gauge", "Requests that wait for a pass"),
    "coterie_api_running": ("gauge", "Requests that are being computed"),
    "coterie_api_passes_total": ("counter", "Steps of the model, each a pass over the rows of all running requests"),
    "coterie_api_up": ("gauge", "1 while the model's thread runs"),
}


@dataclass
class Metrics:
    """Counts of a service. Changed by the thread of its event loop alone."""

    worker: Worker
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    buckets: Counter[tuple[str, float]] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=Counter)

    def ended(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests[route, status] += 1
        self.seconds[route] = self.seconds.get(route, 0.0) + seconds
        for bound in (bound for bound in BUCKETS if seconds <= bound):
            self.buckets[route, bound] += 1

    def render(self) -> str:
        """All metrics."""
        lines: list[str] = []
        for name, (kind, text) in _HELP.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *self._lines(name)]
        return "\n".join(lines) + "\n"

    def _lines(self, name: str) -> Iterator[str]:
        match name.removeprefix("coterie_api_"):
            case "requests_total":
                for (route, status), number in sorted(self.requests.items()):
                    yield f'{name}{{route="{route}",status="{status}"}} {number}'
            case "request_seconds":
                for route, total in sorted(self.seconds.items()):
                    count = sum(number for (of, _), number in self.requests.items() if of == route)
                    for bound in BUCKETS:
                        yield f'{name}_bucket{{route="{route}",le="{bound:g}"}} {self.buckets[route, bound]}'
                    yield f'{name}_bucket{{route="{route}",le="+Inf"}} {count}'
                    yield f'{name}_sum{{route="{route}"}} {total:g}'
                    yield f'{name}_count{{route="{route}"}} {count}'
            case "tokens_total":
                for kind in ("prompt", "completion"):
                    yield f'{name}{{kind="{kind}"}} {self.tokens[kind]}'
            case "waiting":
                yield f"{name} {self.worker.queued}"
            case "running":
                yield f"{name} {self.worker.running}"
            case "passes_total":
                yield f"{name} {self.worker.steps}"
            case "up":
                yield f"{name} {int(self.worker.alive)}"
