"""A trained student that speaks: served to the real client, text in whole characters, stop strings, the discriminator's choice."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import yaml

from gadjax.completions import Ask, Finish, Piece
from gadjax.errors import UserError
from gadjax.rollout.live import Heard
from gadjax.runs import Run
from gadjax.scoring import Scorer
from gadjax.serve import serve
from gadjax.server import Server
from gadjax.session import Session
from gadjax.speaking import Room, Speaker, Utterance, scorer_of, speaker_of
from gadjax.teachers import grammar
from gadjax.text import Text
from tests import tiny

pytestmark = pytest.mark.timeout(600)  # the first test waits for a whole run

PROMPTS, P = grammar.prompts(4, seed=5), 64


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    experiment, done = tiny.finished(tmp_path_factory.getbasetemp())
    assert done.returncode == 0, done.stderr
    run, _ = Run.find(str(experiment.run))
    return Session.open(run, experiment.run / "student")


@pytest.fixture(scope="module")
def scorer(session: Session) -> Scorer:
    return scorer_of(session, "gad", Room(prompt_tokens=P, best_of=3))


@pytest.fixture(scope="module")
def speaker(session: Session, scorer: Scorer) -> Iterator[Speaker]:
    with speaker_of(session, "gad", Room(prompt_tokens=P, places=2), scorer) as speaker:
        yield speaker


@pytest.fixture(scope="module")
def client(speaker: Speaker) -> Iterator[openai.OpenAI]:
    with Server(speaker.complete, model="tiny/gad") as server, openai.OpenAI(base_url=server.address, api_key="any") as client:
        yield client


def ask(number: int = 0, **others: Any) -> Ask:
    return Ask(messages=({"role": "user", "content": PROMPTS[number]},), **others)


def say(client: openai.OpenAI, number: int = 0, **others: Any) -> Any:
    return client.chat.completions.create(model="any", messages=[{"role": "user", "content": PROMPTS[number]}], **others)


def text_of(pieces: list[Piece], choice: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.choice == choice)


# --- text --------------------------------------------------------------------------------------------------------------


def heard(text: Text, said: str, size: int, ended: Finish = "stop") -> list[Heard]:
    """A text as it comes from the decoder, `size` tokens at a time."""
    ids = [*text.response_ids(said, 10_000, truncated=True), *[text.end_of_turn] * (ended == "stop")]
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [Heard(part, [-1.0] * len(part), [[]] * len(part), ended if part is pieces[-1] else None) for part in pieces]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("said", ["sure : 🙂 漢字", "\ufffd", "", "a\ufffd b"])
def test_characters_are_said_whole(session: Session, said: str, size: int):
    utterance = Utterance(session.text, ask(top=0), 3, 7)
    pieces = [piece for part in heard(session.text, said, size) if (piece := utterance.hear(part))]
    assert "".join(piece.text for piece in pieces) == said
    assert all("\ufffd" not in piece.text for piece in pieces if "\ufffd" not in said)
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert sum(piece.completion_tokens for piece in pieces) == len(utterance.ids)
    assert sum(len(piece.tokens) for piece in pieces) == len(utterance.ids) - 1  # the end of turn is not told
    assert (pieces[0].choice, pieces[0].prompt_tokens) == (3, 7)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(("stop", "kept"), [(("END",), "one E two EN "), (("absent", "two"), "one E "), (("ENDS",), None), (("o",), "")])
def test_nothing_is_said_from_a_stop_string_on(session: Session, stop: tuple[str, ...], kept: str | None, size: int):
    whole = "one E two EN END three EN"
    utterance, said, finish, told = Utterance(session.text, ask(stop=stop, top=0), 0, 1), "", None, ""
    for part in heard(session.text, whole, size, ended="length"):
        if piece := utterance.hear(part):
            said, finish = said + piece.text, piece.finish
            told += "".join(token.text for token in piece.tokens)
            if finish:
                break
    assert said == (whole if kept is None else kept)
    assert finish == ("length" if kept is None else "stop")
    assert told.startswith(said)


# --- the real client ---------------------------------------------------------------------------------------------------


def test_an_answer_is_the_same_whole_and_streamed_alone_and_among_others(client: openai.OpenAI):
    alone = say(client, seed=3, n=3, temperature=0.9, top_p=0.9)
    texts = [choice.message.content for choice in alone.choices]
    assert len(set(texts)) > 1, "each answer has a stream of its own"
    assert all(choice.finish_reason in ("stop", "length") for choice in alone.choices)
    assert 0 < alone.usage.completion_tokens <= 3 * 16
    others = [threading.Thread(target=say, args=(client, number % 4), kwargs={"n": 2}) for number in range(5)]  # more than there are places
    for thread in others:
        thread.start()
    streamed = dict.fromkeys(range(3), "")
    for chunk in say(client, seed=3, n=3, temperature=0.9, top_p=0.9, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content
    for thread in others:
        thread.join()
    assert list(streamed.values()) == texts


def test_log_probabilities_are_told(client: openai.OpenAI):
    reply = say(client, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5)
    told = reply.choices[0].logprobs.content
    assert "".join(token.token for token in told) == reply.choices[0].message.content
    for token in told:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(each.logprob for each in token.top_logprobs) < 0
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 5


def test_a_conversation_that_is_too_long_is_refused(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="more than 64 tokens"):
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "word " * 90}])
    assert say(client, max_tokens=1).usage.completion_tokens == 1


# --- the discriminator -------------------------------------------------------------------------------------------------


def test_the_best_of_several_is_given(session: Session, scorer: Scorer, speaker: Speaker):
    every = list(speaker.complete(ask(seed=4, n=3)))
    with speaker_of(session, "gad", Room(prompt_tokens=P, places=1, best_of=3), scorer) as choosy:
        favourites = list(choosy.complete(ask(seed=4, n=2)))
    scores = {piece.choice: piece.score for piece in every if piece.score is not None}
    assert len(set(scores.values())) == 3
    first, second, _ = sorted(scores, key=lambda choice: -scores[choice])
    assert [(piece.choice, piece.text) for piece in favourites] == [(0, text_of(every, first)), (1, text_of(every, second))]
    assert [piece.score for piece in favourites] == pytest.approx([scores[first], scores[second]], abs=1e-5)
    assert favourites[0].completion_tokens == sum(piece.completion_tokens for piece in every if piece.choice == first)


def test_scores_do_not_depend_on_what_is_scored_with_them(scorer: Scorer):
    texts = [[(5, 6, 7), (8,), (9, 10), (11, 12, 13)], [(5,)]]
    together = scorer([(1, 2), (3,)], texts)
    assert [len(row) for row in together] == [4, 1]
    assert together[0] == pytest.approx([scorer([(1, 2)], [[text]])[0][0] for text in texts[0]], abs=1e-5)


# --- faults ------------------------------------------------------------------------------------------------------------


def test_a_fault_of_the_decoder_is_told_to_all(speaker: Speaker):
    class Broken:
        samples, places, response_tokens, going = 1, 1, 8, False

        def is_free(self, place: int) -> bool:
            raise ZeroDivisionError

    with Speaker(Broken(), speaker._text, P) as broken:  # type: ignore[arg-type]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the decoder"):
                list(broken.complete(ask()))


def test_what_nobody_waits_for_is_dropped(speaker: Speaker):
    pieces = speaker.complete(ask(seed=0))
    next(pieces)
    pieces.close()
    (last,) = (piece for piece in speaker.complete(ask(1, seed=0, temperature=0)) if piece.finish)
    assert last.score is not None


# --- the command -------------------------------------------------------------------------------------------------------


def test_a_served_student_teaches_another_run(session: Session, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """`gadjax serve` in a process of its own; another run takes it for its teacher and is trained on what it says."""
    first, _ = tiny.finished(tmp_path_factory.getbasetemp())
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job ignores it
    command = [sys.executable, "-c", heeding + tiny.MAIN, "serve", str(first.run), "--port", "0", "--best-of", "2", "--prompt-tokens", "64"]
    monkeypatch.setenv("GADJAX_TOKEN", "a-token")
    with subprocess.Popen(command, env=first.environment, stderr=subprocess.PIPE, text=True) as served:
        assert served.stderr is not None
        found = next(match for line in served.stderr if (match := re.search(r"tiny/gad at (http://127\.0\.0\.1:\d+/v1)", line)))
        teacher = {"backend": "openai", "model": "tiny/gad", "base_url": found[1], "api_key_env": "GADJAX_TOKEN"}
        teacher |= {"price": {"input": 0.0, "output": 0.0}}
        config = yaml.safe_load(tiny.CONFIG) | {"teacher": teacher, "prompts": {"train": "tutor:6", "validation": "tutor:4"}}
        config["stages"] = {"seqkd": config["stages"]["seqkd"] | {"max_steps": 1, "batch_groups": 1}}
        config["cleaning"] = {"truncated": "keep"}  # a student of so few steps seldom ends
        second = tiny.Tiny.make(tmp_path_factory.getbasetemp(), "second", yaml.safe_dump(config, sort_keys=False))
        done = [second.gadjax(part, "tiny.yaml") for part in ("collect", "train")]
        served.send_signal(signal.SIGINT)
        rest = served.stderr.read()
    assert served.returncode == 0, rest
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert re.search(r"[1-6] groups to train on, [1-4] held out", done[1].stderr), done[1].stderr
    assert re.search(r"seqkd: 1/1 loss \d", done[1].stderr), done[1].stderr


def test_serving_to_others_needs_a_token(session: Session, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GADJAX_TOKEN", raising=False)
    with pytest.raises(UserError, match="GADJAX_TOKEN is not set"):
        serve(str(session.run.folder), 0, "0.0.0.0", 1, 1, None, None)
