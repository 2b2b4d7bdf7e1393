"""Texts as words, and what is told by runs of them: copies, near copies, and overlap with other texts."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Chinese and Japanese, written without spaces: a sign is a word
WORD = re.compile(rf"[{SIGNS}]|(?:(?![{SIGNS}])\w)+")
SHINGLE = 5  # words
FEWEST_WORDS = 25  # below, one other word changes most shingles: such texts are compared as wholes only
BANDS, ROWS = 25, 5  # of the MinHash signature: a pair of similarity 0.8 is missed once in 20,000 times, one of 0.9 never
SEED = 2511_10643
UInt64s = np.ndarray[tuple[int], np.dtype[np.uint64]]


def words(text: str) -> list[str]:
    """The words without case and marks."""
    return WORD.findall(text.casefold())


def ngram_hashes(text: Sequence[str], n: int) -> set[int]:
    """A hash of every n words in a row; of the whole text where it is shorter."""
    runs = [text[i : i + n] for i in range(max(len(text) - n, 0) + 1)]
    return {_hash(" ".join(run)) for run in runs if run}


def copies(texts: Iterable[Sequence[str]]) -> Iterator[bool]:
    """Whether each text has the same words as an earlier one."""
    seen = set[int]()
    for text in texts:
        mark = _hash(" ".join(text))
        yield mark in seen
        seen.add(mark)


def near_copies(texts: Iterable[Sequence[str]], similarity: float) -> list[bool]:
    """Whether each text is at least so similar to an earlier one that was none itself.

    Similarity is Jaccard's, of the sets of 5 words in a row. Pairs to compare are found by MinHash with locality-sensitive hashing
    (Broder, 1997); what decides is their true similarity, so nothing is left out by chance. (The library `datasketch` does the
    same, and brings SciPy.) 200,000 prompts of 100 words take about 300 MB.
    """
    found, shingles = list[bool](), dict[int, UInt64s]()
    for text in texts:
        if len(text) >= FEWEST_WORDS:
            shingles[len(found)] = np.array(sorted(ngram_hashes(text, SHINGLE)), np.uint64)
        found.append(False)
    if not shingles:
        return found
    bands = _shared_bands(list(shingles.values()))
    originals = defaultdict[tuple[int, int], list[int]](list)  # by their band
    for (index, ours), row in zip(shingles.items(), bands, strict=True):
        places = [(band, int(name)) for band, name in enumerate(row) if name >= 0]
        others = {other for place in places for other in originals.get(place, ())}
        common = {other: len(np.intersect1d(ours, shingles[other], assume_unique=True)) for other in others}
        found[index] = any(both >= similarity * (len(ours) + len(shingles[other]) - both) for other, both in common.items())
        if not found[index]:
            for place in places:
                originals[place].append(index)
    return found


def _shared_bands(shingles: Sequence[UInt64s]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """A row for each text: for each band of its MinHash signature a name that texts with an equal one share, or -1 where none has."""
    rng = np.random.default_rng(SEED)
    factors = rng.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    mix = rng.integers(0, 2**63, ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    marks = np.empty((len(shingles), BANDS), np.uint64)
    for index, hashes in enumerate(shingles):
        # Multiply-shift hashing: unsigned products wrap around, and their upper halves are nearly independent.
        least = ((hashes[:, None] * factors) >> np.uint64(32)).min(axis=0)
        marks[index] = (least.reshape(BANDS, ROWS) * mix).sum(axis=1)
    names = np.empty(marks.shape, np.int64)
    for band in range(BANDS):
        _, inverse, counts = np.unique(marks[:, band], return_inverse=True, return_counts=True)
        names[:, band] = np.where(counts[inverse] > 1, inverse, -1)
    return names


def overlapping(texts: Iterable[Sequence[str]], others: Iterable[Sequence[str]], n: int) -> Iterator[bool]:
    """Whether each text shares n words in a row with one of `others`; a shorter one, all of its words."""
    theirs = {mark for text in others for mark in ngram_hashes(text, n)}
    return (not theirs.isdisjoint(ngram_hashes(text, n)) for text in texts)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
