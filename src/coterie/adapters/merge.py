"""Writes a base with one LoRA added to its weights, as a transformers folder that needs neither PEFT nor Coterie."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from coterie.adapters.about import About, write_about
from coterie.adapters.model import limit_inputs
from coterie.inference.generate import end_texts
from coterie.nn.base import Base
from coterie.nn.locate import folder_here
from coterie.nn.spec import is_transposed
from coterie.types import Bank, CoterieError, Part

# Vocabularies that transformers reads, but does not write again. Converters to other formats want the file itself.
_VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt")


def write_merged(folder: Path, base: Base, bank: Bank, about: About) -> None:
    """Write ``base`` with ``W + s B A`` in the place of every adapted W, the bank's head and labels, and its tokenizer.

    ``bank`` has one expert per module and the gate ``constant``. The base changes: it can be used for nothing else.
    Weights are added in float32 and written in the base's dtype. An output layer that shares its weight with the
    embeddings gets a weight of its own, if it is adapted. Texts end where :func:`coterie.load`'s model ends them.
    Raises :class:`ValueError` for another bank, :class:`CoterieError` for other modules that share an adapted weight.
    """
    if bank.gate.name != "constant" or any(key.expert != 0 for key in bank.tensors if key.part in (Part.A, Part.B)):
        raise ValueError("only one expert with a gate of 1 can be added to weights; make the bank static first")
    with torch.no_grad():
        for a in sorted(key for key in bank.tensors if key.part is Part.A):
            product = bank.tensors[a._replace(part=Part.B)].float() @ bank.tensors[a].float() * bank.scaling
            module = base.model.get_submodule(a.module)
            _unshare(base, a.module)
            weight = module.get_parameter("weight")
            added = weight.float() + (product.T if is_transposed(module) else product).to(weight.device)
            weight.copy_(added.to(weight.dtype))
        _put_head(base, bank)
    if about.task != "classification":
        end_texts(base.model, base.tokenizer)
    config = base.model.config
    if about.labels and about.task == "classification":
        config.id2label = dict(enumerate(about.labels))
        config.label2id = {label: i for i, label in enumerate(about.labels)}
        config.problem_type = "single_label_classification"
    base.model.save_pretrained(folder)
    limit_inputs(base, about)
    base.tokenizer.save_pretrained(folder)
    _copy_vocabularies(base, folder)
    write_about(folder, about)


def _copy_vocabularies(base: Base, folder: Path) -> None:
    """Copy the base's vocabularies that the tokenizer has not written."""
    source = folder_here(base.path)
    for name in _VOCABULARIES if source else ():
        if source and (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def _unshare(base: Base, name: str) -> None:
    """Give the module called ``name`` a weight of its own, where it is an output layer tied to the embeddings."""
    module = base.model.get_submodule(name)
    weight = module.get_parameter("weight")
    others = [n for n, m in base.model.named_modules() if m is not module and getattr(m, "weight", None) is weight]
    if not others:
        return
    if module is not base.model.get_output_embeddings():
        raise CoterieError(
            f"{name} shares its weight with {', '.join(others)}, so a LoRA on it alone cannot be merged; export with "
            "--static instead"
        )
    module.register_parameter("weight", torch.nn.Parameter(weight.clone(), requires_grad=False))
    base.model.config.tie_word_embeddings = False
    base.model.config.get_text_config().tie_word_embeddings = False


def _put_head(base: Base, bank: Bank) -> None:
    for key in sorted(key for key in bank.tensors if key.part is Part.HEAD):
        owner, _, name = key.module.rpartition(".")
        module = base.model.get_submodule(owner)
        like = module.get_parameter(name)
        value = bank.tensors[key].to(like.device, like.dtype, copy=True)  # as many rows as the client has labels
        setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
