"""`evaluation/<stage>.jsonl`: every answer of a stage, one object per prompt and teacher's answer. Metrics and report come from here.

    {"id": "p1", "messages": [{"role": "user", "content": "..."}], "teacher": {"text": "..."},
     "greedy": [{"text": "...", "tokens": 12, "log_prob": -3.5, "truncated": false}], "sampled_0_8": [...], "sampled_1_0": [...]}

A way of decoding holds a list: a prompt may be answered more than once. With the tutor every answer, the teacher's
included, also has "valid", "correct" and "style".
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gadjax.errors import UserError
from gadjax.evaluation.samples import BEST_OF, MODES, Samples
from gadjax.evaluation.tutor import verdicts
from gadjax.files import replace_file, to_json
from gadjax.records import Prompt
from gadjax.teachers.grammar import judge

Row = dict[str, Any]


def write_answers(path: Path, answers: Mapping[str, Samples], tutor: bool) -> None:
    """Writes a stage's answers, whole or not at all.

    Args:
        path: `evaluation/<stage>.jsonl` in the run's folder.
        answers: the samples by the name of the way of decoding, of `MODES`.
        tutor: the teacher is the tutor, so verdicts are written too.
    """
    rows: dict[tuple[str, str], Row] = {}
    for mode, samples in answers.items():
        marks = [vars(verdict) for verdict in verdicts(samples)] if tutor else [{}] * len(samples.texts)
        for prompt, teacher, answer, mark in zip(samples.prompts, samples.teacher, _cells(samples), marks, strict=True):
            row = rows.setdefault((prompt.id, teacher), _row(prompt, teacher, tutor))
            row.setdefault(mode, []).append(answer | mark)
    replace_file(path, "".join(f"{to_json(row)}\n" for row in rows.values()))


def read_answers(path: Path) -> dict[str, Samples]:
    """A stage's answers again, by the name of the way of decoding.

    Raises:
        UserError: the file is missing or is not such a file.
    """
    if not path.exists():
        raise UserError(str(path), "the stage has no answers yet", "run `gadjax evaluate`")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        answers = {mode: _samples(rows, mode) for mode in (*MODES, BEST_OF) if any(mode in row for row in rows)}
    except (ValueError, KeyError, TypeError, AttributeError):
        answers = {}
    if not answers:
        raise UserError(str(path), "is not a file of answers", "delete it and run `gadjax evaluate`")
    return answers


def _row(prompt: Prompt, teacher: str, tutor: bool) -> Row:
    mark = vars(judge(prompt.text, teacher)) if tutor else {}
    return {"id": prompt.id, "messages": list(prompt.messages), "teacher": {"text": teacher} | mark}


def _cells(samples: Samples) -> Iterator[Row]:
    columns = zip(samples.texts, samples.lengths.tolist(), samples.log_probs.tolist(), samples.truncated.tolist(), strict=True)
    return (dict(zip(("text", "tokens", "log_prob", "truncated"), values, strict=True)) for values in columns)


def _samples(rows: list[Row], mode: str) -> Samples:
    pairs = [(row, answer) for row in rows for answer in row.get(mode, [])]
    return Samples(
        prompts=tuple(Prompt(row["id"], tuple(row["messages"])) for row, _ in pairs),
        teacher=tuple(row["teacher"]["text"] for row, _ in pairs),
        texts=tuple(answer["text"] for _, answer in pairs),
        log_probs=np.array([answer["log_prob"] for _, answer in pairs], np.float64),
        lengths=np.array([answer["tokens"] for _, answer in pairs], np.int64),
        truncated=np.array([answer["truncated"] for _, answer in pairs], np.bool_),
    )
