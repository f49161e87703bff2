"""Greedy completions of prompts, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from coterie.data.tasks import Generation, Tokenizer
from coterie.nn.pretrained import PreTrainedModel, PreTrainedTokenizerBase


def new_tokens(model: PreTrainedModel, task: Generation, inputs: Mapping[str, Tensor]) -> Tensor:
    """At most ``task.max_new_tokens`` tokens [b, n] after each prompt; the prompts are padded on the left [b, t]."""
    tokenizer = task.tokenizer
    out: Tensor = model.generate(
        **inputs,
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(model, tokenizer),
    )
    return out[:, inputs["input_ids"].shape[1] :]


def texts_of(task: Generation, tokens: Tensor) -> list[str]:
    """The texts of tokens [b, n], without special tokens."""
    return list(task.tokenizer.batch_decode(tokens, skip_special_tokens=True))


def end_texts(model: PreTrainedModel, tokenizer: Tokenizer | PreTrainedTokenizerBase) -> None:
    """Let ``model.generate`` end a text where :func:`new_tokens` does."""
    model.generation_config.eos_token_id = _ends(model, tokenizer)


def _ends(model: PreTrainedModel, tokenizer: Tokenizer | PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end a text: the model's own, and the tokenizer's, which training puts after a completion."""
    of_model = model.generation_config.eos_token_id
    own = of_model if isinstance(of_model, list) else [of_model]
    return sorted({end for end in (*own, tokenizer.eos_token_id) if end is not None}) or None
