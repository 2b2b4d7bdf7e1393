"""The teacher's cache: keys, the life of a row, two collectors at once, and sudden death."""

import hashlib
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadjax.errors import UserError
from gadjax.teachers.cache import ANSWERS, TeacherCache
from gadjax.teachers.config import TeacherConfig
from gadjax.teachers.requests import Outcome, Request

OK = Outcome("ok", "text \x00 é", "stop", 3, 5, 0.25, "model-1")


def request(text: str, sample: int = 0) -> Request:
    return Request("openai", "gpt", ({"role": "user", "content": text},), {"temperature": 1.0, "max_tokens": 9}, sample)


REQUESTS = [request(str(number)) for number in range(5)]
KEYS = [request.key for request in REQUESTS]


def lease(cache: TeacherCache, keys: list[str]) -> tuple[set[str], set[str]]:
    """The keys that were taken, and those that another holds."""
    return cache.lease(dict.fromkeys(keys, 0.0))[:2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "teacher.sqlite"


def test_the_key_is_the_hash_of_the_whole_canonical_request() -> None:
    expected = (
        '{"messages":[{"content":"é","role":"user"}],"model":"gpt","parameters":{"max_tokens":9,"temperature":1.0},'
        '"provider":"openai","sample":0,"version":1}'
    )
    assert request("é").json == expected
    assert request("é").key == hashlib.sha256(expected.encode()).hexdigest()
    base = request("x")
    others = [
        request("y"),
        request("x", 1),
        replace(base, provider="openai:host"),
        replace(base, model="other"),
        replace(base, messages=({"role": "system", "content": "x"},)),
        replace(base, parameters={"temperature": 1.0, "max_tokens": 10}),
        replace(base, parameters={"temperature": 1.0, "max_tokens": 9, "seed": 0}),
    ]
    assert len({base.key, *(other.key for other in others)}) == 1 + len(others)
    assert replace(base, parameters={"max_tokens": 9, "temperature": 1.0}).key == base.key


def test_the_provider_tells_hosts_apart_and_no_ports_or_secrets() -> None:
    def provider(address: str | None) -> str:
        return TeacherConfig(base_url=address).provider

    assert provider(None) == "openai"
    assert provider("http://localhost:8000/v1") == provider("http://localhost:9000/v1/") == "openai:localhost/v1"
    assert provider("https://other.example/v1") != provider("http://localhost/v1")
    for address in ("https://user:secret@host/v1", "https://host/v1?key=secret", "host/v1", "ftp://host"):
        with pytest.raises(UserError, match="base_url"):
            TeacherConfig(base_url=address)


def test_the_life_of_a_row(path: Path) -> None:
    with TeacherCache(path) as cache:
        cache.add(REQUESTS)
        assert lease(cache, KEYS[:3]) == (set(KEYS[:3]), set())
        assert lease(cache, KEYS[:3]) == (set(), set())  # it is ours already
        cache.record([(REQUESTS[0], OK), (REQUESTS[1], Outcome("refused", "no", error="will not"))])
        cache.record([(REQUESTS[2], Outcome("failed", error="status 500"))])
    with TeacherCache(path) as cache:
        assert cache.outcomes(KEYS) == {
            KEYS[0]: OK,
            KEYS[1]: Outcome("refused", "no", error="will not"),
            KEYS[2]: Outcome("failed", error="status 500"),
        }
        assert cache.answered(KEYS) == set(KEYS[:2])
        assert cache.tally(KEYS) == [("failed", "", 1, 0.0), ("ok", "stop", 1, 0.25), ("pending", "", 2, 0.0), ("refused", "", 1, 0.0)]
        assert cache.cost() == 0.25
        cache.add(REQUESTS)  # a later run
        assert lease(cache, KEYS) == (set(KEYS[2:]), set())


def test_an_answer_stays_what_it_is_unless_it_is_replaced(path: Path) -> None:
    with TeacherCache(path) as cache:
        cache.record([(REQUESTS[0], OK)])
        for other in (Outcome("ok", "other"), Outcome("failed", error="late")):
            cache.record([(REQUESTS[0], other)])
            assert cache.outcomes(KEYS) == {KEYS[0]: OK}
        cache.record([(REQUESTS[0], Outcome("ok", "other"))], replace=True)
        assert cache.outcomes(KEYS) == {KEYS[0]: Outcome("ok", "other")}


def test_two_collectors_share_the_rows(path: Path) -> None:
    with TeacherCache(path) as one, TeacherCache(path) as two:
        one.add(REQUESTS)
        two.add(REQUESTS)
        assert lease(one, KEYS[:2]) == (set(KEYS[:2]), set())
        assert lease(two, KEYS) == (set(KEYS[2:]), set(KEYS[:2]))
        one.release()
        assert lease(two, KEYS[:2]) == (set(KEYS[:2]), set())
        assert lease(one, KEYS) == (set(), set(KEYS))


def test_a_lease_runs_out_unless_it_is_renewed(path: Path) -> None:
    with TeacherCache(path, lease_seconds=0.3) as one, TeacherCache(path) as two:
        one.add(REQUESTS)
        lease(one, KEYS[:1])
        for _ in range(3):
            time.sleep(0.15)
            one.renew()
        assert lease(two, KEYS[:1]) == (set(), set(KEYS[:1]))
        time.sleep(0.35)
        assert lease(two, KEYS[:1]) == (set(KEYS[:1]), set())
        one.renew()  # too late: it is the other's
        one.release()
        assert lease(one, KEYS[:1]) == (set(), set(KEYS[:1]))
        one.record([(REQUESTS[0], OK)])  # yet an answer that arrives is kept, once
        two.record([(REQUESTS[0], Outcome("ok", "second"))])
        assert two.outcomes(KEYS) == {KEYS[0]: OK}


def test_what_rows_may_cost_is_set_aside_for_all(path: Path) -> None:
    with TeacherCache(path, lease_seconds=0.3) as one, TeacherCache(path) as two:
        one.add(REQUESTS)
        assert one.lease(dict.fromkeys(KEYS[:3], 4.0), limit=10.0) == (set(KEYS[:2]), set(), {KEYS[2]}, 8.0)
        assert two.lease(dict.fromkeys(KEYS, 4.0), limit=10.0) == (set(), set(KEYS[:2]), set(KEYS[2:]), 8.0)
        assert two.lease({KEYS[2]: 0.0}, limit=1.0).taken == {KEYS[2]}  # what is free may be asked
        one.record([(REQUESTS[0], replace(OK, cost=1.0))])
        assert not one.reserve(KEYS[1], 9.5, limit=10.0)
        assert one.reserve(KEYS[1], 8.5, limit=10.0)
        assert two.lease({KEYS[3]: 1.0}, limit=10.0).dear == {KEYS[3]}
        time.sleep(0.35)
        assert two.lease({KEYS[3]: 9.0}, limit=10.0).taken == {KEYS[3]}  # the other's lease has run out


def test_what_failed_tries_have_cost_stays(path: Path) -> None:
    with TeacherCache(path) as cache:
        for outcome in (Outcome("failed", cost=0.5), Outcome("failed", cost=0.25), replace(OK, cost=1.0), replace(OK, cost=1.0)):
            cache.add(REQUESTS[:1])
            cache.record([(REQUESTS[0], outcome)])
        assert cache.cost() == 1.75
        cache.record([(REQUESTS[0], replace(OK, cost=0.0))], replace=True)
        assert cache.cost() == 0


def test_a_cache_of_the_first_layout_is_taken_over(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute(ANSWERS.replace(",\n        reserved REAL NOT NULL DEFAULT 0", ""))
        db.execute("INSERT INTO answers (key, request, state, text, created, updated) VALUES (?, ?, 'ok', 'old', 0, 0)", (KEYS[0], ""))
        db.execute("PRAGMA user_version = 1")
    db.close()
    with TeacherCache(path, read_only=True) as cache:
        assert cache.outcomes(KEYS)[KEYS[0]].text == "old"
    with TeacherCache(path) as cache:
        cache.add(REQUESTS)
        assert lease(cache, KEYS) == (set(KEYS[1:]), set())
        assert cache.outcomes(KEYS)[KEYS[0]].text == "old"


def test_a_cache_of_the_second_layout_is_taken_over(path: Path) -> None:
    with TeacherCache(path) as cache:
        cache.add(REQUESTS)
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE shared")
        db.execute("PRAGMA user_version = 2")
    db.close()
    for change in (1.0, 2.0):
        with TeacherCache(path) as cache, cache.shared("pace") as numbers:
            assert numbers == ({} if change == 1 else {"now": 1.0})
            numbers["now"] = change
            assert cache._db.execute("PRAGMA synchronous").fetchone() == (1,)
    with TeacherCache(path) as cache:
        with pytest.raises(ZeroDivisionError), cache.shared("pace") as numbers:
            numbers["now"] = 1 / 0
        with cache.shared("pace") as numbers:
            assert numbers == {"now": 2.0}
        assert cache._db.execute("PRAGMA synchronous").fetchone() == (2,) and lease(cache, KEYS)[0] == set(KEYS)


def test_a_request_is_read_again_from_its_text() -> None:
    wanted = Request("openai", "gpt", ({"role": "user", "content": "é"},), {"temperature": 0.5, "seed": 3}, 2)
    assert Request.parse(wanted.json) == wanted


def write_until_killed(path: Path, first: int, acknowledged: Connection) -> None:
    with TeacherCache(path) as cache:
        for number in range(first, first + 100_000, 3):
            cache.record([(request(str(number + offset)), replace(OK, text=str(number + offset))) for offset in range(3)])
            acknowledged.send(number)


def test_acknowledged_answers_survive_a_kill(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ends, writers = [], []
    for first in (0, 1_000_000):
        ours, theirs = context.Pipe(duplex=False)
        writers.append(context.Process(target=write_until_killed, args=(path, first, theirs)))
        writers[-1].start()
        theirs.close()
        ends.append(ours)
    for end in ends:
        assert end.poll(60)
    time.sleep(0.3)
    for writer in writers:
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
    numbers = [number + offset for end in ends for number in received(end) for offset in range(3)]
    with TeacherCache(path) as cache:
        found = cache.outcomes(request(str(number)).key for number in numbers)
    assert len(numbers) >= 6
    assert sorted(outcome.text for outcome in found.values()) == sorted(map(str, numbers))
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*) % 3 FROM answers").fetchone() == (0,)  # a transaction is whole or absent
    db.close()


def received(end: Connection) -> list[int]:
    numbers = []
    try:
        while True:
            numbers.append(end.recv())
    except EOFError:
        return numbers


def test_every_commit_is_flushed_to_the_disk(path: Path) -> None:
    with TeacherCache(path) as cache:
        assert cache._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert cache._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_opening_and_reading_change_nothing(path: Path) -> None:
    with TeacherCache(path) as cache:
        cache.record([(REQUESTS[0], OK)])
    before = path.read_bytes()
    with TeacherCache(path) as cache:
        assert cache.cost() == 0.25
    with TeacherCache(path, read_only=True) as cache:
        assert cache.outcomes(KEYS) == {KEYS[0]: OK}
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            cache.add(REQUESTS)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_sees_what_a_killed_writer_committed(path: Path) -> None:
    program = (
        "import os, sys; from gadjax.teachers.cache import *; from gadjax.teachers.requests import *; cache = TeacherCache(sys.argv[1]);"
        "cache.record([(Request('p', 'm', (), {}), Outcome('ok', 'kept'))]); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert path.with_name(f"{path.name}-wal").exists()
    wanted = Request("p", "m", (), {})
    with TeacherCache(path, read_only=True) as cache:
        assert cache.outcomes([wanted.key])[wanted.key].text == "kept"


def test_a_reader_makes_no_file(path: Path) -> None:
    path.parent.mkdir()
    with pytest.raises(UserError, match="cannot be opened as a cache"):
        TeacherCache(path, read_only=True)
    assert list(path.parent.iterdir()) == []


def test_a_file_that_is_no_cache_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("no database at all, but long enough to look at")
    with pytest.raises(UserError, match="cannot be opened as a cache"):
        TeacherCache(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UserError, match="version 99"):
        TeacherCache(path)


@given(st.text(max_size=20), st.text(max_size=20))
def test_equal_requests_and_only_they_have_equal_keys(one: str, other: str) -> None:
    assert (request(one).key == request(other).key) == (one == other)
