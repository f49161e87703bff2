"""Conversations as tokens: the tokenizer's chat template renders them, and the loss counts the assistant's words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, overload

from jinja2 import Environment, TemplateError

from coterie.data.rows import ASSISTANT, Turn
from coterie.types import CoterieError, DataError

TrainedTurns = Literal["all", "last"]
Span = tuple[int, int]  # from one token to before another
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ENDS = re.compile(r"\{%[-+]?\s*endgeneration\s*[-+]?%\}")


class ChatTokenizer(Protocol):
    """What rendering uses of a Hugging Face tokenizer."""

    @property
    def is_fast(self) -> bool: ...

    @property
    def chat_template(self) -> str | None: ...

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, list[int]]: ...

    @overload
    def apply_chat_template(
        self, turns: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: Literal[False]
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        turns: list[dict[str, str]],
        *,
        tokenize: Literal[True],
        return_dict: Literal[True],
        return_assistant_tokens_mask: Literal[True],
    ) -> Mapping[str, list[int]]: ...


@dataclass(frozen=True)
class Rendered:
    """A conversation's tokens, and the spans of them that the loss counts, in order."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]


def render(tokenizer: ChatTokenizer, turns: Sequence[Turn], trained: TrainedTurns) -> Rendered:
    """The tokens of ``turns`` up to the assistant's last, whose turns count: all of them or the last.

    A template that marks what the assistant says (``{% generation %}``) decides which tokens count. With any other
    they are those that follow the template's own prompt for an answer, up to the last that is not white space.
    Raises :class:`DataError` for a tokenizer without a chat template, for turns that its template refuses, and for a
    template that renders a turn differently when others follow.
    """
    if not tokenizer.chat_template:
        raise DataError("the rows are conversations, and the base's tokenizer has no chat template to render them")
    said = [number for number, turn in enumerate(turns) if turn.role == ASSISTANT]
    turns = turns[: said[-1] + 1]
    try:
        if _MARKS.search(tokenizer.chat_template) and tokenizer.is_fast:
            rendered = _by_marks(tokenizer, turns)
        else:
            rendered = _by_prefix(tokenizer, turns, said if trained == "all" else said[-1:])
    except TemplateError as fault:
        raise DataError(f"the chat template refuses the conversation: {fault}") from fault
    spans = rendered.spans if trained == "all" else rendered.spans[-1:]
    return Rendered(rendered.ids[: spans[-1][1]], spans)


def check_template(text: str, where: str) -> None:
    """Raises :class:`CoterieError` for a template that is empty, or whose blocks do not close."""
    if not text.strip():
        raise CoterieError(f"{where}: the chat template is empty")
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", _ENDS.sub("", text)))
    except TemplateError as fault:
        raise CoterieError(f"{where}: not a valid chat template: {fault}") from fault


def prompt_ids(tokenizer: ChatTokenizer, turns: Sequence[Turn]) -> list[int]:
    """The tokens after which the assistant answers. Raises :class:`DataError` where the template refuses ``turns``."""
    try:
        text = _text(tokenizer, turns, prompt=True)
    except TemplateError as fault:
        raise DataError(f"the chat template refuses the conversation: {fault}") from fault
    return _ids(tokenizer, text)


def fit(rendered: Rendered, max_length: int) -> Rendered:
    """``rendered`` in at most ``max_length`` tokens: it ends where its last span ends, and loses tokens at its start.

    A last span that is too long itself loses its own last tokens. The first token never counts: nothing precedes it.
    Raises :class:`DataError` where nothing else is left.
    """
    start, end = rendered.spans[-1]
    end = min(end, start + max_length - 1)
    first = max(0, end - max_length)
    kept = [(max(a - first, 1), min(b, end) - first) for a, b in rendered.spans]
    spans = tuple((a, b) for a, b in kept if a < b)
    if not spans:
        raise DataError("the chat template puts no token before the assistant's answer, so it follows nothing")
    return Rendered(rendered.ids[first:end], spans)


def gaps(rendered: Rendered) -> tuple[Span, ...]:
    """The tokens between the spans that count."""
    return tuple((before, after) for (_, before), (after, _) in pairwise(rendered.spans) if before < after)


def _by_marks(tokenizer: ChatTokenizer, turns: Sequence[Turn]) -> Rendered:
    out = tokenizer.apply_chat_template(
        _messages(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marks = [0, *out["assistant_masks"], 0]
    edges = [at for at, (one, other) in enumerate(pairwise(marks)) if one != other]
    spans = tuple(zip(edges[::2], edges[1::2], strict=True))
    if not spans:
        raise DataError("the chat template marks no token as the assistant's ({% generation %}); correct the template")
    return Rendered(tuple(out["input_ids"]), spans)


def _by_prefix(tokenizer: ChatTokenizer, turns: Sequence[Turn], counted: Sequence[int]) -> Rendered:
    """What counts lies between the prompt for an answer and the end of the conversation that ends with the answer."""
    whole = _text(tokenizer, turns)
    ids: list[int] = []
    spans: list[Span] = []
    done = 0
    for number in counted:
        before, upto = _text(tokenizer, turns[:number], prompt=True), _text(tokenizer, turns[: number + 1])
        if not (whole.startswith(upto) and upto.startswith(before)):
            raise DataError(
                "the chat template renders the assistant's turns differently when others follow, or after its own "
                'prompt for an answer; set [task] turns = "last", or mark the turns in the template with '
                "{% generation %} and {% endgeneration %}"
            )
        end = len(upto.rstrip())
        ids += _ids(tokenizer, whole[done : len(before)])
        answer = _ids(tokenizer, whole[len(before) : end])
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
        done = end
    return Rendered(tuple(ids), tuple(spans))


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def _text(tokenizer: ChatTokenizer, turns: Sequence[Turn], *, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(_messages(turns), add_generation_prompt=prompt, tokenize=False)


def _ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
