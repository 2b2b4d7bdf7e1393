"""Collecting over real sockets: what is asked, how often, and what is kept when it is interrupted."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gadjax.completions import Ask, Piece
from gadjax.errors import UserError
from gadjax.prompts import PromptsConfig
from gadjax.records import Answer, Prompt
from gadjax.teachers import dispatch, file, grammar
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import Summary, answers, collect, requests_for
from gadjax.teachers.config import TeacherConfig
from gadjax.teachers.requests import Outcome
from gadjax.teachers.sources import load_prompts
from gadjax.teachers.tutor import complete
from tests.desk import KEY, PROMPTS, Reply, desk, good, ok


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


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_every_prompt_is_answered_once_and_never_again(cache: TeacherCache) -> None:
    with desk(lambda text, before: ok(text)) as (server, teacher):
        progress = list[tuple[int, int]]()
        summary = collect([*PROMPTS, PROMPTS[0]], teacher, cache, lambda done, total: progress.append((done, total)))
        again = collect(PROMPTS[::-1], teacher, cache)  # in another order
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


def test_no_more_requests_than_allowed_are_under_way(cache: TeacherCache) -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def slow(text: str, before: int) -> Reply:
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


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_is_under_way_and_asks_nothing_twice(cache: TeacherCache) -> None:
    calls = itertools.count(1)

    def interrupting(text: str, before: int) -> Reply:
        if next(calls) == 15:
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
    def interrupting(text: str, before: int) -> Reply:
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


def test_sigterm_keeps_what_is_under_way_where_ctrl_c_is_ignored(tmp_path: Path) -> None:
    def slow(text: str, before: int) -> Reply:
        time.sleep(0.3)
        return ok(text)

    program = f"""
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from gadjax import cli
{COLLECTOR.replace("collect([", "cli._call = lambda *_: collect([", 1)}
cli.main(["collect", __import__("os").devnull])
"""
    with desk(slow) as (server, teacher):
        path = tmp_path / "teacher.sqlite"
        command = [sys.executable, "-c", program, teacher.model_dump_json(), str(path)]
        collector = subprocess.Popen(command, stderr=subprocess.PIPE)
        while sum(server.asked.values()) < 10:
            assert collector.poll() is None
            time.sleep(0.01)
        collector.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert collector.poll() is None
        collector.terminate()
        _, told = collector.communicate(timeout=20)
        asked = sum(server.asked.values())
    assert (collector.returncode, told.decode()) == (143, "interrupted; the same command goes on from the last checkpoint\n")
    with TeacherCache(path, read_only=True) as cache:
        assert len(answers(PROMPTS, teacher, cache)) == asked < len(PROMPTS)


def test_a_killed_collector_s_rows_are_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "teacher.sqlite"

    def slow(text: str, before: int) -> Reply:
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
    assert len(again) <= teacher.concurrency and max(server.asked.values()) == 2


def test_two_collectors_at_once_ask_everything_once(tmp_path: Path) -> None:
    summaries = list[Summary]()

    def run(teacher: TeacherConfig) -> None:
        with TeacherCache(tmp_path / "teacher.sqlite") as cache:
            summaries.append(collect(prompts, teacher, cache))

    def slow(text: str, before: int) -> Reply:
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
        other.lease({held.key: 0.0})
        timer = threading.Timer(0.3, other.record, [[(held, Outcome("ok", "the other's"))]])
        timer.start()
        progress = list[tuple[int, int]]()
        assert collect(PROMPTS[:3], teacher, mine, lambda done, total: progress.append((done, total))).ok == 3
        timer.join()
    assert "question 0" not in server.asked and progress[-1] == (3, 3)


def test_a_lease_is_held_as_long_as_the_answer_takes(tmp_path: Path) -> None:
    path, taken = tmp_path / "teacher.sqlite", list[tuple[set[str], set[str]]]()

    def slow(text: str, before: int) -> Reply:
        time.sleep(0.9)
        with TeacherCache(path) as other:
            taken.append(other.lease({request.key: 0.0})[:2])
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
    def answer(text: str, seed: int | None) -> list[Piece]:
        return list(complete(Ask(messages=({"role": "user", "content": text},), seed=seed, n=8)))

    one, two = grammar.prompts(2, seed=0)
    first = answer(one, 0)
    answer(two, 0)
    assert answer(one, 0) == first
    assert len({piece.text for piece in first}) > 1
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


def test_an_empty_answer_of_a_file_is_a_refusal(cache: TeacherCache, tmp_path: Path) -> None:
    teacher = answer_file(tmp_path / "a.jsonl", [*ROWS[:1], {"prompt": "p", "response": " "}])
    summary = collect([Prompt.of("p0"), Prompt.of("p")], teacher, cache)
    assert (summary.ok, summary.refused) == (1, 1)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "p"}, "has none of prompt/response"),
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
