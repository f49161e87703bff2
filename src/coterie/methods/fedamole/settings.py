"""The settings of FedAMoLE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from coterie.methods.plan import MethodSettings
from coterie.methods.robust import RobustSettings
from coterie.requests import HoldOut, Observe
from coterie.types import Bank, ClientInfo, CoterieError

PAPERS_PICKS = 2


class FedAMoLESettings(MethodSettings):
    """FedAMoLE's settings. The paper's: ``embed = "after"``, ``embed_rows = "held_out"``, ``inertia = 0`` and
    ``prototype = "experts"``."""

    experts: int | None = Field(
        None, ge=1, description="experts in each module's pool; none: 3 per client, like the paper's 30 for 10"
    )
    clients_per_expert: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="clients that each expert picks; auto: its whole group of clients that are alike, with assignment "
        "= dynamic, prototype = holders, embed = before and neither rule nor clip of [robust], otherwise 2 (paper)",
    )
    first_holders: int | None = Field(
        None,
        ge=1,
        description="where experts choose: clients that hold each in round 1, at random; none: one with prototype = "
        "holders, else clients_per_expert",
    )
    min_experts: int = Field(
        2, ge=1, description="the fewest experts of a client in a module, or top_k if that is larger"
    )
    max_experts: int = Field(8, ge=1, description="the most experts of a client in a module")
    top_k: int = Field(2, ge=1, description="experts per token, besides the shared one")
    assignment: Literal["dynamic", "static", "random", "homogeneous", "oracle"] = Field(
        "dynamic",
        description="experts choose each round; at random, once; at random, each round; like dynamic with a number of "
        "clients per expert, and with the same number of experts for every client; or once, by the clients' known "
        "groups",
    )
    inertia: float = Field(
        2.0,
        ge=0,
        description="bonus of the clients that hold an expert already, in standard deviations of a module's scores; "
        "from the second choice on; 0: the paper",
    )
    balance: float = Field(1e-3, ge=0, description="weight of the load-balance loss")
    embed: Literal["after", "before"] = Field(
        "before",
        description="when clients measure embeddings: before local training, with what they received, or after (paper)",
    )
    embed_rows: Literal["held_out", "training", "all"] = Field(
        "all",
        description="what they measure them on: a share of the training rows, never trained on (paper); such a share, "
        "also trained on; or all training rows",
    )
    embedding_fraction: float = Field(0.05, gt=0, lt=1, description="that share: the same rows in every round")
    embedding_rows: int = Field(200, ge=1, description="the most rows of that share")
    prototype: Literal["holders", "experts"] = Field(
        "holders",
        description="what experts compare clients with: the mean embeddings of their holders' tokens, less what all "
        "clients share; or the experts' own projections of those tokens (paper)",
    )
    prototype_memory: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="weight of the rounds before in an expert's own embedding, a running mean; 0: the last",
    )
    weighting: Literal["uniform", "examples"] = Field("uniform", description="weights of all means over clients")
    dropout_masks: Literal["shared", "per_expert"] = Field(
        "shared", description="one dropout mask for all experts, or one for each (published code)"
    )
    padding: Literal["ignored", "counted"] = Field(
        "ignored", description="padding tokens in the load-balance loss and the embeddings (counted: published code)"
    )

    @model_validator(mode="after")
    def _first_holders(self) -> FedAMoLESettings:
        if self.first_holders and self.first_holders > self.usual_picks:
            picks = f"{', which auto counts as' if self.clients_per_expert == 'auto' else ' ='} {self.usual_picks}"
            raise ValueError(f"first_holders = {self.first_holders} is above clients_per_expert{picks}; lower it")
        return self

    def by_group(self, robust: RobustSettings) -> bool:
        """Whether each expert picks a whole group of clients that are alike.

        Not with a rule or clip of ``robust``: it gives up what whole groups gain, and two bad clients of four cost more
        there (docs/results/robustness.md).
        """
        looks = self.assignment == "dynamic" and self.prototype == "holders" and self.embed == "before"
        return looks and self.clients_per_expert == "auto" and not robust.active

    @property
    def usual_picks(self) -> int:
        """The clients that an expert picks where all pick as many; of groups, the number that the paper has."""
        return PAPERS_PICKS if self.clients_per_expert == "auto" else self.clients_per_expert

    @property
    def chooses(self) -> bool:
        """Whether experts choose clients by embeddings."""
        return self.assignment in ("dynamic", "homogeneous")

    @property
    def of_experts(self) -> bool:
        """Whether experts choose by embeddings of their own, so that clients send these."""
        return self.prototype == "experts"

    @property
    def first_picks(self) -> int:
        """The number of clients that hold each expert in round 1."""
        usual = 1 if self.prototype == "holders" else self.usual_picks
        return self.first_holders or usual if self.chooses else self.usual_picks

    @property
    def share(self) -> HoldOut:
        """The share of a client's training rows that its embeddings are measured on."""
        return HoldOut(self.embedding_fraction, self.embedding_rows)

    def observe(self, bank: Bank) -> Observe:
        """What a client is asked for its embeddings, of ``bank``."""
        rows = None if self.embed_rows == "all" else self.share
        return Observe(bank, "train", ("embeddings",), rows, self.padding == "counted", of_experts=self.of_experts)

    def check_rows(self, clients: Sequence[ClientInfo]) -> None:
        """Raise :class:`CoterieError` for a client of which all rows would be held out."""
        for client in clients if self.embed_rows == "held_out" else ():
            if self.share.count(client.num_train) >= client.num_train:
                raise CoterieError(
                    f"client {client.id} has {client.num_train} training row(s), and embedding_fraction = "
                    f"{self.embedding_fraction:g} holds all of them out; add rows, lower embedding_fraction, or set "
                    'embed_rows = "all"'
                )
