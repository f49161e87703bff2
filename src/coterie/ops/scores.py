"""Scores of generated text against a reference: Coterie's own, those of installed packages, and functions by name.

A score is a function of (reference, text) that returns a number, the higher the better. A package adds one in the
entry-point group ``coterie.scores``.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import cache
from typing import TypeVar

from coterie.plugins import check_new, installed, load
from coterie.types import CoterieError

GROUP = "coterie.scores"
DEFAULT = ("rouge_l", "exact_match")
TextScore = Callable[[str, str], float]
S = TypeVar("S", bound=TextScore)
_OWN: dict[str, TextScore] = {}
_NUMBER = re.compile(r"(?<!\d)-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_BLANK = str.maketrans("", "", string.punctuation)


def text_metrics(references: Sequence[str], texts: Sequence[str], scores: Sequence[str] = DEFAULT) -> dict[str, float]:
    """The mean over rows of each of ``scores``, by the score's own name.

    Raises :class:`CoterieError` as :func:`score_named`, and for a score that returns something else than a finite
    number.
    """
    pairs = list(zip(references, texts, strict=True))
    return {metric_of(name): _mean(name, pairs) for name in scores}


def score_named(name: str) -> TextScore:
    """The score called ``name``; ``module:name`` is a function that this process imports.

    Raises :class:`CoterieError` for one that does not exist, and where a package is missing.
    """
    check_new(GROUP, _OWN)
    if name == "rouge_l":
        check_rouge()
    if name in _OWN:
        return _OWN[name]
    if ":" in name:
        return _imported(name)
    if name not in installed(GROUP):
        known = ", ".join([*_OWN, *installed(GROUP)])
        raise CoterieError(f"[task] scores: unknown score {name!r}; the scores are {known}, or module:function")
    found: TextScore = load(installed(GROUP)[name])
    return found


def metric_of(name: str) -> str:
    """The name of the metric: of ``module:name`` the name."""
    return name.rpartition(":")[2].rpartition(".")[2]


def check_rouge() -> None:
    """Raises :class:`CoterieError` where rouge-score is not installed."""
    if importlib.util.find_spec("rouge_score") is None:
        raise CoterieError("scoring generated text needs rouge-score: pip install rouge-score")


def _own(score: S) -> S:
    _OWN[score.__name__] = score
    return score


@_own
def rouge_l(reference: str, text: str) -> float:
    """ROUGE-L (Lin, 2004), F measure over stemmed words."""
    return float(_rouge().score(reference, text)["rougeL"].fmeasure)


@_own
def exact_match(reference: str, text: str) -> float:
    """1 where the texts are the same but for white space around them."""
    return float(reference.strip() == text.strip())


@_own
def token_f1(reference: str, text: str) -> float:
    """F1 of the words that both have, as SQuAD scores answers (Rajpurkar et al., 2016, arXiv 1606.05250).

    Capital letters, punctuation and articles do not count. Two texts without words score 1.
    """
    one, other = _words(reference), _words(text)
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / (len(one) + len(other)) if one or other else 1.0


@_own
def numeric(reference: str, text: str) -> float:
    """1 where both end in the same number: the one after ``####`` as in GSM8K (arXiv 2110.14168), else the last one."""
    right, given = _last_number(reference), _last_number(text)
    return float(right is not None and right == given)


@cache
def _rouge():  # type: ignore[no-untyped-def]  # rouge_score has no types
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_BLANK)).split()


def _last_number(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text.rpartition("####")[2].replace("\N{MINUS SIGN}", "-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _mean(name: str, pairs: Sequence[tuple[str, str]]) -> float:
    score = score_named(name)
    values = [score(reference, text) for reference, text in pairs]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CoterieError(f"[task] scores: {name} returned {value!r}; a score is a finite number")
    return math.fsum(values) / len(values)


def _imported(name: str) -> TextScore:
    module, _, attribute = name.partition(":")
    try:
        found: TextScore = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as fault:
        raise CoterieError(f"[task] scores: {name!r} cannot be imported: {fault}") from fault
    if not callable(found):
        raise CoterieError(f"[task] scores: {name!r} is not a function of a reference and a text")
    return found
