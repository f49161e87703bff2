"""The configuration of a run: one TOML file, checked once, every key with its type, default and meaning."""

from __future__ import annotations

import difflib
import json
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from coterie.config.deployment import FederationSettings, SiteSettings
from coterie.config.wording import type_in_words, value_in_words
from coterie.data.rows import Kind
from coterie.data.settings import DataSettings
from coterie.methods.base import MethodSettings, Plan, method_named
from coterie.types import SETTINGS, CoterieError, Json, Optim

DEFAULT_METHOD = "fedlease"


class _Section(BaseModel):
    model_config = SETTINGS


class ModelSettings(_Section):
    """The frozen base."""

    path: str = Field("minilm", description="a model folder, a hub name, or the alias minilm")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="how the base is held in memory")
    quantize: Literal["none", "nf4", "int8"] = Field("none", description="hold the base quantised (extra quant)")
    max_length: int = Field(128, ge=2, description="tokens per example; longer ones are cut")
    gradient_checkpointing: bool = Field(False, description="trade time for memory in training")


class LoraSettings(_Section):
    """The experts."""

    rank: int = Field(8, ge=1, description="rank r of an expert")
    alpha: float = Field(16.0, gt=0, description="the scale of an expert is alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the experts' input, while training")
    targets: tuple[str, ...] = Field((), description="names of the Linears to adapt; empty: PEFT's for the model")


class TaskSettings(_Section):
    """What the clients learn."""

    kind: Kind = Field(
        "classification",
        description="the kind of task; multiple_choice: a decoder picks the candidate of least mean loss per token",
    )
    head: Literal["personal", "shared"] = Field(
        "personal", description="the classification head stays with the client, or is averaged per label space"
    )
    generate: bool = Field(False, description="generation: also score generated text (ROUGE-L needs extra metrics)")
    max_new_tokens: int = Field(64, ge=1, description="generation: the longest text to generate")

    @model_validator(mode="after")
    def _only_generation_generates(self) -> TaskSettings:
        if self.generate and self.kind != "generation":
            raise ValueError(f"generate scores generated text, and this is {self.kind}; set kind to generation")
        return self


class RunSettings(_Section):
    """The federation's rounds."""

    rounds: int = Field(10, ge=1, description="communication rounds")
    seed: int = Field(0, ge=0, description="of every random stream")
    cohort: float = Field(1.0, gt=0, le=1, description="share of the clients that take part in a round")
    quorum: float = Field(0.5, ge=0, le=1, description="share of the cohort that must reply, or the run stops")
    norm_bound: float = Field(1e4, gt=0, description="a reply whose tensors have a larger norm is left out")
    evaluate_every: int = Field(1, ge=1, description="rounds between evaluations; the last round is always evaluated")
    evaluate: Literal["auto", "received", "trained"] = Field(
        "auto",
        description="evaluate and export what a client receives from the server, or what it trained last, before the "
        "server's averaging; auto: as the method is meant to be used",
    )
    eval_batch_size: int = Field(64, ge=1, description="examples (or candidates) per forward pass in evaluation")
    tensorboard: bool = Field(False, description="also write TensorBoard logs (extra tracking)")
    keep_checkpoints: int = Field(2, ge=2, description="checkpoints kept, the newest first")


class RaySettings(_Section):
    """What the engine flower-sim gives to its clients; the other engines do not read it."""

    cpus_per_client: int = Field(
        1, ge=1, description="cores that Ray sets aside for a client at work; with threads = 0 also its CPU threads"
    )
    gpus_per_client: float = Field(
        0.0, ge=0, description="share of a GPU of a client at work: 0.25 puts four on each GPU; 0: they see no GPU"
    )
    clients_at_once: int = Field(
        0, ge=0, description="clients at work at the same time, each in a process with its own base; 0: as cores allow"
    )
    object_store_mib: int = Field(256, ge=76, description="shared memory that Ray takes for messages, MiB")
    address: str = Field(
        "", description="a Ray cluster that runs already: HOST:PORT or auto; empty: a Ray of the run's own"
    )


