"""Comparing answers, as SQuAD does (Rajpurkar et al., 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

from kvmem.compare.questions import Question

_QUOTES = str.maketrans("’‘“”", "''\"\"")
_PUNCTUATION = re.compile(f"(?<=\\d),(?=\\d)|(?!(?<=\\d)[.:](?=\\d))[{re.escape(string.punctuation)}]")


def normalise(text: str) -> str:
    """Lower case, without punctuation (but 2.4 stays 2.4, and 02:00), articles and needless space."""
    plain = _PUNCTUATION.sub("", text.lower().translate(_QUOTES))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def f1(answer: str, right: Sequence[str]) -> float:
    """The best F1 of words shared with one of the right answers, in [0, 1]."""
    return max((_f1(normalise(answer).split(), normalise(text).split()) for text in right), default=0.0)


def _f1(given: list[str], right: list[str]) -> float:
    shared = sum((Counter(given) & Counter(right)).values())
    if not shared:
        return float(given == right)
    return 2 * shared / (len(given) + len(right))


def contains(answer: str, right: Iterable[str]) -> bool:
    """Whether one of the right answers stands in the answer, as whole words."""
    given = f" {normalise(answer)} "
    return any(f" {normalise(text)} " in given for text in right if normalise(text))


def missing(question: Question, texts: Sequence[str], corpus: Sequence[str]) -> bool | None:
    """Whether what an answer needs is not in a prompt of `texts`: some of the evidence, or else every right answer.

    None where nobody can say, since not all of the evidence, or no right answer, stands in the corpus.
    """
    prompt, whole = (normalise("\n".join(part)) for part in (texts, corpus))
    if question.evidence:
        needed = [normalise(text) for text in question.evidence]
        return None if any(text not in whole for text in needed) else any(text not in prompt for text in needed)
    if not contains(whole, question.answers):
        return None
    return not contains(prompt, question.answers)
