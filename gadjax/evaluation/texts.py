"""How near a student's texts are to the teacher's, and how they repeat themselves. Strings in, numbers out."""

import re
from collections import Counter
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

_WORD = re.compile(r"\w+|[^\w\s]")
_ROUGE = RougeScorer(["rougeL"], use_stemmer=False)

NGrams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, and every other mark by itself; the case is kept.

    A script that is written without spaces gives one word per run: a Chinese clause is one word.
    """
    return _WORD.findall(text)


def ngrams(text: str, n: int) -> NGrams:
    """How often every n words in a row stand in a text."""
    tokens = words(text)
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def rouge_l(texts: Sequence[str], teacher: Sequence[str]) -> list[float]:
    """F1 of the longest common subsequence of words, by the rouge-score library without stemming, as the literature reports it.

    The library reads ASCII only: it takes lower-case runs of a-z and 0-9 as words and every other character as a space.
    A text of another script has no words and gets 0, even against itself; "naïve" is "na" and "ve". `overlap` reads every script.
    """
    return [_ROUGE.score(reference, text)["rougeL"].fmeasure for text, reference in zip(texts, teacher, strict=True)]


def overlap(texts: Sequence[str], teacher: Sequence[str], n: int) -> list[float]:
    """F1 of the n-grams of `words`: 2 x common / (student's + teacher's), each n-gram counted as often as it stands.

    Where neither text has n words, 1 if their words are the same and 0 if not.
    """
    return [_overlap(text, reference, n) for text, reference in zip(texts, teacher, strict=True)]


def _overlap(text: str, reference: str, n: int) -> float:
    ours, theirs = ngrams(text, n), ngrams(reference, n)
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else float(words(text) == words(reference))


def distinct_2(texts: Sequence[str]) -> float:
    """Different bigrams of `words` over all bigrams, of all texts together (Li et al., 2016).

    A number of the whole set: it falls as the set grows, so only sets of the same prompts can be compared. NaN without bigrams.
    """
    counts = sum((ngrams(text, 2) for text in texts), NGrams())
    return len(counts) / counts.total() if counts else float("nan")
