"""Human evaluation: which of two answers is better, by people who are not told whose they are.

A ballot is a prompt and two answers, one on each side. The order is drawn by lot, one for all, so that whoever stops early has voted on
what others began with; the sides are drawn for each annotator. Both by hashes: they are the same after an interruption. Votes are kept in
SQLite, one for each annotator and pair of texts; answers that change are voted on anew.
"""

import hashlib
import itertools
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from gadjax.evaluation.statistics import Estimate, bootstrap, by_prompt
from gadjax.records import Prompt

Choice = Literal["left", "right", "tie"]
VALUES = {"stage": 1.0, "tie": 0.5, "other": 0.0}  # of a vote, for the stage

SCHEMA = """
    CREATE TABLE IF NOT EXISTS votes (
        pair TEXT NOT NULL,
        annotator TEXT NOT NULL,
        vote TEXT NOT NULL CHECK (vote IN ('stage', 'tie', 'other')),
        PRIMARY KEY (pair, annotator)
    ) STRICT
"""


@dataclass(frozen=True)
class Pair:
    """A stage's answer and another one to the same prompt."""

    prompt: Prompt
    stage: str
    other: str

    @property
    def key(self) -> str:
        """Names the texts."""
        return _hash(self.prompt.id, self.stage, self.other)

    @property
    def same(self) -> bool:
        """Whether there is nothing to choose between."""
        return self.stage.strip() == self.other.strip()

    def turned(self, annotator: str) -> bool:
        """Whether the stage's answer is on the right for this annotator."""
        return int(_hash("side", annotator, self.key), 16) % 2 == 1

    def ballot(self, annotator: str) -> dict[str, Any]:
        """What the annotator sees."""
        left, right = (self.other, self.stage) if self.turned(annotator) else (self.stage, self.other)
        return {"pair": self.key, "messages": list(self.prompt.messages), "left": left, "right": right}

    def vote(self, annotator: str, choice: Choice) -> str:
        """What the choice of a side means."""
        return "tie" if choice == "tie" else "stage" if (choice == "right") == self.turned(annotator) else "other"


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()


class Vote(NamedTuple):
    """One vote."""

    pair: str
    annotator: str
    vote: str


class BallotBox:
    """The file of the votes. Every method is one transaction that is on the disk when it returns."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def cast(self, pair: str, annotator: str, vote: str) -> None:
        """Keeps a vote; a later one of the same annotator on the same pair takes its place."""
        self._db.execute("INSERT OR REPLACE INTO votes (pair, annotator, vote) VALUES (?, ?, ?)", (pair, annotator, vote))

    def take_back(self, annotator: str, pairs: Iterable[str]) -> None:
        """Removes the annotator's last vote on one of these pairs, if there is one."""
        known = set(pairs)
        rows = self._db.execute("SELECT pair FROM votes WHERE annotator = ? ORDER BY rowid DESC", (annotator,)).fetchall()
        last = next((pair for (pair,) in rows if pair in known), None)
        self._db.execute("DELETE FROM votes WHERE annotator = ? AND pair = ?", (annotator, last))

    def votes(self, pairs: Iterable[str]) -> list[Vote]:
        """All votes on these pairs."""
        known = set(pairs)
        rows = self._db.execute("SELECT pair, annotator, vote FROM votes ORDER BY rowid")
        return [Vote(*row) for row in rows if row[0] in known]


def in_order(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs in the order in which everybody votes on them."""
    return sorted(pairs, key=lambda pair: _hash("order", pair.key))


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        wins: of the stage, a tie counting one half: the mean over the pairs that have votes, each the mean of its votes, and as large a
            part of those that are the same.
        same: pairs whose answers are the same; nobody votes on them.
        by_annotator: the same of each one's votes, and how many there are.
        counts: votes for the stage, for the other, and ties.
        agreement: the share of pairs of votes on the same ballot that are equal; None without such pairs.
        alpha: Krippendorff's (2011) for nominal data: 1 is full agreement, 0 that of chance.
    """

    wins: Estimate
    same: int
    by_annotator: Mapping[str, tuple[float, int]]
    counts: Mapping[str, int]
    agreement: float | None
    alpha: float | None


def count(votes: Sequence[Vote], pairs: Sequence[Pair] = ()) -> Result | None:
    """The result of some votes; None of none.

    Args:
        votes: on pairs that differ.
        pairs: all that there are. Of those that are the same as large a part counts as has votes of the others.
    """
    if not votes:
        return None
    values = by_prompt([vote.pair for vote in votes], [VALUES[vote.vote] for vote in votes])
    same = sum(pair.same for pair in pairs)
    ties = round(same * len(values) / (len(pairs) - same)) if same else 0
    names = dict.fromkeys(vote.annotator for vote in votes)
    each = {name: [VALUES[vote.vote] for vote in votes if vote.annotator == name] for name in names}
    ballots = [[vote.vote for vote in votes if vote.pair == pair] for pair in values]
    return Result(
        wins=bootstrap([*values.values(), *[VALUES["tie"]] * ties]),
        same=same,
        by_annotator={name: (sum(own) / len(own), len(own)) for name, own in each.items()},
        counts={value: sum(vote.vote == value for vote in votes) for value in VALUES},
        agreement=_agreement(ballots),
        alpha=alpha(ballots),
    )


def _agreement(ballots: Sequence[Sequence[str]]) -> float | None:
    same = [one == other for ballot in ballots for one, other in itertools.combinations(ballot, 2)]
    return sum(same) / len(same) if same else None


def alpha(ballots: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha for nominal data, from the votes on each ballot.

        alpha = 1 - observed / expected disagreement

    observed: over ballots of m votes, the share of ordered pairs of votes that differ, each pair weighing 1 / (m - 1);
    expected: the same of all votes as if they were on one ballot. None where nothing can disagree.
    """
    shared = [ballot for ballot in ballots if len(ballot) > 1]
    total = Counter(vote for ballot in shared for vote in ballot)
    n = total.total()
    expected = n * n - sum(number**2 for number in total.values())
    if not expected:
        return None
    observed = sum((len(ballot) ** 2 - sum(number**2 for number in Counter(ballot).values())) / (len(ballot) - 1) for ballot in shared)
    return 1 - (n - 1) * observed / expected
