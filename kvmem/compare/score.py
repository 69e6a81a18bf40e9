"""Scores answers with SQuAD's metrics (Rajpurkar et al., 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

from kvmem.compare.questions import Question

_QUOTES = str.maketrans("’‘“”", "''\"\"")
_PUNCTUATION = re.compile(f"(?<=\\d),(?=\\d)|(?!(?<=\\d)[.:](?=\\d))[{re.escape(string.punctuation)}]")


def normalise(text: str) -> str:
    """Lower-case the text and drop punctuation, articles and extra spaces; 2.4 and 02:00 are kept."""
    plain = _PUNCTUATION.sub("", text.lower().translate(_QUOTES))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def f1(answer: str, right: Sequence[str]) -> float:
    """The highest word F1 with any of the right answers, in [0, 1]."""
    return max((_f1(normalise(answer).split(), normalise(text).split()) for text in right), default=0.0)


def _f1(given: list[str], right: list[str]) -> float:
    shared = sum((Counter(given) & Counter(right)).values())
    if not shared:
        return float(given == right)
    return 2 * shared / (len(given) + len(right))


def contains(answer: str, right: Iterable[str]) -> bool:
    """Whether the answer contains one of the right answers, as whole words."""
    given = f" {normalise(answer)} "
    return any(f" {normalise(text)} " in given for text in right if normalise(text))


def missing(question: Question, texts: Sequence[str], corpus: Sequence[str]) -> bool | None:
    """Whether a prompt of `texts` lacks what the answer needs: part of the evidence, or every right answer.

    Right answers are used only if there is no evidence. None if unknown, because the corpus itself lacks it.
    """
    prompt, whole = (normalise("\n".join(part)) for part in (texts, corpus))
    if question.evidence:
        needed = [normalise(text) for text in question.evidence]
        return None if any(text not in whole for text in needed) else any(text not in prompt for text in needed)
    if not contains(whole, question.answers):
        return None
    return not contains(prompt, question.answers)
