"""The settings of a real federation: the server's section ``[federation]``, and a site's own file ``SITE.toml``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from coterie.config.placement import MAP, MEMORY, MemoryLimits, PlacedParts, check_limits
from coterie.data.settings import ClientFiles, Columns, DataSettings
from coterie.types import Json, Part, Section

JOULES = (
    "joules for 1e12 operations of training, to estimate energy where no counter of the machine can be read; 0: no "
    "estimate"
)


class FederationSettings(Section):
    """How the server of ``coterie serve`` works with its sites. ``coterie run`` does not read it."""

    sites: tuple[str, ...] = Field((), description="ids of the sites that may take part; empty: any site that connects")
    at_least: int = Field(0, ge=0, description="sites needed to begin once `wait` is over; 0: all of `sites`")
    wait: float = Field(600.0, gt=0, description="seconds to wait for the sites before the first round")
    deadline: float = Field(3600.0, gt=0, description="seconds that a site has to answer a message")
    greeting: float = Field(
        120.0,
        ge=0,
        description="seconds that a site has to come back before the round continues without it",
    )
    host: str = Field(
        "127.0.0.1", description="address that the server listens on; 0.0.0.0: all addresses of this machine"
    )
    port: int = Field(9092, ge=1, le=65535, description="port that the server listens on")
    keys: str = Field("keys", description="folder written by `coterie keys init`")
    base: str = Field(
        "", description="SHA-256 of the base, as `coterie site check` prints it; empty: computed from [model] path"
    )
    max_rows: int = Field(
        10_000_000, ge=1, description="rows of a split that a site may report; one with more is refused"
    )
    restarts: int = Field(5, ge=0, description="restarts in a row, with no new checkpoint, before the server gives up")
    metrics_port: int = Field(0, ge=0, le=65535, description="port for Prometheus metrics on 127.0.0.1; 0: none")

    @field_validator("sites")
    @classmethod
    def _different_sites(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        lower = [site.lower() for site in sites]  # some disks treat a and A as one name
        twice = [site for site in sites if lower.count(site.lower()) > 1]
        if twice:
            raise ValueError(f"ids must differ by more than capital letters, not {', '.join(twice)}")
        return sites


class SiteIdentity(Section):
    """Who this site is, and where the server is."""

    id: str = Field(description="the site's client id, as in the server's list")
    server: str = Field(description="address of the server, HOST:PORT")
    key: str = Field("", description="this site's private key; empty only with --insecure")
    ca: str = Field("", description="the federation's CA certificate; empty only with --insecure")
    peers: str = Field(
        "",
        description="folder with the public key, NAME.pub, of every site of the federation, from a source that you "
        "trust; with it, this site takes part only in runs with secure aggregation",
    )
    state: str = Field("state", description="folder for what stays at the site: personal state, exports, the log")
    active: int | None = Field(
        None,
        ge=1,
        description="for a weak machine: the most experts per matrix and token that this site activates, on average "
        "(SmartFed with the paper's router, or sparse); without it, as many as the run",
    )


class SiteModel(Section):
    """The base at this site."""

    path: str = Field("minilm", description="a model folder, a hub name, or the alias minilm")
    chat_template: str | None = Field(
        None, description="file with a chat template (Jinja), in place of the tokenizer's own; all sites need the same"
    )
    device_map: PlacedParts = Field(None, description=MAP)
    max_memory: MemoryLimits = Field({}, description=MEMORY)

    @model_validator(mode="after")
    def _limits_that_count(self) -> SiteModel:
        check_limits(self.device_map, self.max_memory)
        return self


class SiteData(Section):
    """This site's files. They are never sent."""

    train: str = Field(description="file of training rows: .jsonl, .csv or .parquet")
    validation: str | None = Field(
        None, description="file of validation rows; without it, taken from the training rows"
    )
    test: str | None = Field(None, description="file of test rows; without it, taken from the training rows")
    labels: tuple[str, ...] | None = Field(None, description="label names, in order; by default those in the rows")
    group: str | None = Field(
        None, description="the site's domain, where a method's groups are given ('oracle'); the server learns it"
    )
    columns: Columns = Field(default=Columns(), description="the columns' names")
    train_rows: int = Field(0, ge=0, description="training rows to use; 0: all")
    validation_rows: int = Field(0, ge=0, description="validation rows to use; 0: all")
    test_rows: int = Field(0, ge=0, description="test rows to use; 0: all")
    duplicates: Literal["warn", "refuse"] = Field(
        "warn", description="rows of test or validation that are training rows too: count them, or refuse the data"
    )
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="share of the training rows to use without a file")
    test_fraction: float = Field(0.2, ge=0, lt=1, description="share of the training rows to use without a file")

    def settings(self, client: str) -> DataSettings:
        """These settings as the ``[data]`` of a run with only this client."""
        own = ClientFiles(id=client, **self.model_dump(include={"train", "validation", "test", "labels", "group"}))
        rest = self.model_dump(exclude={"train", "validation", "test", "labels", "group", "columns"})
        return DataSettings(clients=(own,), columns=self.columns, **rest)


class SiteEngine(Section):
    """How this site computes."""

    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")
    threads: int = Field(0, ge=0, description="CPU threads; 0: OMP_NUM_THREADS, else one per core")
    joules_per_tflop: float = Field(0.0, ge=0, description=JOULES)


class Policy(Section):
    """What this site agreed to. The site enforces it, whatever the server asks for."""

    methods: tuple[str, ...] = Field((), description="methods that may run here; empty: all that are installed")
    settings: dict[str, Json] = Field(
        default_factory=dict,
        description="values that the server's config must have, by dotted key: a value, or a list of allowed values",
    )
    max_steps: int = Field(10_000, ge=1, description="optimiser steps allowed in a round")
    max_rounds: int = Field(1_000, ge=1, description="rounds allowed in a run")
    max_rank: int = Field(
        256, ge=1, description="largest rank of an expert sent to this site, and of an adapter of a pool"
    )
    max_epsilon: float = Field(
        0.0,
        ge=0,
        description="take part only in a run whose noise is this site's own ([privacy] unit = example, or noise_at = "
        "client) and costs it at most this epsilon, by its own calculation; 0: any run",
    )
    max_delta: float = Field(1e-5, gt=0, le=0.01, description="the delta of max_epsilon")
    upload: tuple[Part, ...] = Field(
        tuple(Part), description="the parts that a reply may hold: A, B, router, embedding, head"
    )
    upload_metrics: bool = Field(
        True, description="send this site's metrics, without which the server cannot evaluate it"
    )
    upload_usage: bool = Field(True, description="send how this site's tokens use the experts")
    upload_bank: bool = Field(False, description="send this site's whole bank, personal tensors included, at the end")


class SiteSettings(Section):
    """A whole SITE.toml."""

    site: SiteIdentity
    model: SiteModel = Field(default_factory=SiteModel)
    data: SiteData
    engine: SiteEngine = Field(default_factory=SiteEngine)
    policy: Policy = Field(default_factory=Policy)
