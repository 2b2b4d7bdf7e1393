"""The openai backend against hostile and honest endpoints: what is kept, what is tried again, what stops, what it may cost."""

import gzip
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gadjax.errors import UserError
from gadjax.records import Answer, Prompt
from gadjax.teachers import dispatch, openai
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import answers, collect
from gadjax.teachers.config import Price
from tests.desk import KEY, PROMPTS, Reply, desk, error, good, ok


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[TeacherCache]:
    with TeacherCache(tmp_path / "teacher.sqlite") as cache:
        yield cache


# --- replies ---------------------------------------------------------------------------------------------------------

HOSTILE: dict[str, Reply] = {
    "truncated JSON": (200, {}, good("x")[:-9]),
    "HTML": (200, {"Content-Type": "text/html"}, b"<html>busy</html>"),
    "nothing": (200, {}, b""),
    "an error on 200": (200, {}, error("overloaded")),
    "choices null": (200, {}, good("x", choices=None)),
    "no choices": (200, {}, good("x", choices=[])),
    "a list for content": (200, {}, good("x", choice={"message": {"role": "assistant", "content": ["x"]}})),
    "an unknown ending": (200, {}, good("x", choice={"finish_reason": "tool_calls"})),
    "negative usage": (200, {}, good("x", usage={"prompt_tokens": -1, "completion_tokens": 1})),
    "a lone surrogate": (200, {}, good("x").replace(b'"x"', b'"\\ud800"')),
    "bytes that are no UTF-8": (200, {}, good("x").replace(b'"x"', b'"\xff"')),
    "a huge reply": (200, {}, good("x" * 300_000)),
    "a huge reply that does not end": (200, {"Content-Length": "900000"}, b" " * 300_000),
    "a packed reply": (200, {"Content-Encoding": "gzip"}, gzip.compress(good("x" * 1000))),
    "a reply that breaks off": (200, {"Content-Length": "9999", "Connection": "close"}, good("x")),
    "status 408": (408, {}, error("slow")),
    "status 429": (429, {"Retry-After": "0"}, error("slow down", "rate_limit_exceeded")),
    "status 500": (500, {}, b"<html>oops</html>"),
    "status 503 with nonsense": (503, {"Retry-After": "soon"}, b""),
}


@pytest.fixture
def small_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "MAX_REPLY", 200_000)


@pytest.mark.usefixtures("small_cap")
def test_a_hostile_reply_is_asked_for_again(cache: TeacherCache) -> None:
    prompts = [Prompt.of(name) for name in HOSTILE]
    with desk(lambda text, before: ok(text) if before else HOSTILE[text]) as (server, teacher):
        assert collect(prompts, teacher, cache).ok == len(HOSTILE)
    assert server.asked == dict.fromkeys(HOSTILE, 2)
    assert [answer.text for answer in answers(prompts, teacher, cache)] == [f"answer to {name}" for name in HOSTILE]


@pytest.mark.usefixtures("small_cap")
def test_a_request_fails_after_its_tries_and_is_tried_again_by_the_next_run(cache: TeacherCache) -> None:
    prompts = [Prompt.of(name) for name in [*HOSTILE, "fine"]]
    with desk(lambda text, before: HOSTILE.get(text, ok(text))) as (server, teacher):
        summary = collect(prompts, teacher, cache)
        assert (summary.ok, summary.refused, summary.failed) == (1, 0, len(HOSTILE))
        assert server.asked == {**dict.fromkeys(HOSTILE, teacher.tries), "fine": 1}
        server.reply = lambda text, before: ok(text)
        assert collect(prompts, teacher, cache).ok == len(prompts)
    assert server.asked == {**dict.fromkeys(HOSTILE, teacher.tries + 1), "fine": 1}


REFUSED: dict[str, Reply] = {
    "a refusal": (200, {}, good("", choice={"message": {"role": "assistant", "content": None, "refusal": "I will not"}})),
    "a filtered answer": (200, {}, good("half", choice={"finish_reason": "content_filter"})),
    "a filtered prompt": (400, {}, error("filtered", "content_filter")),
    "an empty answer": (200, {}, good(" \n")),
}


