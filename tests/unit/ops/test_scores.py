"""Scores of generated text."""

from __future__ import annotations

from pathlib import Path

import pytest

import packages
from coterie.ops import scores
from coterie.ops.scores import exact_match, numeric, score_named, text_metrics, token_f1
from coterie.types import CoterieError


def test_text_metrics_by_hand() -> None:
    """ROUGE-L of (reference, text): F of the longest common subsequence of stemmed words."""
    pairs = {
        ("the cat sat", "the cat sat"): 1.0,
        ("the cat sat on the mat", "the mat"): 2 * (2 / 2) * (2 / 6) / (2 / 2 + 2 / 6),
        ("running fast", "runs fast"): 1.0,  # stemmed
        ("a b c d", "d c b a"): 1 / 4,
        ("yes", "no"): 0.0,
        ("yes", ""): 0.0,
    }
    for (reference, text), score in pairs.items():
        assert text_metrics([reference], [text])["rouge_l"] == pytest.approx(score), (reference, text)
    references, texts = [list(side) for side in zip(*pairs, strict=True)]
    assert text_metrics(references, texts)["rouge_l"] == pytest.approx(sum(pairs.values()) / len(pairs))
    assert text_metrics([" yes", "no", "Yes"], ["yes \n", "yes", "yes"])["exact_match"] == pytest.approx(1 / 3)


def test_text_metrics_without_rouge_score_name_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CoterieError, match=r"needs rouge-score: pip install "):
        text_metrics(["a"], ["a"])


@pytest.mark.parametrize(
    ("reference", "text", "score"),
    [
        ("The cat, on a mat.", "cat on mat", 1.0),
        ("red green blue", "blue", 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("yes yes", "yes", 2 * 1 * (1 / 2) / (1 + 1 / 2)),
        ("one", "two", 0.0),
        ("one", "", 0.0),
        ("the", "a", 1.0),
    ],
)
def test_token_f1_by_hand(reference: str, text: str, score: float) -> None:
    assert token_f1(reference, text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("reference", "text", "same"),
    [
        ("2 + 2 = 4\n#### 4", "so it is 4.", True),
        ("#### 1,200", "1200", True),
        ("#### 1200", "$1,200.00 in all", True),
        ("#### 4", "4, or maybe 5", False),
        ("#### 4", "first 7 #### 4", True),
        ("#### -3", "-3", True),
        ("#### 0.5", ".5", True),
        ("#### 4", "four", False),
        ("none", "none", False),
        ("#### 5", "3-5", True),
        ("#### 2", "(1,2)", True),
        ("#### -5", "\N{MINUS SIGN}5", True),
        ("#### 1200000", "1,200,000", True),
    ],
)
def test_numbers_are_compared_as_numbers(reference: str, text: str, same: bool) -> None:
    assert numeric(reference, text) == float(same)


def test_scores_are_means_over_rows_by_name() -> None:
    found = text_metrics(["1", "2"], ["1", "3"], ["numeric", "exact_match"])
    assert found == {"numeric": 0.5, "exact_match": 0.5}
    assert exact_match(" a", "a\n") == 1.0


def test_a_function_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores.py").write_text(
        "def length(reference, text):\n    return len(text)\nnone = lambda r, t: None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert text_metrics(["a", "b"], ["xx", "xxxx"], ["my_scores:length"]) == {"length": 3.0}
    with pytest.raises(CoterieError, match="my_scores:none returned None; a score is a finite number"):
        text_metrics(["a"], ["b"], ["my_scores:none"])
    for wrong, fault in {
        "my_scores:no": "cannot be imported",
        "no_such_module:x": "cannot be imported",
        "my_scores:__name__": "is not a function",
        "bleu": "unknown score 'bleu'; the scores are rouge_l, exact_match, token_f1, numeric",
    }.items():
        with pytest.raises(CoterieError, match=fault):
            score_named(wrong)


def test_a_package_adds_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def brevity(reference, text):\n    return 1 / (1 + len(text))\n"
    packages.forget()
    packages.install(
        tmp_path, monkeypatch, "coterie-brevity", {"coterie.scores: brevity": "brief:brevity"}, brief=source
    )
    assert text_metrics(["a"], ["xyz"], ["brevity"]) == {"brevity": 0.25}
    packages.forget()
