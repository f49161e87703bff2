"""``coterie site check``: whether versions, keys, server, data and model are ready, before a site joins."""

from __future__ import annotations

import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from coterie.compute.loading import workplaces
from coterie.config.deployment import SiteSettings
from coterie.config.load import check_config, load_raw
from coterie.config.sections import Config
from coterie.deploy.agreement import config_at, terms_of
from coterie.deploy.base_digest import base_digest, files_digest
from coterie.deploy.policy import check_active, check_policy
from coterie.deploy.private_site import own_cost
from coterie.deploy.site import key_checks, load
from coterie.deploy.worker import Worker
from coterie.machine import Check, version, versions
from coterie.nn.locate import resolve
from coterie.ops.accounting import INSTALL, NoAccountantError
from coterie.runs.cost import MOST, unprotected_by_delta
from coterie.types import ClientInfo, CoterieError

_FLOWER = "1.41.0"


def check(path: Path, config: Path | None = None, insecure: bool = False) -> Iterator[Check]:
    """Every check in turn: versions, keys, server, data and model, with the server's ``config`` if there is one.

    Without it, data and model are tried with the defaults of a classification.
    """
    site, root = load(path)
    yield Check("site", site.site.id)
    flower = version("flwr")
    ready = flower == _FLOWER
    yield Check("flwr", flower or "not installed", ready, "" if ready else f"pip install flwr=={_FLOWER}")
    for name, number in versions().items():
        yield Check(name, str(number))
    yield from key_checks(site, root, insecure)
    yield _server_check(site, root, insecure)
    run, found = _run_config(site, config)
    yield found
    if run is None:
        return
    yield from _policy_checks(site, root, run)
    yield from _data_and_model(site, root, run)


def _run_config(site: SiteSettings, config: Path | None) -> tuple[Config | None, Check]:
    try:
        raw = load_raw(config) if config is not None else {}
        served = check_config({**raw, "data": {"clients": [{"id": site.site.id, "train": "at the site"}]}})
        named = str(config) if config else "none given (--config); tried with the defaults of a classification"
        return config_at(site, terms_of(served)), Check("config", named)
    except CoterieError as fault:
        return None, Check("config", str(fault), False, "ask whoever runs the server for the config file")


def _server_check(site: SiteSettings, root: Path, insecure: bool) -> Check:
    """Check that the server answers, with a certificate for its address."""
    host, _, port = site.site.server.rpartition(":")
    fix = "check that `coterie serve` runs there, and that no firewall blocks the connection"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10) as plain:
            if insecure:
                return Check("server", f"{site.site.server} answers")
            trust = ssl.create_default_context(cafile=str(root / site.site.ca))
            with trust.wrap_socket(plain, server_hostname=host.strip("[]")) as secure:
                return Check("server", f"{site.site.server} answers, {secure.version()}")
    except ssl.SSLError as fault:
        fix = "the certificate is not for this address or not from this CA: ask whoever runs the server"
        return Check("server", f"{site.site.server}: {fault.reason or fault}", False, fix)
    except (OSError, ValueError) as fault:
        return Check("server", f"{site.site.server}: {fault}", False, fix)


def _policy_checks(site: SiteSettings, root: Path, run: Config) -> Iterator[Check]:
    try:
        method = run.make_method(root)
        check_policy(site.policy, run, method)
    except CoterieError as fault:
        yield Check("policy", str(fault), False, "change [policy], or ask whoever runs the server to change its config")
        return
    try:
        check_active(site.site, method)
    except CoterieError as fault:
        yield Check("active", str(fault), False, "leave [site] active out, or ask whoever runs the server")
    else:
        yield Check("policy", f"allows {run.method_name}, rank {method.max_rank}, {run.run.rounds} rounds")


def _data_and_model(site: SiteSettings, root: Path, run: Config) -> Iterator[Check]:
    worker = Worker(site, root)
    try:
        federation = worker.federation(run)
    except CoterieError as fault:
        yield Check("data", str(fault), False, "correct the files or [data]")
        return
    (client,) = federation.clients
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in client.splits.items())
    yield Check("data", f"{counts} rows; labels {', '.join(client.info.labels or ()) or 'none'}")
    for note in federation.notes:
        yield Check("duplicates", note)
    steps, bound = run.train.steps_on(client.info.num_train), site.policy.max_steps
    fix = "" if steps <= bound else "raise [policy] max_steps"
    yield Check("steps per round", f"{steps} of {bound}", steps <= bound, fix)
    yield from _privacy_check(root, run, client.info)
    try:
        with tempfile.TemporaryDirectory() as folder:
            workplace = workplaces(run, root, {})[0]
            files = files_digest(resolve(run.model.path, root), Path(folder) / "base.json")
    except CoterieError as fault:
        yield Check("model", str(fault), False, "correct [model], or ask whoever runs the server which model it uses")
        return
    try:
        for split in (split for split, rows in client.splits.items() if rows):
            workplace.prepare(client, split)
    except CoterieError as fault:
        yield Check("rows", str(fault), False, "correct the row, or [model]")
    else:
        if (cut := workplace.truncation([client])).cut:
            yield Check("length", str(cut))
    spec = workplace.base.spec
    yield Check("model", f"{len(spec.targets)} targets, SHA-256 {base_digest(files, spec)} ([federation] base)")


def _privacy_check(root: Path, run: Config, client: ClientInfo) -> Iterator[Check]:
    """What the run would cost this site; of noise that is not its own, only whether it would protect nobody."""
    if not run.privacy.active:
        return
    delta, ask = run.privacy.delta, "ask whoever runs the server to change [privacy]"
    if fault := unprotected_by_delta(run.privacy, {client.id: client.num_train}):
        yield Check("privacy", str(fault), False, f"{ask}, or stay out of this run")
        return
    try:
        cost = own_cost(run.make_method(root), client.num_train, delta)
    except NoAccountantError as missing:
        yield Check("privacy", str(missing), False, INSTALL)
        return
    except CoterieError as other:
        yield Check("privacy", str(other), False, ask)
        return
    if cost is not None:
        fix = "" if cost <= MOST else f"above {MOST:g} it protects nobody: ask whoever runs the server for more noise"
        yield Check("privacy", f"the run costs this site epsilon {cost:.3g} at delta {delta:g}", not fix, fix)
