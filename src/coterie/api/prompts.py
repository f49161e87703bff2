"""What a text is written after: a chat by the tokenizer's template, or a plain one; or a text as it is."""

from __future__ import annotations

from coterie.api.jobs import RequestError
from coterie.data import chat
from coterie.data.rows import Turn
from coterie.data.tasks import Generation
from coterie.nn.pretrained import PreTrainedTokenizerBase
from coterie.types import DataError


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | tuple[Turn, ...]) -> list[int]:
    """The tokens of a prompt.

    A chat of one message has the tokens that training gave a prompt. Without a chat template, several messages are
    joined by a blank line.
    Raises :class:`RequestError` for a chat that the template refuses.
    """
    if isinstance(prompt, str):
        return Generation(tokenizer).plain_ids(prompt)
    if not tokenizer.chat_template:
        return Generation(tokenizer).plain_ids("\n\n".join(turn.text for turn in prompt))
    try:
        return chat.prompt_ids(tokenizer, prompt)
    except DataError:  # its text may quote a message
        text = "the model's chat template does not take these messages"
        raise RequestError(text, 400, "bad_messages", "messages") from None
