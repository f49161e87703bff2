"""How clusters by texts and LoRAs were chosen, and how sure that is, in words."""

from __future__ import annotations

from coterie.methods.findings import CLOSE_CHOICE
from coterie.ops.nested import TEXTS_APART, Nested, Split


def grounds_of(made: Nested) -> str:
    """How the clusters were chosen, and the least margin by which another choice was missed, where that is small."""
    sentence = "; ".join([_by_texts(made), *_by_loras(made)])
    margins = _margins(made)
    if margins and min(margins) < CLOSE_CHOICE:
        sentence += f". That is a close choice (margin {min(margins):.3f}): another seed may change it"
    return sentence


def of_some(choice: str, sent: int, there: int) -> str:
    """``choice``, how the clusters were chosen, and that only ``sent`` of ``there`` clients decided it."""
    some = f"Only {sent} of {there} clients had sent what clusters are made of; the others join the nearest"
    return ". ".join([*([choice] if choice else []), f"{some}. If that is too few, raise [run] cohort"])


def _by_texts(made: Nested) -> str:
    text = f"{_clusters(max(made.labels) + 1)}: {_clusters(max(made.texts) + 1)} by texts"
    if not made.by_texts:
        return text
    best = max(made.by_texts, key=lambda k: made.by_texts[k])
    return f"{text} (the best silhouette is {made.by_texts[best]:.3f} with {best}, where {TEXTS_APART} is enough)"


def _by_loras(made: Nested) -> list[str]:
    split = [text for text in made.by_loras if _parts(made, text) > 1]
    whole = [of for text, of in made.by_loras.items() if text not in split]
    parts = [
        f"LoRAs split cluster {text} of these into {_parts(made, text)} ({_silhouette(made, made.by_loras[text])})"
        for text in split
    ]
    if whole:
        nearest = max(whole, key=lambda of: (of.no_room, of.silhouette - of.enough))
        parts.append(f"LoRAs split no {'other' if split else 'cluster'} ({_silhouette(made, nearest)})")
    return parts


def _margins(made: Nested) -> list[float]:
    """How far each silhouette that decided is from deciding otherwise."""
    margins = [abs(split.silhouette - split.enough) for split in made.by_loras.values()]
    scores = sorted(made.by_texts.values())
    if scores:
        margins.append(abs(scores[-1] - TEXTS_APART))
    if len(scores) > 1 and max(made.texts) > 0:
        margins.append(scores[-1] - scores[-2])
    return margins


def _parts(made: Nested, text: int) -> int:
    return len({label for label, of in zip(made.labels, made.texts, strict=True) if of == text})


def _silhouette(made: Nested, split: Split) -> str:
    text, enough = f"silhouette {split.silhouette:.3f}", f"where {split.enough:.3f} is enough"
    if split.small:
        return f"{text}, {enough}, but a part is smaller than [robust] min_group"
    if split.no_room:
        limit = f"[method] {'experts' if made.exactly else 'max_experts'} = {made.most}"
        return f"{text} with {split.parts}, {enough}, but {limit} leaves no room for so many"
    return f"{text}, {enough}"


def _clusters(number: int) -> str:
    return f"{number} cluster{'s' * (number != 1)}"
