"""`report/data.html`: what the teacher's data is like, and what of it the student has taken on. Made from the files in a run's folder."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from gadjax.data.languages import INSTALLED, UNKNOWN, language
from gadjax.data.snapshot import Example, Snapshot, Split
from gadjax.data.words import copies, near_copies, words
from gadjax.files import replace_file
from gadjax.report.answers import MARKS, Answers, read_answers
from gadjax.report.templates import STYLE, TEMPLATES
from gadjax.teachers.cache import Overview, TeacherCache

MOST = 20_000  # training examples that are looked at, evenly spread
RUNS = (3, 5)  # words of the runs that are counted
SHOWN = 12  # rows of a list
FEWEST = 3  # answers that a run of words must stand in
SIMILAR = 0.8  # of near copies
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

    @property
    def figures(self) -> dict[str, str]:
        """What the answers are like, in words to show."""
        spoken = [words(answer) for answer in self.answers]
        lengths = np.array([len(each) for each in spoken])
        shares = {"cut off": self.truncated, "declining (English)": [bool(DECLINES.search(answer)) for answer in self.answers]}
        if INSTALLED:
            pairs = [(language(prompt), language(answer)) for prompt, answer in zip(self.prompts, self.answers, strict=True)]
            shares["in another language than the prompt"] = [ours != theirs and UNKNOWN not in (ours, theirs) for ours, theirs in pairs]
        shares["copies of an earlier answer"] = list(copies(spoken))
        shares["near copies of an earlier answer"] = near_copies(spoken, SIMILAR)
        shares |= {mark: [bool(form.search(answer)) for answer in self.answers] for mark, form in MARKS.items()}
        quantiles = {"words, median": 50, "words, 95th percentile": 95}
        return (
            {"answers": f"{len(self.answers):,}", "words, mean": f"{lengths.mean():.1f}"}
            | {name: f"{np.percentile(lengths, rank):.0f}" for name, rank in quantiles.items()}
            | {name: f"{np.mean(share):.1%}" for name, share in shares.items()}
        )


def write_audit(run: Path, stages: Sequence[str]) -> Path | None:
    """Writes the page from what is there; None where there is neither a cache nor frozen data.

    Args:
        run: the run's folder.
        stages: names of the evaluated stages, in the order in which they are shown.
    """
    cache, data = run / "teacher.sqlite", run / "data"
    if not cache.exists() and not data.exists():
        return None
    overview: list[Overview] = []
    if cache.exists():
        with TeacherCache(cache, read_only=True) as opened:
            overview = opened.overview()
    snapshot = Snapshot.open(data) if data.exists() else None
    corpora = _corpora(snapshot, read_answers(run / "evaluation", stages)) if snapshot else []
    examples = _spread(snapshot.train) if snapshot else []
    page = TEMPLATES.get_template("data.html").render(
        name=run.resolve().name,
        style=Markup(STYLE),
        overview=[_teacher(each) for each in overview],
        lengths=_lengths(examples),
        languages=_languages(examples) if INSTALLED else None,
        topics=_topics(examples),
        corpora=[(corpus.name, corpus.figures) for corpus in corpora],
        runs=_over_represented(corpora),
    )
    path = run / "report" / "data.html"
    replace_file(path, page)
    return path


def _teacher(row: Overview) -> dict[str, Any]:
    states = {state: row.states.get(state, 0) for state in ("ok", "refused", "failed", "pending", "leased")}
    return {
        "name": f"{row.provider} {row.model}",
        "states": states,
        "truncated": row.truncated,
        "cost": f"${row.cost:.2f}",
        "models": ", ".join(f"{name} ({count:,})" for name, count in row.replied) or "–",
        "errors": [(error[:200], f"{count:,}") for error, count in row.errors],
    }


def _spread(split: Split) -> list[Example]:
    """All examples, or MOST of them."""
    count = min(len(split), MOST)
    return [split[index * len(split) // count] for index in range(count)]


def _corpora(snapshot: Snapshot, answers: Answers) -> list[Corpus]:
    """The teacher on the training prompts and on those held out, and every stage on the latter."""
    corpora = [_of_teacher("teacher, training", _spread(snapshot.train)), _of_teacher("teacher, held out", [*snapshot.validation])]
    for stage, rows in answers.items():
        given = [(row["messages"][-1]["content"], answer) for row in rows.values() for answer in row["greedy"]]
        if given:
            prompts, found = zip(*given, strict=True)
            corpora.append(Corpus(stage, prompts, [each["text"] for each in found], [bool(each.get("truncated")) for each in found]))
    return corpora


def _of_teacher(name: str, examples: Sequence[Example]) -> Corpus:
    answers = [example.answer for example in examples]
    prompts = [example.prompt.text for example in examples]
    return Corpus(name, prompts, [answer.text for answer in answers], [answer.truncated for answer in answers])


def _lengths(examples: Sequence[Example]) -> list[tuple[str, list[str]]]:
    """Tokens of prompts and answers: least, median, mean, 95th percentile, most."""
    if not examples:
        return []
    columns = {
        "prompts": [len(example.tokens.prompt) for example in examples],
        "answers": [len(example.tokens.teacher) for example in examples],
    }
    return [
        (name, [f"{value:,.0f}" for value in (min(column), np.median(column), np.mean(column), np.percentile(column, 95), max(column))])
        for name, column in columns.items()
    ]


def _languages(examples: Sequence[Example]) -> list[tuple[str, str, str]]:
    """The most frequent languages, and their shares of prompts and answers."""
    if not examples:
        return []
    prompts = Counter(language(example.prompt.text) for example in examples)
    answers = Counter(language(example.answer.text) for example in examples)
    names = [name for name, _ in (prompts + answers).most_common(SHOWN)]
    return [(name, f"{prompts[name] / len(examples):.1%}", f"{answers[name] / len(examples):.1%}") for name in names]


def _topics(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """The words of four letters and more that stand in the most prompts."""
    counts = Counter(word for example in examples for word in {*words(example.prompt.text)} if len(word) > 3)
    return [(word, f"{count / len(examples):.1%}") for word, count in counts.most_common(SHOWN)]


def _over_represented(corpora: Sequence[Corpus]) -> list[dict[str, Any]]:
    """For the teacher the runs of words that stand in the most answers; for a stage those that it uses more than the teacher does."""
    if not corpora:
        return []
    training, held_out, *stages = corpora
    found = [{"title": "teacher, training: in the most answers", "rows": _most_frequent(_run_counts(training), len(training.answers))}]
    theirs = _run_counts(held_out)
    for stage in stages:
        rows = _more_than(_run_counts(stage), len(stage.answers), theirs, len(held_out.answers))
        found.append({"title": f"{stage.name}: more often than the teacher", "rows": rows})
    return found


def _run_counts(corpus: Corpus) -> Counter[str]:
    """In how many answers each run of words stands."""
    counts = Counter[str]()
    for answer in corpus.answers:
        spoken = words(answer)
        counts.update({" ".join(spoken[i : i + n]) for n in RUNS for i in range(len(spoken) - n + 1)})
    return counts


def _most_frequent(counts: Mapping[str, int], answers: int) -> list[tuple[str, str, str]]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(run, f"{count / answers:.1%}", "") for run, count in ranked[:SHOWN] if count >= FEWEST]


def _more_than(ours: Mapping[str, int], our_answers: int, theirs: Mapping[str, int], their_answers: int) -> list[tuple[str, str, str]]:
    """Ranked by how sure it is: the difference of the log-odds in standard errors, each count with 0.5 added (Haldane and Anscombe)."""

    def surety(run: str) -> float:
        counts = [(ours[run] + 0.5, our_answers + 1), (theirs.get(run, 0) + 0.5, their_answers + 1)]
        one, other = (math.log(count / (total - count)) for count, total in counts)
        return (one - other) / math.sqrt(sum(1 / count + 1 / (total - count) for count, total in counts))

    sure = {run: surety(run) for run, count in ours.items() if count >= FEWEST}
    ranked = sorted((run for run in sure if sure[run] > 1.96), key=lambda run: (-sure[run], run))
    return [(run, f"{ours[run] / our_answers:.1%}", f"{theirs.get(run, 0) / their_answers:.1%}") for run in ranked[:SHOWN]]
