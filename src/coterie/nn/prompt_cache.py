"""A decoder's cache of prompts: read once, and continued by several answers one after the other.

Prompts are padded on the left, so that every answer follows its prompt directly. A decoder is used so only if a trial
shows that the logits of its answers are those of whole rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.nn.placement import input_device
from coterie.nn.pretrained import DynamicCache

_TOLERANCE = 0.02  # of the largest logit: a wrong position or mask is far above, rounding in bfloat16 below
_PROMPTS, _ANSWERS = ((3, 4, 5, 6), (7, 8)), ((9, 10), (11, 12))


@dataclass(frozen=True)
class Prompts:
    """Prompts that were read: their mask [b, t], their keys and values, and the logits after each [b, v]."""

    mask: Tensor
    cache: DynamicCache
    logits: Tensor


@dataclass(frozen=True)
class PromptCache:
    """How a decoder is called: ``positions``: with each token's position; ``last``: for the last logits alone.

    ``longest``: the most tokens of prompt and answer that share prompts; None: any number.
    """

    positions: bool
    last: bool
    longest: int | None = None

    def up_to(self, tokens: int) -> PromptCache | None:
        """This cache for rows of at most so many ``tokens``; None where longer ones would get other logits."""
        return self if self.longest is None or tokens <= self.longest else None

    def read(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Prompts:
        """Pass prompts [b, t], padded on the left."""
        mask, cache = inputs["attention_mask"], DynamicCache()
        more = {"logits_to_keep": 1} if self.last else {}
        logits = self._pass(model, inputs["input_ids"], mask, cache, **more)
        return Prompts(mask, cache, logits[:, -1])

    def follow(self, model: nn.Module, prompts: Prompts, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits [b, t, v] of answers [b, t] to the prompts, which can be continued anew afterwards."""
        mask = torch.cat([prompts.mask, inputs["attention_mask"]], dim=1)
        logits = self._pass(model, inputs["input_ids"], mask, prompts.cache)
        prompts.cache.crop(-inputs["input_ids"].shape[1])  # removes these tokens
        return logits

    def _pass(self, model: nn.Module, ids: Tensor, mask: Tensor, cache: DynamicCache, **more: int) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        where: dict[str, Any] = {"position_ids": positions} if self.positions else {}
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **where, **more)
        logits: Tensor = out.logits
        return logits


def prompt_cache(model: nn.Module) -> PromptCache | None:
    """How the decoder's prompts are shared; None for one without such a cache, or whose logits would be others."""
    config: Any = model.config
    if int(config.get_text_config().vocab_size) <= max(*_ANSWERS[0], *_ANSWERS[1]):
        return None
    known = inspect.signature(model.forward).parameters
    made = PromptCache("position_ids" in known, "logits_to_keep" in known, _unscaled(model))
    was = model.training
    model.eval()  # in training mode, a model with gradient checkpointing has no cache
    try:
        with torch.no_grad():
            off = max(_differences(made, model))
    except (TypeError, AttributeError, RuntimeError, IndexError, ValueError):  # it has no cache as others have it
        return None
    finally:
        model.train(was)
    return made if off <= _TOLERANCE else None


def _unscaled(model: nn.Module) -> int | None:
    """The most tokens for which rotary positions do not depend on the text's length; None: they never do.

    Beyond, an answer gets other frequencies than the cached keys of its prompt have, and the trial is too short for it.
    """
    original = []
    for module in model.modules():
        of_layers = getattr(module, "rope_type", None)
        types = of_layers.values() if isinstance(of_layers, Mapping) else [of_layers]
        if not any("dynamic" in str(each) or each == "longrope" for each in types):
            continue
        stated: Any = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        of_rope = [stated, *(each for each in stated.values() if isinstance(each, Mapping))]
        own = [each.get("original_max_position_embeddings") for each in of_rope]
        known = [n for n in (*own, getattr(module, "original_max_seq_len", None)) if isinstance(n, int)]
        original.append(min(known, default=0))
    return min(original, default=None)


def _differences(cache: PromptCache, model: nn.Module) -> list[float]:
    """How far each answer's logits are from those of a whole row, as a part of the largest."""
    device, width = input_device(model), max(map(len, _PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + [*prompt] for prompt in _PROMPTS], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in _PROMPTS], device=device)
    prompts = cache.read(model, {"input_ids": ids, "attention_mask": mask})
    found = []
    for answer in _ANSWERS:
        inputs = torch.tensor([answer] * len(_PROMPTS), device=device)
        logits = cache.follow(model, prompts, {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)})
        for row, prompt in enumerate(_PROMPTS):
            whole: Tensor = model(input_ids=torch.tensor([[*prompt, *answer]], device=device), use_cache=False).logits
            expected = whole[0, len(prompt) - 1 :].float()
            own = torch.cat([prompts.logits[row : row + 1], logits[row]]).float()
            found.append(float((own - expected).abs().max() / expected.abs().max()))
    return found
