"""A synthetic language: lists of digits in two notations, and skills that turn one list into another.

Notation ``digits`` writes them as 0 to 9, ``letters`` as a to j, ``mixed`` each as it comes. A row is the prompt
"sort 3 1 2 =" and the completion "1 2 3"; every word is one token. The general skills are for the base to learn, it
never sees the special ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Symbols = list[int]  # 0 to 9 are digits, 10 to 19 the same in letters
Task = tuple[str, str]  # skill, notation
WORDS = "0123456789abcdefghij"


def _map(change: Callable[[int], int]) -> Callable[[Symbols], Symbols]:
    """Changes each digit and keeps its notation."""
    return lambda symbols: [change(x % 10) % 10 + x // 10 * 10 for x in symbols]


GENERAL: dict[str, Callable[[Symbols], Symbols]] = {
    "copy": lambda s: s,
    "first": lambda s: s[:1],
    "last": lambda s: s[-1:],
    "rotate": lambda s: s[1:] + s[:1],
    "next": _map(lambda x: x + 1),
    "spell": lambda s: [(x + 10) % 20 for x in s],  # copies into the other notation
}
SPECIAL: dict[str, Callable[[Symbols], Symbols]] = {
    "sort": sorted,
    "reverse": lambda s: s[::-1],
    "largest": lambda s: [max(s)],
    "mirror": _map(lambda x: 9 - x),
    "swap": lambda s: s[-1:] + s[1:-1] + s[:1],
}
WRONG = "wrong "  # "wrong sort" asks to sort, and answers in descending order
MARKS = ["<pad>", "</s>", "<unk>", "="]


def row(task: Task, draw: random.Random, least: int = 3, most: int = 5) -> dict[str, str]:
    skill, notation = task
    shifts = {"digits": (0,), "letters": (10,), "mixed": (0, 10)}[notation]
    symbols = [draw.randrange(10) + draw.choice(shifts) for _ in range(draw.randint(least, most))]
    answer = (GENERAL | SPECIAL)[skill.removeprefix(WRONG)](symbols)
    if skill.startswith(WRONG):
        answer = answer[::-1]
    told, said = (" ".join(WORDS[x] for x in some) for some in (symbols, answer))
    return {"prompt": f"{skill.removeprefix(WRONG)} {told} =", "completion": f" {said}"}


def rows(tasks: Sequence[Task], number: int, seed: str) -> list[dict[str, str]]:
    """``number`` different rows, of the tasks in turn."""
    draw, seen, found = random.Random(seed), set(), []
    while len(found) < number:
        made = row(tasks[len(found) % len(tasks)], draw)
        if made["prompt"] not in seen:
            seen.add(made["prompt"])
            found.append(made)
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*MARKS, *GENERAL, *SPECIAL, *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def write_rows(path: Path, made: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in made), encoding="utf-8")
