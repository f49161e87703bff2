"""FedIT as Flower's LLM examples run it: the simulation engine, and Hugging Face's Trainer and PEFT at the clients.

For every message a client loads the model, puts a LoRA on it, sets what the server sent, and trains or evaluates with a
Trainer; FedAvg averages. Written for this bench, with the examples' structure. Kind to it: rows are tokenised once per
actor and bucketed by length, the base's dropout is off, and nothing is saved.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

client_app = ClientApp()


@cache
def tokenizer_of(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


@cache
def rows_of(path: str, file: Path, labels: tuple[str, ...], longest: int) -> list[dict[str, Any]]:
    """The tokenised rows of a file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    texts = tokenizer_of(path)([row["text"] for row in rows], truncation=True, max_length=longest)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": row["label"]}
        for row, ids, mask in zip(rows, texts["input_ids"], texts["attention_mask"], strict=True)
    ]


def model_of(task: dict[str, Any]) -> Any:
    """A fresh model from its folder with a fresh LoRA."""
    config = AutoConfig.from_pretrained(task["path"], num_labels=2)
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and "dropout" in name:
            setattr(config, name, 0.0)
    model = AutoModelForSequenceClassification.from_pretrained(task["path"], config=config)
    lora = task["lora"]
    return get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS",
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=list(lora["targets"]),
        ),
    )


def at_work(message: Message, context: Context) -> tuple[Any, Trainer, dict[str, list[dict[str, Any]]]]:
    """The client's model with what the server sent, a Trainer for it, and the client's rows."""
    torch.set_num_threads(int(message.content["config"]["threads"]))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    task = json.loads(Path(message.content["config"]["task"]).read_text())
    entry = task["clients"][int(context.node_config["partition-id"])]
    rows = {
        split: rows_of(task["path"], Path(task["folder"]) / entry[split], tuple(entry["labels"]), task["max_length"])
        for split in ("train", "test")
    }
    model = model_of(task)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    train = task["train"]
    arguments = TrainingArguments(
        output_dir=str(Path(task["folder"]) / "trainer"),
        max_steps=train["steps"],
        per_device_train_batch_size=train["batch_size"],
        per_device_eval_batch_size=64,
        learning_rate=train["learning_rate"],
        lr_scheduler_type="linear",
        weight_decay=train["weight_decay"],
        max_grad_norm=train["clip"],
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    collator = DataCollatorWithPadding(tokenizer_of(task["path"]))
    trainer = Trainer(
        model, arguments, collator, train_dataset=rows["train"], eval_dataset=rows["test"], compute_metrics=accuracy
    )
    return model, trainer, rows


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


@client_app.train()
def train(message: Message, context: Context) -> Message:
    model, trainer, rows = at_work(message, context)
    loss = trainer.train().training_loss
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(rows["train"])})
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    _, trainer, rows = at_work(message, context)
    found = trainer.evaluate()
    metrics = {"eval_loss": found["eval_loss"], "accuracy": found["eval_accuracy"], "num-examples": len(rows["test"])}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


class Clocked(FedAvg):
    """FedAvg that notes when a round begins, when its averaging is done, and when its evaluation is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.marks: list[dict[str, float]] = []
        self.accuracy: list[float] = []

    def configure_train(self, server_round: int, *rest: Any) -> Iterable[Message]:
        self.marks.append({"start": time.time()})
        return super().configure_train(server_round, *rest)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        found = super().aggregate_train(server_round, replies)
        self.marks[-1]["trained"] = time.time()
        return found

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
        found = super().aggregate_evaluate(server_round, replies)
        self.marks[-1]["evaluated"] = time.time()
        self.accuracy.append(float(found["accuracy"]) if found else float("nan"))
        return found


def simulate(task_file: Path, rounds: int, threads: int, actors: int) -> dict[str, Any]:
    """The marks of every round on the wall clock, and the mean accuracy after it."""
    from flwr.simulation import run_simulation

    task = json.loads(task_file.read_text())
    clients = len(task["clients"])
    everyone = {"min_train_nodes": clients, "min_evaluate_nodes": clients, "min_available_nodes": clients}
    strategy = Clocked(**everyone)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        given = ConfigRecord({"task": str(task_file), "threads": threads})
        first = ArrayRecord(get_peft_model_state_dict(model_of(task)))
        strategy.start(grid, first, num_rounds=rounds, train_config=given, evaluate_config=given)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    backend = {
        "init_args": {"num_cpus": threads * actors, "include_dashboard": False, "logging_level": logging.ERROR},
        "client_resources": {"num_cpus": threads, "num_gpus": 0.0},
    }
    run_simulation(server, client_app, clients, backend_config=backend)
    return {"marks": strategy.marks, "accuracy": strategy.accuracy}
