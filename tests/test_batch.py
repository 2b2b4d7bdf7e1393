"""The Batch API, against a fake of it on this machine, with the real client: what is kept, and what is never asked twice."""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gadjax.errors import UserError
from gadjax.teachers import batch as batches
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.collect import all_requests, answers, collect
from gadjax.teachers.config import BatchConfig, Price, TeacherConfig
from gadjax.teachers.estimate import estimate
from tests.desk import KEY, PROMPTS, good

Line = dict[str, Any]


def answered(line: Line, text: str = "") -> Line:
    """The line of an output file."""
    body = json.loads(good(text or f"answer to {line['body']['messages'][-1]['content']}"))
    return {"id": "r", "custom_id": line["custom_id"], "response": {"status_code": 200, "request_id": "q", "body": body}, "error": None}


def refused(line: Line, status: int, code: str) -> Line:
    """The line of an error file."""
    body = {"error": {"message": f"it is {code}", "code": code, "type": "invalid_request_error", "param": None}}
    return {"id": "r", "custom_id": line["custom_id"], "response": {"status_code": status, "body": body}, "error": None}


def expired(line: Line) -> Line:
    return {"id": "r", "custom_id": line["custom_id"], "response": None, "error": {"code": "batch_expired", "message": "too late"}}


class Bureau(ThreadingHTTPServer):
    """Takes files and batches; `finish` says what a batch ends with: its status and the lines of its two files."""

    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Clerk)
        self.files, self.batches, self.looks = dict[str, bytes](), dict[str, Any](), Counter[str]()
        self.finish: Callable[[list[Line]], tuple[str, list[Line], list[Line]]] = lambda lines: ("completed", [*map(answered, lines)], [])
        self.asked, self.patience = Counter[str](), 1  # how often each text was asked, looks before a batch ends
        self.faults = list[tuple[str, int | None]]()  # (a part of "METHOD /path", status; None: done, but the connection breaks), each once

    @property
    def sizes(self) -> list[int]:
        return [len(each["lines"]) for each in self.batches.values()]

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        self.asked.update(line["body"]["messages"][-1]["content"] for line in lines)
        name = f"batch_{len(self.batches)}"
        self.batches[name] = {"lines": lines, "told": {"id": name, "status": "validating", "metadata": body["metadata"]}, "request": body}
        return self.told(name)

    def told(self, name: str) -> dict[str, Any]:
        defaults = {
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "created_at": 1,
            "input_file_id": "f",
        }
        return defaults | self.batches[name]["told"]

    def look(self, name: str) -> dict[str, Any]:
        self.looks[name] += 1
        if self.looks[name] == self.patience:
            status, output, errors = self.finish(self.batches[name]["lines"])
            told = self.batches[name]["told"]
            told["status"] = status
            for field, rows in (("output_file_id", output), ("error_file_id", errors)):
                if rows:
                    told[field] = f"{name}_{field}"
                    self.files[told[field]] = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()
        return self.told(name)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are a part of it."""


class Clerk(BaseHTTPRequestHandler):
    server: Bureau  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        if self.path == "/v1/files":
            self.reply(lambda: self.take(content))
        else:
            self.reply(lambda: self.server.create(json.loads(content)))

    def do_GET(self) -> None:
        if self.path.startswith("/v1/batches?"):
            made = [self.server.told(name) for name in self.server.batches]
            self.reply(lambda: {"object": "list", "data": made[::-1], "has_more": False})
        elif self.path.endswith("/content"):
            self.reply(lambda: self.server.files[self.path.split("/")[-2]])
        else:
            self.reply(lambda: self.server.look(self.path.split("/")[-1]))

    def take(self, content: bytes) -> dict[str, Any]:
        part = re.search(rb"filename=.*?\r\n\r\n(.*?)\r\n--", content, re.DOTALL)
        assert part
        assert b'name="purpose"\r\n\r\nbatch' in content
        name = f"file_{len(self.server.files)}"
        self.server.files[name] = part[1]
        return {"id": name, "object": "file", "bytes": len(part[1]), "created_at": 1, "filename": "x", "purpose": "batch"}

    def reply(self, work: Callable[[], Any]) -> None:
        here = f"{self.command} {self.path}"
        fault = next((each for each in self.server.faults if each[0] in here), None)
        status = 200
        if fault:
            self.server.faults.remove(fault)
            if fault[1] is not None:
                status, work = fault[1], lambda: {"error": {"message": "a fault", "code": None}}
        done = work()
        if fault and fault[1] is None:
            self.close_connection = True
            if isinstance(done, bytes):  # half of a file
                self.start(200, len(done))
                self.wfile.write(done[: len(done) // 2])
            return
        content = done if isinstance(done, bytes) else json.dumps(done).encode()
        self.start(status, len(content))
        self.wfile.write(content)

    def start(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def bureau() -> Iterator[Bureau]:
    server = Bureau()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def teacher(bureau: Bureau, monkeypatch: pytest.MonkeyPatch) -> TeacherConfig:
    monkeypatch.setenv("TEST_KEY", KEY)
    batch = BatchConfig(requests=15, poll_seconds=0.01)
    address = f"http://127.0.0.1:{bureau.server_port}/v1"
    return TeacherConfig(base_url=address, api_key_env="TEST_KEY", tries=3, retry_wait=0.01, timeout=5.0, batch=batch)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[TeacherCache]:
    with TeacherCache(tmp_path / "teacher.sqlite") as cache:
        yield cache


def test_batches_bring_the_same_answers_for_half_the_price(bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache) -> None:
    bureau.patience, bureau.finish = 3, lambda lines: ("completed", [answered(line) for line in reversed(lines)], [])
    at_once = teacher.model_copy(update={"batch": None})
    most = [estimate(all_requests(PROMPTS, each), each, cache).cost for each in (teacher, at_once)]
    assert most[0] == most[1] / 2
    progress = list[tuple[int, int]]()
    summary = collect(PROMPTS, teacher, cache, lambda done, total: progress.append((done, total)))
    assert (summary.ok, bureau.sizes, progress[-1]) == (40, [15, 15, 10], (40, 40))
    assert summary.cost == pytest.approx(40 * (10 * 1.25e-6 + 20 * 10e-6) / 2)
    assert [answer.text for answer in answers(PROMPTS, at_once, cache)] == [f"answer to {prompt.text}" for prompt in PROMPTS]
    assert collect(PROMPTS, at_once, cache) == summary == collect(PROMPTS, teacher, cache)  # nothing is asked again
    line = bureau.batches["batch_0"]["lines"][0]
    assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
    assert line["body"] == {"model": "gpt-5-chat", "messages": list(PROMPTS[0].messages), "temperature": 1.0, "max_tokens": 2048}
    request = bureau.batches["batch_0"]["request"]
    assert (request["endpoint"], request["completion_window"]) == ("/v1/chat/completions", "24h")


def test_what_an_expired_batch_finished_is_kept_and_the_rest_asked_again(
    bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache
) -> None:
    def finish(lines: list[Line]) -> tuple[str, list[Line], list[Line]]:
        if len(bureau.batches) > 3:
            return "completed", [*map(answered, lines)], []
        return "expired", [*map(answered, lines[:9])], [*map(expired, lines[9:])]

    bureau.finish = finish
    assert collect(PROMPTS, teacher, cache).ok == 40
    assert bureau.sizes == [15, 15, 10, 13] and bureau.asked.total() == 53


def test_every_line_is_sorted_as_a_reply_is(bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache) -> None:
    def finish(lines: list[Line]) -> tuple[str, list[Any], list[Line]]:
        by_text = {line["body"]["messages"][-1]["content"].split()[1]: line for line in lines}
        output: list[Any] = []
        if "0" in by_text and len(bureau.batches) == 1:
            output.append(answered(by_text["0"], " "))  # empty: a refusal
            output += [answered(by_text["1"]), answered(by_text["1"], "a second answer"), "no JSON\n", "[]\n", "{}\n"]
            output.append(answered(by_text["2"]) | {"custom_id": "nobody's"})
            output.append(answered(by_text["3"]) | {"response": {"status_code": 200, "body": {"choices": []}}})
            errors = [refused(by_text["4"], 400, "content_filter"), refused(by_text["5"], 400, "context_length_exceeded")]
            return "completed", output, [*errors, refused(by_text["6"], 500, "server_error")]
        return "completed", [answered(line, "later") for line in lines], []

    bureau.finish = finish
    summary = collect(PROMPTS[:7], teacher, cache)
    assert (summary.ok, summary.refused, summary.failed) == (4, 2, 1)
    assert [answer.text for answer in answers(PROMPTS[:7], teacher, cache)] == ["answer to question 1", "later", "later", "later"]
    assert bureau.sizes == [7, 3]


def test_what_no_batch_brings_fails_after_its_tries(bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache) -> None:
    bureau.finish = lambda lines: ("cancelled", [*map(answered, lines[:2])], [])
    summary = collect(PROMPTS[:7], teacher, cache)
    assert (summary.ok, summary.failed, bureau.sizes) == (6, 1, [7, 5, 3])


def test_batches_are_taken_up_by_the_next_run(
    bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    bureau.patience = 2
    with monkeypatch.context() as patch:
        patch.setattr(batches.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            collect(PROMPTS, teacher, cache)
    with pytest.raises(UserError, match=r"^teacher.batch: is left out while answers are under way"):
        collect(PROMPTS, teacher.model_copy(update={"batch": None}), cache)
    assert collect(PROMPTS, teacher, cache).ok == 40
    assert bureau.asked.total() == 40


@pytest.mark.parametrize("where", ["POST /v1/batches", "POST /v1/files"])
def test_a_batch_whose_creation_was_not_seen_is_found_again(
    bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache, where: str
) -> None:
    bureau.faults.append((where, None))
    assert collect(PROMPTS, teacher, cache).ok == 40
    assert bureau.asked.total() == 40 and not bureau.faults


@pytest.mark.parametrize("made", [True, False], ids=["made", "not made"])
def test_a_process_that_dies_while_a_batch_is_made_asks_nothing_twice(
    bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    class Death(BaseException):
        """As sudden as a kill: nothing catches it."""

    def die(*_: object) -> None:
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(*((TeacherCache, "name_batch", die) if made else (batches._Batches, "_created", die)))
        with pytest.raises(Death):
            collect(PROMPTS, teacher, cache)
    assert len(bureau.batches) == made
    assert collect(PROMPTS, teacher, cache).ok == 40
    assert bureau.asked.total() == 40


def test_a_file_that_breaks_off_is_read_again(bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache) -> None:
    bureau.faults += [("/content", None), ("/content", 503), ("GET /v1/batches/", 500), ("GET /v1/batches/", None)]
    assert collect(PROMPTS, teacher, cache).ok == 40
    assert bureau.asked.total() == 40 and not bureau.faults


def test_max_cost_bounds_what_is_sent(bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache) -> None:
    dear = teacher.model_copy(update={"price": Price(input=0.0, output=1e6), "max_tokens": 20, "max_cost": 115.0})  # 10 dollars an answer
    with pytest.raises(UserError, match=r"^teacher.max_cost: 110.00 of 115.00 dollars are spent"):
        collect(PROMPTS, dear, cache)
    assert bureau.asked.total() == 11 and cache.cost() == 110
    assert collect(PROMPTS, dear.model_copy(update={"max_cost": 400.0}), cache).ok == 40


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([("POST /v1/files", 401)], "teacher.api_key_env: .* refuses the key"),
        ([("POST /v1/batches", 400)], "teacher.batch: the endpoint refuses it .status 400: a fault"),
        ([("POST /v1/files", 500)] * 3, "teacher.base_url: .* does not serve batches"),
    ],
    ids=["a key", "a request", "a server"],
)
def test_what_the_endpoint_refuses_is_told_and_nothing_stays_leased(
    bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache, faults: list[tuple[str, int | None]], message: str
) -> None:
    bureau.faults += faults
    with pytest.raises(UserError, match=f"^{message}") as told:
        collect(PROMPTS, teacher, cache)
    assert KEY not in str(told.value)
    assert cache.open_batches(teacher.provider) == []
    assert collect(PROMPTS, teacher.model_copy(update={"batch": BatchConfig(poll_seconds=0.01)}), cache).ok == 40


def test_a_batch_that_fails_as_a_whole_stops(bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache) -> None:
    def finish(lines: list[Line]) -> tuple[str, list[Line], list[Line]]:
        for each in bureau.batches.values():
            each["told"]["errors"] = {"object": "list", "data": [{"code": "token_limit_exceeded", "message": "Enqueued token limit"}]}
        return "failed", [], []

    bureau.finish = finish
    with pytest.raises(UserError, match=r"^teacher.batch: the endpoint refuses the batch .Enqueued token limit"):
        collect(PROMPTS[:5], teacher, cache)
    assert cache.open_batches(teacher.provider) == []


def test_one_process_at_a_time_collects_batches(bureau: Bureau, teacher: TeacherConfig, cache: TeacherCache) -> None:
    with batches._alone(cache), pytest.raises(UserError, match="another process collects its batches"):
        collect(PROMPTS, teacher, cache)


def test_lines_that_are_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_REPLY", 10)
    chunks = [b"one\ntw", b"o\n\n", b"x" * 30, b"y" * 5, b"\nthree", b"\nfour"]
    assert list(batches._lines(chunks)) == [b"one", b"two", b"three", b"four"]
