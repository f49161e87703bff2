"""What the sites of a run agree on: the terms, the run's id, who may take part, and how long they have to reply.

The terms are what the server's config says about the method. They are sent to every site with every message; a site
makes the run's config from them and from its own file: data, model folder and device are the site's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from coterie import __version__
from coterie.config.deployment import SiteSettings
from coterie.config.load import check_config
from coterie.config.sections import Config
from coterie.deploy.head import MOST
from coterie.deploy.private_site import check_privacy_of_sites
from coterie.flower.message import Message
from coterie.methods.registry import method_named
from coterie.runs.folder import plain
from coterie.types import ClientId, ClientInfo, CoterieError, Json

_SENT = {
    "model": ("dtype", "quantize", "max_length", "gradient_checkpointing"),
    "run": ("rounds", "seed", "evaluate", "export", "eval_batch_size"),
    "engine": ("precision",),
}
_SENT_WHOLE = ("task", "lora", "train", "method", "secure_aggregation", "privacy")
_GRACE = 60.0  # seconds after the deadline for which Flower keeps a message, so that late answers are noticed


@dataclass(frozen=True)
class Agreement:
    """What all sites of a run have in common.

    ``terms`` are sent with every message, ``digest`` is their SHA-256. ``sites`` may take part; empty: any site.
    ``keys`` is the site that owns a key, by the key's SHA-256; empty without authentication. ``attempt`` counts the
    starts of the run's server, so that a site recognises a message of a server that is gone. ``closed`` is the reason
    why only ``sites`` can take part now that the run has begun; empty while it is open. ``spaces`` are the label spaces
    of the shared heads (:func:`coterie.methods.parts.label_space`), of which a site that comes later needs one; empty:
    it may have any labels. ``finished``: the run is over,
    and ``sites`` join it afterwards. ``deadline`` (seconds) is for
    an answer, ``greeting`` (seconds) for a site that went away to come back. ``base`` is the SHA-256 of the base
    (:func:`coterie.deploy.base_digest.base_digest`); empty: that of the first site.
    ``max_rows`` is the most training rows that a site may report: its weight in means goes by them. ``unprotected``
    says why the rows of a site that is new would have no protection, where ``[privacy]`` counts rows; None: they do.
    ``starts``: the earlier attempts, and the round that each went back to.
    """

    run: str
    terms: Mapping[str, Json]
    digest: str
    attempt: int = 1
    sites: tuple[ClientId, ...] = ()
    closed: str = ""
    spaces: tuple[str, ...] = ()
    finished: bool = False
    keys: Mapping[str, ClientId] = field(default_factory=dict)
    deadline: float = 3600.0
    greeting: float = 60.0
    base: str = ""
    max_rows: int = 10_000_000
    starts: Sequence[tuple[int, int]] = ()
    unprotected: Callable[[ClientInfo], str | None] = lambda info: None

    @property
    def ttl(self) -> float:
        """Seconds for which Flower keeps a message."""
        return self.deadline + _GRACE

    def message(
        self,
        kind: str,
        client: ClientId = "",
        rnd: int = 0,
        details: Mapping[str, Json] | None = None,
        body: bytes = b"",
        *,
        since: int = 0,
        keep: int = 0,
        kept_rounds: Sequence[int] = (),
    ) -> Message:
        """A message of this run; ``details`` is what only messages of its kind have in their head.

        ``since`` is the round whose state this attempt starts from, ``keep`` the oldest round that is still needed,
        beside the rounds ``kept_rounds``. The head also has the newest of ``starts``.
        """
        head: dict[str, Json] = {"kind": kind, "client": client, "round": rnd, "run": self.run, "attempt": self.attempt}
        head |= {"since": since, "keep": keep, "kept_rounds": list(kept_rounds)}
        head |= {"starts": [list(start) for start in self.starts[-MOST:]]}
        head |= {"patience": self.deadline, "terms": dict(self.terms), **(details or {})}
        return Message(head, body)


def terms_of(config: Config) -> dict[str, Json]:
    """What a site needs to know of ``config``, and nothing else: no path, no address, nobody's data."""
    whole = plain(config)
    terms = {name: whole[name] for name in _SENT_WHOLE}
    terms |= {section: {key: whole[section][key] for key in keys} for section, keys in _SENT.items()}
    return {"coterie": __version__, **terms}


def config_at(site: SiteSettings, terms: Mapping[str, Json]) -> Config:
    """The config of the run at ``site``.

    Raises :class:`CoterieError` if the server runs another version, or for settings that only a simulation may have.
    """
    if not isinstance(terms, dict) or not all(isinstance(terms.get(name), dict) for name in (*_SENT_WHOLE, *_SENT)):
        raise CoterieError(
            "these are not the terms of a Coterie server; check that [site] server is the address of one"
        )
    if terms.get("coterie") != __version__:
        raise CoterieError(
            f"the server runs coterie {terms.get('coterie')}, this site {__version__}: install the same version"
        )
    _check_scores(terms["task"])
    raw = {name: terms[name] for name in (*_SENT_WHOLE, *_SENT)}
    raw["model"] = {**raw["model"], **site.model.model_dump(mode="json")}  # its path, and what is its machine's own
    raw["engine"] = {**raw["engine"], **site.engine.model_dump()}
    raw["data"] = site.data.settings(site.site.id).model_dump(mode="json", exclude_none=True)
    config = check_config(raw)
    check_privacy_of_sites(config.privacy)
    return config


def _check_scores(task: Mapping[str, object]) -> None:
    """Raises :class:`CoterieError` for a score that a site would have to import by the server's word."""
    scores = task.get("scores", ())
    if not isinstance(scores, list | tuple) or any(":" in str(score) for score in scores):
        raise CoterieError(
            f"[task] scores is {list(scores) if isinstance(scores, list | tuple) else scores!r}: a site imports "
            "nothing that a server names; make an installed package add the score instead (coterie.scores)"
        )


def federation_config(raw: Mapping[str, Json]) -> Config:
    """The server's config: that of a run, except that the rows are the sites'.

    A ``[data]`` section, which the same federation in process needs, is ignored: the server reads no rows. Raises
    :class:`CoterieError` for a method that needs all rows in one place.
    """
    federation = raw.get("federation", {})
    sites = federation.get("sites", ()) if isinstance(federation, dict) else ()
    clients = [{"id": site, "train": "at the site"} for site in sites] or [{"id": "any", "train": "at the site"}]
    config = check_config({**raw, "data": {"clients": clients}})
    _check_scores(config.task.model_dump())
    check_privacy_of_sites(config.privacy)
    if method_named(config.method_name).needs_all_rows:
        raise CoterieError(
            f"[method] {config.method_name} trains on all clients' rows in one place, and sites keep theirs: choose "
            "another method, or simulate it with `coterie run`"
        )
    return config
