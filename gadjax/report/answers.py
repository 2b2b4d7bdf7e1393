"""The answers of the stages side by side, and how often each style was used: from `evaluation/<stage>.jsonl`."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gadjax.data.words import words
from gadjax.errors import UserError
from gadjax.report.charts import Chart, bar_chart

EXAMPLES = 12  # prompts shown
CHARACTERS = 8_000  # of one answer
MOMENTS = 6  # answers of one stage to a prompt that are shown of its training
MARKS = {
    "with a list": re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE),
    "with a heading": re.compile(r"^#{1,6} ", re.MULTILINE),
    "with bold": re.compile(r"\*\*\S"),
    "with code": re.compile(r"```"),
}
BINS = 12  # of a histogram of lengths
LEAST = 0.01  # share of answers with some Markdown, below which there is nothing to see
MODES = {"greedy": "greedy", "sampled_0_8": "T = 0.8", "sampled_1_0": "T = 1", "best_of": "the discriminator's choice"}

Row = dict[str, Any]
Answers = Mapping[str, Mapping[str, Row]]  # stage -> id of the prompt -> its object, where `teacher` is a list


def read_answers(folder: Path, stages: Sequence[str]) -> Answers:
    """The objects of each stage that has a file, by the prompt's id; those of one prompt, which has several answers of the teacher, as one.

    Raises:
        UserError: a file does not hold such objects.
    """
    return {stage: _read(path) for stage in stages if (path := folder / f"{stage}.jsonl").exists()}


def _read(path: Path) -> dict[str, Row]:
    found: dict[str, Row] = {}
    try:
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            prompt = found.setdefault(row["id"], {"messages": row["messages"], "teacher": []} | {mode: [] for mode in MODES})
            prompt["teacher"].append(row["teacher"])
            for mode in MODES:
                prompt[mode] += row.get(mode, [])
    except (ValueError, KeyError, TypeError):
        raise UserError(str(path), "is not a file of answers", "delete it and run `gadjax evaluate`") from None
    return found


def examples(answers: Answers, colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """Prompts that every stage answered, evenly spread over the file, with all answers to each."""
    if not answers:
        return []
    first, *others = answers.values()
    ids = [name for name in first if all(name in other for other in others)]
    chosen = [ids[i * len(ids) // EXAMPLES] for i in range(EXAMPLES)] if len(ids) > EXAMPLES else ids
    return [_example({stage: rows[name] for stage, rows in answers.items()}, colours) for name in chosen]


def _example(rows: Mapping[str, Row], colours: Mapping[str, int]) -> dict[str, Any]:
    row = next(iter(rows.values()))
    first, *others = (_shown("another answer", answer) for answer in row["teacher"])
    teacher = {"title": "teacher", "colour": colours["teacher"], "first": first, "others": others}
    title = row["messages"][-1]["content"]
    return {
        "title": title[:120] + "…" * (len(title) > 120),
        "messages": [message | {"content": _cut(message["content"])} for message in row["messages"]],
        "answers": [teacher, *(_of_stage(stage, colours[stage], row) for stage, row in rows.items())],
    }


def _of_stage(stage: str, colour: int, row: Row) -> dict[str, Any]:
    shown = [_shown(title, row[mode][0]) for mode, title in MODES.items() if row[mode]]
    return {"title": stage, "colour": colour, "first": shown[0], "others": shown[1:]}


def _shown(mode: str, answer: Row) -> dict[str, str]:
    marks = [f"{answer['tokens']} tokens"] if "tokens" in answer else []
    marks += ["cut off"] * answer.get("truncated", False)
    if "style" in answer:
        marks += [
            f"style {answer['style']}",
            "valid" if answer["valid"] else "not valid",
            "correct" if answer["correct"] else "not correct",
        ]
    return {"mode": mode, "text": _cut(answer["text"]), "marks": ", ".join(marks)}


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}\n… ({len(text) - CHARACTERS} more characters)"


def evolution(run: Path, steps: Mapping[str, Sequence[int]], colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """What each stage answered to a few held-out prompts while it was trained, beside the teacher's answers.

    Args:
        run: the run's folder; the answers are in `stages/<stage>/answers/<step>.jsonl`.
        steps: of each stage those that its metrics tell of; answers of others are left from another trial.
        colours: of the teacher and the stages.
    """
    found = {stage: list(_kept(run / "stages" / stage / "answers", own)) for stage, own in steps.items()}
    prompts: dict[str, Row] = {name: row for moments in found.values() for _, rows in moments for name, row in rows.items()}
    return [
        {
            "prompt": _cut(row["messages"][-1]["content"]),
            "teacher": [_cut(answer["text"]) for answer in row["teacher"]],
            "moments": [
                moment | {"stage": stage, "colour": colours[stage]}
                for stage, moments in found.items()
                for moment in _moments([(step, rows[name]["greedy"][0]) for step, rows in moments if name in rows])
            ],
        }
        for name, row in prompts.items()
    ]


def _kept(folder: Path, steps: Sequence[int]) -> Iterator[tuple[int, dict[str, Row]]]:
    return ((step, _read(path)) for step in steps if (path := folder / f"{step}.jsonl").exists())


def _moments(answers: Sequence[tuple[int, Row]]) -> list[dict[str, Any]]:
    """The answers in their order, those that stayed the same as one; of many, some, evenly spread, the first and the last among them."""
    runs = [[*group] for _, group in groupby(answers, key=lambda moment: moment[1]["text"])]
    count = min(len(runs), MOMENTS)
    chosen = [runs[index * (len(runs) - 1) // max(count - 1, 1)] for index in range(count)]
    return [
        {
            "steps": f"step {own[0][0]}" if len(own) == 1 else f"steps {own[0][0]} to {own[-1][0]}",
            "text": _cut(own[0][1]["text"]),
            "marks": _shown("", own[0][1])["marks"],
        }
        for own in chosen
    ]


def styles(answers: Answers, colours: Mapping[str, int]) -> list[Chart]:
    """How the teacher's and the stages' answers are alike: lengths, Markdown, and the tutor's styles; those that there is something of."""
    ways = [mode for mode in ("sampled_0_8", "greedy") if any(row[mode] for rows in answers.values() for row in rows.values())]
    if not ways:
        return []
    given = {stage: [answer for row in rows.values() for answer in row[ways[0]]] for stage, rows in answers.items()}
    first = next(iter(answers.values()))  # the teacher's answers are the same in all files
    given = {"teacher": [answer for row in first.values() for answer in row["teacher"]]} | {name: own for name, own in given.items() if own}
    unit = f"share of answers, {MODES[ways[0]]}"
    return [*_of_the_tutor(given, unit, colours), *_lengths(given, unit, colours), *_marks(given, unit, colours)]


