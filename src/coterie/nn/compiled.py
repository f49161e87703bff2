"""``torch.compile`` for the parts of a base that have no bank."""

from __future__ import annotations

from torch import nn

from coterie.nn.base import Base


def compile_frozen(base: Base) -> int:
    """Compile the largest modules that hold neither a target nor a head; return how many there are.

    Banks are hooks on the targets and change from client to client; what lies between them never does, so it is
    compiled once, for batches of any size. Results differ from uncompiled ones in the last bits.
    """
    apart = {target.name for target in base.spec.targets} | {part.name.partition(".")[0] for part in base.spec.head}
    apart |= {base.first_token.module} if base.first_token else set()  # a hook comes and goes there, too
    chosen = list(_untouched(base.model, "", apart))
    for module in chosen:
        module.compile(dynamic=True)
    return len(chosen)


def _untouched(module: nn.Module, name: str, apart: set[str]) -> list[nn.Module]:
    """The largest modules with parameters under ``module`` that neither are one of ``apart`` nor contain one."""
    if next(module.parameters(), None) is None or name in apart:
        return []
    if name and not any(inner.startswith(f"{name}.") for inner in apart):
        return [module]
    return [
        part
        for child_name, child in module.named_children()
        for part in _untouched(child, f"{name}.{child_name}" if name else child_name, apart)
    ]
