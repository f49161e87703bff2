"""Greedy completions of prompts, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from coterie.data.tasks import Generation
from coterie.nn.pretrained import PreTrainedModel


def new_tokens(model: PreTrainedModel, task: Generation, inputs: Mapping[str, Tensor]) -> Tensor:
    """At most ``task.max_new_tokens`` tokens [b, n] after each prompt; the prompts are padded on the left [b, t]."""
    tokenizer = task.tokenizer
    out: Tensor = model.generate(
        **inputs,
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(model.generation_config.eos_token_id, tokenizer.eos_token_id),
    )
    return out[:, inputs["input_ids"].shape[1] :]


def texts_of(task: Generation, tokens: Tensor) -> list[str]:
    """The texts of tokens [b, n], without special tokens."""
    return list(task.tokenizer.batch_decode(tokens, skip_special_tokens=True))


def _ends(of_model: int | list[int] | None, of_tokenizer: int | None) -> list[int] | None:
    """The tokens that end a text: the model's own, and the tokenizer's, which training puts after a completion."""
    own = of_model if isinstance(of_model, list) else [of_model]
    return sorted({end for end in (*own, of_tokenizer) if end is not None}) or None
