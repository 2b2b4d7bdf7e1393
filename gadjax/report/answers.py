"""The answers of the stages side by side, and how often each style was used: from `evaluation/<stage>.jsonl`."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gadjax.errors import UserError
from gadjax.report.charts import Chart, bar_chart

EXAMPLES = 12  # prompts shown
CHARACTERS = 8_000  # of one answer
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


def styles(answers: Answers, colours: Mapping[str, int]) -> Chart | None:
    """The share of each style among the teacher's and the stages' answers, sampled at 0.8; None without the tutor."""
    given = {stage: [answer for row in rows.values() for answer in row["sampled_0_8"]] for stage, rows in answers.items()}
    first = next(iter(answers.values()), {})  # the teacher's answers are the same in all files
    given = {"teacher": [answer for row in first.values() for answer in row["teacher"]]} | given
    counts = {name: Counter(answer["style"] for answer in found if "style" in answer) for name, found in given.items()}
    names = sorted({style for found in counts.values() for style in found}, key=lambda style: (style == "none", style))
    if not names:
        return None
    shares = {name: [found[style] / found.total() for style in names] for name, found in counts.items() if found}
    return bar_chart("Styles", "share of answers, T = 0.8", names, shares, colours)
