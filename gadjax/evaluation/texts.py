"""How near a student's texts are to the teacher's, and how they repeat themselves. Strings in, numbers out."""

import re
from collections import Counter
from collections.abc import Sequence

# Not its RougeScorer: that fills a table of len(text) x len(reference) in Python, and loads NLTK and SciPy for stemming and sentences.
from rouge_score.scoring import fmeasure
from rouge_score.tokenize import tokenize

_WORD = re.compile(r"\w+|[^\w\s]")

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
    """F1 of the longest common subsequence of words: the number of the rouge-score library without stemming, as the literature reports it.

    They are the library's, which reads ASCII only: lower-case runs of a-z and 0-9 are words, every other character is a space.
    A text of another script has no words and gets 0, even against itself; "naïve" is "na" and "ve". `overlap` reads every script.
    """
    return [_rouge_l(tokenize(text, None), tokenize(reference, None)) for text, reference in zip(texts, teacher, strict=True)]


def _rouge_l(text: list[str], reference: list[str]) -> float:
    common = common_subsequence(text, reference)
    return fmeasure(precision=common / len(text), recall=common / len(reference)) if common else 0.0


def common_subsequence(text: Sequence[str], reference: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    A row of the usual table grows by 0 or 1 from place to place, so one bit a place holds it, and a sum of two integers
    makes the next row of it (Hyyrö, 2004): two answers of 1,100 words take a millisecond.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(reference):
        places[word] = places.get(word, 0) | 1 << place
    whole = (1 << len(reference)) - 1
    row = whole  # a 0 for every place where the table's row grows
    for word in text:
        found = row & places.get(word, 0)
        row = ((row + found) | (row - found)) & whole
    return len(reference) - row.bit_count()


def overlap(texts: Sequence[str], teacher: Sequence[str], n: int) -> list[float]:
    """F1 of the n-grams of `words`: 2 x common / (student's + teacher's), each n-gram counted as often as it stands.

    Where neither text has n words, 1 if their words are the same and 0 if not.
    """
    return [_overlap(text, reference, n) for text, reference in zip(texts, teacher, strict=True)]


def _overlap(text: str, reference: str, n: int) -> float:
    ours, theirs = ngrams(text, n), ngrams(reference, n)
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else float(words(text) == words(reference))


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of `words` over all n-grams, of all texts together (Li et al., 2016).

    A number of the whole set: it falls as the set grows, so only sets of the same prompts can be compared. NaN without n-grams.
    It has no interval: a bootstrap over prompts takes some twice, whose n-grams are no longer different, so that every resample lies
    below the number itself.
    """
    counts = sum((ngrams(text, n) for text in texts), NGrams())
    return len(counts) / counts.total() if counts else float("nan")
