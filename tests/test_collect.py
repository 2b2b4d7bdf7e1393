"""Collecting over real sockets: what is asked, how often, what is kept of good and of hostile replies."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gadjax.errors import UserError
from gadjax.prompts import PromptsConfig
from gadjax.records import Answer, Prompt
from gadjax.server import Completion
from gadjax.teachers import dispatch, file, grammar, openai
from gadjax.teachers.cache import Outcome, TeacherCache
from gadjax.teachers.collect import Summary, answers, collect, requests_for
from gadjax.teachers.config import Price, TeacherConfig
from gadjax.teachers.sources import load_prompts
from gadjax.teachers.tutor import complete

PROMPTS = [Prompt.of(f"question {number}") for number in range(40)]
KEY = "sk-secret-of-this-test"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, as in a terminal; in a shell's background jobs it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[TeacherCache]:
    with TeacherCache(tmp_path / "teacher.sqlite") as cache:
        yield cache


class Desk(ThreadingHTTPServer):
    """An endpoint whose every reply is made by a function of the prompt's text and of how often it was asked before."""

    def __init__(self, reply: Callable[[str, int], tuple[int, dict[str, str], bytes]]):
        super().__init__(("127.0.0.1", 0), Clerk)
        self.reply, self.asked, self.bodies, self.headers = reply, Counter[str](), list[dict[str, Any]](), list[Any]()
        self.piece, self.pause = 2**30, 0.0  # bytes sent at once, seconds between them

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The clients of these tests hang up at will."""


class Clerk(BaseHTTPRequestHandler):
    server: Desk  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, desk = body["messages"][-1]["content"], self.server
        desk.bodies.append(body)
        desk.headers.append(self.headers)
        before = desk.asked[text]
        desk.asked[text] += 1
        status, headers, content = desk.reply(text, before)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(content), desk.piece):
            self.wfile.write(content[start : start + desk.piece])
            time.sleep(desk.pause)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@contextmanager
def desk(reply: Callable[[str, int], tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[Desk, TeacherConfig]]:
    server = Desk(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server, config(f"http://127.0.0.1:{server.server_port}/v1")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def config(base_url: str, **others: Any) -> TeacherConfig:
    return TeacherConfig(base_url=base_url, api_key_env="TEST_KEY", concurrency=4, tries=3, retry_wait=0.01, timeout=5.0, **others)


def good(text: str, **others: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | others.pop("choice", {})
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
    return json.dumps({"id": "1", "object": "chat.completion", "model": "gpt-1", "choices": [choice], "usage": usage} | others).encode()


def error(message: str, code: str | None = None) -> bytes:
    return json.dumps({"error": {"message": message, "type": "some_error", "param": None, "code": code}}).encode()


def ok(text: str) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, good(f"answer to {text}")


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_every_prompt_is_answered_once_and_never_again(cache: TeacherCache) -> None:
    with desk(lambda text, before: ok(text)) as (server, teacher):
        progress = list[tuple[int, int]]()
        summary = collect([*PROMPTS, PROMPTS[0]], teacher, cache, lambda done, total: progress.append((done, total)))
        again = collect(PROMPTS, teacher, cache)
    assert summary == again == Summary(wanted=40, ok=40, refused=0, failed=0, truncated=0, cost=summary.cost)
    assert summary.cost == pytest.approx(40 * (10 * 1.25e-6 + 20 * 10e-6))
    assert set(server.asked.values()) == {1} and len(server.asked) == 40
    assert progress[0] == (0, 40) and progress[-1] == (40, 40) and progress == sorted(progress)
    assert answers(PROMPTS, teacher, cache) == [Answer(prompt.id, f"answer to {prompt.text}") for prompt in PROMPTS]


def test_the_request_says_what_the_config_says(cache: TeacherCache) -> None:
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi 🙂"}]
    with desk(lambda text, before: ok(text)) as (server, teacher):
        collect([Prompt.of(talk)], teacher.model_copy(update={"temperature": 0.5, "max_tokens": 7, "samples": 2}), cache)
    assert server.bodies == [{"model": "gpt-5-chat", "messages": talk, "temperature": 0.5, "max_tokens": 7}] * 2
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert len({headers["Idempotency-Key"] for headers in server.headers}) == 2


def test_openai_s_own_hosts_are_asked_with_their_name_of_the_limit() -> None:
    for address in ("https://api.openai.com/v1", "https://x.openai.azure.com/openai/v1"):
        assert openai.limit_name(address) == "max_completion_tokens"
    assert openai.limit_name("http://127.0.0.1:8000/v1") == "max_tokens"


def test_no_more_requests_than_allowed_are_under_way(cache: TeacherCache) -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def slow(text: str, before: int) -> tuple[int, dict[str, str], bytes]:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return ok(text)

    with desk(slow) as (_, teacher):
        collect(PROMPTS, teacher, cache)
    assert most == teacher.concurrency


def test_samples_are_separate_answers(cache: TeacherCache) -> None:
    with desk(lambda text, before: (200, {}, good(f"{text}: {before}"))) as (_, teacher):
        three = teacher.model_copy(update={"samples": 3})
        assert collect(PROMPTS[:2], three, cache).wanted == 6
        assert collect(PROMPTS[:2], teacher, cache).wanted == 2
    found = [answer.text for answer in answers(PROMPTS[:1], three, cache)]
    assert sorted(found) == [f"question 0: {before}" for before in range(3)]
    assert [answer.text for answer in answers(PROMPTS[:1], teacher, cache)] == found[:1]


# --- replies ---------------------------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[int, dict[str, str], bytes]] = {
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
    "a huge reply of unknown length": (200, {"Content-Length": "900000"}, b" " * 300_000),
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


REFUSED: dict[str, tuple[int, dict[str, str], bytes]] = {
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
def test_a_fault_of_all_requests_stops_at_once(cache: TeacherCache, where: str, reply: tuple[int, dict[str, str], bytes]) -> None:
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
    def trickle(text: str, before: int) -> tuple[int, dict[str, str], bytes]:
        server.piece, server.pause = (2**30, 0.0) if before else (10, 0.1)
        return ok(text)

    with desk(trickle) as (server, teacher):
        assert collect(PROMPTS[:1], teacher.model_copy(update={"timeout": 0.5}), cache).ok == 1
    assert server.asked["question 0"] == 2


def test_after_a_fault_nothing_is_tried_again(cache: TeacherCache) -> None:
    def reply(text: str, before: int) -> tuple[int, dict[str, str], bytes]:
        if text == "question 0":
            return 500, {}, b""
        time.sleep(0.1)
        return 401, {}, error("no such key")

    with desk(reply) as (server, teacher), pytest.raises(UserError, match="refuses the key"):
        collect(PROMPTS[:2], teacher.model_copy(update={"retry_wait": 1.0}), cache)
    assert server.asked == {"question 0": 1, "question 1": 1}


def test_retry_after_is_heeded_by_all(cache: TeacherCache) -> None:
    times = list[float]()

    def limited(text: str, before: int) -> tuple[int, dict[str, str], bytes]:
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


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_is_under_way_and_asks_nothing_twice(cache: TeacherCache) -> None:
    def interrupting(text: str, before: int) -> tuple[int, dict[str, str], bytes]:
        if sum(server.asked.values()) == 15:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return ok(text)

    with desk(interrupting) as (server, teacher):
        with pytest.raises(KeyboardInterrupt):
            collect(PROMPTS, teacher, cache)
        asked = sum(server.asked.values())
        assert 15 <= asked < 15 + 2 * teacher.concurrency
        assert len(answers(PROMPTS, teacher, cache)) == asked
        assert collect(PROMPTS, teacher, cache).ok == len(PROMPTS)
    assert server.asked == {prompt.text: 1 for prompt in PROMPTS}


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_does_not_wait(cache: TeacherCache) -> None:
    def interrupting(text: str, before: int) -> tuple[int, dict[str, str], bytes]:
        for _ in range(2):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)
        return ok(text)

    with desk(interrupting) as (_, teacher):
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            collect(PROMPTS[:1], teacher, cache)
        assert time.monotonic() - started < 1.5
    assert answers(PROMPTS, teacher, cache) == []


COLLECTOR = """
import sys
from gadjax.records import Prompt
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import collect
from gadjax.teachers.config import TeacherConfig
teacher = TeacherConfig.model_validate_json(sys.argv[1])
collect([Prompt.of(f"question {number}") for number in range(40)], teacher, TeacherCache(sys.argv[2]))
"""


def test_a_killed_collector_s_rows_are_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "teacher.sqlite"

    def slow(text: str, before: int) -> tuple[int, dict[str, str], bytes]:
        time.sleep(0.05)
        return ok(text)

    with desk(slow) as (server, teacher):
        collector = subprocess.Popen([sys.executable, "-c", COLLECTOR, teacher.model_dump_json(), str(path)])
        while sum(server.asked.values()) < 15:
            assert collector.poll() is None
            time.sleep(0.01)
        collector.kill()
        collector.wait()
        with TeacherCache(path) as cache:
            kept = {answer.text.removeprefix("answer to ") for answer in answers(PROMPTS, teacher, cache)}
            cache._db.execute("UPDATE answers SET leased_until = 0")  # half a minute later
            assert collect(PROMPTS, teacher, cache).ok == len(PROMPTS)
    assert 0 < len(kept) < len(PROMPTS)
    assert all(server.asked[text] == 1 for text in kept)
    again = [text for text, times in server.asked.items() if times == 2]
    assert len(again) <= 3 * teacher.concurrency and max(server.asked.values()) == 2  # those under way, or not yet committed


def test_two_collectors_at_once_ask_everything_once(tmp_path: Path) -> None:
    summaries = list[Summary]()

    def run(teacher: TeacherConfig) -> None:
        with TeacherCache(tmp_path / "teacher.sqlite") as cache:
            summaries.append(collect(prompts, teacher, cache))

    def slow(text: str, before: int) -> tuple[int, dict[str, str], bytes]:
        time.sleep(0.01)
        return ok(text)

    prompts = [Prompt.of(f"question {number}") for number in range(3 * dispatch.LEASE)]
    with desk(slow) as (server, teacher):
        threads = [threading.Thread(target=run, args=(teacher,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [summary.ok for summary in summaries] == [len(prompts)] * 2
    assert set(server.asked.values()) == {1} and len(server.asked) == len(prompts)


def test_what_another_collector_holds_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "teacher.sqlite"
    with TeacherCache(path) as mine, TeacherCache(path) as other, desk(lambda text, before: ok(text)) as (server, teacher):
        held = requests_for(PROMPTS[0], teacher)[0]
        other.add([held])
        other.lease([held.key])
        timer = threading.Timer(0.3, other.record, [[(held, Outcome("ok", "the other's"))]])
        timer.start()
        progress = list[tuple[int, int]]()
        assert collect(PROMPTS[:3], teacher, mine, lambda done, total: progress.append((done, total))).ok == 3
        timer.join()
    assert "question 0" not in server.asked and progress[-1] == (3, 3)


def test_a_lease_is_held_as_long_as_the_answer_takes(tmp_path: Path) -> None:
    path, taken = tmp_path / "teacher.sqlite", list[tuple[set[str], set[str]]]()

    def slow(text: str, before: int) -> tuple[int, dict[str, str], bytes]:
        time.sleep(0.9)
        with TeacherCache(path) as other:
            taken.append(other.lease([request.key]))
        return ok(text)

    with TeacherCache(path, lease_seconds=0.4) as cache, desk(slow) as (_, teacher):
        request = requests_for(PROMPTS[0], teacher)[0]
        assert collect(PROMPTS[:1], teacher, cache).ok == 1
    assert taken == [(set(), {request.key})]


def test_nothing_more_is_asked_once_answers_cannot_be_kept(tmp_path: Path) -> None:
    class Full(TeacherCache):
        def record(self, *_: Any, **__: Any) -> None:
            raise OSError("no space left")

    with Full(tmp_path / "teacher.sqlite") as cache, desk(lambda text, before: ok(text)) as (server, teacher):
        prompts = [Prompt.of(f"question {number}") for number in range(500)]
        with pytest.raises(OSError, match="no space left"):
            collect(prompts, teacher, cache)
    assert len(server.asked) < 400


# --- the tutor and files ---------------------------------------------------------------------------------------------


def test_the_tutor_answers_alike_in_every_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts = [Prompt.of(text) for text in grammar.prompts(60, seed=0)]
    shuffled = random.Random(0).sample(prompts, len(prompts))
    teacher = TeacherConfig(backend="tutor", samples=2)
    found = []
    for name, order, concurrency in (("a", prompts, 16), ("b", shuffled, 1)):
        with TeacherCache(tmp_path / name) as cache:
            summary = collect(order, teacher.model_copy(update={"concurrency": concurrency}), cache)
            assert summary == Summary(wanted=120, ok=120, refused=0, failed=0, truncated=0, cost=0.0)
            found.append(answers(prompts, teacher, cache))
    assert found[0] == found[1]
    texts = {prompt.id: prompt.text for prompt in prompts}
    assert all(grammar.judge(texts[answer.prompt_id], answer.text).valid for answer in found[0])
    assert any(one.text != two.text for one, two in zip(found[0][::2], found[0][1::2], strict=True))


def test_the_tutor_s_answer_depends_on_the_request_alone() -> None:
    def answer(text: str, seed: int | None) -> Sequence[Completion]:
        return complete([{"role": "user", "content": text}], temperature=1.0, max_tokens=None, seed=seed, n=8)

    one, two = grammar.prompts(2, seed=0)
    first = answer(one, 0)
    answer(two, 0)
    assert answer(one, 0) == first
    assert len({completion.text for completion in first}) > 1
    assert answer(one, 1) != first


def test_the_tutor_cuts_and_refuses(cache: TeacherCache) -> None:
    prompts = [Prompt.of(text) for text in grammar.prompts(5, seed=0)]
    short = TeacherConfig(backend="tutor", max_tokens=2)
    assert collect(prompts, short, cache).truncated == 5
    assert all(len(answer.text.split()) == 2 and answer.truncated for answer in answers(prompts, short, cache))
    with pytest.raises(UserError, match="status 400"):
        collect(PROMPTS[:1], short, cache)


def test_the_quickstart_s_thousands_are_split_and_collected(cache: TeacherCache) -> None:
    teacher = TeacherConfig(backend="tutor")
    train, validation = load_prompts(PromptsConfig(train="tutor:300", validation="tutor:50"), teacher, seed=0)
    assert collect([*train, *validation], teacher, cache).ok == 350
    assert [answer.prompt_id for answer in answers(validation, teacher, cache)] == [prompt.id for prompt in validation]


ROWS: list[dict[str, Any]] = [
    {"prompt": "p0", "response": "r0"},
    {"content": [{"role": "user", "content": "p1"}], "teacher_response": "r1", "finish_reason": "length"},
    {"messages": [{"role": "user", "content": "p2"}, {"role": "assistant", "content": "r2", "refusal": None}], "id": "two"},
]


def answer_file(path: Path, rows: list[dict[str, Any]]) -> TeacherConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TeacherConfig(backend="file", path=str(path))


def test_a_file_s_answers_go_through_the_cache(cache: TeacherCache, tmp_path: Path) -> None:
    teacher = answer_file(tmp_path / "a.jsonl", ROWS)
    train, validation = load_prompts(PromptsConfig(), teacher, seed=0)
    progress = list[tuple[int, int]]()
    summary = collect([*train, *validation], teacher, cache, lambda done, total: progress.append((done, total)))
    assert summary == Summary(wanted=3, ok=3, refused=0, failed=0, truncated=1, cost=0.0)
    assert progress[-1] == (3, 3)
    found = {answer.text: answer for answer in answers([*train, *validation], teacher, cache)}
    assert set(found) == {"r0", "r1", "r2"} and found["r1"].truncated and found["r2"].prompt_id == "two"


def test_a_mended_file_replaces_its_answers(cache: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "CHUNK", 2)
    prompts = PROMPTS[:5]
    for text in ("wrong", "right"):
        teacher = answer_file(tmp_path / "a.jsonl", [{"prompt": prompt.text, "response": text} for prompt in prompts])
        collect(prompts, teacher, cache)
        assert answers(prompts, teacher, cache) == [Answer(prompt.id, text) for prompt in prompts]


def test_rows_of_the_same_prompt_are_samples(cache: TeacherCache, tmp_path: Path) -> None:
    teacher = answer_file(tmp_path / "a.jsonl", [{"prompt": "p", "response": f"r{number}"} for number in range(3)])
    two = teacher.model_copy(update={"samples": 2})
    collect([Prompt.of("p")], two, cache)
    assert [answer.text for answer in answers([Prompt.of("p")], two, cache)] == ["r0", "r1"]
    with pytest.raises(UserError, match=r"^teacher.path: .* lacks 1 answers, the first being number 4 to 'p'"):
        collect([Prompt.of("p")], teacher.model_copy(update={"samples": 4}), cache)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "p"}, "has none of prompt/response"),
        ({"prompt": "p", "response": " "}, "the answer is empty"),
        ({"prompt": "p", "response": None}, "not a string"),
        ({"prompt": "", "response": "r"}, "the prompt is empty"),
        ({"messages": [{"role": "assistant", "content": "r"}]}, "not a list of messages"),
    ],
)
def test_a_broken_row_of_answers_is_told_with_its_line(cache: TeacherCache, tmp_path: Path, row: dict[str, Any], what: str) -> None:
    teacher = answer_file(tmp_path / "a.jsonl", [*ROWS, row])
    with pytest.raises(UserError, match=what) as told:
        collect([Prompt.of("p0")], teacher, cache)
    assert told.value.where == f"{tmp_path}/a.jsonl, line 4"


def test_the_config_refuses_nonsense() -> None:
    for nonsense in ({"backend": "file"}, {"samples": 0}, {"temperature": 3.0}, {"price": {"input": -1.0, "output": 0.0}}, {"typo": 1}):
        with pytest.raises(ValidationError):
            TeacherConfig.model_validate(nonsense)
