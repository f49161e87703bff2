"""The sections of a run's config: every key with its type, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from coterie.config.check import checked
from coterie.config.deployment import JOULES, FederationSettings
from coterie.config.placement import MAP, MEMORY, MemoryLimits, PlacedParts, check_engine, check_limits
from coterie.config.privacy import check_privacy, check_training
from coterie.data.dpo import Objective, Reference
from coterie.data.settings import DataSettings
from coterie.methods.base import Method
from coterie.methods.plan import MethodSettings, Plan
from coterie.methods.privacy import PrivacySettings
from coterie.methods.registry import method_named
from coterie.methods.robust import RobustSettings
from coterie.methods.secure import SecureAggregationSettings, refusal
from coterie.ops.sampling import NEW_TOKENS
from coterie.ops.scores import DEFAULT
from coterie.requests import Optim
from coterie.types import CoterieError, Json, Section, TaskKind

DEFAULT_METHOD = "fedlease"


class ModelSettings(Section):
    """The frozen base."""

    path: str = Field("minilm", description="a model folder, a hub name, or the alias minilm")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="the dtype of the base in memory")
    quantize: Literal["none", "nf4", "int8"] = Field("none", description="quantise the base (extra quant)")
    max_length: int = Field(128, ge=2, description="tokens per example; longer examples are cut")
    gradient_checkpointing: bool = Field(False, description="use less memory in training, for more time")
    chat_template: str | None = Field(
        None,
        description="file with a chat template (Jinja), in place of the tokenizer's own; a site names its own",
    )
    device_map: PlacedParts = Field(None, description=f"{MAP}; a site names its own")
    max_memory: MemoryLimits = Field({}, description=MEMORY)

    @model_validator(mode="after")
    def _limits_that_count(self) -> ModelSettings:
        check_limits(self.device_map, self.max_memory)
        return self


class LoraSettings(Section):
    """The experts."""

    rank: int = Field(8, ge=1, description="rank r of an expert")
    ranks: dict[str, int] | tuple[int, ...] = Field(
        (),
        description="different ranks, for methods that allow them: by client, as in {north = 4, south = 16}, where the "
        "other clients have rank; or a list that is repeated over the clients' sorted names",
    )
    alpha: float = Field(16.0, gt=0, description="the scale of an expert is alpha / rank, with the client's own rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the experts' input in training")
    targets: tuple[str, ...] = Field(
        (), description="names of the Linears to adapt; empty: PEFT's defaults for the model"
    )

    @field_validator("ranks")
    @classmethod
    def _at_least_one(cls, value: dict[str, int] | tuple[int, ...]) -> dict[str, int] | tuple[int, ...]:
        if any(rank < 1 for rank in (value.values() if isinstance(value, dict) else value)):
            raise ValueError("a rank must be at least 1")
        return value


class TaskSettings(Section):
    """What the clients learn."""

    kind: TaskKind = Field(
        "classification",
        description="the kind of task; multiple_choice: a decoder picks the candidate with the lowest mean loss per "
        "token",
    )
    head: Literal["personal", "shared"] = Field(
        "personal",
        description="personal: each client keeps its classification head; shared: averaged over clients with the "
        "same labels",
    )
    generate: bool = Field(False, description="generation: also score generated text")
    scores: tuple[str, ...] = Field(
        DEFAULT,
        min_length=1,
        description="generation: the scores of generated text: rouge_l (extra metrics), exact_match, token_f1, "
        "numeric, those of installed packages, and in simulations module:function",
    )
    max_new_tokens: int = Field(NEW_TOKENS, ge=1, description="generation: the most tokens to generate")
    temperature: float = Field(
        0.0, ge=0, description="generation: 0: the most likely tokens; above: draw them, the higher the more freely"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="generation: draw from the most likely tokens that have this probability together"
    )
    turns: Literal["all", "last"] = Field(
        "all", description="generation: the assistant's turns of a conversation that the loss counts"
    )

    objective: Objective = Field(
        "likelihood",
        description="generation: what training does: make completions likely, or, with dpo, prefer each row's chosen "
        "answer to its rejected one",
    )
    beta: float = Field(0.1, gt=0, description="dpo: the strength of the pull towards the reference")
    reference: Reference = Field(
        "round",
        description="dpo: what training compares with: round, the experts that a client starts it from, or base, the "
        "base without experts",
    )

    @model_validator(mode="after")
    def _what_goes_together(self) -> TaskSettings:
        if self.generate and self.kind != "generation":
            raise ValueError(f"generate works only with kind = generation, not {self.kind}; leave it out")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("top_p counts only where tokens are drawn; set temperature above 0, or leave top_p out")
        if self.temperature > 0 and not self.generate:
            raise ValueError("temperature counts only where text is generated; set generate = true, or leave it out")
        if self.objective == "dpo" and self.kind != "generation":
            raise ValueError(f"objective = dpo works only with kind = generation, not {self.kind}; leave it out")
        for name in ("beta", "reference"):
            if self.objective != "dpo" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name} counts only with objective = "dpo"; set that, or leave {name} out')
        return self


def at_least_one(value: int | str) -> int | str:
    """Checks a number that may be ``auto``."""
    if isinstance(value, int) and value < 1:
        raise ValueError("must be at least 1, or 'auto'")
    return value


Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]


class RunSettings(Section):
    """The federation's rounds."""

    rounds: int = Field(10, ge=1, description="communication rounds")
    seed: int = Field(0, ge=0, description="seed of every random stream")
    cohort: float = Field(1.0, gt=0, le=1, description="share of the clients that take part in a round")
    sampling: Literal["fixed", "poisson"] = Field(
        "fixed",
        description="how a cohort is drawn: fixed: always as many clients; poisson: each client by itself, with the "
        "probability cohort",
    )
    quorum: float = Field(0.5, ge=0, le=1, description="share of the cohort that must reply, or the run stops")
    norm_bound: float = Field(1e4, gt=0, description="replies whose tensors have a larger norm are left out")
    update_bound: float = Field(
        10.0, gt=0, description="replies whose update exceeds this many times the round's median are left out"
    )
    max_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="largest share of a round's training examples that one client counts for; none: twice an equal "
        "share, at least a third and at most half",
    )
    evaluate_every: int = Field(1, ge=1, description="rounds between evaluations; the last round is always evaluated")
    evaluate: Literal["auto", "received", "trained"] = Field(
        "auto",
        description="what clients evaluate and export: what they receive from the server, or what they trained last, "
        "before the server averages it; auto: the method's own choice",
    )
    export: Literal["best", "last"] = Field(
        "best",
        description="which round's experts and clients' banks are exported: best, the one that validation chose; last",
    )
    eval_batch_size: int | Literal["auto"] = Field(
        "auto", description="examples (or candidates) per forward pass in evaluation; auto: 16 on a CPU, 64 on a GPU"
    )
    tracking: tuple[Tracker, ...] = Field(
        (),
        description="also give the run's figures to these trackers, each an extra of its own: tensorboard, mlflow, "
        "wandb, trackio",
    )
    keep_checkpoints: int = Field(2, ge=2, description="how many of the newest checkpoints to keep")

    _checked = field_validator("eval_batch_size")(at_least_one)


