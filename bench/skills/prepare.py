"""The bench's base, its pool of LoRA modules for single skills, and what starts FedIT from a merge of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from language import GENERAL, Task, row, rows, tokenizer, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from coterie.adapters.pool import POOL_FILE, Pool, read_pool, write_pool
from coterie.adapters.read import build_pool
from coterie.config.load import check_config
from coterie.experiment import run
from coterie.types import Key, Part

SIZES = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CLIENTS = 4
LEARNING_RATE = 5e-3
# The base knows the general skills in digits, and letters from lists in both notations; "next" it has not seen there.
LEARNED: list[Task] = [(skill, "digits") for skill in GENERAL] + [
    (skill, "mixed") for skill in GENERAL if skill != "next"
]
MODULES: dict[str, list[Task]] = {
    "letters": [(skill, "letters") for skill in GENERAL],
    "sort": [("sort", "digits")],
    "reverse": [("reverse", "digits")],
    "largest": [("largest", "digits")],
    "mirror": [("mirror", "digits")],
}


@dataclass(frozen=True)
class Modules:
    """The modules of a pool: which draw of their rows, of which form and rank, and for which draw of the base.

    In the hard form the special skills' modules have seen digits alone. In the easy form one list in four of sort's and
    mirror's was in letters, and they had twice the rows: the pool fits the targets.
    """

    draw: int = 0
    form: str = "hard"
    rank: int = 4
    base: int = 0

    @property
    def name(self) -> str:
        """What sets the folders of these modules apart, with a hyphen before it; "" for the first hard ones."""
        parts = (self.form.removeprefix("hard"), f"rank-{self.rank}" if self.rank != 4 else "", self.base_name)
        return "".join(f"-{part}" for part in (*parts, str(self.draw or "")) if part)

    @property
    def base_name(self) -> str:
        """What sets the folders of this draw of the base apart; "" for the first."""
        return f"base-{self.base}" if self.base else ""

    def of(self, name: str) -> Modules:
        """These for the module ``name``: hard and easy ones share what is the same in both."""
        return self if name in ("sort", "mirror") else replace(self, form="hard")

    def tasks(self, name: str) -> list[Task]:
        """What the module ``name`` learns."""
        easy = [(name, "digits")] * 3 + [(name, "letters")]
        return easy if self.of(name).form == "easy" else MODULES[name]

    def rows(self, name: str) -> int:
        """How many rows it learns from."""
        return 4000 if name == "letters" or self.of(name).form == "easy" else 2000


FIRST = Modules()


def single(draw: random.Random) -> dict[str, str]:
    """A row of a general skill."""
    return row(draw.choice(LEARNED), draw)


def make_base(
    folder: Path, steps: int, seed: int = 0, batch: int = 64, sample: Callable[[random.Random], Any] = single
) -> Path:
    """Train the decoder on the general skills, once: on rows that ``sample`` draws."""
    if (folder / "config.json").exists():
        return folder
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, **SIZES,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    draw = random.Random(f"base {seed}")
    for _ in range(steps):
        loss = model(**_batch([sample(draw) for _ in range(batch)], words)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _batch(made: Sequence[Mapping[str, str]], words: Any) -> dict[str, torch.Tensor]:
    prompts = [words(one["prompt"])["input_ids"] for one in made]
    answers = [[*words(one["completion"])["input_ids"], words.eos_token_id] for one in made]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (width - len(values))

    both = list(zip(prompts, answers, strict=True))
    return {
        "input_ids": torch.tensor([padded(p + a, 0) for p, a in both]),
        "attention_mask": torch.tensor([padded([1] * len(p + a), 0) for p, a in both]),
        "labels": torch.tensor([padded([-100] * len(p) + a, -100) for p, a in both]),
    }


def config(
    base: Path, clients: Path, method: Mapping[str, Any], seed: int, **more: Mapping[str, Any]
) -> dict[str, Any]:
    """What all runs share."""
    made: dict[str, Any] = {
        "model": {"path": str(base), "max_length": 24},
        "data": {"folder": str(clients)},
        "task": {"kind": "generation", "generate": True, "scores": ["exact_match"], "max_new_tokens": 7},
        "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": list(TARGETS)},
        "train": {"learning_rate": LEARNING_RATE, "batch_size": 16, "epochs": 1, "weight_decay": 0.0},
        "method": dict(method),
        "run": {"rounds": 10, "seed": seed, "eval_batch_size": 256},
        "engine": {"threads": 1, "device": "cpu", "clients_per_batch": CLIENTS},
    }
    for section, values in more.items():
        made[section] |= values
    return made


def make_module(
    work: Path, base: Path, name: str, tasks: Sequence[Task], number: int, epochs: int, of: Modules = FIRST
) -> Path:
    """One LoRA trained on its own, by FedIT with a single client; returns the adapter's folder."""
    out = work / f"modules{of.name}" / name
    if not (out / "summary.json").exists():
        place = work / f"modules{of.name}-data" / name / "alone"
        write_rows(place / "train.jsonl", rows(tasks, number, f"{name} train" + (f"-{of.draw}" if of.draw else "")))
        write_rows(place / "test.jsonl", rows(tasks, 64, f"{name} test"))
        train = {"learning_rate": LEARNING_RATE, "batch_size": 32, "epochs": epochs}
        lora = {"rank": of.rank, "alpha": 2.0 * of.rank}
        made = config(base, place.parent, {"name": "fedit"}, 0, run={"rounds": 1}, train=train, lora=lora)
        run(check_config(made), out, root=work, resume=(out / "config.json").exists())
    return out / "experts" / "global"


def make_pool(folder: Path, adapters: Mapping[str, Path]) -> Pool:
    if not (folder / POOL_FILE).exists():
        write_pool(folder, build_pool([f"{name}={path}" for name, path in adapters.items()]))
    return read_pool(folder)


def merged_base(base: Path, pool: Pool, weight: float, folder: Path) -> Path:
    """The base with W0 + weight x the sum of the pool's B A in it: FedIT that starts from a linear merge."""
    if (folder / "config.json").exists():
        return folder
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for key, a in pool.tensors.items():
            if key.part is Part.A:
                b = pool.tensors[Key(key.module, key.expert, Part.B)]
                model.get_submodule(f"model.{key.module}").weight.add_(b @ a, alpha=weight)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def zero_shot(base: Path, pool: Pool, target: Task, folder: Path, number: int = 256) -> float:
    """Exact matches of the base with the plain sum of the pool in it, which saw no row of the target."""
    merged = LlamaForCausalLM.from_pretrained(merged_base(base, pool, 1.0, folder)).eval()
    words, right = tokenizer(), 0
    with torch.no_grad():
        for made in rows([target], number, "zero-shot"):
            prompt = words(made["prompt"], return_tensors="pt")
            answer = merged.generate(**prompt, max_new_tokens=7, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            right += words.decode(answer, skip_special_tokens=True).split() == made["completion"].split()
    return right / number
