"""FedIT on NVFlare's simulator, with its patch of Hugging Face's Trainer, which exchanges the PEFT adapter alone.

``python peer_nvflare.py TASK OUT`` is the job; each client runs this file with ``--client``, in a process of its own as
the simulator starts it. By default all clients are at work at once. With fewer processes than clients
(``nvflare_processes`` of the task) the simulator starts a process anew for every task. Runs in the environment of this
peer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peer_trainer import model_of, trainer_of
from peft import get_peft_model_state_dict


class Adapter(torch.nn.Module):
    """The server's model: its state is that of the adapter, as the clients send it."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.model = model_of(json.loads(Path(task).read_text()))

    def state_dict(self, *given: Any, **named: Any) -> Any:
        return get_peft_model_state_dict(self.model)

    def load_state_dict(self, state: Any, *given: Any, **named: Any) -> Any:
        from peft import set_peft_model_state_dict

        return set_peft_model_state_dict(self.model, state)


def client(file: Path) -> None:
    """A client: what its script would be without a federation, and one line of the patch."""
    import nvflare.client.hf as flare

    flare.init()
    task = json.loads(file.read_text())
    name = flare.get_site_name()
    out = Path(task["folder"]) / "nvflare" / name
    out.mkdir(parents=True, exist_ok=True)
    trainer = trainer_of(task, int(name.removeprefix("site-")) - 1, model_of(task), out)
    flare.patch(trainer, restore_state=False)
    with (out / "marks.jsonl").open("a") as marks:
        while flare.is_running():
            began = time.time()
            loss = trainer.evaluate()["eval_loss"]
            trainer.train()
            marks.write(json.dumps({"began": began, "ended": time.time(), "loss": loss}) + "\n")
            marks.flush()


def job(file: Path) -> dict[str, Any]:
    """When each round began and the last one ended, the test loss before each, and the bytes of a client in a round."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat
    from nvflare.recipe import SimEnv

    task = json.loads(file.read_text())
    clients = len(task["clients"])
    recipe = FedAvgRecipe(
        name="fedit",
        model={"class_path": "peer_nvflare.Adapter", "args": {"task": str(file)}},
        min_clients=clients,
        num_rounds=task["rounds"],
        train_script=str(Path(__file__).resolve()),
        train_args=f"--client {file}",
        server_expected_format=ExchangeFormat.PYTORCH,
        key_metric="",
    )
    workspace, threads = f"{task['folder']}/nvflare-sim", task["nvflare_processes"]
    recipe.execute(SimEnv(num_clients=clients, num_threads=threads, workspace_root=workspace))
    lines = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (Path(task["folder"]) / "nvflare").glob("*/marks.jsonl")
    ]
    rounds = list(zip(*lines, strict=True))
    if len(rounds) != task["rounds"] or len(lines) != clients:
        raise SystemExit(f"{len(lines)} clients left the marks of {len(rounds)} rounds")
    state = get_peft_model_state_dict(model_of(task))
    return {
        "marks": [*(min(mark["began"] for mark in each) for each in rounds), max(mark["ended"] for mark in rounds[-1])],
        "losses": [statistics.fmean(mark["loss"] for mark in each) for each in rounds[1:]],
        "bytes": 2 * sum(value.numel() * value.element_size() for value in state.values()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--client", type=Path)
    options, rest = parser.parse_known_args()
    if options.client:
        client(options.client)
    else:
        Path(rest[1]).write_text(json.dumps(job(Path(rest[0]))))
        sys.stdout.flush()
