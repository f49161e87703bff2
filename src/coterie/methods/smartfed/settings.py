"""The settings of SmartFed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator

from coterie.methods.plan import MethodSettings
from coterie.types import SHARED, Key, Part

DECAYED = "router_decayed"
# The learning rates of our routers where none is set, and what is left of them from round to round. Their weights are
# of the size of 1 whatever the base, so their rates do not follow that of [train].
_RATES, _DECAY = {"signed": 0.2, "mixing": 0.1, "response": 0.1}, 0.9
# A router for which these are, for the message about one for which they are not.
ROUTER_OF = {
    "router_rank": "response",
    "sparse": "signed",
    **dict.fromkeys(("gate_scale", "quota", "per_active", "floor"), "paper"),
}


class SmartFedSettings(MethodSettings):
    """The settings of SmartFed; a relative ``pool`` starts at the config's folder."""

    pool: str = Field("", description="the pool's folder, made by `coterie pool build`; required")
    pool_at: Literal["server", "everywhere"] = Field(
        "server", description="server: sent with a client's first round; everywhere: every client has the folder"
    )
    pool_bound: float = Field(
        0.0,
        ge=0,
        description="adapters of the pool whose norm exceeds this many times the median of the others' are left out; "
        "1 or more; 0: the default, 10, or with [robust] 3. There is no off: 1e9 leaves out none",
    )
    granularity: Literal["rank", "adapter"] = Field(
        "rank", description="adapter: whole LoRAs are the experts, a gate for each (a control)"
    )
    active: int = Field(
        8,
        ge=1,
        description="active experts per matrix and token, on average: the budget of EEQA; where all are active, what a "
        "matrix's weights add up to at the start",
    )
    budgets: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="active for single clients, by id: weak devices activate fewer experts, down to 1"
    )
    floor: int = Field(
        2,
        ge=1,
        description="paper, or sparse: active experts that every matrix keeps; with only one, paper cannot learn",
    )
    router: Literal["signed", "mixing", "response", "paper"] = Field(
        "signed",
        description="signed: a signed weight for each expert, all tokens alike; mixing: that, and any combination of "
        "A x before B; response: signed, and a part that follows |A x|; paper: softmax over W x per token, with EEQA",
    )
    router_rank: int = Field(0, ge=0, description="rank of response's mixing of |A x| over experts; 0: each its own")
    sparse: bool = Field(
        False, description="signed and response: only a quota's largest weights are active; false: all experts are"
    )
    gate_scale: Literal["active", "one", "budget"] = Field(
        "active", description="paper: what the K weights of a token add up to: K, 1, or active whatever K is"
    )
    router_rate: float = Field(
        0.0,
        ge=0,
        description="the routers' learning rate, times that of [train]; 0: the router's own, which is that of [train] "
        "for paper and, whatever that is, 0.2 for signed and 0.1 for mixing and response",
    )
    router_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="the routers' learning rate is multiplied by this every round, beside round_decay; 0: by 0.9 if it "
        "is their own, else by 1",
    )
    head_rate: float = Field(1.0, gt=0, description="the head's learning rate, times that of [train]")
    fresh_rate: float = Field(1.0, gt=0, description="the fresh expert's learning rate, times that of [train]")
    quota: Literal["proportional", "greedy", "uniform"] = Field(
        "proportional", description="paper, or sparse: how importance becomes quotas; uniform: no EEQA"
    )
    importance: Literal["first_order", "gate_mass", "ablation"] = Field(
        "first_order", description="what clients measure, for EEQA and for the report"
    )
    per_active: bool = Field(
        True, description="paper, or sparse: divide the budget by importance per active expert, not by a matrix's sum"
    )
    quota_interval: int = Field(2, ge=1, description="rounds from one measurement to the next; the first is round 1")
    measure_examples: int = Field(64, ge=0, description="training examples used in a measurement; 0: all")
    fresh_rank: int = Field(0, ge=0, description="rank of an expert beside the pool, trained and averaged as FedIT's")
    train_experts: tuple[str, ...] = Field((), description="adapters of the pool that are trained, sent and averaged")
    drop_below: float = Field(
        0.0, ge=0, lt=1, description="drop an adapter whose share of the gates is below this fraction of an even share"
    )

    @field_validator("pool_bound")
    @classmethod
    def _at_least_what_is_usual(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError(
                "must be 1 or more, or 0 for the default: below 1 up to half of the pool is left out, whatever it holds"
            )
        return value

    @property
    def whole(self) -> bool:
        """Whether an expert is a whole adapter."""
        return self.granularity == "adapter"

    @property
    def routes_all(self) -> bool:
        """Whether every expert is active on every token, whatever the quotas."""
        return self.router != "paper" and not self.sparse

    def idle(self) -> str:
        """The name of a setting that is not at its default and that the router does not use; "" if there is none."""
        unused = {
            "router_rank": self.router != "response",
            "sparse": self.router == "paper",
            "gate_scale": self.router != "paper",
            **dict.fromkeys(("quota", "per_active", "floor"), self.routes_all),
        }
        fields = type(self).model_fields
        return next((name for name, idle in unused.items() if idle and getattr(self, name) != fields[name].default), "")

    @property
    def own_rate(self) -> bool:
        """Whether the routers' learning rate is their own, whatever that of ``[train]``."""
        return self.router in _RATES and not self.router_rate

    def decayed(self, rnd: int) -> dict[str, float]:
        """For an instruction's info: what is left of the routers' learning rate in round ``rnd``."""
        decay = self.router_decay or (_DECAY if self.own_rate else 1.0)
        return {DECAYED: decay ** (rnd - 1)} if decay < 1 else {}

    def fastest(self, rnd: int, rate: float) -> dict[Part, float]:
        """The largest factors on ``rate``, the run's learning rate, of what trains in round ``rnd``, by part."""
        return self._by_part(self.decayed(rnd).get(DECAYED, 1.0), rate) | (
            dict.fromkeys((Part.A, Part.B), max(1.0, self.fresh_rate) if self.fresh_rank else 1.0)
        )

    def _by_part(self, decayed: float, rate: float) -> dict[Part, float]:
        router = _RATES[self.router] / rate if self.own_rate else self.router_rate or 1.0
        return {Part.ROUTER: router * decayed, Part.HEAD: self.head_rate}

    def rates(self, trainable: Iterable[Key], decayed: float, rate: float) -> dict[Key, float]:
        """The factors on ``rate``, the run's learning rate, by tensor; ``decayed``: what is left of the routers'."""
        parts = self._by_part(decayed, rate)
        return {key: self.fresh_rate if key.expert == SHARED else parts.get(key.part, 1.0) for key in trainable}

    def located(self, root: Path) -> Self:
        return self.model_copy(update={"pool": str(root / Path(self.pool).expanduser())}) if self.pool else self
