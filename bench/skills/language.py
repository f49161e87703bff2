"""A synthetic language: lists of digits in two notations, and skills that turn one list into another.

Notation ``digits`` writes them as 0 to 9, ``letters`` as a to j. A row is the prompt "sort 3 1 2 =" and the completion
"1 2 3"; every word is one token. The general skills are for the base to learn, it never sees the special ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Digits = list[int]
Task = tuple[str, str]  # skill, notation
WORDS = {"digits": "0123456789", "letters": "abcdefghij"}
OTHER = {"digits": "letters", "letters": "digits"}
GENERAL: dict[str, Callable[[Digits], Digits]] = {
    "copy": lambda d: d,
    "first": lambda d: d[:1],
    "last": lambda d: d[-1:],
    "rotate": lambda d: d[1:] + d[:1],
    "next": lambda d: [(x + 1) % 10 for x in d],
}
SPECIAL: dict[str, Callable[[Digits], Digits]] = {
    "sort": sorted,
    "reverse": lambda d: d[::-1],
    "largest": lambda d: [max(d)],
    "mirror": lambda d: [9 - x for x in d],
    "twice": lambda d: [2 * x % 10 for x in d],
    "wrong sort": lambda d: sorted(d)[::-1],
    "swap": lambda d: d[-1:] + d[1:-1] + d[:1],
}
SPELL = "spell"  # copies into the other notation
WRONG = "wrong "  # "wrong sort" asks to sort, and answers in descending order
MARKS = ["<pad>", "</s>", "<unk>", "="]


def row(task: Task, draw: random.Random, least: int = 3, most: int = 5) -> dict[str, str]:
    skill, notation = task
    digits = [draw.randrange(10) for _ in range(draw.randint(least, most))]
    answer = digits if skill == SPELL else (GENERAL | SPECIAL)[skill](digits)
    to = OTHER[notation] if skill == SPELL else notation
    skill = skill.removeprefix(WRONG)
    told, said = (" ".join(WORDS[n][d] for d in some) for n, some in ((notation, digits), (to, answer)))
    return {"prompt": f"{skill} {told} =", "completion": f" {said}"}


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
    skills = [skill for skill in (*GENERAL, *SPECIAL, SPELL) if not skill.startswith(WRONG)]
    words = [*MARKS, *skills, *WORDS["digits"], *WORDS["letters"]]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def write_rows(path: Path, made: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in made), encoding="utf-8")