def test_refusals_are_kept_as_data_and_not_asked_again(cache: TeacherCache) -> None:
    prompts = [Prompt.of(name) for name in [*REFUSED, "fine"]]
    with desk(lambda text, before: REFUSED.get(text, ok(text))) as (server, teacher):
        for _ in range(2):
            summary = collect(prompts, teacher, cache)
            assert (summary.ok, summary.refused, summary.failed) == (1, len(REFUSED), 0)
    assert set(server.asked.values()) == {1}
    assert [answer.text for answer in answers(prompts, teacher, cache)] == ["answer to fine"]


def test_an_answer_that_was_cut_off_is_marked(cache: TeacherCache) -> None:
    with desk(lambda text, before: (200, {}, good("half", choice={"finish_reason": "length"}))) as (_, teacher):
        assert collect(PROMPTS[:1], teacher, cache).truncated == 1
    assert answers(PROMPTS[:1], teacher, cache) == [Answer(PROMPTS[0].id, "half", truncated=True)]


def test_a_prompt_that_the_endpoint_does_not_accept_fails_at_once(cache: TeacherCache) -> None:
    with desk(lambda text, before: (400, {}, error("too long")) if text == "question 3" else ok(text)) as (server, teacher):
        assert collect(PROMPTS, teacher, cache).failed == 1
    assert set(server.asked.values()) == {1}


FATAL = {
    "teacher.api_key_env": [(401, {}, error(f"no such key {KEY}")), (403, {}, error("no")), (429, {}, error("pay", "insufficient_quota"))],
    "teacher.model": [(404, {}, error("no such model"))],
}


@pytest.mark.parametrize(("where", "reply"), [(where, reply) for where, replies in FATAL.items() for reply in replies])
def test_a_fault_of_all_requests_stops_at_once(cache: TeacherCache, where: str, reply: Reply) -> None:
    with desk(lambda text, before: reply) as (server, teacher), pytest.raises(UserError) as told:
        collect(PROMPTS, teacher, cache)
    assert told.value.where == where
    assert KEY not in str(told.value)
    assert len(server.asked) <= teacher.concurrency and set(server.asked.values()) == {1}
    with desk(lambda text, before: ok(text)) as (server, teacher):
        assert collect(PROMPTS, teacher, cache).ok == len(PROMPTS)  # nothing is left leased


def test_a_redirect_is_not_followed(cache: TeacherCache) -> None:
    with desk(lambda text, before: ok(text)) as (elsewhere, other):
        location = {"Location": f"{other.base_url}/chat/completions"}
        with (
            desk(lambda text, before: (307, location, b"")) as (_, teacher),
            pytest.raises(UserError, match=r"^teacher.base_url: .* redirects to"),
        ):
            collect(PROMPTS, teacher, cache)
    assert not elsewhere.asked


def test_an_endpoint_that_is_down_is_told_at_once(cache: TeacherCache) -> None:
    with desk(lambda text, before: ok(text)) as (_, teacher):
        pass
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^teacher.base_url: .* is not reached"):
        collect(PROMPTS, teacher.model_copy(update={"retry_wait": 10.0}), cache)
    assert time.monotonic() - started < 3


def test_an_endpoint_that_only_fails_is_given_up(cache: TeacherCache) -> None:
    prompts = [Prompt.of(f"question {number}") for number in range(100)]
    with desk(lambda text, before: (400, {}, error("unknown parameter"))) as (server, teacher):
        with pytest.raises(UserError, match="unknown parameter"):
            collect(prompts, teacher, cache)
        assert len(server.asked) < dispatch.FAILURES_IN_A_ROW + 2 * teacher.concurrency
        with pytest.raises(UserError, match="gave no answer to any of 2 requests.*unknown parameter"):
            collect(prompts[:2], teacher, cache)


def test_a_reply_that_trickles_ends_with_the_time_limit(cache: TeacherCache) -> None:
    def trickle(text: str, before: int) -> Reply:
        server.piece, server.pause = (2**30, 0.0) if before else (10, 0.1)
        return ok(text)

    with desk(trickle) as (server, teacher):
        assert collect(PROMPTS[:1], teacher.model_copy(update={"timeout": 0.5}), cache).ok == 1
    assert server.asked["question 0"] == 2


