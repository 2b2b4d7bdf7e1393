"""The server, over a real socket: what it answers, what it refuses, and how it ends."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from gadjax.errors import UserError
from gadjax.records import Message
from gadjax.server import Completion, Server

MAX_BODY = 10_000
GOOD = {"model": "any", "messages": [{"role": "user", "content": "hi 🙂"}]}


def echo(messages: Sequence[Message], *, temperature: float, max_tokens: int | None, seed: int | None, n: int) -> Sequence[Completion]:
    """Tells what it was asked."""
    asked = messages[-1]["content"]
    if asked == "mine":
        raise UserError("messages", "not understood", "ask otherwise")
    if asked == "fault":
        raise ValueError("a secret of the server")
    return [Completion(f"{asked} {temperature} {max_tokens} {seed} {i}", i == 1, 3, 5) for i in range(n)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(echo, model="echo", max_body=MAX_BODY) as server:
        yield server


def connect(server: Server) -> HTTPConnection:
    return HTTPConnection("127.0.0.1", urlsplit(server.address).port or 0, timeout=10)


def call(server: Server, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    connection = connect(server)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def chat(server: Server, body: object) -> tuple[int, dict[str, Any]]:
    return call(server, "POST", "/v1/chat/completions", body if isinstance(body, bytes) else json.dumps(body).encode())


def test_the_openai_client_is_answered(server: Server) -> None:
    with openai.OpenAI(base_url=server.address, api_key="any") as client:
        reply = client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "hi 🙂"}], temperature=0.5, max_completion_tokens=7, seed=9, n=2
        )
        assert [model.id for model in client.models.list()] == ["echo"]
    assert [choice.message.content for choice in reply.choices] == ["hi 🙂 0.5 7 9 0", "hi 🙂 0.5 7 9 1"]
    assert [choice.finish_reason for choice in reply.choices] == ["stop", "length"]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 10, 13)


def test_defaults_and_the_older_name_of_the_limit(server: Server) -> None:
    content = [choice["message"]["content"] for choice in chat(server, {**GOOD, "max_tokens": 4})[1]["choices"]]
    assert content == ["hi 🙂 1.0 4 None 0"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        (b"[" * 5000, 400, "not JSON"),
        ([1], 400, "dictionary"),
        ({}, 400, "messages"),
        ({"messages": []}, 400, "not a list"),
        ({"messages": ["x"]}, 400, "role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "empty"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "Unicode"),
        ({**GOOD, "temperature": "hot"}, 400, "temperature"),
        ({**GOOD, "temperature": 3}, 400, "temperature"),
        (b'{"messages": [], "temperature": NaN}', 400, "temperature"),
        ({**GOOD, "max_tokens": 0}, 400, "max_tokens"),
        ({**GOOD, "n": 1000}, 400, "n: "),
        ({**GOOD, "stream": True}, 400, "stream"),
        ({"messages": [{"role": "user", "content": "mine"}]}, 400, "not understood"),
        ({"messages": [{"role": "user", "content": "fault"}]}, 500, "its log"),
        (b"x" * (MAX_BODY + 1), 413, "more than"),
    ],
)
def test_a_bad_request_is_refused_in_openai_s_shape(server: Server, body: object, status: int, message: str) -> None:
    got, content = chat(server, body)
    assert got == status
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert message in content["error"]["message"]
    assert "secret" not in content["error"]["message"]
    assert chat(server, GOOD)[0] == 200  # and the next one is answered


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("POST", "/v1/completions"), ("GET", "/v1/chat/completions"), ("PUT", "/v1/models")]
)
def test_what_is_not_there_is_refused_in_openai_s_shape(server: Server, method: str, path: str) -> None:
    status, content = call(server, method, path)
    assert status == (501 if method == "PUT" else 404)
    assert content["error"]["message"]


@pytest.mark.parametrize(
    ("header", "body", "status"),
    [
        (b"Transfer-Encoding: chunked", b"", b"411"),
        (b"Content-Length: -1", b"", b"411"),
        (b"Content-Length: 99999999999999", b"x" * 4 * MAX_BODY, b"413"),  # answered without reading to the end
    ],
)
def test_a_body_without_an_honest_length_is_refused(server: Server, header: bytes, body: bytes, status: bytes) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(server.address).port), timeout=10) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + header + b"\r\n\r\n" + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 " + status)


def test_a_connection_serves_many_requests_without_delay(server: Server) -> None:
    connection = connect(server)
    body, started = json.dumps(GOOD), time.monotonic()
    for _ in range(50):
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        response.read()
        assert response.status == 200 and connection.sock is not None
    connection.close()
    assert time.monotonic() - started < 1.5  # Nagle's algorithm would hold each reply back for 40 ms


def test_stopping_waits_for_answers_and_not_for_idle_connections() -> None:
    entered, go = threading.Event(), threading.Event()

    def slow(messages: Sequence[Message], **_: object) -> Sequence[Completion]:
        entered.set()
        go.wait(10)
        return [Completion("late", False, 1, 1)]

    before = set(threading.enumerate())
    server, replies = Server(slow, model="slow"), list[int]()
    server.start()
    idle = connect(server)
    idle.connect()
    asking = threading.Thread(target=lambda: replies.append(chat(server, GOOD)[0]))
    asking.start()
    assert entered.wait(10)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    time.sleep(0.2)
    assert stopping.is_alive()
    go.set()
    for thread in (asking, stopping):
        thread.join(5)
        assert not thread.is_alive()
    assert replies == [200]
    idle.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConnectionRefusedError):
        connect(server).connect()


def test_it_listens_on_this_machine_only_and_tells_a_taken_port(server: Server) -> None:
    assert server.address.startswith("http://127.0.0.1:")
    with pytest.raises(UserError, match="port"):
        Server(echo, model="second", port=urlsplit(server.address).port or 0)
