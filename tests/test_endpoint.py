"""The openai backend against hostile and honest endpoints: what is kept, what is tried again, what stops, what it may cost."""

import gzip
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gadjax.errors import UserError
from gadjax.records import Answer, Prompt
from gadjax.teachers import dispatch, openai, replies
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import answers, collect, requests_for
from gadjax.teachers.config import Price, TeacherConfig
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
    "two choices": (200, {}, good("x", choices=json.loads(good("x"))["choices"] * 2)),
    "a list for content": (200, {}, good("x", choice={"message": {"role": "assistant", "content": ["x"]}})),
    "an unknown ending": (200, {}, good("x", choice={"finish_reason": "tool_calls"})),
    "negative usage": (200, {}, good("x", usage={"prompt_tokens": -1, "completion_tokens": 1})),
    "a lone surrogate": (200, {}, good("x").replace(b'"x"', b'"\\ud800"')),
    "bytes that are no UTF-8": (200, {}, good("x").replace(b'"x"', b'"\xff"')),
    "a huge reply": (200, {}, good("x" * 300_000)),
    "a huge reply that does not end": (200, {"Content-Length": "900000"}, b" " * 300_000),
    "a packed reply": (200, {"Content-Encoding": "gzip"}, gzip.compress(good("x" * 1000))),
    "a reply that breaks off": (200, {"Content-Length": "9999", "Connection": "close"}, good("x")),
    "an error of a status on 200": (200, {}, json.dumps({"error": {"code": 503, "message": "later"}}).encode()),
    "a user for a role": (200, {}, good("x", choice={"message": {"role": "user", "content": "x"}})),
    "no usage to count": (200, {}, good("x", usage={"prompt_tokens": 1.5, "completion_tokens": 1})),
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
    hostile = {name: reply for name, reply in HOSTILE.items() if name != "status 429"}  # which may cost no try
    prompts = [Prompt.of(name) for name in [*hostile, "fine"]]
    with desk(lambda text, before: HOSTILE.get(text, ok(text))) as (server, teacher):
        summary = collect(prompts, teacher, cache)
        assert (summary.ok, summary.refused, summary.failed) == (1, 0, len(hostile))
        assert server.asked == {**dict.fromkeys(hostile, teacher.tries), "fine": 1}
        server.reply = lambda text, before: ok(text)
        assert collect(prompts, teacher, cache).ok == len(prompts)
    assert server.asked == {**dict.fromkeys(hostile, teacher.tries + 1), "fine": 1}


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
    "teacher.api_key_env": [
        (401, {}, error(f"no such key {KEY}")),
        (403, {}, error("no")),
        (402, {}, error("Insufficient Balance")),
        (429, {}, error("pay", "insufficient_quota")),
        (400, {}, error("stop", "billing_hard_limit_reached")),
        (200, {}, json.dumps({"error": {"code": 402, "message": "no credits"}}).encode()),
    ],
    "teacher.model": [(404, {}, error("no such model")), (400, {}, error("no such model", "model_not_found"))],
    "teacher.temperature": [(400, {}, error("only 1", "unsupported_value").replace(b'"param": null', b'"param": "temperature"'))],
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
    ("headers", "seconds"),
    [
        ({"Retry-After": "2.5"}, 2.5),
        ({"Retry-After": ""}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "-3"}, 0),
        ({"Retry-After": "nan"}, 0),
        ({"Retry-After": "inf"}, 0),
        ({"Retry-After": "99999"}, 300.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "Sun, 06 Sep 2026 00:01:40 GMT"}, 100),
        ({"retry-after-ms": "1500", "Retry-After": "9"}, 1.5),
        ({"x-ratelimit-reset-requests": "1m2.5s"}, 62.5),
        ({"x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-reset-tokens": "4m", "x-ratelimit-reset-requests": "2s", "x-ratelimit-remaining-requests": "0"}, 240),
        (
            {
                "x-ratelimit-reset-tokens": "4m",
                "x-ratelimit-remaining-tokens": "9000",
                "x-ratelimit-reset-requests": "2s",
                "x-ratelimit-remaining-requests": "0",
            },
            2,
        ),
        ({"X-RateLimit-Reset": "30"}, 30),
        ({"X-RateLimit-Reset": "1788652830"}, 30),  # Unix time
        ({"X-RateLimit-Reset": "1788652830000"}, 30),  # the same in milliseconds
        ({"anthropic-ratelimit-requests-reset": "2026-09-06T00:00:07Z"}, 7),
        ({"Retry-After": "soon", "X-RateLimit-Reset": "3"}, 3),
        ({"X-RateLimit-Reset": "never"}, 0),
    ],
    ids=str,
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies.time, "time", lambda: 1788652800.0)  # 2026-09-06 00:00:00 UTC
    assert replies.retry_after(headers) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("body", "seconds"), [("Please try again in 1m3s.", 63), ("try again in 120ms", 0.12), ('{"retryDelay": "34s"}', 34), ("busy", 0)]
)
def test_the_words_of_an_error_tell_when_to_ask_again(body: str, seconds: float) -> None:
    assert replies.retry_after({}, body) == pytest.approx(seconds)


