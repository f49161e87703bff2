"""Text that others wrote: JSON that may be damaged or hostile, and names that a terminal must not obey."""

from __future__ import annotations

import json
import re
import unicodedata

from coterie.types import Json

TEXT = 500  # characters of a text that others wrote
_UNSHOWN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of surrogate pairs, separators of lines
_TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # they change the direction of the text around them
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_ESCAPED_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # the only other way in which JSON can have one


def parse_json(text: str | bytes) -> Json:
    """The value of the JSON in ``text``. Bytes are UTF-8, with or without a byte order mark.

    Raises :class:`ValueError` for any fault, including half of a surrogate pair in a text.
    """
    if isinstance(text, bytes):  # json.loads would guess the encoding, and take halves of pairs as they are
        text = text.decode("utf-8-sig")
    check_pairs(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise ValueError(reason_of(fault)) from fault
    if _ESCAPED_PAIR.search(text):
        check_pairs(json.dumps(value, ensure_ascii=False))
    return value


def reason_of(fault: ValueError | RecursionError) -> str:
    """What is wrong with a text, in a line, from what a parser of JSON or TOML raised."""
    if isinstance(fault, RecursionError):
        return "its brackets are nested too deep"
    if "int_max_str_digits" in str(fault):
        return "it has a number with thousands of digits"
    if isinstance(fault, json.JSONDecodeError):
        return f"{fault.msg} (line {fault.lineno}, column {fault.colno})"
    return str(fault)


def check_pairs(text: str) -> None:
    """Raise :class:`ValueError` if ``text`` holds half of a surrogate pair, which can be neither shown nor written."""
    if half := _HALF_PAIR.search(text):
        raise ValueError(f"a text in it has the character U+{ord(half[0]):04X}, half of a surrogate pair; remove it")


def name_fault(name: str, allowed: str = "") -> str | None:
    """Why ``name`` cannot be shown as it is: a character that is neither shown nor ``allowed``. None where it can."""
    hidden = next((c for c in name if _is_hidden(c) and c not in allowed), None)
    if hidden is None:
        return None
    shown = printable(name).replace("\n", "\\n")
    return f"'{shown}' has the character U+{ord(hidden):04X}, which is not shown"


def printable(text: str) -> str:
    """``text`` with escapes for characters that a terminal would act on or could not show: ESC as ``\\x1b``."""
    return "".join(_escaped(c) if _is_hidden(c) and c != "\n" else c for c in text)


def _is_hidden(character: str) -> bool:
    return ord(character) in _TURNING or unicodedata.category(character) in _UNSHOWN


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def plain_text(text: str, most: int = TEXT) -> str:
    """``text`` cut to ``most`` characters, with a space for each that is not printable (ESC, say)."""
    return "".join(c if c.isprintable() else " " for c in text[:most])