class RaySettings(Section):
    """What the engine flower-sim gives its clients; other engines ignore it."""

    cpus_per_client: int = Field(
        1, ge=1, description="cores that Ray reserves for each client at work; with threads = 0 also its CPU threads"
    )
    gpus_per_client: float = Field(
        0.0, ge=0, description="share of a GPU for each client at work: 0.25 puts four on each GPU; 0: no GPU"
    )
    clients_at_once: int = Field(
        0,
        ge=0,
        description="clients at work at the same time, each in a process with its own base; 0: as many as the "
        "cores allow",
    )
    object_store_mib: int = Field(256, ge=76, description="shared memory for Ray's messages, in MiB")
    address: str = Field("", description="a running Ray cluster: HOST:PORT or auto; empty: start one for the run")


class EngineSettings(Section):
    """Where and how the clients compute."""

    name: str = Field("local", description="the engine: local, or flower-sim (extra flower-sim)")
    device: str | tuple[str, ...] = Field(
        "auto",
        description='cpu, cuda, cuda:1 or auto; for several, ["cuda:0", "cuda:1"] or cuda:all: clients are '
        "distributed over them, with a copy of the base on each",
    )
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="bfloat16: autocast every forward pass; auto: bfloat16 on devices that support it natively",
    )
    clients_per_batch: int | Literal["auto"] = Field(
        1,
        description="clients that share a forward pass; 1: one after another, the reference; auto: the number that is "
        "estimated to be fastest, padding included, and fits in memory as measured; a resumed run decides again",
    )
    attention: Literal[
        "auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = Field(
        "auto",
        description="the implementation of attention, by transformers' name; flash attention needs its package and a "
        "GPU; auto: the model's own, usually sdpa, or eager for short rows in bfloat16 on a CPU",
    )
    compile: bool = Field(
        False, description="torch.compile the modules between the adapters; needs a compiler, and changes the last bits"
    )
    loss_chunk: int | Literal["auto"] = Field(
        "auto",
        description="generation and multiple_choice: tokens whose logits are in memory at once in the loss; auto: all, "
        "or as many as take 64 MiB where all would take more than 256 MiB; 0: all",
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0: OMP_NUM_THREADS, or one per core")
    joules_per_tflop: float = Field(0.0, ge=0, description=JOULES)
    ray: RaySettings = Field(default_factory=RaySettings)

    @field_validator("device")
    @classmethod
    def _some_device(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("give at least one device")
        return value

    _checked = field_validator("clients_per_batch")(at_least_one)

    def on(self, device: str) -> EngineSettings:
        """The same on another device. Flash attention, which a CPU does not have, becomes ``auto`` there."""
        lacks = device == "cpu" and self.attention.startswith("flash")
        return self.model_copy(update={"device": device, **({"attention": "auto"} if lacks else {})})

    @field_validator("loss_chunk")
    @classmethod
    def _some_tokens(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError("must be at least 1, 0 for all tokens, or 'auto'")
        return value


class Config(Section):
    """A whole run. ``method`` holds the method's name together with the method's own settings."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    data: DataSettings
    task: TaskSettings = Field(default_factory=TaskSettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    train: Optim = Field(default_factory=Optim)
    method: dict[str, Json] = Field(default_factory=lambda: {"name": DEFAULT_METHOD})
    run: RunSettings = Field(default_factory=RunSettings)
    robust: RobustSettings = Field(default_factory=RobustSettings)
    secure_aggregation: SecureAggregationSettings = Field(default_factory=SecureAggregationSettings)
    privacy: PrivacySettings = Field(default_factory=PrivacySettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    federation: FederationSettings = Field(default_factory=FederationSettings)

    def on(self, device: str) -> Config:
        """The same on one device: the base is no longer placed in parts."""
        model = self.model.model_copy(update={"device_map": None, "max_memory": {}})
        return self.model_copy(update={"engine": self.engine.on(device), "model": model})

    @property
    def method_name(self) -> str:
        return str(self.method.get("name", DEFAULT_METHOD))

    @property
    def evaluated(self) -> Literal["received", "trained"]:
        """What clients evaluate and export: ``[run] evaluate``, or the method's own choice."""
        return method_named(self.method_name).evaluates if self.run.evaluate == "auto" else self.run.evaluate

    def method_settings(self) -> MethodSettings:
        """The method's own settings, checked against its model."""
        own = {key: value for key, value in self.method.items() if key != "name"}
        return checked(method_named(self.method_name).Settings, own, "method")

    def make_method(self, root: Path) -> Method:
        """The method with its settings; relative paths in them start at ``root``, the config's folder."""
        kind = method_named(self.method_name)
        if self.train.packing and (self.task.kind == "classification" or self.task.objective == "dpo"):
            what = "classification" if self.task.kind == "classification" else "objective = dpo"
            raise CoterieError(
                f"[train] packing works with generation and multiple_choice, not with {what}; leave it out"
            )
        if self.robust.active and kind.no_rules:
            raise CoterieError(
                f"[robust] does not work with {kind.name}: {kind.no_rules}; leave [robust] out or choose another method"
            )
        if self.run.cohort < 1 and kind.needs_all_rows:
            raise CoterieError(f"[run] cohort < 1 does not work with {kind.name}: it needs all rows; set cohort = 1")
        method = kind(self.method_settings().located(root), self.plan())
        if fault := refusal(self.secure_aggregation, method.releases(), self.robust.active):
            raise CoterieError(f"[secure_aggregation] does not work with {kind.name} here: {fault}")
        engine = self.engine
        check_engine(self.model.device_map, engine.device, engine.clients_per_batch, engine.compile)
        check_training(self.privacy.by_row, self.model.gradient_checkpointing, self.task.objective)
        check_privacy(method, self.run.cohort < 1 or self.run.sampling == "poisson", self.run.export)
        return method

    def plan(self) -> Plan:
        """What a method gets besides its own settings."""
        return Plan(
            rank=self.lora.rank,
            ranks=self.lora.ranks,
            alpha=self.lora.alpha,
            dropout=self.lora.dropout,
            optim=self.train,
            head=self.task.head,
            rounds=self.run.rounds,
            seed=self.run.seed,
            robust=self.robust,
            secure=self.secure_aggregation,
            privacy=self.privacy,
        )
