"""The settings of FedLEASE."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from coterie.methods.plan import MethodSettings


class FedLEASESettings(MethodSettings):
    """FedLEASE's settings; the defaults are the paper's, except ``distance`` (the paper's is ``B``)."""

    warmup_rounds: int = Field(
        5,
        ge=1,
        description="rounds of local training before the clients are clustered; with representations they are "
        "clustered after the first round, whatever this says",
    )
    max_experts: int | None = Field(
        None,
        ge=2,
        description="the most clusters that the silhouette may choose; none: 4, or one less than the number of clients",
    )
    min_experts: int = Field(
        2, ge=1, le=2, description="1: also allow a single cluster, when no silhouette is high enough"
    )
    one_cluster_below: float = Field(0.1, description="min_experts = 1: one cluster if every silhouette is below this")
    experts: int = Field(0, ge=0, description="a fixed number of clusters; 0: chosen by silhouette")
    experts_per_cluster: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="experts of each cluster, each trained by a share of its clients; auto: by the cluster's rows, at "
        "most one for two clients",
    )
    linkage: Literal["average", "complete", "single", "kmeans", "spectral"] = Field(
        "average", description="linkage of the clusters' tree; or clusters by k-means or spectral clustering"
    )
    distance: Literal["B", "A", "BA", "representation", "auto"] = Field(
        "auto",
        description="what is clustered by cosine distance: matrices of the warm-up LoRAs; the mean input of each "
        "target over a client's rows in the frozen base; or auto: by mean inputs, then within those by LoRAs",
    )
    distance_rows: int = Field(
        100, ge=0, description='rows of a client\'s mean input with distance = "representation" or "auto"; 0: all'
    )
    centre: bool = Field(
        False,
        description="take off what all clients' LoRAs have in common, and compare all modules together; "
        "representations always are compared so",
    )
    recluster_every: int = Field(
        0,
        ge=0,
        description="rounds after which clients whose representation is nearer to another cluster move there; 0: never",
    )
    allocation: Literal["learned", "oracle", "random"] = Field(
        "learned", description="clusters by distance, by the clients' known groups, or at random (controls)"
    )
    expert_start: Literal["cluster_mean", "own"] = Field(
        "cluster_mean", description="experts start as the cluster's mean, or each client from its own warm-up LoRA"
    )
    start: Literal["common", "own"] = Field(
        "common", description="own: clients draw different A to start from (a control)"
    )
    routing: Literal["adaptive", "top_k", "dense", "own"] = Field(
        "adaptive",
        description="adaptive top-M over 2M-1 slots; controls: plain top-k or softmax over M, or own: the cluster's "
        "expert alone, without a router",
    )
    top_k: int = Field(2, ge=1, description='experts per token with routing = "top_k"')
    download: Literal["all", "used"] = Field(
        "all",
        description="experts that a client is sent: all, or its own and those that its tokens use; the client keeps "
        "the others as it last received them",
    )
    download_threshold: float = Field(
        0.1,
        ge=0,
        le=1,
        description='an expert is sent with download = "used" if it gets at least this part of the weight of a '
        "client's gates",
    )
    download_every: int = Field(
        10, ge=1, description='rounds after which a client is sent all experts again with download = "used"'
    )
    weighting: Literal["uniform", "examples"] = Field("uniform", description="weights of the means inside a cluster")
    router: Literal["cluster", "personal"] = Field("cluster", description="average routers in a cluster, or keep them")
    head: Literal["trained", "frozen"] = Field("trained", description="train the head, or leave it at its start")

    @property
    def clustered_after(self) -> int:
        """The round at whose end the clients are clustered, by what they sent in it."""
        return 1 if self.represents and self.distance == "representation" else self.warmup_rounds

    def reclusters(self, rnd: int) -> bool:
        """Whether clients that have a cluster send their representations again in round ``rnd``."""
        return self.recluster_every > 0 and rnd % self.recluster_every == 0

    @property
    def represents(self) -> bool:
        """Whether clients send the mean inputs of the targets, to be clustered by."""
        return self.distance in ("representation", "auto") and self.allocation == "learned"

    @property
    def most(self) -> int:
        """The largest number of clusters."""
        return self.experts or self.max_experts or 4

    @property
    def needed(self) -> int:
        """The number of warm-up LoRAs that the allocation needs; with fewer, the warm-up goes on."""
        return (self.experts or 3) if self.allocation == "learned" else 1
