"""`report/data.html`: what the teacher's data is like, and what of it the student has taken on. Made from the files in a run's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from gadjax.data.snapshot import Example, Snapshot, Split
from gadjax.files import replace_file
from gadjax.report.answers import Answers, read_answers
from gadjax.report.templates import STYLE, TEMPLATES
from gadjax.report.traits import INSTALLED, Corpus, goes_on, marks, more_than, traits
from gadjax.teachers.cache import Overview, TeacherCache

MOST = 20_000  # training examples that are looked at, evenly spread
SIGNS = {"more": "▲", "less": "▼", "taken on": "=", "": ""}


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
        languages=INSTALLED,
        **(_compared(corpora) if examples else {}),
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


def _compared(corpora: Sequence[Corpus]) -> dict[str, Any]:
    """The teacher's answers and the stages' side by side."""
    groups, totals, names = traits(corpora), [len(corpus.answers) for corpus in corpora], [corpus.name for corpus in corpora]
    _, held_out, *stages = corpora
    tables = [
        (
            title,
            [
                (
                    trait.name,
                    "" if trait.prompts is None else f"{trait.prompts:.1%}",
                    [
                        (f"{count / max(total, 1):.1%}", SIGNS[mark])
                        for count, total, mark in zip(trait.counts, totals, marks(trait, totals, names), strict=True)
                    ],
                )
                for trait in rows
            ],
        )
        for title, rows in groups
    ]
    return {
        "corpora": names,
        "figures": [(name, [corpus.figures[name] for corpus in corpora]) for name in corpora[0].figures],
        "tables": tables,
        "goes_on": goes_on(groups, totals, names),
        "runs": [(stage.name, more_than(stage.runs, len(stage.answers), held_out.runs, len(held_out.answers))) for stage in stages],
    }
