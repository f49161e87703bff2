"""Answers one client's requests in one round on a frozen base; the reference for answering many clients together."""

from __future__ import annotations

from dataclasses import dataclass, replace

from coterie.compute.observe import Observation, observe
from coterie.compute.preferences import scoring_of
from coterie.compute.private_observe import hides, private_embeddings
from coterie.compute.private_train import PrivateTraining
from coterie.compute.score import score
from coterie.compute.train import Training, train
from coterie.compute.workplace import Workplace
from coterie.data.rows import ClientData
from coterie.methods.parts import one_head
from coterie.methods.row_privacy import RowPrivacy
from coterie.requests import Observe, Observed, Score, Scored, Train, Trained
from coterie.types import Bank, CoterieError

_BY_ROW = '[privacy] unit = "example" hides each row in training'


@dataclass
class LocalCompute:
    """Answers the requests of one client in one round, one at a time. ``trained`` is the bank that it trained last.

    ``private``: how training hides each row. It then trains once, and measures nothing on the rows but, where that is
    counted, their mean embeddings, once.
    """

    workplace: Workplace
    client: ClientData
    rnd: int
    trained: Bank | None = None
    private: RowPrivacy | None = None
    measured: bool = False

    def train(self, request: Train) -> Trained:
        """Train the request's tensors on the client's training split.

        Raises :class:`CoterieError` that names client and step when a loss is not finite.
        """
        (trained,) = train([self.training(request)])
        if isinstance(trained, CoterieError):
            raise trained
        return self.keep(request, trained)

    def training(self, request: Train) -> Training:
        """What answers the request. Raises :class:`CoterieError` for one that ``private`` does not allow."""
        if self.private is None:
            return Training(self.workplace, self.client, self.rnd, request)
        if self.trained is not None:
            raise CoterieError(f"{_BY_ROW}, and one training in a round is what is counted")
        return PrivateTraining(self.workplace, self.client, self.rnd, request, private=self.private)

    def _check_measuring(self, counted: bool = False) -> None:
        """Raise :class:`CoterieError` where this may not be measured on the rows: it would have no noise.

        ``counted``: it has noise, which is counted once in some rounds.
        """
        if self.private is not None and not (counted and self.private.measures and not self.measured):
            raise CoterieError(f"{_BY_ROW}, and what else the method measures on the rows would have no noise")

    def keep(self, request: Train, trained: Trained) -> Trained:
        """Remember the trained bank; if it has several heads, with the client's own head only."""
        tensors = {**request.bank.tensors, **trained.tensors}
        if request.rows_of:
            tensors = one_head(tensors, request.rows_of[self.client.info.id])
        self.trained = replace(request.bank, tensors=tensors)
        return trained

    def score(self, request: Score) -> list[Scored]:
        """Mean loss and metrics of every bank on the split."""
        self._check_measuring()
        scores = []
        for bank in request.banks:
            scores += score([scoring_of(self.workplace, self.client, self.rnd, request, bank)])
        return scores

    def observe(self, request: Observe) -> Observed:
        """Gate usage, mean embeddings and modules' importance of the bank on the split."""
        self._check_measuring(hides(request))
        observation = Observation(self.workplace, self.client, self.rnd, request)
        if self.private is not None:
            observed = private_embeddings(observation, self.private)
            self.measured = True
            return observed
        (observed,) = observe([observation])
        return replace(observed, importance=observation.importance())