def test_a_limit_that_lets_others_through_costs_no_try(cache: TeacherCache) -> None:
    def limited(text: str, before: int) -> Reply:
        return ok(text) if before == 9 or text != "question 0" else (429, {}, error("slow down"))

    prompts = [Prompt.of(f"question {number}") for number in range(400)]
    with desk(limited) as (server, teacher):
        assert collect(prompts, teacher, cache).ok == len(prompts)
    assert server.asked["question 0"] == 10 > teacher.tries


def test_requests_and_tokens_a_minute_are_spread_evenly() -> None:
    pace = dispatch.Pace(requests_per_minute=60, tokens_per_minute=None)
    assert [pace.take(100.0, 10**6) for _ in range(3)] == [100, 101, 102]
    assert pace.take(200.0, 1) == 200
    pace = dispatch.Pace(requests_per_minute=None, tokens_per_minute=600)
    assert [pace.take(0.0, tokens) for tokens in (50, 10, 10)] == [0, 5, 6]
    pace.give_back(40)
    assert pace.take(0.0, 10) == 3
    pace = dispatch.Pace(None, None)
    assert [pace.take(5.0, 100) for _ in range(2)] == [5, 5]


def test_the_config_s_limits_are_kept(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, taken, given_back = list[tuple[float | None, ...]](), list[int](), list[int]()

    class Spy(dispatch.Pace):
        def __init__(self, *given: float | None):
            limits.append(given)
            super().__init__(*given)

        def take(self, now: float, tokens: int) -> float:
            taken.append(tokens)
            return super().take(now, tokens)

        def give_back(self, tokens: int) -> None:
            given_back.append(tokens)
            super().give_back(tokens)

    monkeypatch.setattr(dispatch, "Pace", Spy)
    with desk(lambda text, before: ok(text) if before or text != "question 2" else (500, {}, b"")) as (_, teacher):
        slow = {"requests_per_minute": 300.0, "tokens_per_minute": 600_000.0, "max_tokens": 100, "concurrency": 1}
        started = time.monotonic()
        collect(PROMPTS[:3], teacher.model_copy(update=slow), cache)
        assert time.monotonic() - started >= 3 * 60 / 300
    most = 16 + 16 + len("question 0") + 100
    assert (limits, taken) == ([(300.0, 600_000.0)], [most] * 4)
    assert given_back == [most - 30, most - 30, most, most - 30]  # an error has no tokens


def test_collectors_of_one_cache_keep_one_limit(tmp_path: Path) -> None:
    came = list[float]()

    def reply(text: str, before: int) -> Reply:
        came.append(time.monotonic())
        return ok(text)

    def collector(prompts: Sequence[Prompt]) -> None:
        with TeacherCache(tmp_path / "teacher.sqlite") as cache:
            collect(prompts, teacher.model_copy(update={"requests_per_minute": 1200.0}), cache)

    with desk(reply) as (_, teacher), TeacherCache(tmp_path / "teacher.sqlite"):
        began = time.monotonic()
        threads = [threading.Thread(target=collector, args=(PROMPTS[start::2],)) for start in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(came) == len(PROMPTS) and max(came) - began >= (len(PROMPTS) - 1) * 60 / 1200


def test_a_clock_that_goes_back_lets_nobody_wait(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TeacherConfig(requests_per_minute=6, tokens_per_minute=60)
    one, other = (dispatch.Dispatcher(Mock(), Mock(), config, cache, Mock()) for _ in range(2))
    one._endpoint = other._endpoint = "openai gpt"
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    assert [one._take_turn(5), other._take_turn(20), one._take_turn(1)] == [0, 10, 30]  # by requests, then by tokens
    other._give_back(20)
    monkeypatch.setattr(time, "time", lambda: 5_000.0)
    assert [one._take_turn(1), other._take_turn(1)] == [0, 10]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["stop", "length", "assistant", "503"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "choices", "message", "content", "finish_reason", "usage", "error", "code"]), inner)
    ),
    max_leaves=12,
)
READER = replies.Replies(TeacherConfig(), Price(input=1.0, output=1.0), KEY)


