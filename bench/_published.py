"""FedLEASE as its published code is described to run it, written from that description; and the floor under any way.

A process walks through the clients. For each client, and again for each evaluation, the model is loaded from its
folder, every target is replaced by a layer that loops over experts, and the experts are read from a file; what was
trained goes to a file, which the server reads. Distances are taken pair by pair, the two clients read for each pair.

Kind to that way, so that the ratios are of these differences alone: rows are tokenised once and ahead, batches are
ours (bucketed by length, padded to their own longest row), files are safetensors, the base's dropout is off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from layer import Loop, Plain
from safetensors.torch import load_file, save_file
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging

from coterie.data.examples import Batch, Example, batches
from coterie.data.tasks import Task
from coterie.ops.streams import kaiming_uniform, stream
from coterie.requests import Optim

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """A client's tokenised rows."""

    id: str
    train: Sequence[Example]
    test: Sequence[Example]


@dataclass(frozen=True)
class Work:
    """What there is to do, whoever does it: the batches of every client in a round, and its rows to evaluate."""

    path: str
    targets: Sequence[str]
    clients: Sequence[Rows]
    task: Task
    optim: Optim
    seed: int
    rank: int
    dropout: float
    head: str
    device: torch.device
    dtype: torch.dtype = torch.float32
    precision: str = "float32"
    eval_batch: int = 64

    def steps(self, rnd: int, client: Rows) -> Iterator[Batch]:
        """The batches that :class:`coterie.compute.train.Course` takes too."""
        number, epoch = 0, 0
        while True:
            draw = stream(self.seed, rnd, client.id, "train", "batches", epoch)
            for part in batches(client.train, self.optim.batch_size, draw):
                yield self.task.collate(part).to(self.device)
                number += 1
                if number == self.optim.steps:
                    return
            epoch += 1

    def tests(self, client: Rows) -> Iterator[Batch]:
        ordered = sorted(client.test, key=lambda example: len(example.ids))
        for start in range(0, len(ordered), self.eval_batch):
            yield self.task.collate(ordered[start : start + self.eval_batch]).to(self.device)

    def load(self, layer: Callable[[nn.Linear], nn.Module]) -> nn.Module:
        """The model from its folder, frozen but for its head, with ``layer`` for every target."""
        config = AutoConfig.from_pretrained(self.path, num_labels=2)
        for name, value in list(vars(config).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(config, name, 0.0)
        config.pad_token_id = self.task.tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_pretrained(self.path, config=config, dtype=self.dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(self.head))
        for name in self.targets:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, layer(linear))
        model.get_submodule(self.head).float()  # what trains is held in float32, as ours
        return model.to(self.device)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            found: Tensor = model(**batch.inputs, use_cache=False).logits
        return found.float()


@dataclass
class Bare:
    """The floor: the base's forward and input-gradient pass with one plain LoRA, loaded once, in a bare loop."""

    work: Work
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.work.load(lambda linear: Plain(linear, self.work.rank, self.work.dropout))

    def round(self, rnd: int) -> None:
        with _timed(self.seconds, "train"):
            self.model.train()
            for client in self.work.clients:
                for batch in self.work.steps(rnd, client):
                    loss = functional.cross_entropy(self.work.logits(self.model, batch), batch.labels)
                    loss.backward()
                    self.model.zero_grad(set_to_none=True)
        with _timed(self.seconds, "evaluate"), torch.no_grad():
            self.model.eval()
            for client in self.work.clients:
                for batch in self.work.tests(client):
                    self.work.logits(self.model, batch).argmax(-1)


