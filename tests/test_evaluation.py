"""Metrics of texts, the tutor's verdicts, intervals, the files of answers, the summary and its table."""

import dataclasses
import io
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer

from gadjax.errors import UserError
from gadjax.evaluation import texts, tutor
from gadjax.evaluation.answers import read_answers, write_answers
from gadjax.evaluation.measure import Metric, measure
from gadjax.evaluation.samples import MODES, Samples
from gadjax.evaluation.statistics import Estimate, bootstrap, by_prompt, estimate, paired_difference
from gadjax.evaluation.summary import HELD_OUT, Stages, summarise, to_table
from gadjax.evaluation.table import interval_text, print_table
from gadjax.records import Prompt
from gadjax.teachers import grammar
from gadjax.terminal import PLAIN_WIDTH


def samples(rows: list[tuple[str, str, str]], log_prob: float = -1.0, length: int = 2, truncated: bool = False) -> Samples:
    """Samples of rows (prompt, teacher, text)."""
    prompts, teacher, answers = zip(*rows, strict=True)
    n = len(rows)
    made = [Prompt.of(prompt) for prompt in prompts]
    return Samples(tuple(made), teacher, answers, np.full(n, log_prob), np.full(n, length), np.full(n, truncated))


def of_the_tutor(count: int, answers: int = 1) -> Samples:
    """Answers of the tutor itself, with their exact log-probabilities."""
    rng = random.Random(0)
    asked = [prompt for prompt in grammar.prompts(count, seed=0) for _ in range(answers)]
    rows = [(prompt, grammar.sample(prompt, rng), grammar.sample(prompt, rng)) for prompt in asked]
    return dataclasses.replace(samples(rows), log_probs=np.array([grammar.log_prob(prompt, text) for prompt, _, text in rows]))


# --- texts -----------------------------------------------------------------------------------------------------------

TEACHER, TEXT = "the cat sat on the mat", "the cat on a mat"


def test_rouge_l():
    assert texts.rouge_l([TEXT, TEACHER, "no"], [TEACHER] * 3) == pytest.approx([8 / 11, 1, 0])  # LCS: the cat on mat


@given(*[st.lists(st.sampled_from(["a", "b", "C", "d-e", "é", "1"]), max_size=80).map(" ".join)] * 2)
def test_rouge_l_is_the_library_s(text: str, teacher: str):
    assert texts.rouge_l([text], [teacher]) == [RougeScorer(["rougeL"]).score(teacher, text)["rougeL"].fmeasure]


def test_the_metrics_load_neither_nltk_nor_scipy():
    program = "import sys, gadjax.evaluation.measure; print({'nltk', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_rouge_l_reads_no_other_script_but_overlap_does():
    assert texts.rouge_l(["кошка спит"], ["кошка спит"]) == [0]
    assert texts.overlap(["кошка спит"], ["кошка спит"], 1) == [1]


@pytest.mark.parametrize(("n", "expected"), [(1, 8 / 11), (2, 2 / 9), (3, 0)])
def test_overlap(n: int, expected: float):
    assert texts.overlap([TEXT], [TEACHER], n) == pytest.approx([expected])


def test_overlap_counts_an_ngram_as_often_as_it_stands():
    assert texts.overlap(["a a a"], ["a a b"], 1) == [2 / 3]


@pytest.mark.parametrize(("text", "teacher", "expected"), [("yes", "yes", 1), ("yes", "no", 0), ("", "", 1), ("yes", "a b c d e", 0)])
def test_overlap_of_texts_shorter_than_n(text: str, teacher: str, expected: float):
    assert texts.overlap([text], [teacher], 4) == [expected]


def test_words_keep_case_and_marks():
    assert texts.words("Is 3_a, (so)?") == ["Is", "3_a", ",", "(", "so", ")", "?"]


def test_distinct():
    assert texts.distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert texts.distinct(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
    assert [texts.distinct(["a b a b"], n) for n in (1, 3, 4)] == [2 / 4, 1, 1]
    assert math.isnan(texts.distinct(["a", ""], 2))


# --- tutor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "truncated", "expected"),
    [
        (0.5, False, -1 - math.log(0.999 * 0.5 + 0.001 * 10**-2)),
        (0.0, False, -1 - math.log(0.001 * 10**-2)),
        (0.5, True, -1 - math.log(0.001 * 10**-2)),
    ],
)
def test_reverse_kl_term(monkeypatch: pytest.MonkeyPatch, p: float, truncated: bool, expected: float):
    monkeypatch.setattr(tutor, "log_prob", lambda prompt, answer: math.log(p) if p else -math.inf)
    assert tutor.reverse_kl(samples([("x", "t", "y")], truncated=truncated), vocabulary=10) == pytest.approx([expected])


