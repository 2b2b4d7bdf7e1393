"""What a student may say: no text is given before the moderation has seen it; through the server, the real client and the chat."""

import io
from collections.abc import Generator, Iterator, Sequence

import openai
import pytest
from rich.console import Console

from gadjax.chat import Chat
from gadjax.completions import Ask, Complete, Piece, Unavailable
from gadjax.errors import UserError
from gadjax.moderation import ModerationConfig, moderated, moderation_of
from gadjax.server import Server

SAID = "Good day. This is fine. Now something bad. And on it goes."
QUESTION = ({"role": "user", "content": "x"},)


def speaker(*answers: str) -> Complete:
    """Says its answers in turn, a character each."""

    def complete(ask: Ask) -> Generator[Piece, None, None]:
        for place in range(max(map(len, answers))):
            for choice, answer in enumerate(answers):
                if place < len(answer):
                    last = place == len(answer) - 1
                    yield Piece(choice=choice, text=answer[place], finish="stop" if last else None, prompt_tokens=3, completion_tokens=1)

    return complete


class Watch:
    """Flags what has `bad` in it, and remembers what it has seen."""

    def __init__(self) -> None:
        self.seen = list[str]()

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        self.seen += texts
        return ["bad" in text for text in texts]


def test_no_text_is_given_before_it_was_seen() -> None:
    watch, given = Watch(), ""
    pieces = list[Piece]()
    for piece in moderated(speaker(SAID), watch)(Ask(messages=QUESTION)):
        given += piece.text
        pieces.append(piece)
        assert any(seen.startswith(given) for seen in watch.seen)
    assert given == "Good day. This is fine. "
    assert (pieces[-1].finish, pieces[-1].text, pieces[-1].tokens) == ("content_filter", "", ())
    assert sum(piece.completion_tokens for piece in pieces) == SAID.index("bad. ") + 5
    assert watch.seen[-1] == SAID[: SAID.index("bad. ") + 5], "all of the answer is judged, and no more is asked for"


def test_a_text_without_a_sentence_is_seen_in_parts_and_at_its_end() -> None:
    watch = Watch()
    pieces = list(moderated(speaker("x" * 900 + "bad"), watch)(Ask(messages=QUESTION)))
    assert [len(seen) for seen in watch.seen] == [401, 802, 903]
    assert pieces[-1].finish == "content_filter" and len("".join(piece.text for piece in pieces)) == 802


def test_one_of_several_answers_is_withheld_and_the_decoder_let_go() -> None:
    pieces = list(moderated(speaker("a bad one", "a good one"), Watch())(Ask(messages=QUESTION, n=2)))
    assert {piece.choice: piece.finish for piece in pieces} == {0: "content_filter", 1: "stop"}
    assert "".join(piece.text for piece in pieces) == "a good one"


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with Server(moderated(speaker(SAID), Watch()), model="m") as server, openai.OpenAI(base_url=server.address, api_key="k") as client:
        yield client


def test_a_client_is_told_in_openai_s_shape(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "x"}]
    choice = client.chat.completions.create(model="m", messages=messages).choices[0]  # type: ignore[arg-type]
    assert (choice.finish_reason, choice.message.content) == ("content_filter", "Good day. This is fine. ")
    events = list(client.chat.completions.create(model="m", messages=messages, stream=True))  # type: ignore[arg-type]
    assert "".join(event.choices[0].delta.content or "" for event in events) == "Good day. This is fine. "
    assert events[-1].choices[0].finish_reason == "content_filter"


def test_without_a_verdict_nothing_is_said() -> None:
    def flagged(texts: Sequence[str]) -> list[bool]:
        raise Unavailable("cleaning.moderation", "the endpoint does not answer", "try again")

    with (
        Server(moderated(speaker(SAID), flagged), model="m") as server,
        openai.OpenAI(base_url=server.address, api_key="k", max_retries=0) as client,
    ):
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as stop:
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=stream)
            assert stop.value.status_code == 503


def test_the_chat_says_that_an_answer_was_withheld() -> None:
    class Parrot:
        complete = staticmethod(speaker("a bad one"))

        def fits(self, messages: object) -> bool:
            return True

    out = io.StringIO()
    chat = Chat({"gad": Parrot()}, Console(file=out), lambda messages: Ask(messages=tuple(messages)), Watch())  # type: ignore[dict-item]
    chat.answer("hi")
    assert out.getvalue().split() == ["gad:", "withheld", "by", "the", "moderation"]


def test_whom_to_ask() -> None:
    own = ModerationConfig(model="mine", base_url="https://one.example/v1")
    assert moderation_of(own, "run") == own
    assert moderation_of(own, "http://127.0.0.1:1/v1").model == "mine"
    with pytest.raises(UserError, match=r"^--moderation: the run's config has no"):
        moderation_of(None, "run")
    with pytest.raises(UserError, match="is no address of an endpoint"):
        moderation_of(None, "http://169.254.169.254/v1")
