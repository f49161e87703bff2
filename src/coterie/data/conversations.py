"""Rows of generation in the forms that people have them in, recognised by their columns.

============  ==========================================  ===========================================
form          columns                                     known as
============  ==========================================  ===========================================
prompt        ``prompt``, ``completion``, or a template   prompt and completion
messages      ``messages``: ``role`` and ``content``      chat messages (OpenAI)
conversations ``conversations``: ``from`` and ``value``   ShareGPT
instruction   ``instruction``, ``input``, ``output``      Alpaca; ``input`` may be missing or empty
preference    ``prompt``, ``chosen``, ``rejected``        preferences: :mod:`coterie.data.preferences`
============  ==========================================  ===========================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from coterie.data.files import RowTable
from coterie.data.rows import ASSISTANT, ROLES, ChatRow, PromptRow, Turn
from coterie.data.settings import Columns
from coterie.text import parse_json
from coterie.types import DataError

Form = Literal["prompt", "messages", "conversations", "instruction", "preference"]
_INSTRUCTION, _INPUT, _OUTPUT = "instruction", "input", "output"
_NAMES = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT}  # other names of roles
_MOST = 1_000  # turns of a conversation


def form_of(table: RowTable, columns: Columns) -> Form:
    """The form of a table's rows. Columns that the settings name come first, then preferences, then prompts."""
    names = table.columns
    if columns.messages is not None:
        return "messages"
    if {columns.chosen, columns.rejected} <= {*names} and columns.completion not in names:
        return "preference"
    if columns.template is not None or columns.prompt in names:
        return "prompt"
    if "messages" in names:
        return "messages"
    if "conversations" in names:
        return "conversations"
    return "instruction" if _INSTRUCTION in names and _OUTPUT in names else "prompt"


def chat_row(value: object, where: str, column: str, bounded: Callable[[str, str, str], str]) -> ChatRow:
    """The row of one conversation: a list of turns, or such a list written as JSON (in CSV files).

    ``bounded`` refuses a text that is too long. Raises :class:`DataError` that names the turn.
    """
    if isinstance(value, str):
        with suppress(ValueError):  # not a list: refused below
            value = parse_json(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(
            f'{where}: {column} is {str(value)[:60]!r}, not a list of turns such as [{{"role": "user", "content": '
            '"..."}]'
        )
    if len(value) > _MOST:
        raise DataError(f"{where}: {column} has {len(value):,} turns, more than {_MOST:,}; divide it over several rows")
    turns = tuple(_turn(turn, where, f"{column}[{i}]", bounded) for i, turn in enumerate(value))
    if all(turn.role != ASSISTANT for turn in turns[1:]):
        raise DataError(f"{where}: {column} has no turn of the assistant after another's, so there is nothing to learn")
    return ChatRow(turns)


def unanswered(record: Mapping[str, object], columns: Columns) -> dict[str, object]:
    """What a record lacks to be read as a row whose completion is to be found: any text in its place.

    A conversation that ends with the assistant's turn is answered anew from there.
    """
    answer = "-"
    match form_of(RowTable("", [record], ""), columns):
        case "prompt":
            instruction = columns.template is None and columns.prompt not in record and _INSTRUCTION in record
            return {_OUTPUT if instruction else columns.completion: answer}
        case "instruction":
            return {_OUTPUT: answer}
        case "preference":
            return {}
        case "messages" | "conversations" as name:
            column = columns.messages or name
            turns = record.get(column)
            if isinstance(turns, str):
                with suppress(ValueError):  # refused when it is read
                    turns = parse_json(turns)
            if not isinstance(turns, list) or (turns and role_of(turns[-1]) == ASSISTANT):
                return {}
            return {column: [*turns, {"role": ASSISTANT, "content": answer}]}


def instruction_row(record: Mapping[str, object], where: str, bounded: Callable[[str, str, str], str]) -> PromptRow:
    """The instruction, after an empty line the input if there is one, and the output as completion."""
    texts = {}
    for name in (_INSTRUCTION, _INPUT, _OUTPUT):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {name} is {value!r}, not text")
        texts[name] = bounded(value or "", where, name)
    for name in (_INSTRUCTION, _OUTPUT):
        if not texts[name].strip():
            raise DataError(f"{where}: the row has no {name}")
    given = texts[_INPUT]
    return PromptRow(texts[_INSTRUCTION] + (f"\n\n{given}" if given.strip() else ""), texts[_OUTPUT])


def _turn(value: object, where: str, at: str, bounded: Callable[[str, str, str], str]) -> Turn:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: {at} is {str(value)[:60]!r}, not a turn with role and content")
    role, text = role_of(value), value.get("content", value.get("value"))
    if role not in ROLES:
        raise DataError(f"{where}: {at} has the role {role!r}; the roles are {', '.join(ROLES)}")
    if value.get("tool_calls"):
        raise DataError(f"{where}: {at} calls tools, which is not supported; leave the row out")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {at} has the content {str(text)[:60]!r}, not text")
    return Turn(str(role), bounded(text, where, at))


def role_of(turn: object) -> object:
    """Who says a turn, by the name that chat templates use."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    return _NAMES.get(role, role) if isinstance(role, str) else role