def test_reverse_kl_of_a_long_impossible_answer_is_finite(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tutor, "log_prob", lambda prompt, answer: -math.inf)
    terms = tutor.reverse_kl(samples([("x", "t", "y")], log_prob=-9000.0, length=1500), vocabulary=150_000)
    assert terms == pytest.approx([-9000 - math.log(0.001) + 1500 * math.log(150_000)])


def test_the_tutor_has_no_reverse_kl_from_itself():
    answers = dataclasses.replace(of_the_tutor(50), lengths=np.full(50, 12))
    assert tutor.reverse_kl(answers, vocabulary=200) == pytest.approx(np.full(50, -math.log(0.999)), abs=1e-9)


def test_verdicts():
    answers = of_the_tutor(20)
    found = tutor.verdicts(answers)
    assert all(verdict.valid and verdict.correct and verdict.style in grammar.STYLES for verdict in found)
    cut = tutor.verdicts(dataclasses.replace(answers, truncated=np.arange(20) == 3))
    assert [(verdict.valid, verdict.correct) for verdict in cut] == [(i != 3, i != 3) for i in range(20)]
    assert [verdict.style for verdict in cut] == [verdict.style for verdict in found]


# --- statistics ------------------------------------------------------------------------------------------------------


def near(found: Estimate, mean: float, half: float):
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-5)


def test_estimate():
    near(estimate([1, 2, 3, 4]), 2.5, 1.265152)  # std 1.290994, standard error 0.645497
    near(estimate([3.0] * 5), 3.0, 0.0)
    assert math.isnan(estimate([1.0]).low)


def test_bootstrap():
    found = bootstrap([0.0, 1.0, 1.0, 1.0])
    assert found.mean == 0.75 and 0.25 <= found.low < 0.75 < found.high == 1.0
    alone = bootstrap([1.0])
    assert alone.mean == 1 and math.isnan(alone.low) and math.isnan(alone.high)


def test_paired_difference():
    near(paired_difference({"x": 1, "y": 5}, {"y": 3, "x": 0}), 1.5, 0.979982)  # differences 1 and 2
    with pytest.raises(ValueError, match="2 prompts are only on one side"):
        paired_difference({"x": 1, "y": 5}, {"x": 0, "z": 3})


def test_by_prompt():
    assert by_prompt(["b", "a", "b"], [1, 2, 4]) == {"b": 2.5, "a": 2}


# --- metrics of a stage ----------------------------------------------------------------------------------------------


BOTH = ("rouge_l", "overlap")
DISTINCT = {f"distinct_{n}" for n in (1, 2, 3, 4)}


def test_measure_compares_as_it_is_told():
    answers = {"greedy": samples([("q1", TEACHER, TEXT)])}
    always = DISTINCT | {"length_mean"}
    assert set(measure(answers, ())) == always
    assert set(measure(answers, ("rouge_l",))) == always | {"rouge_l"}
    assert set(measure(answers, ("overlap",))) == always | {f"overlap_{n}" for n in (1, 2, 3, 4)}


def test_measure_without_the_tutor():
    rows = [("q1", TEACHER, TEXT), ("q2", "yes", "yes")]
    other = samples([("q3", "t", "other")], length=9)
    found = measure({"greedy": samples(rows), "sampled_0_8": other, "sampled_1_0": other}, BOTH)
    assert set(found) == {"rouge_l", "overlap_1", "overlap_2", "overlap_3", "overlap_4", "length_mean"} | DISTINCT
    assert found["rouge_l"].value == pytest.approx((8 / 11 + 1) / 2)
    assert found["overlap_2"].by_prompt == pytest.approx({Prompt.of("q1").id: 2 / 9, Prompt.of("q2").id: 1})
    assert found["length_mean"].value == 2
    assert found["distinct_2"].by_prompt is None


def test_measure_with_the_tutor():
    answers = of_the_tutor(10, answers=2)
    broken = dataclasses.replace(answers, texts=("nonsense", *answers.texts[1:]))
    # In so large a vocabulary uniform text weighs nothing, and the tutor's own answers lie -log(1 - 0.001) from the smoothed tutor.
    found = measure({"greedy": answers, "sampled_0_8": broken, "sampled_1_0": answers}, BOTH, vocabulary=10**9)
    assert found["greedy_validity"].value == 1
    assert found["validity"].value == found["correctness"].value == pytest.approx(0.95)
    assert found["validity"].by_prompt == {name: 0.5 if name == answers.ids[0] else 1 for name in answers.ids}
    assert found["reverse_kl"].value == pytest.approx(0.001, abs=2e-4)