class EngineSettings(_Section):
    """Where it runs."""

    name: str = Field("local", description="the engine: local, or flower-sim (extra flower-sim)")
    device: str | tuple[str, ...] = Field(
        "auto",
        description='cpu, cuda, cuda:1, or auto; several, as ["cuda:0", "cuda:1"], or cuda:all: clients are spread '
        "over them, and each holds the base",
    )
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="bfloat16: autocast every forward pass; auto: where the device computes in it by itself"
    )
    clients_per_batch: int | Literal["auto"] = Field(
        1,
        description="clients that share a forward pass; 1: one after another, the reference; auto: as many as pay by "
        "what is measured, which a resumed run measures anew",
    )
    compile: bool = Field(
        False, description="torch.compile for what lies between the adapters; needs a compiler, changes the last bits"
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0: OMP_NUM_THREADS, or as many as cores")
    ray: RaySettings = Field(default_factory=RaySettings)

    @field_validator("device")
    @classmethod
    def _some_device(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("it names no device")
        return value

    @field_validator("clients_per_batch")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("it is at least 1, or 'auto'")
        return value


class Config(_Section):
    """A whole run. ``method`` holds the method's name and, beside it, the method's own settings."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    data: DataSettings
    task: TaskSettings = Field(default_factory=TaskSettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    train: Optim = Field(default_factory=Optim)
    method: dict[str, Json] = Field(default_factory=lambda: {"name": DEFAULT_METHOD})
    run: RunSettings = Field(default_factory=RunSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    federation: FederationSettings = Field(default_factory=FederationSettings)

    def method_settings(self) -> MethodSettings:
        """The method's own settings, checked against its model."""
        name = str(self.method.get("name", DEFAULT_METHOD))
        own = {key: value for key, value in self.method.items() if key != "name"}
        settings: MethodSettings = _checked(method_named(name).Settings, own, "method")
        return settings

    @property
    def evaluated(self) -> Literal["received", "trained"]:
        """What clients evaluate and export: ``[run] evaluate``, or as the method says."""
        name = str(self.method.get("name", DEFAULT_METHOD))
        return method_named(name).evaluates if self.run.evaluate == "auto" else self.run.evaluate

    def plan(self) -> Plan:
        """What a method is given besides its own settings."""
        return Plan(
            rank=self.lora.rank,
            alpha=self.lora.alpha,
            dropout=self.lora.dropout,
            optim=self.train,
            head=self.task.head,
            rounds=self.run.rounds,
            seed=self.run.seed,
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a TOML file, with ``section.key=value`` overrides.

    Raises :class:`CoterieError` for a missing file, bad TOML, an unknown key (names the nearest) or a wrong value.
    """
    return check_config(override(load_raw(path), overrides))


def load_site(path: Path) -> SiteSettings:
    """The checked SITE.toml at ``path``; faults as :func:`load_config` raises them."""
    site: SiteSettings = _checked(SiteSettings, load_raw(path), "")
    return site


def load_raw(path: Path) -> dict[str, Json]:
    """The unchecked content of a TOML file. Raises :class:`CoterieError` for a missing file and for bad TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as fault:
        raise CoterieError(f"there is no config file {path}") from fault
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise CoterieError(f"{path} is no TOML file: {fault}") from fault


def check_config(raw: Mapping[str, Json]) -> Config:
    """The checked config of nested mappings; see :func:`load_config`.

    ``[methods.NAME]`` holds the settings of a method by name, for a file that several methods share: those of the
    method that ``[method]`` names count, and ``[method]`` itself counts more.
    """
    several, named = section_of(raw, "methods"), section_of(raw, "method")
    for name in several:
        _checked(method_named(name).Settings, section_of(several, name), f"methods.{name}")
    chosen = str(named.get("name", DEFAULT_METHOD))
    rest = {name: value for name, value in raw.items() if name != "methods"}
    method = {**section_of(several, chosen), **named, "name": chosen}
    config: Config = _checked(Config, {**rest, "method": method}, "")
    resolved = config.method_settings().model_dump(mode="json")
    return config.model_copy(update={"method": {"name": chosen, **resolved}})


def section_of(raw: Mapping[str, Json], name: str) -> dict[str, Json]:
    """A section of an unchecked config, empty where there is none. Raises :class:`CoterieError` for another thing."""
    found = raw.get(name, {})
    if not isinstance(found, dict):
        raise CoterieError(f"{name} = {found!r} in the config: {name} is a section")
    return found


def override(raw: Mapping[str, Json], overrides: Sequence[str]) -> dict[str, Json]:
    """``raw`` with every ``section.key=value`` set; a value is TOML, or a plain string where it is no TOML."""
    result: dict[str, Json] = json.loads(_json(raw))
    for text in overrides:
        path, found, value = text.partition("=")
        if not found or "." not in path:
            raise CoterieError(f"--set {text!r} is not of the form section.key=value")
        *sections, key = path.strip().split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise CoterieError(f"--set {text!r}: {section} is no section")
        place[key] = _value(value)
    return result


def differences(old: Mapping[str, Json], new: Mapping[str, Json]) -> list[str]:
    """The keys, dotted, in which two configs differ."""
    flat = [dict(_flat(config)) for config in (old, new)]
    return sorted(k for k in flat[0].keys() | flat[1].keys() if flat[0].get(k) != flat[1].get(k))


def describe_config(method: str | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Every key as (dotted key, type, default, meaning); with the settings of one method or of all.

    Raises :class:`CoterieError` for an unknown method.
    """
    from coterie.methods.base import methods

    if method is not None:
        method_named(method)
    for name, field in Config.model_fields.items():
        if name != "method":
            yield from _describe(field.annotation, name)
    yield "method.name", "text", value_in_words(DEFAULT_METHOD), "the method: " + ", ".join(methods())
    for known, kind in methods().items():
        if method in (None, known):
            yield from _describe(kind.Settings, f"method[{known}]")


def describe_site() -> Iterator[tuple[str, str, str, str]]:
    """Every key of a SITE.toml, as :func:`describe_config` has them."""
    for name, field in SiteSettings.model_fields.items():
        yield from _describe(field.annotation, name)


def _describe(model: Any, path: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        section, several = _section_in(field.annotation)
        if section is not None:
            yield from _describe(section, f"{path}.{name}{'[]' if several else ''}")
        if section is not None and not several:
            continue
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else value_in_words(value)
        yield f"{path}.{name}", type_in_words(field.annotation), default, field.description or ""


def _section_in(annotation: Any) -> tuple[Any, bool]:
    """The section that an annotation holds, itself or in a union or a tuple (then there may be several), or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    found = [_section_in(inner)[0] for inner in typing.get_args(annotation)]
    sections = [section for section in found if section is not None]
    return (sections[0] if sections else None), typing.get_origin(annotation) is tuple


def _flat(tree: Mapping[str, Json], path: str = "") -> Iterator[tuple[str, Json]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _value(text: str) -> Json:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _json(raw: Mapping[str, Json]) -> str:
    """``raw`` as JSON; a date or time of TOML, which no key takes, as text."""
    return json.dumps(raw, default=str)


def _checked(model: type[Any], raw: Mapping[str, Json], path: str) -> Any:
    try:
        return model.model_validate_json(_json(raw))  # as JSON: a list makes a tuple, and yet '4' no number
    except ValidationError as fault:
        errors = fault.errors()
        # Where a string or a section may stand, pydantic also says of a wrong section that it is no string.
        errors = [e for e in errors if not (e["type"] == "string_type" and isinstance(e["input"], dict))] or errors
        raise CoterieError("; ".join(_message(model, error, path) for error in errors[:3])) from fault


def _message(model: Any, error: Any, path: str) -> str:
    unknown = error["type"] == "extra_forbidden"
    parts = [path] if path else []
    for depth, part in enumerate(error["loc"], start=1):
        field = getattr(model, "model_fields", {}).get(part)
        model = _section_in(field.annotation)[0] if field else model
        if field or isinstance(part, int) or (unknown and depth == len(error["loc"])):  # else a name that pydantic made
            parts.append(str(part))
    *sections, key = parts
    where = f"[{'.'.join(sections)}] " if sections else ""
    if not unknown:
        found = f" (found {error['input']!r})" if not isinstance(error["input"], dict) else ""
        return f"{where}{key}: {error['msg'].removeprefix('Value error, ')}{found}"
    known = list(getattr(model, "model_fields", {}))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known) or 'none'}"
    return f"{where}unknown key {key!r}; {hint}"
