"""FedLEASE's own published code, unchanged, on rows and an encoder given here; started by :mod:`published_code`.

Runs in the environment of that code, not of Coterie. What differs from its ``python main.py``: rows come from files
and are tokenised with its settings; training is in float32 or under bfloat16's autocast, where it asks for half
precision that a CPU lacks; its server keeps tensors on the CPU; and after it has clustered the clients, the clusters
are the jobs, whatever it found, so that as many experts are trained as on the other side.
"""

import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
settings = json.loads(sys.argv[1])
sys.path.insert(0, settings["checkout"])

import client  # noqa: E402
import datasets  # noqa: E402
import main  # noqa: E402
import server  # noqa: E402


def arguments(*given, made=client.TrainingArguments, **named):
    bfloat16 = settings["precision"] == "bfloat16"
    return made(*given, **{**named, "fp16": False, "bf16": bfloat16, "use_cpu": True, "report_to": "none"})


def rows(task_name_list, tokenizer, **_):
    """Every client's rows, in the place of the code's own GLUE; and what the code wants to know of each task."""
    clients = []
    for name in task_name_list:
        splits = {}
        for theirs, ours in (("train", "train"), ("validation", "test")):
            text = Path(settings["rows"], f"{name}-{ours}.jsonl").read_text().splitlines()
            lines = [json.loads(line) for line in text]
            tokens = tokenizer([line["text"] for line in lines], truncation=True, max_length=128)
            splits[theirs] = datasets.Dataset.from_dict({**tokens, "labels": [line["label"] for line in lines]})
        clients.append(splits)
    return clients, [{"task_name": name, "num_labels": 2} for name in task_name_list]


def clusters(clients, *given, found=main.compute_lora_client_map, **named):
    found(clients, *given, **named)
    jobs = settings["jobs"]
    return {e: [i for i, job in enumerate(jobs) if job == e] for e in sorted(set(jobs))}, len(set(jobs))


client.TrainingArguments = arguments
main.compute_lora_client_map = clusters
main.Server = lambda clients_num: server.Server(clients_num, device="cpu")
main.partition_multi_task_dataset = rows
sys.argv = ["main.py", *settings["arguments"]]
main.main()
