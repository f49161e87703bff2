"""The terms of a run: what the server's config says about the method, sent to every site with every message.

A site makes the run's config from the terms and its own file: data, model folder and device are the site's alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from coterie import __version__
from coterie.config.deployment import SiteSettings
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.runs.folder import plain
from coterie.types import CoterieError, Json

_SENT = {
    "model": ("dtype", "quantize", "max_length", "gradient_checkpointing"),
    "run": ("rounds", "seed", "evaluate", "eval_batch_size"),
    "engine": ("precision",),
}
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


def federation_config(raw: Mapping[str, Json]) -> Config:
    """The server's config: as that of a run, but the rows are the sites'.

    A ``[data]`` section, which the same federation in process needs, is left out: the server reads no rows.
    """
    federation = raw.get("federation", {})
    sites = federation.get("sites", ()) if isinstance(federation, dict) else ()
    clients = [{"id": site, "train": "at the site"} for site in sites] or [{"id": "any", "train": "at the site"}]
    return check_config({**raw, "data": {"clients": clients}})
