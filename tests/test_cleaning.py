"""What is left out of the data: copies, near copies, overlap, other languages, what a moderation flags; each with its count."""

import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gadjax import prepare
from gadjax.collecting import collect_answers
from gadjax.data import languages
from gadjax.data.cleaning import CleaningConfig, clean
from gadjax.data.snapshot import Snapshot
from gadjax.data.words import copies, near_copies, ngram_hashes, overlapping, words
from gadjax.errors import UserError
from gadjax.moderation import ModerationConfig, Moderator
from gadjax.prepare import prepare_data
from gadjax.records import Answer, Prompt
from gadjax.runs import Run
from tests import tiny
from tests.desk import Desk, Reply, desk

RNG = random.Random(0)
LONG = [f"w{RNG.randrange(500)}" for _ in range(60)]


def changed(text: Sequence[str], count: int) -> list[str]:
    """The text with so many other words, far from each other."""
    places = {round((place + 0.5) * len(text) / count) for place in range(count)}
    return [f"new{place}" if place in places else word for place, word in enumerate(text)]


def test_words_have_no_case_and_marks_and_a_chinese_sign_is_one() -> None:
    assert words("Don't STOP — it\u2019s 3.5!") == ["don", "t", "stop", "it", "s", "3", "5"]
    assert words("今天 weather很好Zażółć") == ["今", "天", "weather", "很", "好", "zażółć"]


def test_copies_are_found_whatever_their_marks() -> None:
    texts = ["How are you?", "how  are YOU", "how are they", "", ""]
    assert list(copies(map(words, texts))) == [False, True, False, False, True]


def test_near_copies_are_those_of_the_similarity_asked_for() -> None:
    def similarity(one: Sequence[str], other: Sequence[str]) -> float:
        ours, theirs = ngram_hashes(one, 5), ngram_hashes(other, 5)
        return len(ours & theirs) / len(ours | theirs)

    texts = [LONG, changed(LONG, 1), changed(LONG, 6), LONG[:20], [*LONG[:20], "x"], LONG]
    assert similarity(texts[0], texts[1]) > 0.8 > similarity(texts[0], texts[2])
    assert near_copies(texts, 0.8) == [False, True, False, False, False, True]  # the short ones are compared as wholes only
    assert near_copies(texts, 1.0) == [False, False, False, False, False, True]


def test_near_copies_among_thousands_are_all_found() -> None:
    rng = random.Random(1)
    base = [[f"w{rng.randrange(2000)}" for _ in range(40)] for _ in range(600)]
    copied = [[*text[:-1], "other"] for text in base]
    assert near_copies([*base, *copied], 0.8) == [False] * 600 + [True] * 600


def test_overlap_is_of_words_in_a_row() -> None:
    held_out = [LONG, words("a short one")]
    texts = [["x", *LONG[5:18], "y"], ["x", *LONG[5:17], "y"], words("A short one!"), words("not a short one"), []]
    assert list(overlapping(texts, held_out, 13)) == [True, False, True, False, False]


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=40), max_size=8))
def test_a_text_is_a_near_copy_of_itself_and_only_later(texts: list[list[str]]) -> None:
    found = near_copies([*texts, *texts], 1.0)
    assert [bad for bad, text in zip(found[len(texts) :], texts, strict=True)] == [len(text) >= 25 for text in texts]


# --- all together ----------------------------------------------------------------------------------------------------


def made(texts: Sequence[str], **marks: bool) -> tuple[dict[str, Prompt], list[Answer]]:
    prompts = [Prompt.of(text) for text in texts]
    return {prompt.id: prompt for prompt in prompts}, [Answer(prompt.id, "yes", **marks) for prompt in prompts]


def test_each_reason_is_counted() -> None:
    held, held_answers = made([" ".join(LONG)])
    texts = ["one", "ONE!", "two", " ".join(changed(LONG[::-1], 1)), " ".join(LONG[::-1]), " ".join(LONG[10:30])]
    prompts, found = made(texts)
    found.append(Answer(found[0].prompt_id, "another answer to one"))
    found.append(Answer(found[2].prompt_id, "cut off in the", truncated=True))
    cleaned = clean({"train": found, "validation": held_answers}, prompts | held, CleaningConfig())
    assert cleaned.left_out == {
        "cut off by the teacher's length limit": 1,
        "copies of earlier prompts": 1,
        "near copies of earlier prompts": 1,
        "share 13 words in a row with a held-out prompt": 1,
    }
    assert [answer.text for answer in cleaned.answers["train"]] == ["yes", "yes", "yes", "another answer to one"]
    all_of_it = CleaningConfig(duplicates=False, near_duplicates=None, overlap=None, truncated="keep")
    assert clean({"train": found, "validation": held_answers}, prompts | held, all_of_it).answers["train"] == found


def test_a_filter_that_leaves_nothing_is_told() -> None:
    prompts, found = made(["one", "two"], truncated=True)
    with pytest.raises(UserError, match=r"^cleaning.truncated: leaves nothing of prompts.train"):
        clean({"train": found, "validation": found}, prompts, CleaningConfig())


