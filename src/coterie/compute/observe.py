"""Answers ``Observe``: how a bank's experts are used on a split, mean embeddings and directions, modules' importance.

All but importance is collected for one client alone or for many in the same passes. Importance, which takes
gradients of the gates, is computed for one client at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from coterie.compute.importance import IMPORTANCE, gate_importance
from coterie.compute.passes import evaluating, logits_of, on_base, output_of
from coterie.compute.score import in_order
from coterie.compute.statistics import COLLECTED, Collector
from coterie.compute.workplace import Workplace
from coterie.data.examples import Batch, Example
from coterie.data.rows import ClientData
from coterie.nn.build import BankLayers, build_layers
from coterie.nn.gates import routes_by_row
from coterie.requests import Observe, Observed


def observe(observations: Sequence[Observation]) -> list[Observed]:
    """Usage, embeddings and directions of each client's bank; the clients share their passes.

    Raises :class:`~coterie.nn.many.UnlikeError` for banks that cannot share them.
    """
    if not observations:
        return []
    workplace, clients = observations[0].workplace, len(observations)
    layers = [observation.layers for observation in observations]
    with on_base(workplace, layers) as passes, evaluating(workplace.base.model):
        for joined in passes.in_step([observation.batches(clients) for observation in observations]):
            for at, i in enumerate(joined.active):
                padding = observations[i].request.padding
                observations[i].begin_pass(joined.parts[at], joined.mask(at, padding))
            passes.outputs(joined)
    results = [(observation.request, observation.collector.result()) for observation in observations]
    return [replace(result, embeddings=request.wanted(result.embeddings)) for request, result in results]


@dataclass
class Observation:
    """The observation of a client's bank on a split, as a request describes it.

    Raises :class:`ValueError` for unknown statistics, :class:`CoterieError` where the client has no rows, or the bank
    does not fit the base.
    """

    workplace: Workplace
    client: ClientData
    rnd: int
    request: Observe
    examples: Sequence[Example] = field(init=False)
    layers: BankLayers = field(init=False)
    collector: Collector = field(init=False)

    def __post_init__(self) -> None:
        workplace, request, known = self.workplace, self.request, {*COLLECTED, *IMPORTANCE}
        if unknown := set(request.what) - known:
            raise ValueError(f"cannot observe {sorted(unknown)}; known: {', '.join(sorted(known))}")
        if request.hold_out:
            _, examples = workplace.divided(self.client, request.split, request.hold_out)
        else:
            examples = workplace.examples(self.client, request.split)
        self.examples = workplace.some(self.client, self.rnd, examples, request.examples)
        self.layers = build_layers(workplace.base.model, request.bank)
        self.collector = Collector(request.bank, self.layers.now, request.what)

    def batches(self, clients: int = 1) -> Iterator[Batch]:
        """Batches on the CPU for passes that ``clients`` clients share.

        If padding counts, the statistics depend on the batches. They are then those of one client alone.
        """
        size = self.workplace.rows_of_each(1 if self.request.padding else clients)
        return in_order(self.workplace.task, self.examples, size)

    def begin_pass(self, batch: Batch, mask: Tensor | None) -> None:
        """Prepare for a pass of this batch, in which the tokens that ``mask`` marks count (None: all)."""
        self.collector.begin_pass(mask, batch.mask.numel() if self.request.padding else batch.mask.sum())

    def importance(self) -> dict[str, dict[str, float]]:
        """``[statistic][module]``, as :func:`gate_importance` defines it, for the statistics that are requested."""
        workplace, wanted = self.workplace, [name for name in IMPORTANCE if name in self.request.what]
        if not wanted:
            return {}

        by_row = routes_by_row(self.request.bank.gate.name)  # such gates follow the calls of the whole model

        def loss(batch: Batch) -> Tensor:
            if by_row:
                return workplace.task.loss(logits_of(workplace, batch.inputs), batch)
            return workplace.task.loss(output_of(workplace, batch.inputs, self.layers.layers), batch)

        batches = (batch.to(workplace.device) for batch in self.batches())
        return gate_importance(workplace.base.model, self.request.bank, batches, loss, wanted)