def _of_the_tutor(given: Mapping[str, Sequence[Row]], unit: str, colours: Mapping[str, int]) -> Iterator[Chart]:
    counts = {name: Counter(answer["style"] for answer in found if "style" in answer) for name, found in given.items()}
    names = sorted({style for found in counts.values() for style in found}, key=lambda style: (style == "none", style))
    if names:
        shares = {name: [found[style] / found.total() for style in names] for name, found in counts.items() if found}
        yield bar_chart("Styles", unit, names, shares, colours)


def _lengths(given: Mapping[str, Sequence[Row]], unit: str, colours: Mapping[str, int]) -> Iterator[Chart]:
    lengths = {name: np.array([len(words(answer["text"])) for answer in found]) for name, found in given.items()}
    longest = float(np.percentile(np.concatenate([*lengths.values()]), 99))
    width = max(int(np.ceil((longest + 1) / BINS)), 1)
    names = [f"{start}" if width == 1 else f"{start}–{start + width - 1}" for start in range(0, BINS * width, width)]
    shares = {}
    for name, own in lengths.items():
        bins = np.minimum(own // width, BINS)
        shares[name] = [float(np.mean(bins == index)) for index in range(BINS + 1)]
    yield bar_chart("Words of an answer", unit, [*names, f"{BINS * width}+"], shares, colours)


def _marks(given: Mapping[str, Sequence[Row]], unit: str, colours: Mapping[str, int]) -> Iterator[Chart]:
    shares = {
        name: [sum(bool(form.search(answer["text"])) for answer in found) / len(found) for form in MARKS.values()]
        for name, found in given.items()
    }
    if any(share >= LEAST for found in shares.values() for share in found):
        yield bar_chart("Markdown", unit, [*MARKS], shares, colours)
