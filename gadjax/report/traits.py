"""What answers are like, as shares of them; which shares of a student's differ for sure from the teacher's, and which it has taken on."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from gadjax.data.languages import INSTALLED, UNKNOWN, language
from gadjax.data.topics import Topics
from gadjax.data.words import copies, near_copies, words
from gadjax.report.answers import MARKS

SIMILAR = 0.8  # of near copies
RUNS = (3, 5)  # words of the runs that are counted
SHOWN = 12  # rows of a list
FEWEST = 3  # answers that a run of words must stand in
SURE = 3.0  # standard errors: of some fifty comparisons hardly one goes so far by chance
UNTOUCHED = "student"  # as the student's answers before all training are called
# Words with which assistants decline, in English; a count of them, not a verdict on one answer.
DECLINES = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:can(?:'|no)t|won't|will not|am not able to) (?:help|assist|provide|do|create|write)"
    r"|as an ai)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Corpus:
    """Answers of one side, with the prompts that they answer."""

    name: str
    prompts: Sequence[str]
    answers: Sequence[str]
    truncated: Sequence[bool]

    @cached_property
    def spoken(self) -> list[list[str]]:
        """The words of each answer."""
        return [words(answer) for answer in self.answers]

    @cached_property
    def lengths(self) -> list[int]:
        """The words of each answer, counted."""
        return [len(each) for each in self.spoken]

    @cached_property
    def languages(self) -> list[str]:
        """The language of each answer."""
        return [language(answer) for answer in self.answers]

    @cached_property
    def runs(self) -> Counter[str]:
        """In how many answers each run of words stands."""
        counts = Counter[str]()
        for spoken in self.spoken:
            counts.update({" ".join(spoken[i : i + n]) for n in RUNS for i in range(len(spoken) - n + 1)})
        return counts

    @property
    def figures(self) -> dict[str, str]:
        """How many answers and how long they are, in words to show."""
        quantiles = {"words, median": 50, "words, 95th percentile": 95}
        return {"answers": f"{len(self.answers):,}", "words, mean": f"{np.mean(self.lengths):.1f}"} | {
            name: f"{np.percentile(self.lengths, rank):.0f}" for name, rank in quantiles.items()
        }

    @property
    def manner(self) -> dict[str, int]:
        """How many answers are of each kind."""
        flags = {"cut off": self.truncated, "declining (English)": [bool(DECLINES.search(answer)) for answer in self.answers]}
        if INSTALLED:
            pairs = zip(map(language, self.prompts), self.languages, strict=True)
            flags["in another language than the prompt"] = [ours != theirs and UNKNOWN not in (ours, theirs) for ours, theirs in pairs]
        flags["copies of an earlier answer"] = list(copies(self.spoken))
        flags["near copies of an earlier answer"] = near_copies(self.spoken, SIMILAR)
        flags |= {mark: [bool(form.search(answer)) for answer in self.answers] for mark, form in MARKS.items()}
        return {name: sum(each) for name, each in flags.items()}


@dataclass(frozen=True)
class Trait:
    """Something that an answer has or has not.

    Attributes:
        name: of it.
        prompts: the share of the training prompts that have it, where that can be said of a prompt.
        counts: how many answers of each corpus have it.
    """

    name: str
    prompts: float | None
    counts: Sequence[int]


Group = tuple[str, Sequence[Trait]]


def traits(corpora: Sequence[Corpus]) -> list[Group]:
    """All that is compared: by title, a count for each of `corpora`, of which the first is the teacher on the training prompts."""
    training = corpora[0]
    longer = [int(sum(length > np.median(training.lengths) for length in corpus.lengths)) for corpus in corpora]
    manners = [corpus.manner for corpus in corpora]
    manner = [Trait(name, None, [each[name] for each in manners]) for name in manners[0]]
    groups = [("Manner", [Trait("longer than half of the training answers", None, longer), *manner])]
    if INSTALLED:
        groups.append(("Languages", _languages(corpora)))
    groups.append(("Topics", _topics(corpora)))
    ranked = sorted(training.runs.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]
    runs = [Trait(run, None, [corpus.runs[run] for corpus in corpora]) for run, count in ranked if count >= FEWEST]
    return [*groups, ("Words in a row", runs)]


def _languages(corpora: Sequence[Corpus]) -> list[Trait]:
    """The most frequent languages on any side."""
    training = corpora[0]
    prompts, answers = Counter(map(language, training.prompts)), [Counter(corpus.languages) for corpus in corpora]
    shares = Counter[str]()
    for counts in (prompts, *answers):
        shares.update({name: count / counts.total() for name, count in counts.items()})
    names = [name for name, _ in sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]]
    return [Trait(name, prompts[name] / len(training.prompts), [counts[name] for counts in answers]) for name in names]


def _topics(corpora: Sequence[Corpus]) -> list[Trait]:
    """Those of the training data, prompt and answer together; each prompt and each answer then has the nearest one."""
    training = corpora[0]
    asked = [words(prompt) for prompt in training.prompts]
    topics = Topics.of([prompt + answer for prompt, answer in zip(asked, training.spoken, strict=True)])
    prompts, answers = Counter(topics.assign(asked)), [Counter(topics.assign(corpus.spoken)) for corpus in corpora]
    numbers = [*range(len(topics.names)), -1]
    return [
        Trait(name, prompts[number] / len(asked), [counts[number] for counts in answers])
        for number, name in zip(numbers, (*topics.names, "none of these"), strict=True)
    ]


def surety(count: int, total: int, other_count: int, other_total: int) -> float:
    """How much larger a share is than another, in standard errors of their log-odds' difference; 0.5 is added to each count (Haldane,
    Anscombe).
    """
    counts = [(count + 0.5, total + 1), (other_count + 0.5, other_total + 1)]
    one, other = (math.log(part / (whole - part)) for part, whole in counts)
    return (one - other) / math.sqrt(sum(1 / part + 1 / (whole - part) for part, whole in counts))


Mark = Literal["more", "less", "taken on", ""]


def marks(trait: Trait, totals: Sequence[int], names: Sequence[str]) -> list[Mark]:
    """Of each corpus how its share stands to the teacher's on the same prompts, the second's: surely more, surely less, or taken on.

    Taken on is what a trained student does as often as the teacher while the untouched one did it surely more or less often than both.
    """
    sides = list(zip(trait.counts, totals, strict=True))
    teacher, before = sides[1], sides[names.index(UNTOUCHED)] if UNTOUCHED in names else None

    def mark(side: tuple[int, int]) -> Mark:
        difference = surety(*side, *teacher)
        if abs(difference) > SURE:
            return "more" if difference > 0 else "less"
        if before is not None and abs(surety(*before, *teacher)) > SURE and abs(surety(*side, *before)) > SURE:
            return "taken on"
        return ""

    return ["", "", *map(mark, sides[2:])]


def goes_on(groups: Sequence[Group], totals: Sequence[int], names: Sequence[str]) -> list[tuple[str, Mapping[Mark, list[str]]]]:
    """For each trained student which traits of the data it has taken on, and which it has surely more or less often than the teacher."""
    found: dict[str, dict[Mark, list[str]]] = {name: {"taken on": [], "more": [], "less": []} for name in names[2:] if name != UNTOUCHED}
    for title, rows in groups:
        for trait in rows:
            for name, mark in zip(names, marks(trait, totals, names), strict=True):
                if mark and name in found:
                    found[name][mark].append(f"{title.lower()}: {trait.name}")
    return list(found.items())


def more_than(ours: Mapping[str, int], our_answers: int, theirs: Mapping[str, int], their_answers: int) -> list[tuple[str, str, str]]:
    """The runs of words that stand in more of our answers than of theirs, the surest first, with both shares."""
    sure = {run: surety(count, our_answers, theirs.get(run, 0), their_answers) for run, count in ours.items() if count >= FEWEST}
    ranked = sorted((run for run in sure if sure[run] > 1.96), key=lambda run: (-sure[run], run))
    return [(run, f"{ours[run] / our_answers:.1%}", f"{theirs.get(run, 0) / their_answers:.1%}") for run in ranked[:SHOWN]]