@dataclass
class Published:
    """The loop. ``clusters`` are the clients' experts once there are any; ``losses`` of the last round, by client."""

    work: Work
    folder: Path
    start: Weights  # the first LoRA, and the head: the same for everyone
    clusters: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        for client in self.work.clients:
            save_file(self.start, self._file("client", client.id))

    @property
    def experts(self) -> int:
        return max(self.clusters.values()) + 1 if self.clusters else 0

    def round(self, rnd: int) -> None:
        """Every client trains, the server averages, every client is evaluated."""
        for client in self.work.clients:
            model = self._model(client)
            with _timed(self.seconds, "train"):
                self.losses[client.id] = self._train(model, rnd, client)
            with _timed(self.seconds, "files"):
                mine = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
                save_file({name: p.contiguous() for name, p in mine.items()}, self._file("client", client.id))
        if self.experts:
            with _timed(self.seconds, "files"):
                self._average()
        for client in self.work.clients:
            model = self._model(client)
            with _timed(self.seconds, "evaluate"):
                self.accuracy[client.id] = self._evaluate(model, client)

    def allocate(self, most: int) -> None:
        """Clusters by the distances of the warm-up's B, pair by pair from the files; the experts' first means."""
        with _timed(self.seconds, "cluster"):
            ids = [client.id for client in self.work.clients]
            d = np.zeros((len(ids), len(ids)))
            for i, one in enumerate(ids):
                for j in range(i):
                    d[i, j] = d[j, i] = self._distance(one, ids[j])
            tree = linkage(squareform(d, checks=False), "average")
            cuts = {k: fcluster(tree, k, "maxclust") for k in range(2, most + 1)}
            cuts = {k: cut for k, cut in cuts.items() if len(set(cut)) == k}
            best = max(cuts, key=lambda k: silhouette_score(d, cuts[k], metric="precomputed"))
            self.begin_experts({c: int(e) - 1 for c, e in zip(ids, cuts[best], strict=True)})

    def begin_experts(self, clusters: dict[str, int]) -> None:
        """Expert e starts as the mean of its members' LoRAs, every router as ours does."""
        self.clusters = clusters
        uploads, made = {c: load_file(self._file("client", c)) for c in clusters}, Weights()
        for target in self.work.targets:
            for e in range(self.experts):
                members = [uploads[c] for c in clusters if clusters[c] == e]
                for part in "ab":
                    mean = torch.stack([m[f"{target}.{part}.weight"] for m in members]).mean(0)
                    made[f"{target}.{part}.{e}.weight"] = mean
            shape = 2 * self.experts - 1, made[f"{target}.a.0.weight"].shape[1]
            router = kaiming_uniform(shape, stream(self.work.seed, "router", target))
            made |= {f"router {e}/{target}.router.weight": router.clone() for e in range(self.experts)}
        self.go_on_from(clusters, made, {c: self._head_of(upload) for c, upload in uploads.items()})

    def go_on_from(self, clusters: dict[str, int], server: Weights, heads: dict[str, Weights]) -> None:
        """Write what the server and the clients have, from which the next round starts."""
        self.clusters = clusters
        save_file(server, self._file("server", "experts"))
        for c, head in heads.items():
            save_file(head, self._file("client", c))

    def server(self) -> Weights:
        """What the server has: every expert, and a router for each cluster."""
        return load_file(self._file("server", "experts"))

    def _model(self, client: Rows) -> nn.Module:
        """A model of the client's own, from the files."""
        rank, dropout, number = self.work.rank, self.work.dropout, self.experts
        with _timed(self.seconds, "load"):
            if not self.clusters:
                model = self.work.load(lambda linear: Plain(linear, rank, dropout))
                _read(model, load_file(self._file("client", client.id)))
                return model
            own = self.clusters[client.id]
            model = self.work.load(lambda linear: Loop(linear, rank, number, own, dropout))
            sent = self.server()
            router = {n.partition("/")[2]: v for n, v in sent.items() if n.startswith(f"router {own}/")}
            experts = {n: v for n, v in sent.items() if not n.startswith("router ")}
            _read(model, {**experts, **router, **self._head_of(load_file(self._file("client", client.id)))})
            return model

    def _train(self, model: nn.Module, rnd: int, client: Rows) -> float:
        """Train what is not frozen; the mean loss of a row."""
        optim, model = self.work.optim, model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        rate, decay = optim.learning_rate * optim.round_decay ** (rnd - 1), optim.weight_decay
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optim.optimizer]
        optimizer = kind(trained, lr=rate, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / optim.steps)
        losses, counts = [], []
        for batch in self.work.steps(rnd, client):
            loss = functional.cross_entropy(self.work.logits(model, batch), batch.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, optim.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            counts.append(batch.count)
        return float((torch.stack(losses).cpu() * torch.tensor(counts)).sum()) / sum(counts)

    def _average(self) -> None:
        sent = self.server()
        uploads = {c: load_file(self._file("client", c)) for c in self.clusters}
        for e in range(self.experts):
            members = [upload for c, upload in uploads.items() if self.clusters[c] == e]
            for name in members[0]:
                if not name.startswith(self.work.head):
                    key = f"router {e}/{name}" if ".router." in name else name
                    sent[key] = torch.stack([m[name] for m in members]).mean(0)
        save_file(sent, self._file("server", "experts"))

    def _evaluate(self, model: nn.Module, client: Rows) -> float:
        model.eval()
        right = 0
        with torch.no_grad():
            for batch in self.work.tests(client):
                right += int((self.work.logits(model, batch).argmax(-1) == batch.labels).sum())
        return right / len(client.test)

    def _distance(self, one: str, other: str) -> float:
        x, y = (load_file(self._file("client", c)) for c in (one, other))
        names = [f"{target}.b.weight" for target in self.work.targets]
        cosines = [functional.cosine_similarity(x[n].flatten(), y[n].flatten(), dim=0).item() for n in names]
        return 1 - sum(cosines) / len(cosines)

    def _head_of(self, weights: Weights) -> Weights:
        return {name: value for name, value in weights.items() if name.startswith(self.work.head)}

    def _file(self, kind: str, name: str) -> Path:
        return self.folder / f"{kind}-{name}.safetensors"


def _read(model: nn.Module, weights: Weights) -> None:
    """Put every one of ``weights`` into the model."""
    with torch.no_grad():
        for name, value in weights.items():
            model.get_parameter(name).copy_(value)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds of the block to a phase."""
    began = time.perf_counter()
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began


def quiet() -> None:
    """Without transformers' remarks on a head that the base has not, and its progress bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
