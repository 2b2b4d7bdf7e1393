"""The page about the data: its figures, worked out by hand, and that hostile text stays text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gadjax.data import languages
from gadjax.data.snapshot import Example, freeze
from gadjax.data.topics import NO_TOPIC, Topics
from gadjax.data.words import words
from gadjax.records import Answer, Prompt, TokenGroup
from gadjax.report.audit import write_audit
from gadjax.report.page import write_report
from gadjax.report.traits import Corpus, Trait, goes_on, marks, more_than, surety, traits
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.requests import Outcome, Request
from tests.test_report import HOSTILE, Page


def example(number: int, answer: str, truncated: bool = False) -> Example:
    prompt = Prompt.of(f"please write an answer to question {number}")
    return Example(prompt, Answer(prompt.id, answer, truncated), TokenGroup(prompt.id, tuple(range(number + 1)), (1, 2, 3)))


def make_run(run: Path, train: Sequence[str], held_out: Sequence[str], student: Sequence[str]) -> Path:
    """A run with data, and with greedy answers of the stage `gad`."""
    splits = {
        "train": [example(number, answer) for number, answer in enumerate(train)],
        "validation": [example(100 + number, answer) for number, answer in enumerate(held_out)],
    }
    run.mkdir()
    freeze(run / "data", splits, {})
    rows: list[dict[str, Any]] = []
    for each, text in zip(splits["validation"], student, strict=True):
        row = {"id": each.prompt.id, "messages": list(each.prompt.messages), "teacher": {"text": each.answer.text}}
        rows.append(row | {"greedy": [{"text": text, "tokens": 3, "log_prob": -1.0, "truncated": text.endswith("and")}]})
    (run / "evaluation").mkdir()
    (run / "evaluation" / "gad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_figures_of_answers_are_shares_of_them() -> None:
    answers = ["I'm sorry, no.", "- one\n- two", "- One, two!", "# Title\n**bold** and ```code```", " ".join(["word"] * 10)]
    corpus = Corpus("x", ["p"] * 5, answers, [True, False, False, False, False])
    found = corpus.figures | {name: f"{count / 5:.1%}" for name, count in corpus.manner.items()}
    found.pop("in another language than the prompt", None)
    assert found == {
        "answers": "5",
        "words, mean": "4.4",
        "words, median": "4",
        "words, 95th percentile": "9",
        "cut off": "20.0%",
        "declining (English)": "20.0%",
        "copies of an earlier answer": "20.0%",
        "near copies of an earlier answer": "0.0%",
        "with a list": "40.0%",
        "with a heading": "20.0%",
        "with bold": "20.0%",
        "with code": "20.0%",
    }


def test_what_the_student_says_more_often_is_ranked_by_how_sure_it_is() -> None:
    ours = {"only ours": 40, "more": 60, "as often": 50, "rare": 2, "less": 10}
    theirs = {"more": 40, "as often": 50, "less": 50}
    assert more_than(ours, 100, theirs, 100) == [("only ours", "40.0%", "0.0%"), ("more", "60.0%", "40.0%")]


FRUIT = ["apple pear plum", "pear plum apple grape", "grape apple plum", "plum pear grape", "pear apple grape plum"]
METAL = ["iron zinc lead", "zinc iron tin", "lead tin iron", "tin zinc lead iron", "iron lead tin zinc"]
RIVER = ["rhine elbe", "elbe rhine oder", "oder elbe rhine", "rhine oder elbe", "oder rhine elbe"]


def test_topics_are_the_words_that_stand_together() -> None:
    told = [words(f"the answer is {text}") for text in (*FRUIT, *METAL[:4], *RIVER)]
    topics = Topics.of(told)
    fruit, metal, river = (topics.assign([words(text)])[0] for text in ("a plum and an apple", "iron", "where the elbe ends"))
    assert len({fruit, metal, river}) == 3 and topics.assign(told) == [fruit] * 5 + [metal] * 4 + [river] * 5
    assert {*topics.names[metal].split(", ")} == {"iron", "zinc", "lead", "tin"} and topics.names[river].startswith(
        ("elbe", "rhine", "oder")
    )
    assert topics.assign([words("the answer is no"), []]) == [NO_TOPIC] * 2
    again = Topics.of(told)
    assert again.names == topics.names and (again.centres_KV == topics.centres_KV).all()


@pytest.mark.parametrize("texts", [[], [[]] * 9, [["alike"]] * 9, [[str(number)] for number in range(9)]])
def test_where_there_are_no_topics_none_are_made_up(texts: list[list[str]]) -> None:
    topics = Topics.of(texts)
    assert topics.names == () and topics.assign([["alike"], []]) == [NO_TOPIC] * 2


def test_a_difference_is_marked_when_it_is_sure() -> None:
    # Log-odds with 0.5 added: log(60.5 / 40.5) - log(40.5 / 60.5) = 0.8027, in errors of sqrt(2 / 60.5 + 2 / 40.5) = 0.2871.
    assert surety(60, 100, 40, 100) == pytest.approx(0.8027 / 0.2871, rel=1e-3) == -surety(40, 100, 60, 100)
    names, totals = ["teacher, training", "teacher, held out", "student", "seqkd", "gad"], [1000, 100, 100, 100, 100]
    lists = Trait("with a list", None, [500, 50, 1, 48, 90])
    short = Trait("short", None, [500, 50, 45, 52, 20])
    assert marks(lists, totals, names) == ["", "", "less", "taken on", "more"]
    assert marks(short, totals, names) == ["", "", "", "", "less"]
    between = Trait("in between", None, [500, 50, 25, 37, 50])  # seqkd is not surely another than either
    assert marks(between, totals, names) == ["", "", "less", "", "taken on"]
    unknown = Trait("with a list", None, [500, 50, 48, 90])  # what was before training
    assert marks(unknown, totals[:4], ["teacher, training", "teacher, held out", "seqkd", "gad"]) == ["", "", "", "more"]
    assert goes_on([("Manner", [lists, short])], totals, names) == [
        ("seqkd", {"taken on": ["manner: with a list"], "more": [], "less": []}),
        ("gad", {"taken on": [], "more": ["manner: with a list"], "less": ["manner: short"]}),
    ]


def test_a_bias_of_the_data_is_followed_into_the_student() -> None:
    def corpus(name: str, answers: Sequence[str]) -> Corpus:
        return Corpus(name, ["tell me of fruit or of metal"] * len(answers), answers, [False] * len(answers))

    biased = [*(f"of course it is {text}" for text in FRUIT * 3), *METAL, *RIVER]  # most speak of fruit, and begin with one phrase
    corpora = [corpus("teacher, training", biased * 2), corpus("teacher, held out", biased * 2)]
    corpora += [corpus("student", [*METAL * 8, *RIVER, *RIVER[:4], "no"]), corpus("gad", biased * 2)]
    by_title = {title: {trait.name: trait for trait in rows} for title, rows in traits(corpora)}
    assert by_title["Words in a row"]["of course it"].counts == [30, 30, 0, 30]
    fruit = [trait for name, trait in by_title["Topics"].items() if {*name.split(", ")} & {"apple", "pear", "grape"}]
    assert [sum(counts) for counts in zip(*(trait.counts for trait in fruit), strict=True)] == [30, 30, 0, 30]
    assert by_title["Topics"]["none of these"].counts == [0, 0, 1, 0]
    ((stage, found),) = goes_on([*traits(corpora)], [len(each.answers) for each in corpora], [each.name for each in corpora])
    assert (stage, found["more"], found["less"]) == ("gad", [], [])
    assert "words in a row: of course it" in found["taken on"] and any("zinc" in name for name in found["taken on"])


def test_the_page_shows_cache_data_and_student_side_by_side(tmp_path: Path) -> None:
    train = ["the best of all answers", "the best of all worlds", "the best of all towns", "no"]
    run = make_run(tmp_path / "mine", train, ["yes sir"] * 6, ["as an AI I will think about it and"] * 6)
    with TeacherCache(run / "teacher.sqlite") as cache:
        asked = [Request("openai", "gpt", ({"role": "user", "content": str(number)},), {"max_tokens": 5}) for number in range(6)]
        cache.add(asked)
        done = [Outcome("ok", "x", "stop", cost=0.5, model="gpt-1"), Outcome("ok", "x", "length", cost=0.25, model="gpt-1")]
        done += [Outcome("refused", error="I will not"), Outcome("failed", error="status 500"), Outcome("failed", error="status 500")]
        cache.record(zip(asked, done, strict=False))
    written = write_audit(run, ["student", "gad"])
    assert written == run / "report" / "data.html"
    page = Page((run / "report" / "data.html").read_text())
    for text in (
        "Collected from openai gpt",
        "answers 2 1 2 1 0 1 $0.75",
        "Answered by: gpt-1 (2)",
        "status 500 2 I will not 1",
        "prompts 1 2 2 4 4",
        "none of these 100.0% 100.0% 100.0% 100.0%",
        "the best of 75.0%",
        "declining (English) 0.0% 0.0% 100.0%",
        "cut off 0.0% 0.0% 100.0%",
        "as an ai 100.0% 0.0%",
        "gad = taken on from the data – ▲ more often than the teacher –",
    ):
        assert text in page.text, text
    assert page.links == ["index.html"]
    assert "data.html" in Page(write_report(run, ["gad"]).read_text()).links


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", [f"{HOSTILE} {number}".replace("\ud800", "") for number in range(4)], ["a"] * 4, [HOSTILE] * 4)
    with TeacherCache(run / "teacher.sqlite") as cache:
        cache.record([(Request("openai", "<b>m</b>", (), {}), Outcome("failed", error="<script>alert(1)</script>", model="<i>"))])
    written = write_audit(run, ["gad"])
    assert written
    page = Page(written.read_text())
    assert not {"script", "img", "b", "i"} & {*page.tags}


def test_a_run_without_data_has_no_such_page(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert write_audit(tmp_path / "mine", []) is None
    assert Page(write_report(tmp_path / "mine", []).read_text()).links == []


def test_a_cache_alone_is_shown(tmp_path: Path) -> None:
    with TeacherCache(tmp_path / "mine" / "teacher.sqlite") as cache:
        cache.add([Request("openai", "gpt", (), {})])
    written = write_audit(tmp_path / "mine", ["gad"])
    assert written and "answers 0 0 0 1 0 0 $0.00" in Page(written.read_text()).text


@pytest.mark.skipif(not languages.INSTALLED, reason="needs the extra `languages`")
def test_languages_are_shares_of_prompts_and_answers(tmp_path: Path) -> None:
    german = "Das ist eine Antwort in deutscher Sprache und nicht in einer anderen."
    english = "This is an answer in the English language, and in no other one."
    run = make_run(tmp_path / "mine", [german, english, english, "ja"], [english], [german])
    written = write_audit(run, ["gad"])
    assert written
    text = Page(written.read_text()).text
    assert "en 100.0% 50.0%" in text and "de 0.0% 25.0%" in text
    assert "in another language than the prompt 25.0% 0.0% 100.0%" in text
