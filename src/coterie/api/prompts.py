"""What a text is written after: a chat by the tokenizer's template, or a plain one; or a text as it is."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.api.jobs import RequestError, Turn
from coterie.data.tasks import Generation
from coterie.nn.pretrained import PreTrainedTokenizerBase


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | tuple[Turn, ...]) -> list[int]:
    """The tokens of a prompt.

    A chat of one message has the tokens that training gave a prompt. Without a chat template, several messages are
    joined by a blank line.
    Raises :class:`RequestError` for a chat that the template refuses.
    """
    if isinstance(prompt, str):
        return _plain(tokenizer, prompt)
    if not tokenizer.chat_template:
        return _plain(tokenizer, "\n\n".join(turn.content for turn in prompt))
    turns = [{"role": "system" if t.role == "developer" else t.role, "content": t.content} for t in prompt]
    return list(tokenizer(_templated(tokenizer, turns), add_special_tokens=False, verbose=False)["input_ids"])


def _templated(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as fault:  # its text may quote a message
        raise RequestError(
            "the model's chat template does not take these messages", 400, "bad_messages", "messages"
        ) from fault
    return text


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """As training tokenises a prompt where there is no chat template."""
    return Generation(tokenizer).plain_ids(text)