def test_measure_refuses_unknown_ways_of_decoding():
    with pytest.raises(ValueError, match="beam"):
        measure({"beam": samples([("q", "t", "t")])}, BOTH, vocabulary=5)


def test_samples_have_columns_of_one_length():
    with pytest.raises(ValueError, match="2 prompts"):
        dataclasses.replace(samples([("q", "t", "t"), ("r", "t", "t")]), log_probs=np.zeros(3))


# --- files -----------------------------------------------------------------------------------------------------------


def test_answers_come_back(tmp_path: Path):
    answers = dict(zip(MODES, (of_the_tutor(5), of_the_tutor(5, answers=3), of_the_tutor(5)), strict=True))
    write_answers(tmp_path / "evaluation" / "gad.jsonl", answers, tutor=True)
    again = read_answers(tmp_path / "evaluation" / "gad.jsonl")
    assert list(again) == list(answers)
    for mode, wanted in answers.items():
        for field in dataclasses.fields(Samples):
            np.testing.assert_equal(getattr(again[mode], field.name), getattr(wanted, field.name))


def test_answers_are_one_object_per_prompt_and_teachers_answer(tmp_path: Path):
    path = tmp_path / "gad.jsonl"
    write_answers(path, {"greedy": samples([("q", "t\u2028", "<b>"), ("q", "t\u2028", "c")])}, tutor=False)
    (line,) = path.read_text().split("\n")[:-1]
    assert json.loads(line) == {
        "id": Prompt.of("q").id,
        "messages": [{"role": "user", "content": "q"}],
        "teacher": {"text": "t\u2028"},
        "greedy": [{"text": text, "tokens": 2, "log_prob": -1.0, "truncated": False} for text in ("<b>", "c")],
    }
    assert read_answers(path)["greedy"].texts == ("<b>", "c")


def test_answers_hold_the_tutors_verdicts(tmp_path: Path):
    answers = of_the_tutor(1)
    write_answers(tmp_path / "gad.jsonl", {"greedy": dataclasses.replace(answers, truncated=np.array([True]))}, tutor=True)
    row = json.loads((tmp_path / "gad.jsonl").read_text())
    style = grammar.judge(answers.prompts[0].text, answers.texts[0]).style
    assert row["greedy"][0] | {"valid": False, "correct": False, "style": style} == row["greedy"][0]
    assert row["teacher"]["valid"] is True


NO_TOKENS = '{"id": "a", "messages": [], "teacher": {"text": "t"}, "greedy": [{"text": "a"}]}'


@pytest.mark.parametrize("content", ["", "{", "[]", '["greedy"]', "{}", '{"greedy": [{}]}', NO_TOKENS])
def test_a_broken_file_of_answers_is_told(tmp_path: Path, content: str):
    (tmp_path / "gad.jsonl").write_text(content)
    with pytest.raises(UserError, match="gad.jsonl"):
        read_answers(tmp_path / "gad.jsonl")


def test_missing_answers_are_told(tmp_path: Path):
    with pytest.raises(UserError, match="no answers yet"):
        read_answers(tmp_path / "gad.jsonl")


# --- summary and table -----------------------------------------------------------------------------------------------


STAGES = {
    "student": {"rouge_l": Metric(0.25, {"p": 0.0, "q": 0.5}), "distinct_2": Metric(math.nan)},
    "seqkd": {"rouge_l": Metric(0.5, {"p": 0.25, "q": 0.75}), "distinct_2": Metric(0.5)},
    "gad": {"rouge_l": Metric(0.75, {"p": 0.75, "q": 0.75}), "distinct_2": Metric(0.75), "validity": Metric(1.0, {"p": 1.0, "q": 1.0})},
}


