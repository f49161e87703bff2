"""Tiny random models, tokenizers and banks for the tests: seeded, made in memory, nothing downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
)

from coterie.adapters.about import About
from coterie.nn.spec import describe
from coterie.ops.streams import stream
from coterie.types import NO_EXPERT, SHARED, Bank, GateSpec, Key, Part, Target

DEVICE = os.environ.get("COTERIE_TEST_DEVICE", "cpu")  # of the tests of layers and of shared passes; bench/gpu.py
ENCODERS = ("bert", "roberta")
DECODERS = ("llama", "qwen2", "gpt2")
ARCHITECTURES = (*ENCODERS, *DECODERS)
VOCABULARY = 300
HIDDEN = 32
_ABOUT = About("fedit", 3, "last", "classification", "a/base")
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
_CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def config(arch: str, **overrides: Any) -> PretrainedConfig:
    """Two layers, hidden size 32, 4 heads (2 of them for keys and values in Llama and Qwen2), a vocabulary of 300."""
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 160}
    grouped = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    match arch:
        case "bert":
            return BertConfig(**{**shared, **sizes, **overrides})
        case "distilbert":  # PEFT has no default targets for it
            sizes = {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 160}
            return DistilBertConfig(**{**shared, **sizes, **overrides})
        case "roberta":
            return RobertaConfig(**{**shared, **sizes, **overrides})
        case "llama":
            return LlamaConfig(**{**shared, **sizes, **grouped, **overrides})
        case "qwen2":
            return Qwen2Config(**{**shared, **sizes, **grouped, **overrides})
        case "gpt2":
            return GPT2Config(
                **{**shared, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 160, **overrides}
            )
    raise ValueError(f"no tiny {arch!r}")


def model(arch: str, kind: str = "classification", *, seed: int = 0, labels: int = 3, **overrides: Any) -> Any:
    """A random model in evaluation mode, frozen. ``kind``: "classification", "generation" or "bare" (no head)."""
    autos = {"classification": AutoModelForSequenceClassification, "generation": AutoModelForCausalLM}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = autos.get(kind, AutoModel).from_config(config(arch, num_labels=labels, **overrides))
    return made.eval().requires_grad_(False)


def tokenizer(texts: Iterable[str] = (), *, chat: bool = False, token_types: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, so that any text survives encode and decode; merges are learned from ``texts``, if any.

    Encodes a pair as ``<s> a </s> b </s>``. Its vocabulary fits :data:`VOCABULARY`. ``token_types``: as BERT has them.
    """
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(list(texts) or ["a"], trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=128,
        model_input_names=["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
    )
    made.chat_template = _CHAT if chat else None
    return made


def folder(
    path: Path,
    arch: str,
    kind: str | None = None,
    *,
    seed: int = 0,
    texts: Iterable[str] = (),
    chat: bool = False,
    **overrides: Any,
) -> Path:
    """A model folder as users have them: an encoder without a head, a decoder with its output layer; a tokenizer."""
    kind = kind or ("generation" if arch in DECODERS else "bare")
    model(arch, kind, seed=seed, **overrides).save_pretrained(path)
    tokenizer(texts, chat=chat, token_types=arch == "bert").save_pretrained(path)
    return path


def about(**changes: Any) -> About:
    """What is said of an export."""
    return replace(_ABOUT, **changes)


def batch(
    rows: int = 3, tokens: int = 7, *, seed: int = 0, padded: bool = True, left: bool = False
) -> dict[str, Tensor]:
    """Random token ids [rows, tokens] and their mask: row i ends (``left``: starts) with i padding tokens."""
    ids = torch.randint(len(_SPECIAL), VOCABULARY, (rows, tokens), generator=stream(seed, "batch"))
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows if padded else 0):
        pads = slice(0, row) if left else slice(tokens - row, tokens)
        mask[row, pads] = 0
        ids[row, pads] = 0
    return {"input_ids": ids, "attention_mask": mask}


def targets(made: nn.Module, names: tuple[str, ...] = ()) -> tuple[Target, ...]:
    """The targets of a model that ``names`` name, by default PEFT's."""
    return describe(made, names).targets


def bank(
    over: Sequence[Target],
    experts: int = 1,
    rank: int | Sequence[int] = 4,
    *,
    gate: str = "constant",
    options: Mapping[str, Any] | None = None,
    shared: int = 0,
    slots: int | None = None,
    zero_b: bool = False,
    scaling: float = 2.0,
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Bank:
    """A random bank over ``over``: ``experts`` of ``rank`` (one number, or one each), a shared one of rank ``shared``.

    The router has ``slots`` rows; by default what ``gate`` wants (2 M - 1, the rank, M, or none for "constant"). For a
    gate by expert it is a table.
    """
    ranks = dict(enumerate([rank] * experts if isinstance(rank, int) else rank))
    by_gate = {"constant": 0, "slot_top_k": 2 * experts - 1, "scaled_dot_product": ranks.get(0, 0)}
    wanted = by_gate.get(gate, experts) if slots is None else slots
    tensors: dict[Key, Tensor] = {}

    def draw(key: Key, *shape: int) -> None:
        tensors[key] = torch.randn(shape, generator=stream(seed, str(key)), dtype=torch.float64).mul(0.3).to(dtype)

    for target in over:
        for expert, r in {**({SHARED: shared} if shared else {}), **ranks}.items():
            draw(Key(target.name, expert, Part.A), r, target.d_in)
            draw(Key(target.name, expert, Part.B), target.d_out, r)
            if zero_b:
                tensors[Key(target.name, expert, Part.B)].zero_()
        if columns := {"signed": 1, "response": 4, "mixing": 1 + experts}.get(gate):
            draw(Key(target.name, NO_EXPERT, Part.ROUTER), experts, columns)
        elif wanted:
            draw(Key(target.name, NO_EXPERT, Part.ROUTER), wanted, target.d_in)
    return Bank(tensors, GateSpec(gate, options or {}), scaling, dropout)


def head(made: nn.Module, labels: int, *, seed: int = 0, over: tuple[str, ...] = ()) -> dict[Key, Tensor]:
    """A random head for ``labels`` labels. ``over`` names targets, for a model for which PEFT has no defaults."""
    return {
        Key(p.name, NO_EXPERT, Part.HEAD): torch.randn(p.shape_for(labels), generator=stream(seed, "head", p.name))
        * 0.3
        for p in describe(made, over).head
    }
