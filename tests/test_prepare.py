"""What is frozen of the teacher's answers, and what is left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from gadjax import prepare
from gadjax.collecting import collect_answers
from gadjax.data.snapshot import Snapshot
from gadjax.errors import UserError
from gadjax.models.fresh import FreshConfig, write_fresh
from gadjax.prepare import check_student, prepare_data
from gadjax.runs import Run
from gadjax.teachers.collect import answers
from gadjax.text import Text
from tests import tiny

GIVEN = [
    "teacher={backend: file, path: answers.jsonl}",
    "prompts={train: null, validation: null, validation_share: 0.4}",
    "data={max_prompt_tokens: 40, max_response_tokens: 24, row_tokens: null}",
]
SHORT = [{"prompt": f"question {i}", "response": "yes"} for i in range(6)]
LONG = [
    {"content": [{"role": "system", "content": "word " * 40}, {"role": "user", "content": f"long {i}"}], "teacher_response": "no"}
    for i in range(3)
]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines = list[str]()
    monkeypatch.setattr(prepare, "say", lines.append)
    return lines


def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> Run:
    """A run with the answers of these rows in its cache."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny.CONFIG)
    Path("answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = Run.open(Path("tiny.yaml"), GIVEN)
    collect_answers(run)
    return run


def test_prompts_that_are_too_long_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]):
    run = run_of(tmp_path, monkeypatch, [*SHORT, *LONG])
    prepare_data(run)
    snapshot = Snapshot.open(run.data)
    kept = [example.prompt.text for split in snapshot.splits.values() for example in split]
    assert sorted(kept) == [row["prompt"] for row in SHORT]
    assert said == [
        "prepare: 3 prompts are left out: too long for data.max_prompt_tokens even without their last text",
        f"prepare: {len(snapshot.train)} groups to train on, {len(snapshot.validation)} held out",
    ]
    prepare_data(run)  # which is done already
    assert len(said) == 2


def test_prompts_that_are_cut_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]):
    rows = [{"prompt": f"word{number} " * 40, "response": "yes"} for number in range(4)]
    run = run_of(tmp_path, monkeypatch, [*SHORT, *rows])
    prepare_data(run)
    assert said[0] == "prepare: 4 prompts lose the end of their last text (data.max_prompt_tokens is 40)"
    assert len(said) == 2 and all(
        len(example.tokens.prompt) <= 40 for split in Snapshot.open(run.data).splits.values() for example in split
    )


def test_a_student_without_place_for_any_prompt_is_refused_before_the_teacher_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
):
    monkeypatch.chdir(tmp_path)
    write_fresh(tmp_path / "given", FreshConfig(width=16, layers=1, heads=2, kv_heads=1, feed_forward=32, words=0), [], 0)
    Path("tiny.yaml").write_text(tiny.CONFIG)
    given = ["student={path: given, random: null}", "data={max_prompt_tokens: 3, row_tokens: null}"]
    with pytest.raises(UserError, match=r"^data\.max_prompt_tokens: has no place for the prompts"):
        check_student(Run.open(Path("tiny.yaml"), given))
    check_student(Run.open(Path("tiny.yaml"), [given[0], "data={max_prompt_tokens: 4, row_tokens: null}"]))


def test_an_error_is_left_where_all_prompts_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]):
    run = run_of(tmp_path, monkeypatch, LONG)
    with pytest.raises(UserError, match=r"^data\.max_prompt_tokens: has no place for the prompts even without their last text; raise it"):
        prepare_data(run)
    assert not run.data.exists() and said == []


def test_a_split_without_answers_is_told_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = run_of(tmp_path, monkeypatch, SHORT)
    held = {prompt.id for prompt in run.prompts["validation"]}
    monkeypatch.setattr(
        prepare, "answers", lambda prompts, teacher, cache: [] if prompts[0].id in held else answers(prompts, teacher, cache)
    )
    with pytest.raises(UserError, match=r"^prompts\.validation: no prompt has an answer of the teacher; add prompts, or see"):
        prepare_data(run)
    assert held and not run.data.exists() and not (run.folder / "student").exists()


def test_the_cache_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = run_of(tmp_path, monkeypatch, SHORT)
    before = run.cache.read_bytes()
    prepare_data(run)
    assert run.cache.read_bytes() == before


def test_the_teacher_s_text_is_all_that_a_student_with_other_tokens_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One cache of answers, two tokenizers: other tokens, which are the same texts."""
    run = run_of(tmp_path, monkeypatch, [{"prompt": f"question {i}", "response": f"the answer {i} is yes"} for i in range(6)])
    cached, tokens = run.cache.read_bytes(), []
    for words in (60, 0):
        other = Run.open(Path("tiny.yaml"), [*GIVEN, f"student.random.words={words}"])
        text = Text.load(str(prepare_data(other)))
        found = [example for split in Snapshot.open(other.data).splits.values() for example in split]
        tokens.append([example.tokens.teacher for example in found])
        assert sorted(map(text.decode, tokens[-1])) == [f"the answer {i} is yes" for i in range(6)]
    assert all(len(few) < len(many) for few, many in zip(*tokens, strict=True)), "words, and their bytes"
    assert run.cache.read_bytes() == cached, "nobody was asked again"