def test_summary():
    summary = json.loads(json.dumps(summarise({HELD_OUT: STAGES}, seconds=7.5)), parse_constant=pytest.fail)
    assert summary["stages"]["student"] == {"rouge_l": 0.25, "distinct_2": None}
    assert list(summary["stages"]) == ["student", "seqkd", "gad"]
    assert summary["intervals"]["gad"]["validity"] == [1, 1]
    assert set(summary["differences"]) == {"student", "gad"}
    assert set(summary["differences"]["gad"]) == {"rouge_l"}, "no baseline for validity, no prompts for distinct_2"
    half = 1.959964 * 0.25  # of the differences 0.5 and 0
    assert summary["differences"]["gad"]["rouge_l"] == pytest.approx({"mean": 0.25, "low": 0.25 - half, "high": 0.25 + half})
    assert (summary["baseline"], summary["prompts"], summary["seconds"]) == ("seqkd", 2, 7.5)


def test_summary_without_the_baseline():
    assert summarise({HELD_OUT: {"gad": STAGES["gad"]}}, seconds=1)["differences"] == {}


def test_a_summary_is_a_table_of_all_splits():
    lines = to_table(summarise({HELD_OUT: STAGES, "unseen": {"gad": STAGES["gad"]}}, seconds=1)).splitlines()
    assert lines[0] == "split,stage,metric,mean,low,high,minus_baseline,difference_low,difference_high"
    assert "validation,seqkd,distinct_2,0.5,,,,," in lines and "validation,student,distinct_2,,,,,," in lines, "without an interval"
    (row,) = (line.split(",") for line in lines if line.startswith("validation,gad,rouge_l"))
    half = 1.959964 * 0.25
    assert [float(cell) for cell in row[3:]] == pytest.approx([0.75, 0.75, 0.75, 0.25, 0.25 - half, 0.25 + half])
    assert "unseen,gad,validity,1.0,1.0,1.0,,," in lines and len(lines) == 1 + 7 + 3


def test_an_interval_that_is_not_about_its_mean_is_shown_by_its_ends():
    assert interval_text(0.5, 0.4, 0.6, 3) == "± 0.100"
    assert interval_text(0.75, 0.5, 0.875, 3) == "[0.500, 0.875]"
    assert interval_text(0.75, -0.5, 0.875, 3, "+") == "[-0.500, +0.875]"
    assert interval_text(0.5, None, None, 3) == interval_text(None, 0.4, 0.6, 3) == ""
    assert "0.750 [0.500, 0.800]" in shown(terminal=False, stages={"gad": {"wins": Metric(0.75, {"p": 1.0, "q": 0.5}, skewed)}})


def skewed(values: Iterable[float]) -> Estimate:
    return Estimate(0.75, 0.5, 0.8)


def shown(terminal: bool, stages: Stages = STAGES, width: int = 100) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system="standard" if terminal else None)
    print_table(summarise({HELD_OUT: stages}, seconds=1), console)
    return cast(io.StringIO, console.file).getvalue()


def test_table_on_a_file_is_plain_markdown():
    lines = shown(terminal=False).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[0] == ["metric", "student", "seqkd", "gad"]
    assert cells[2] == ["rouge_l", "0.250 ± 0.490", "0.500 ± 0.490", "0.750 ± 0.000"]
    assert cells[3] == ["minus seqkd", "-0.250 ± 0.000 *", "", "+0.250 ± 0.490"]
    assert cells[4] == ["distinct_2", "-", "0.500", "0.750"]
    assert cells[5] == ["validity", "-", "-", "1.000 ± 0.000"]
    assert all(len(row) == 4 for row in cells)
    assert "\x1b" not in shown(terminal=False)


def test_table_on_a_terminal_has_the_same_numbers():
    text = shown(terminal=True)
    assert "\x1b" in text
    assert all(number in text for number in ("0.250 ± 0.490", "-0.250 ± 0.000 *", "0.750"))


SIX = {"student": STAGES["student"], "seqkd": STAGES["seqkd"]} | {f"gad-number-{i}": STAGES["gad"] for i in range(4)}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_a_narrow_terminal_gets_the_stages_in_blocks_that_fit(width: int):
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown(terminal=True, stages=SIX, width=width)).splitlines()
    heads = [line.split() for line in lines if line.split()[:1] == ["metric"]]
    assert [stage for _, *stages in heads for stage in stages] == list(SIX)
    assert (len(heads) == 1) == (width == 200)
    assert sum("rouge_l" in line for line in lines) == sum("minus seqkd" in line for line in lines) == len(heads)
    assert "…" not in "".join(lines) and max(map(len, lines[:-1])) <= width
    assert "".join(lines).count("+0.250 ± 0.490") == 4
    assert sum("prompts, 95 % intervals" in line for line in lines) == 1


def test_a_file_gets_one_block():
    assert shown(terminal=False, stages=SIX, width=PLAIN_WIDTH).count("metric") == 1