def test_flagged_prompts_and_answers_are_left_out() -> None:
    prompts, found = made(["good", "bad question", "fine"])
    found[2] = Answer(found[2].prompt_id, "a bad answer")
    held, held_answers = made(["held out"])
    cleaned = clean(
        {"train": found, "validation": held_answers}, prompts | held, CleaningConfig(), lambda texts: ["bad" in text for text in texts]
    )
    assert cleaned.answers["train"] == found[:1] and cleaned.left_out["flagged by the moderation"] == 2


ENGLISH, GERMAN = "What is the capital of the country of France, please?", "Wie heißt die Hauptstadt von Frankreich, bitte schön?"


@pytest.mark.skipif(not languages.INSTALLED, reason="needs the extra `languages`")
def test_languages_are_told_and_others_left_out() -> None:
    assert [languages.language(text) for text in (ENGLISH, GERMAN, "oui")] == ["en", "de", "und"]
    prompts, found = made([ENGLISH, GERMAN, "hm"])
    cleaned = clean({"train": found, "validation": found[:1]}, prompts, CleaningConfig(languages=["en"], overlap=None))
    assert cleaned.answers["train"] == [found[0], found[2]] and cleaned.left_out["in other languages"] == 1


def test_without_the_detector_no_language_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "INSTALLED", False)
    monkeypatch.setattr(languages, "classify", None)
    assert languages.language(ENGLISH) == "und"
    with pytest.raises(UserError, match=r"^cleaning.languages: needs the package py3langid; pip install"):
        CleaningConfig(languages=["en"])


def test_the_extra_is_what_the_detector_is_looked_for_under() -> None:
    assert (importlib.util.find_spec("py3langid") is not None) == languages.INSTALLED


def test_the_section_refuses_nonsense() -> None:
    for nonsense in ({"near_duplicates": 0.0}, {"near_duplicates": 1.1}, {"overlap": 0}, {"truncated": "maybe"}, {"typo": 1}):
        with pytest.raises(ValidationError):
            CleaningConfig.model_validate(nonsense)


# --- in a run --------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_out_is_told_and_other_settings_freeze_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(prepare, "say", said.append)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"question {number}", "response": "yes"} for number in range(8)]
    rows += [{"prompt": "Question 1!", "response": "no"}, {"prompt": "cut", "response": "half an", "finish_reason": "length"}]
    rows += [{"prompt": "long " * 40, "response": "yes"}]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tiny.yaml").write_text(tiny.CONFIG)
    Path("held.jsonl").write_text(json.dumps({"prompt": "question 0"}))
    Path("train.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[1:]))
    given = ["teacher={backend: file, path: answers.jsonl}", "prompts={train: train.jsonl, validation: held.jsonl}"]
    run = Run.open(Path("tiny.yaml"), given)
    collect_answers(run)
    prepare_data(run)
    assert said == [
        "prepare: 1 answers are left out: cut off by the teacher's length limit",
        "prepare: 1 answers are left out: copies of earlier prompts",
        "prepare: 1 prompts lose the end of their last text (data.max_prompt_tokens is 16)",
        "prepare: 8 groups to train on, 1 held out",
    ]
    prepare_data(run)
    assert len(said) == 4
    prepare_data(Run.open(Path("tiny.yaml"), [*given, "cleaning={duplicates: false, truncated: keep}"]))
    assert said[-1] == "prepare: 10 groups to train on, 1 held out"
    cut = next(example for example in Snapshot.open(run.data).train if example.answer.truncated)
    assert cut.prompt.text == "cut"
    prepare_data(Run.open(Path("tiny.yaml"), [*given, "cleaning.long_prompts=drop"]))
    assert said[-2:] == [
        "prepare: 1 prompts are left out: too long for data.max_prompt_tokens",
        "prepare: 7 groups to train on, 1 held out",
    ]


# --- the moderation's endpoint ---------------------------------------------------------------------------------------


def verdicts(server: Desk) -> Reply:
    texts = server.bodies[-1]["input"]
    return 200, {}, json.dumps({"id": "m", "model": "x", "results": [{"flagged": "bad" in text} for text in texts]}).encode()


def test_every_text_is_asked_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "k")
    with desk(lambda text, before: verdicts(server)) as (server, teacher):
        config = ModerationConfig(base_url=teacher.base_url, api_key_env="TEST_KEY")
        texts = [f"{'bad' if number % 3 == 0 else 'good'} {number}" for number in range(40)]
        for _ in range(2):
            with Moderator(config, tmp_path / "m.sqlite") as moderator:
                assert moderator.flagged(texts) == [number % 3 == 0 for number in range(40)]
                assert moderator.flagged([]) == []
        assert [len(body["input"]) for body in server.bodies] == [32, 8]
        assert server.bodies[0]["model"] == "omni-moderation-latest"


@pytest.mark.parametrize("reply", [(200, {}, b'{"results": []}'), (200, {}, b"<html>"), (400, {}, b"{}")], ids=["few", "HTML", "400"])
def test_an_endpoint_that_moderates_nothing_is_told(reply: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "k")
    with desk(lambda text, before: reply) as (_, teacher):
        config = ModerationConfig(base_url=teacher.base_url, api_key_env="TEST_KEY")
        with Moderator(config) as moderator, pytest.raises(UserError, match=r"^cleaning.moderation: the endpoint"):
            moderator.flagged(["x"])
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(UserError, match=r"^cleaning.moderation.api_key_env: "):
        Moderator(config)
