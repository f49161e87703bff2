"""FedIT as Flower's LLM examples run it: the simulation engine, and :mod:`peer_trainer` at the clients.

For every message a client loads the model, puts a LoRA on it, sets what the server sent, and trains or evaluates;
FedAvg averages. ``python peer_flower.py TASK OUT`` runs it, in the environment of this peer.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peer_trainer import model_of, trainer_of
from peft import get_peft_model_state_dict, set_peft_model_state_dict

client_app = ClientApp()


def at_work(message: Message, context: Context) -> tuple[Any, Any, int]:
    """The client's model with what the server sent, a Trainer for it, and the number of its training rows."""
    task = json.loads(Path(message.content["config"]["task"]).read_text())
    model = model_of(task)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    trainer = trainer_of(task, int(context.node_config["partition-id"]), model, Path(task["folder"]) / "trainer")
    return model, trainer, len(trainer.train_dataset)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    model, trainer, rows = at_work(message, context)
    loss = trainer.train().training_loss
    metrics = MetricRecord({"train_loss": loss, "num-examples": rows})
    return Message(
        RecordDict({"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": metrics}), reply_to=message
    )


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    _, trainer, rows = at_work(message, context)
    metrics = MetricRecord({"eval_loss": trainer.evaluate()["eval_loss"], "num-examples": rows})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


class Clocked(FedAvg):
    """FedAvg that notes when each round begins, and the loss after it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.marks: list[float] = []
        self.losses: list[float] = []

    def configure_train(self, server_round: int, *rest: Any) -> Iterable[Message]:
        self.marks.append(time.time())
        return super().configure_train(server_round, *rest)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
        found = super().aggregate_evaluate(server_round, replies)
        self.losses.append(float(found["eval_loss"]) if found else float("nan"))
        return found


def simulate(file: Path) -> dict[str, Any]:
    """When each round began and the last one ended, the test loss after each, and the bytes of a client in a round."""
    from flwr.simulation import run_simulation

    task = json.loads(file.read_text())
    clients, threads = len(task["clients"]), int(task["threads"])
    strategy = Clocked(min_train_nodes=clients, min_evaluate_nodes=clients, min_available_nodes=clients)
    server, size = ServerApp(), [0]

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        given = ConfigRecord({"task": str(file)})
        state = get_peft_model_state_dict(model_of(task))
        size[0] = sum(value.numel() * value.element_size() for value in state.values())
        strategy.start(
            grid, ArrayRecord(state), num_rounds=task["rounds"], train_config=given, evaluate_config=given
        )  # fmt: skip
        strategy.marks.append(time.time())

    logging.getLogger("flwr").setLevel(logging.ERROR)
    backend = {
        "init_args": {"num_cpus": threads, "include_dashboard": False, "logging_level": logging.ERROR},
        "client_resources": {"num_cpus": threads, "num_gpus": 0.0},
    }
    run_simulation(server, client_app, clients, backend_config=backend)
    return {"marks": strategy.marks, "losses": strategy.losses, "bytes": 3 * size[0]}  # down twice: it is evaluated too


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(simulate(Path(sys.argv[1]))))