def test_after_a_fault_nothing_is_tried_again(cache: TeacherCache) -> None:
    def reply(text: str, before: int) -> Reply:
        if text == "question 0":
            return 500, {}, b""
        time.sleep(0.1)
        return 401, {}, error("no such key")

    with desk(reply) as (server, teacher), pytest.raises(UserError, match="refuses the key"):
        collect(PROMPTS[:2], teacher.model_copy(update={"retry_wait": 1.0}), cache)
    assert server.asked == {"question 0": 1, "question 1": 1}


def test_retry_after_is_heeded_by_all(cache: TeacherCache) -> None:
    times = list[float]()

    def limited(text: str, before: int) -> Reply:
        times.append(time.monotonic())
        return ok(text) if len(times) > 1 else (429, {"Retry-After": "0.5"}, error("slow down"))

    with desk(limited) as (_, teacher):
        assert collect(PROMPTS[:3], teacher.model_copy(update={"concurrency": 1}), cache).ok == 3
    assert times[1] - times[0] >= 0.5


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("2.5", 2.5), ("", 0), ("soon", 0), ("-3", 0), ("nan", 0), ("inf", 0), ("99999", 300.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_retry_after_in_all_its_forms(value: str, seconds: float) -> None:
    assert openai.retry_after({"Retry-After": value}) == seconds


def test_openai_s_own_hosts_are_asked_with_their_name_of_the_limit() -> None:
    for address in ("https://api.openai.com/v1", "https://x.openai.azure.com/openai/v1"):
        assert openai.limit_name(address) == "max_completion_tokens"
    assert openai.limit_name("http://127.0.0.1:8000/v1") == "max_tokens"


# --- key and cost ----------------------------------------------------------------------------------------------------


def test_without_a_key_or_a_price_nothing_is_sent(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    with desk(lambda text, before: ok(text)) as (server, teacher):
        with pytest.raises(UserError, match=r"^teacher.price: the price of some-model is not known"):
            collect(PROMPTS, teacher.model_copy(update={"model": "some-model"}), cache)
        monkeypatch.setenv("TEST_KEY", " ")
        with pytest.raises(UserError, match=r"^teacher.api_key_env: the environment variable TEST_KEY is not set"):
            collect(PROMPTS, teacher, cache)
        monkeypatch.setenv("TEST_KEY", "sk-\n1")
        with pytest.raises(UserError, match="characters that no key has"):
            collect(PROMPTS, teacher, cache)
    assert not server.asked


def test_the_key_is_written_nowhere(cache: TeacherCache, tmp_path: Path) -> None:
    with desk(lambda text, before: (400, {}, error(f"bad {KEY}")) if text == "question 0" else ok(text)) as (_, teacher):
        collect(PROMPTS, teacher, cache)
        errors = cache._db.execute("SELECT error FROM answers WHERE state = 'failed'").fetchall()
    assert errors == [("status 400: Error code: 400 - bad [key]",)]
    cache.close()
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_max_cost_is_never_exceeded_and_can_be_raised(cache: TeacherCache) -> None:
    dear = {"price": Price(input=0.0, output=1e6), "max_tokens": 20, "max_cost": 110.0}  # 20 dollars an answer
    with desk(lambda text, before: ok(text)) as (server, teacher):
        limited = teacher.model_copy(update=dear)
        for _ in range(2):
            with pytest.raises(UserError, match=r"^teacher.max_cost: 100.00 of 110.00 dollars are spent"):
                collect(PROMPTS[:7], limited, cache)
            assert sum(server.asked.values()) == 5 and cache.cost() == 100
        assert collect(PROMPTS[:7], limited.model_copy(update={"max_cost": 140.0}), cache).ok == 7
    assert set(server.asked.values()) == {1}


def test_an_answer_without_usage_counts_for_the_most_that_it_may_cost(cache: TeacherCache) -> None:
    with desk(lambda text, before: (200, {}, good("x", usage=None))) as (_, teacher):
        limited = teacher.model_copy(update={"price": Price(input=0.0, output=1e6), "max_tokens": 2})
        assert collect(PROMPTS[:3], limited, cache).cost == 6
