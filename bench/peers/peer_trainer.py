"""A client of the peers' way: a Hugging Face model with a PEFT LoRA, trained and evaluated by a Trainer.

Flower's and NVFlare's sides share it. It imports nothing of Coterie, and runs in the peers' environments. Kind to them:
rows are tokenised once per process and grouped by length, dropout is off, and nothing is saved.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging


@cache
def tokenizer_of(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


@cache
def rows_of(path: str, file: Path, longest: int) -> list[dict[str, Any]]:
    """The tokenised rows of a file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    texts = tokenizer_of(path)([row["text"] for row in rows], truncation=True, max_length=longest)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": row["label"]}
        for row, ids, mask in zip(rows, texts["input_ids"], texts["attention_mask"], strict=True)
    ]


def model_of(task: dict[str, Any]) -> Any:
    """A fresh model from its folder with a fresh LoRA."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(task["path"], num_labels=2)
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and "dropout" in name:
            setattr(config, name, 0.0)
    model = AutoModelForSequenceClassification.from_pretrained(task["path"], config=config, dtype=torch.float32)
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


def trainer_of(task: dict[str, Any], client: int, model: Any, out: Path) -> Trainer:
    """A Trainer of ``model`` with the rows of a client."""
    torch.set_num_threads(int(task["threads"]))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    entry, train = task["clients"][client], task["train"]
    splits = {split: rows_of(task["path"], Path(task["folder"]) / entry[split], task["max_length"]) for split in SPLITS}
    arguments = TrainingArguments(
        output_dir=str(out),
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
    return Trainer(model, arguments, collator, train_dataset=splits["train"], eval_dataset=splits["test"])


SPLITS = ("train", "test")
