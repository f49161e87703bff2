"""A site's worker: it has the base, the rows and the personal state, and answers messages."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter

from coterie import codec
from coterie.adapters.about import About
from coterie.compute.batched import FAULTS
from coterie.compute.client import LocalCompute
from coterie.compute.join import EPOCHS, join_with
from coterie.compute.loading import workplaces
from coterie.config.deployment import SiteSettings
from coterie.config.sections import Config
from coterie.data.clients import load_data
from coterie.data.rows import FederatedData
from coterie.deploy.agreement import config_at
from coterie.deploy.base_digest import files_digest
from coterie.deploy.head import Head, digest_of, read_head
from coterie.deploy.hello import Hello
from coterie.deploy.onboard import Answer
from coterie.deploy.policy import check_active, check_policy, guard_of
from coterie.deploy.private_site import Releases, check_cost
from coterie.deploy.received import received_file
from coterie.deploy.secure_site import SiteSums, identity_of, keep_for_sums
from coterie.deploy.site_log import disk_text, log, private_model_faults, public_text
from coterie.energy import meter_of
from coterie.engines.client import LocalClient, client_bank, evaluate_client, failed, train_client
from coterie.engines.store import ClientStates
from coterie.experiment import about_export, set_threads, write_own
from coterie.files import read_json_as, write_atomic, write_json
from coterie.flower.message import KINDS, Message
from coterie.machine import versions
from coterie.methods.base import Method
from coterie.nn.locate import resolve
from coterie.types import Bank, CoterieError, DataError, ExportedAs, Instruction, Json


@dataclass(frozen=True)
class Run:
    """A run that this site takes part in, and the folder of its personal state."""

    config: Config
    method: Method
    client: LocalClient
    folder: Path


@dataclass
class Worker:
    """Answers one message at a time. ``root`` is the folder that the paths of SITE.toml are relative to."""

    site: SiteSettings
    root: Path
    cache: dict[str, object] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    unsaved: dict[Path, bytes] = field(default_factory=dict)  # what a full disk did not take
    sums: SiteSums | None = field(default=None, repr=False)  # for the secure sums of the round

    @property
    def state(self) -> Path:
        return (self.root / self.site.site.state).resolve()

    def answer(self, message: Message) -> Message:
        """The reply to one message; a fault that whoever runs the server can act on is ``error`` in its head."""
        started = time.perf_counter()
        try:
            reply = self._answer(message)
        except (CoterieError, codec.CodecError) as fault:
            reply = Message({"error": public_text(fault)})
        except OSError as fault:  # of its own files: those of the base and of the rows have their own errors
            reply = Message({"error": disk_text(fault)})
        seconds = time.perf_counter() - started
        kind, rnd = message.head.get("kind"), message.head.get("round")
        log.info(
            "%s of round %s: %s, %d bytes in, %d out, %.1f s",
            kind if kind in KINDS else "an unknown kind",
            rnd if isinstance(rnd, int) else "?",
            "refused" if "error" in reply.head else "done",
            len(message.body),
            len(reply.body),
            seconds,
        )
        return Message({**reply.head, "seconds": seconds}, reply.body)

    def catch_up(self) -> None:
        """Keep the server's last instruction, if a full disk has prevented it so far."""
        for path, blob in list(self.unsaved.items()):
            try:
                write_atomic(path, blob)
            except OSError as fault:
                disk_text(fault)
            else:
                del self.unsaved[path]

    def _answer(self, message: Message) -> Message:
        head = read_head(message.head)
        run = self._open(head)
        if head.kind == "query.hello":
            return self._hello(run, head)
        if head.client != self.site.site.id:
            raise CoterieError(f"this is {self.site.site.id}, the message is for {head.client}")
        answers = {
            "train": self._train,
            "query.sum": self._sum,
            "evaluate": self._evaluate,
            "query.bank": self._bank,
            "query.onboard": self._onboard,
        }
        if head.kind in ("evaluate", "query.bank"):
            self.unsaved = received_file(run.folder, head, message.body)
            self.catch_up()
        return answers[head.kind](run, head, message.body)

    # one answer per kind ----------------------------------------------------------------------------------------------

    def _hello(self, run: Run, head: Head) -> Message:
        with private_model_faults():
            base = files_digest(resolve(run.config.model.path, self.root), self.state / "base.json")
        info, spec = run.client.info, run.client.workplace.base.spec
        return Message({}, codec.encode(Hello(info, spec, digest_of(head.terms), base, versions())))

    def _train(self, run: Run, head: Head, body: bytes) -> Message:
        if not 1 <= head.rnd <= self.site.policy.max_rounds:
            raise CoterieError(
                f"this site takes part in rounds 1 to {self.site.policy.max_rounds} ([policy] max_rounds)"
            )
        self.sums = None
        own_noise = run.config.privacy.at_clients
        releases = Releases(run.folder, run.method, run.config.run.rounds, run.client) if own_noise else None
        if releases:
            releases.check(head, body)
        blob, said = releases.answered(head.rnd) if releases else None, {}
        if blob is None:
            meter = meter_of(run.client.workplace.devices)
            outcome = train_client(run.client, run.method, body, head.rnd, meter)  # again too: it needs its own state
            if outcome.error:
                return Message({"error": outcome.error}, outcome.blob)
            blob, said = outcome.blob, {"energy": asdict(outcome.energy)} if outcome.energy else {}
            if releases:
                releases.prune(head.keep)
                blob = releases.once(head, body, blob)
        if run.config.secure_aggregation.enabled:
            identity = identity_of(self.site, self.root)
            self.sums, blob = keep_for_sums(run.client, run.method, identity, run.folder, head, body, blob)
        hides = run.config.secure_aggregation.enabled or run.config.privacy.active  # energy says something of the rows
        return Message({} if hides else said, blob)

    def _sum(self, run: Run, head: Head, body: bytes) -> Message:
        """This site's answer in a step of the round's secure sums."""
        if self.sums is None:
            raise CoterieError("this site holds no update for a secure sum; it may have been restarted")
        answer = self.sums.answer(head, body)
        while self.sums.party.refusals:
            log.warning("refused in a secure sum: %s", self.sums.party.refusals.pop(0))
        return Message({}, answer)

    def _evaluate(self, run: Run, head: Head, body: bytes) -> Message:
        if run.config.privacy.active:
            raise CoterieError("this site sends no metrics in a run with [privacy]: they would have no noise")
        if not self.site.policy.upload_metrics:
            raise CoterieError("this site sends no metrics ([policy] upload_metrics)")
        last = head.rnd >= run.config.run.rounds  # [privacy], which can end a run before, refuses every evaluation
        usage = head.usage and self.site.policy.upload_usage and last
        return Message({}, evaluate_client(run.client, run.method, body, head.rnd, head.splits, usage).blob)

    def _bank(self, run: Run, head: Head, body: bytes) -> Message:
        """Write this site's own experts to its own disk; send them only if the policy says so."""
        try:
            bank = self.export(run, body, head.rnd, head.export)
        except OSError as fault:
            raise CoterieError(f"{disk_text(fault)}; `coterie site export` there writes the bundle later") from fault
        counted = not run.config.privacy.at_clients  # a bank would be one more release
        return Message({}, codec.encode(bank) if self.site.policy.upload_bank and counted else b"")

    def _onboard(self, run: Run, head: Head, body: bytes) -> Message:
        """Join a finished run: write this site's bundle to its own disk, and send a count and metrics."""
        client, guard = run.client, run.client.guard
        welcome = codec.decode(run.method.Welcome, body)
        compute = LocalCompute(client.workplace, client.data, head.rnd + 1)
        try:
            joined = join_with(run.method, welcome, compute, EPOCHS, guard.compute)
            guard.admit(Instruction(joined.bank.tensors))
        except FAULTS as fault:
            return Message({"error": failed(client, fault, 0.0).error})
        about = about_export(run.config, self.root, head.rnd, head.export)
        _write(run, joined.bank, about)
        shown = self.site.policy.upload_metrics and not run.config.privacy.active
        before, after = (joined.before, joined.after) if shown else ({}, {})
        return Message({}, codec.encode(Answer(joined.trained, before, after)))

    def export(self, run: Run, body: bytes, rnd: int, export: ExportedAs) -> Bank:
        """Write this site's own experts after round ``rnd``, from the instruction in ``body``; returns them."""
        bank = client_bank(run.client, run.method, body, rnd)
        about = about_export(run.config, self.root, rnd, export)
        _write(run, bank, about)
        return bank

    # runs -------------------------------------------------------------------------------------------------------------

    def _open(self, head: Head) -> Run:
        """The run of a message, with the personal state that the server's attempt starts from."""
        key = f"{head.run} {digest_of(head.terms)}"
        if key not in self.runs:
            self.runs = {key: self.load(head.run, head.terms)}  # only this run: another run's rows are not kept
        run = self.runs[key]
        path = run.folder / "attempt.json"
        last = read_json_as(path, _ATTEMPT, "delete the folder of the run at this site") if path.exists() else 0
        if head.attempt < last:
            raise CoterieError(f"the message is from attempt {head.attempt}, but attempt {last} has begun")
        if head.attempt > last and head.kind != "query.hello":  # before that a server has not read its checkpoint
            missed = [rnd for attempt, rnd in head.starts if attempt > last]  # each undid what came after its round
            run.client.states.restore(min([head.since, *missed]))
            write_json(path, head.attempt)
        run.client.states.prune(head.keep, head.kept_rounds)
        return run

    def load(self, name: str, terms: Mapping[str, Json]) -> Run:
        """The run of that name with these terms of the server. Raises :class:`CoterieError` for what is not agreed."""
        config = config_at(self.site, terms)
        method = config.make_method(self.root)
        check_policy(self.site.policy, config, method)
        check_active(self.site.site, method)
        if config.secure_aggregation.enabled:
            identity_of(self.site, self.root)  # raises where a key is missing, before anything is loaded
        elif self.site.site.peers:
            raise CoterieError(
                "this site hides its updates ([site] peers), and the run does not; set [secure_aggregation] enabled = "
                "true at the server"
            )
        set_threads(config)
        federation = self.federation(config)
        folder = self.state / name
        with private_model_faults():
            workplace = workplaces(config, self.root, self.cache)[0]
        while len(self.cache) > 1:  # the base of an earlier run with other terms
            self.cache.pop(next(iter(self.cache)))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (rows,) = federation.clients
        rows = replace(rows, info=replace(rows.info, active=self.site.site.active))
        check_cost(self.site.policy, method, rows.info.num_train)
        guard = guard_of(self.site.policy, method, public_text)
        return Run(config, method, LocalClient(workplace, rows, ClientStates.of(config, folder), guard), folder)

    def federation(self, config: Config) -> FederatedData:
        """This site's rows. Raises :class:`DataError`; its text may quote them, for ``site check`` alone."""
        try:
            return load_data(config.data, config.task.kind, config.run.seed, self.root)
        except OSError as fault:
            raise DataError(f"{fault.filename}: {fault.strerror}") from fault


def _write(run: Run, bank: Bank, about: About) -> None:
    """Write this site's model, and say in its log where."""
    write_own(run.folder / "export", bank, about, run.client.workplace.base.spec, run.client.info)
    log.info("this site's model is in %s", run.folder / "export")


_ATTEMPT = TypeAdapter(int)
