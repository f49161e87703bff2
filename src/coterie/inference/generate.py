"""Completions of prompts, the most likely or drawn, with a cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.data.tasks import Generation, Tokenizer
from coterie.nn.pretrained import PreTrainedModel, PreTrainedTokenizerBase
from coterie.ops.sampling import Sampling, next_token


@dataclass(frozen=True)
class Draw:
    """Leaves one token of each row's scores [b, v]: the one that the row's own stream draws, so that a text does not
    depend on the texts beside it. Scores that are not numbers stay as they are."""

    sampling: Sampling
    streams: Sequence[torch.Generator]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = scores.float().cpu()
        made = torch.full_like(scores, -math.inf)
        for number, (row, stream) in enumerate(zip(rows, self.streams, strict=True)):
            if bool(row.isnan().any()):
                made[number] = scores[number]
            else:
                made[number, next_token(row, self.sampling.temperature, self.sampling.top_p, stream)] = 0.0
        return made


def new_tokens(
    model: PreTrainedModel,
    task: Generation,
    inputs: Mapping[str, Tensor],
    streams: Sequence[torch.Generator] = (),
) -> Tensor:
    """At most ``task.max_new_tokens`` tokens [b, n] after each prompt; the prompts are padded on the left [b, t].

    The most likely tokens, unless there is a stream for each row: then ``task.sampling`` says how they are drawn.
    """
    tokenizer = task.tokenizer
    out: Tensor = model.generate(
        **inputs,
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        logits_processor=[Draw(task.sampling, streams)] if streams else None,
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
