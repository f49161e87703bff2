"""The terms of a run: what the server's config says about the method, sent to every site with every message.

A site makes the run's config from the terms and its own file: data, model folder and device are the site's alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from coterie import __version__
from coterie.config import Config, check_config
from coterie.deployment import Policy, SiteSettings
from coterie.engines.compute import LocalCompute
from coterie.run_folder import plain
from coterie.types import CoterieError, Json, Observe, Observed, Optim, Reply, Score, Scored, Train, Trained

_SENT = {
    "model": ("dtype", "quantize", "max_length", "gradient_checkpointing"),
    "run": ("rounds", "seed", "evaluate", "eval_batch_size"),
    "engine": ("precision",),
}
_USAGE = ("importance", "use")  # what a reply of SmartFed says of the experts, beside its tensors
_WHOLE = ("task", "lora", "train", "method")


def terms_of(config: Config) -> dict[str, Json]:
    """What a site has to know of ``config``, and nothing else: no path, no address, nobody's data."""
    whole = plain(config)
    terms = {name: whole[name] for name in _WHOLE}
    terms |= {section: {key: whole[section][key] for key in keys} for section, keys in _SENT.items()}
    return {"coterie": __version__, **terms}


def hash_of(terms: Mapping[str, Json]) -> str:
    """SHA-256 of the terms, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()


def config_at(site: SiteSettings, terms: Mapping[str, Json]) -> Config:
    """The config of the run at ``site``. Raises :class:`CoterieError` for terms of another version."""
    if not isinstance(terms, dict) or not all(isinstance(terms.get(name), dict) for name in (*_WHOLE, *_SENT)):
        raise CoterieError("the terms are not those that a coterie server sends")
    if terms.get("coterie") != __version__:
        raise CoterieError(
            f"the server runs coterie {terms.get('coterie')}, this site {__version__}: install the same version"
        )
    raw = {name: terms[name] for name in (*_WHOLE, *_SENT)}
    raw["model"] = {**raw["model"], "path": site.model.path}
    raw["engine"] = {**raw["engine"], "device": site.engine.device, "threads": site.engine.threads}
    raw["data"] = site.data.settings(site.site.id).model_dump(mode="json", exclude_none=True)
    return check_config(raw)


def check_policy(policy: Policy, config: Config) -> None:
    """Raises :class:`CoterieError` that says what in the server's config this site did not agree to."""
    name = config.method["name"]
    if policy.methods and name not in policy.methods:
        raise CoterieError(f"this site does not run {name}, only {', '.join(policy.methods)} ([policy] methods)")
    for what, asked, most in (
        ("rank", config.lora.rank, policy.max_rank),
        ("rounds", config.run.rounds, policy.max_rounds),
    ):
        if asked > most:
            raise CoterieError(f"this site allows at most {most} {what}, the run has {asked} ([policy] max_{what})")
    asked_for = plain(config)
    for key, wanted in policy.settings.items():
        found: Json = asked_for
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found not in (wanted if isinstance(wanted, list) else [wanted]):
            raise CoterieError(f"this site wants {key} = {wanted!r}, the run has {found!r} ([policy] settings)")


def check_upload(policy: Policy, reply: Reply) -> None:
    """Raises :class:`CoterieError` where ``reply`` holds a part that this site keeps to itself."""
    kept = sorted({key.part.value for key in reply.tensors} - {part.value for part in policy.upload})
    if kept:
        raise CoterieError(f"this site does not send {', '.join(kept)} ([policy] upload)")


def without_usage(policy: Policy, reply: Reply) -> Reply:
    """``reply`` without how the rows use the experts, where the site keeps that to itself; a server does without."""
    if policy.upload_usage:
        return reply
    return replace(reply, info={name: value for name, value in reply.info.items() if name not in _USAGE})


@dataclass(frozen=True)
class BoundedCompute:
    """A client's compute with a bound on the optimiser steps of its round: counts before it trains."""

    inner: LocalCompute
    bound: int
    taken: list[int] = field(default_factory=list)

    def train(self, request: Train) -> Trained:
        steps = steps_of(request.optim, len(self.inner.place.examples(self.inner.client, "train")))
        if sum(self.taken) + steps > self.bound:
            raise CoterieError(
                f"round {self.inner.rnd} would take {sum(self.taken) + steps} steps here, and this site allows "
                f"{self.bound} ([policy] max_steps)"
            )
        self.taken.append(steps)
        return self.inner.train(request)

    def score(self, request: Score) -> list[Scored]:
        return self.inner.score(request)

    def observe(self, request: Observe) -> Observed:
        return self.inner.observe(request)


def steps_of(optim: Optim, rows: int) -> int:
    """The optimiser steps that ``optim`` asks for on so many rows."""
    if optim.steps:
        return optim.steps
    return optim.epochs * math.ceil(math.ceil(rows / optim.batch_size) / optim.accumulate)


def federation_config(raw: Mapping[str, Json]) -> Config:
    """The server's config: as that of a run, but the rows are the sites'.

    A ``[data]`` section, which the same federation in process needs, is left out: the server reads no rows.
    """
    federation = raw.get("federation", {})
    sites = federation.get("sites", ()) if isinstance(federation, dict) else ()
    clients = [{"id": site, "train": "at the site"} for site in sites] or [{"id": "any", "train": "at the site"}]
    return check_config({**raw, "data": {"clients": clients}})