@given(JSON.map(json.dumps) | st.text(max_size=30) | st.binary(max_size=30))
@example('{"error": {"code": 1e999}}')
@example('{"error": {"code": "' + "9" * 5000 + '"}}')
@example("[" * 50_000)
def test_any_reply_is_an_outcome_a_retry_or_a_fault(content: bytes | str) -> None:
    try:
        outcome = READER.outcome(content, requests_for(PROMPTS[0], TeacherConfig())[0])
    except (replies.Retry, UserError):
        return
    assert outcome.state == "refused" or outcome.text.strip()


HEADERS = st.dictionaries(st.sampled_from(["Retry-After", "x-ratelimit-reset", "Location"]), st.text(max_size=30))


@given(st.integers(100, 599), JSON, HEADERS)
def test_any_error_is_an_outcome_a_retry_or_a_fault(status: int, error: object, headers: dict[str, str]) -> None:
    assert 0 <= replies.retry_after(headers) <= replies.LONGEST_RETRY_AFTER
    try:
        outcome = READER.sort(status, error, headers)
    except (replies.Retry, UserError):
        return
    assert outcome.state in ("refused", "failed") and outcome.error.isprintable()


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
    assert errors == [("status 400: bad [key]",)]
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


def test_max_cost_holds_for_two_collectors_together(tmp_path: Path) -> None:
    dear = {"price": Price(input=0.0, output=1e6), "max_tokens": 20, "max_cost": 110.0}  # 20 dollars an answer
    told = list[str]()

    def run(teacher: TeacherConfig) -> None:
        with TeacherCache(tmp_path / "teacher.sqlite") as cache:
            with pytest.raises(UserError, match=r"^teacher.max_cost: 100.00 of 110.00") as stop:
                collect(PROMPTS, teacher, cache)
            told.append(str(stop.value))

    def slow(text: str, before: int) -> Reply:
        time.sleep(0.02)
        return ok(text)

    with desk(slow) as (server, teacher):
        threads = [threading.Thread(target=run, args=(teacher.model_copy(update=dear),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(told) == 2 and sum(server.asked.values()) == 5


def test_a_reply_that_was_lost_counts_for_the_most_that_it_may_cost(cache: TeacherCache) -> None:
    dear = {"price": Price(input=0.0, output=1e6), "max_tokens": 20, "max_cost": 70.0}
    lost = {"question 0": (200, {}, good("x")[:-9]), "question 1": (500, {}, b"")}
    with desk(lambda text, before: ok(text) if before else lost.get(text, ok(text))) as (server, teacher):
        one = teacher.model_copy(update=dear | {"concurrency": 1})
        assert collect(PROMPTS[:2], one, cache).cost == 60  # 20 that are lost, 20, and 20: what failed on the server is not billed
        server.reply = lambda text, before: lost["question 0"]
        with pytest.raises(UserError, match=r"^teacher.max_cost: 60.00 of 70.00"):
            collect(PROMPTS[:3], one, cache)
        more = one.model_copy(update={"max_cost": 110.0})
        with pytest.raises(UserError, match=r"^teacher.max_cost: 100.00 of 110.00"):
            collect([PROMPTS[2]], more, cache)
        assert server.asked["question 2"] == 2 and cache.cost() == 100
        server.reply = lambda text, before: ok(text)
        assert collect([PROMPTS[2]], one.model_copy(update={"max_cost": 120.0}), cache).cost == 60  # with its failed tries


def test_another_key_asks_only_for_the_rest(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    with desk(lambda text, before: ok(text)) as (server, teacher):
        collect(PROMPTS[:20], teacher, cache)
        monkeypatch.setenv("OTHER_KEY", "sk-rotated")
        collect(PROMPTS[::-1], teacher.model_copy(update={"api_key_env": "OTHER_KEY"}), cache)
    assert server.asked == {prompt.text: 1 for prompt in PROMPTS}


def test_an_answer_with_all_tokens_that_it_may_have_was_cut(cache: TeacherCache) -> None:
    with desk(lambda text, before: ok(text)) as (_, teacher):
        assert collect(PROMPTS[:1], teacher.model_copy(update={"max_tokens": 20}), cache).truncated == 1
        assert collect(PROMPTS[:1], teacher.model_copy(update={"max_tokens": 21}), cache).truncated == 0
