"""Rows of preferences: two answers to one prompt, as texts or as conversations.

====================  ==================================  =================================================
``prompt``            ``chosen``, ``rejected``            what it is
====================  ==================================  =================================================
text                  texts                               a prompt with two completions
text                  turns that begin with the prompt    two whole conversations, as in UltraFeedback
text, or turns        turns of the assistant              the prompt's turns, with two answers
turns                 texts                               the same
no such column        turns                               two whole conversations that differ in the last answer
====================  ==================================  =================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from coterie.data.conversations import chat_row, role_of
from coterie.data.rows import ASSISTANT, ChatRow, PreferenceRow, PromptRow
from coterie.data.settings import Columns
from coterie.text import parse_json
from coterie.types import DataError

Bounded = Callable[[str, str, str], str]  # refuses a text that is too long


def preference_row(
    prompt: object, chosen: object, rejected: object, where: str, columns: Columns, bounded: Bounded
) -> PreferenceRow:
    """The row of a prompt (None: there is no such column) and two answers, each a text or a list of turns.

    Raises :class:`DataError` for answers that are the same, and for conversations that differ before the last answer.
    """
    before = _turns(prompt)
    first, second = (
        _answered(before, answer, where, column, columns.prompt, bounded)
        for answer, column in ((chosen, columns.chosen), (rejected, columns.rejected))
    )
    if _context(first) != _context(second):
        raise DataError(
            f"{where}: {columns.chosen} and {columns.rejected} differ before the assistant's last turn, and only that "
            "turn is compared; give both the same turns before it"
        )
    if first.completion == second.completion:
        raise DataError(f"{where}: {columns.chosen} and {columns.rejected} are the same answer; leave the row out")
    return PreferenceRow(first, second)


def _answered(
    prompt: object, answer: object, where: str, column: str, prompts: str, bounded: Bounded
) -> PromptRow | ChatRow:
    """The prompt (None, a text or turns) with one answer."""
    answer = _turns(answer)
    if isinstance(answer, str):
        if isinstance(prompt, str):
            return PromptRow(bounded(prompt, where, prompts), bounded(answer, where, column))
        if prompt is None:
            raise DataError(f"{where}: {column} is a text, and there is no column {prompts!r} that it answers")
        answer = [{"role": ASSISTANT, "content": answer}]
    if not isinstance(answer, list):
        raise DataError(f"{where}: {column} is {str(answer)[:60]!r}, neither a text nor a list of turns")
    if prompt is not None and not isinstance(prompt, str | list):
        raise DataError(f"{where}: {prompts} is {str(prompt)[:60]!r}, neither a text nor a list of turns")
    if isinstance(prompt, str) and answer and role_of(answer[0]) == ASSISTANT:
        prompt = [{"role": "user", "content": prompt}]
    row = chat_row([*prompt, *answer] if isinstance(prompt, list) else answer, where, column, bounded)
    if isinstance(prompt, str):
        _check_prompt(prompt, row, where, column, prompts)
    return row


def _check_prompt(prompt: str, row: ChatRow, where: str, column: str, prompts: str) -> None:
    """Raise :class:`DataError` where no turn of the user before the answer is the prompt."""
    before = row.turns[: row.last]
    if not any(turn.role == "user" and turn.text.strip() == prompt.strip() for turn in before):
        raise DataError(
            f"{where}: {prompts} is {prompt[:60]!r}, and no user turn before the answer in {column} has this text; "
            f"make them the same, or leave out the column {prompts!r}"
        )


def _turns(value: object) -> object:
    """A list of turns that is written as JSON (in CSV files) as that list; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            parsed = parse_json(value)
            if isinstance(parsed, list) and parsed and all(isinstance(turn, Mapping) for turn in parsed):
                return parsed
    return value


def _context(row: PromptRow | ChatRow) -> object:
    """What the answer follows."""
    return row.prompt if isinstance(row, PromptRow) else row.turns[: row.last]
