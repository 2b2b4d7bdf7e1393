"""What texts are about, told by the words that stand in some of them: spherical k-means of TF-IDF vectors (Dhillon and Modha, 2001).

Only words are counted, so a topic is a habit of using certain words together; what it is called are its most telling ones. The same
texts give the same topics. (scikit-learn does this too; these few lines need no further package.)

K topics, V words, T texts.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

MOST_TOPICS = 8
TEXTS_A_TOPIC = 4  # at the least, or there are fewer topics
MOST_WORDS = 4_000  # those that stand in the most texts
FEWEST_TEXTS = 3  # in which a word must stand
WIDEST = 0.5  # share of the texts beyond which a word tells nothing
NAMED_BY = 4  # words
STARTS, ROUNDS, SEED = 4, 30, 2511_10643
NO_TOPIC = -1

Sparse = Any  # scipy.sparse.csr_array, whose products are not typed
Floats = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True)
class Topics:
    """Topics that were found.

    Attributes:
        names: K names, of the topic with the most texts first.
        words: V words by the number of their column.
        weights_V: the inverse document frequency of each.
        centres_KV: unit vectors.
    """

    names: tuple[str, ...]
    words: dict[str, int]
    weights_V: np.ndarray[tuple[int], np.dtype[np.float32]]
    centres_KV: Floats

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> "Topics":
        """The topics of texts, each given by its words; there are none where hardly a word stands in some of the texts and not in most."""
        standing = Counter(word for text in texts for word in {*text})
        useful = [(count, word) for word, count in standing.items() if FEWEST_TEXTS <= count <= WIDEST * len(texts)]
        chosen = sorted(sorted(useful, key=lambda item: (-item[0], item[1]))[:MOST_WORDS], key=lambda item: item[1])
        weights_V = np.array([math.log(len(texts) / count) for count, _ in chosen], np.float32)
        found = cls((), {word: number for number, (_, word) in enumerate(chosen)}, weights_V, np.zeros((0, len(chosen)), np.float32))
        vectors_TV = found._vectors(texts)
        vectors_TV = vectors_TV[np.diff(vectors_TV.indptr) > 0]  # others have no topic
        wanted = min(MOST_TOPICS, vectors_TV.shape[0] // TEXTS_A_TOPIC)
        if wanted == 0:
            return found
        rng = np.random.default_rng(SEED)
        centres_KV = max((_clustered(vectors_TV, wanted, rng) for _ in range(STARTS)), key=lambda found: found[0])[1]
        sizes = np.bincount((vectors_TV @ centres_KV.T).argmax(axis=1), minlength=len(centres_KV))
        centres_KV = centres_KV[np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]]
        return cls(_names(centres_KV, [word for _, word in chosen]), found.words, weights_V, centres_KV)

    def assign(self, texts: Sequence[Sequence[str]]) -> list[int]:
        """The number of each text's topic; NO_TOPIC where it has no word of any."""
        if not self.names:
            return [NO_TOPIC] * len(texts)
        nearness_TK = self._vectors(texts) @ self.centres_KV.T
        return [int(row.argmax()) if row.max() > 0 else NO_TOPIC for row in nearness_TK]

    def _vectors(self, texts: Sequence[Sequence[str]]) -> Sparse:
        """Unit TF-IDF vectors, with 1 + log(count) for a word's frequency."""
        columns, values, ends = list[int](), list[float](), [0]
        for text in texts:
            counts = Counter(self.words[word] for word in text if word in self.words)
            row = {column: (1 + math.log(count)) * float(self.weights_V[column]) for column, count in sorted(counts.items())}
            length = math.hypot(*row.values())
            columns += row
            values += [value / length for value in row.values()]
            ends.append(len(columns))
        return sparse.csr_array((np.array(values, np.float32), np.array(columns, np.int64), ends), shape=(len(texts), len(self.words)))


def _clustered(vectors_TV: Sparse, count: int, rng: np.random.Generator) -> tuple[float, Floats]:
    """The sum of the texts' nearness to the centres that one start ends in, and these."""
    first = int(rng.integers(vectors_TV.shape[0]))
    centres_KV = vectors_TV[[first]].toarray()
    while len(centres_KV) < count:  # k-means++: far ones are likely
        distance_T = np.maximum(1 - (vectors_TV @ centres_KV.T).max(axis=1), 0).astype(np.float64)
        if distance_T.sum() < 1e-6:
            break  # there are no more different texts
        centres_KV = np.concatenate([centres_KV, vectors_TV[[int(rng.choice(len(distance_T), p=distance_T / distance_T.sum()))]].toarray()])
    nearest_T = np.array([], np.int64)
    for _ in range(ROUNDS):
        before_T, nearest_T = nearest_T, (vectors_TV @ centres_KV.T).argmax(axis=1)
        if np.array_equal(before_T, nearest_T):
            break
        members_KT: Sparse = sparse.csr_array(
            (np.ones(len(nearest_T), np.float32), (nearest_T, np.arange(len(nearest_T)))), (len(centres_KV), len(nearest_T))
        )
        sums_KV = (members_KT @ vectors_TV).toarray()
        lengths_K1 = np.linalg.norm(sums_KV, axis=1, keepdims=True)
        centres_KV = np.where(lengths_K1 > 0, sums_KV / np.maximum(lengths_K1, 1e-12), centres_KV)
    return float((vectors_TV @ centres_KV.T).max(axis=1).sum()), centres_KV


def _names(centres_KV: Floats, words: Sequence[str]) -> tuple[str, ...]:
    """The words by which each topic differs most from the mean of all."""
    telling_KV = centres_KV - centres_KV.mean(axis=0) if len(centres_KV) > 1 else centres_KV
    best_K4 = np.argsort(-telling_KV, axis=1, kind="stable")[:, :NAMED_BY]
    return tuple(", ".join(words[int(each)] for each in row if centre[each] > 0) for row, centre in zip(best_K4, centres_KV, strict=True))
