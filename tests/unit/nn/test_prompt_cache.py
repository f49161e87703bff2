"""Which decoders share prompts, and that the trial refuses those whose answers would get other logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from coterie.nn.prompt_cache import PromptCache, prompt_cache


@pytest.mark.parametrize("arch", tiny.DECODERS)
def test_decoders_share_prompts(arch: str) -> None:
    model = tiny.model(arch, "generation")
    assert prompt_cache(model) == PromptCache(positions=True, last=True)
    model.train()
    model.gradient_checkpointing_enable()
    assert prompt_cache(model) is not None
    assert model.training


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 160),
        ({"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, 40),
        ({"rope_type": "linear", "factor": 2.0}, None),
    ],
)
def test_rows_that_change_the_positions_frequencies_are_read_whole(
    scaling: dict[str, Any], longest: int | None
) -> None:
    if scaling["rope_type"] == "longrope":
        scaling = {**scaling, "original_max_position_embeddings": 40}
    model = tiny.model("llama", "generation", rope_parameters={**scaling, "rope_theta": 1e4})
    cache = prompt_cache(model)
    assert cache is not None
    assert cache.longest == longest
    assert cache.up_to(40) is cache
    assert (cache.up_to(161) is None) == (longest is not None)


def test_a_decoder_without_a_cache_reads_whole_rows() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.model("llama", "generation")
            self.config = self.inner.config

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return self.inner(input_ids, attention_mask)

    assert prompt_cache(Bare()) is None


def test_a_decoder_that_forgets_its_prompt_reads_whole_rows() -> None:
    model = tiny.model("llama", "generation")

    def forget(_: Any, __: Any, kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            for layer in cache.layers:
                layer.values = torch.zeros_like(layer.values)
        return None

    model.register_forward_pre_hook(forget, with_kwargs=True)
    assert prompt_cache(model) is None
