"""The server, over a real socket: what it answers, what it refuses, and how it ends."""

import json
import socket
import threading
import time
from collections.abc import Generator, Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from gadjax.completions import Ask, Piece, Token
from gadjax.errors import UserError
from gadjax.server import Server

MAX_BODY = 10_000
CLOSED = threading.Event()  # a stream was
GOOD = {"model": "any", "messages": [{"role": "user", "content": "hi 🙂"}]}


def echo(ask: Ask) -> Generator[Piece, None, None]:
    """Tells what it was asked; in two pieces and with its tokens, where those are wanted."""
    asked = ask.messages[-1]["content"]
    if asked == "mine":
        raise UserError("messages", "not understood", "ask otherwise")
    if asked == "fault":
        raise ValueError("a secret of the server")
    try:
        for choice in range(ask.n):
            text = f"{asked} {ask.temperature} {ask.top_p} {ask.max_tokens} {ask.seed} {list(ask.stop)} "
            tokens = () if ask.top is None else (Token(text, -0.5, (("é", -0.25), ("\ufffd", -2.0))[: ask.top]),)
            yield Piece(choice=choice, text=text, tokens=tokens, prompt_tokens=3, completion_tokens=4)
            if asked == "late fault":
                raise ValueError("a secret of the server")
            if asked == "endless":
                yield from (Piece(text="x" * 1000, prompt_tokens=3, completion_tokens=1) for _ in range(50_000))
            finish = "length" if choice else "stop"
            yield Piece(choice=choice, text=str(choice), finish=finish, prompt_tokens=3, completion_tokens=1, score=0.5)
    finally:
        CLOSED.set()


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
    assert [choice.message.content for choice in reply.choices] == ["hi 🙂 0.5 1.0 7 9 [] 0", "hi 🙂 0.5 1.0 7 9 [] 1"]
    assert [choice.finish_reason for choice in reply.choices] == ["stop", "length"]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 10, 13)


def test_defaults_and_the_older_name_of_the_limit(server: Server) -> None:
    content = [choice["message"]["content"] for choice in chat(server, {**GOOD, "max_tokens": 4})[1]["choices"]]
    assert content == ["hi 🙂 1.0 1.0 4 None [] 0"]


def test_fields_that_change_nothing_are_accepted(server: Server) -> None:
    neutral = {"presence_penalty": 0, "logit_bias": None, "response_format": {"type": "text"}, "user": "u", "tools": [], "stop": None}
    assert chat(server, {**GOOD, **neutral})[0] == 200


def test_the_openai_client_is_answered_by_a_stream(server: Server) -> None:
    with openai.OpenAI(base_url=server.address, api_key="any") as client:
        stream = client.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": "hi"}],
            n=2,
            top_p=0.5,
            stop="\n",
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = list(stream)
    assert [(c.choices[0].index, c.choices[0].delta.role, c.choices[0].finish_reason) for c in chunks] == [
        (0, "assistant", None),
        (0, None, "stop"),
        (1, "assistant", None),
        (1, None, "length"),
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:2]) == "hi 1.0 0.5 None None ['\\n'] 0"
    assert not last.choices and last.usage is not None and last.usage.total_tokens == 13
    told = chunks[0].choices[0].logprobs
    assert told is not None and told.content is not None
    assert [(each.token, each.logprob, each.bytes) for each in told.content[0].top_logprobs] == [
        ("é", -0.25, [0xC3, 0xA9]),
        ("\ufffd", -2.0, None),
    ]
    assert chunks[1].choices[0].logprobs is None
    assert getattr(chunks[1].choices[0], "discriminator_score") == 0.5  # noqa: B009 (the client's types do not know it)


def test_a_fault_on_the_way_ends_a_stream_and_a_client_that_goes_closes_it(server: Server) -> None:
    with openai.OpenAI(base_url=server.address, api_key="any") as client:
        with pytest.raises(openai.APIError, match="its log says why"):
            list(client.chat.completions.create(model="any", messages=[{"role": "user", "content": "late fault"}], stream=True))
        CLOSED.clear()
        endless = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "endless"}], n=2, stream=True)
        next(iter(endless))
        assert not CLOSED.is_set()
        endless.close()
        assert CLOSED.wait(10)
    assert chat(server, GOOD)[0] == 200


def test_a_token_is_asked_for_and_others_are_let_in_only_with_one() -> None:
    with Server(echo, model="echo", token="wonderful") as guarded:
        for key, welcome in (("wonderful", True), ("wonderfu", False), ("naïve", False)):
            body = json.dumps(GOOD).encode()
            connection = connect(guarded)
            connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}".encode()})
            response = connection.getresponse()
            assert response.status == (200 if welcome else 401)
            assert "wonderful" not in response.read().decode()
            connection.close()
        assert call(guarded, "GET", "/v1/models")[0] == 401
    with pytest.raises(UserError, match="there is no token"):
        Server(echo, model="echo", host="0.0.0.0")


def status_for(server: Server, name: str, **headers: str) -> int:
    """What a browser gets that was told that `name` is this machine."""
    connection = connect(server)
    connection.request("POST", "/v1/chat/completions", json.dumps(GOOD).encode(), {"Host": name, **headers})
    response = connection.getresponse()
    said = json.loads(response.read())
    connection.close()
    assert ("choices" in said) == (response.status == 200)
    return response.status


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "[::1", "0"]
)
def test_a_foreign_name_that_was_made_to_lead_here_is_refused(server: Server, name: str) -> None:
    assert status_for(server, name) == 421


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost:9", "LOCALHOST"])
def test_this_machine_s_names_are_answered_whatever_the_port(server: Server, name: str) -> None:
    assert status_for(server, name) == 200


def test_where_others_are_let_in_the_token_alone_counts() -> None:
    with Server(echo, model="echo", host="127.1", token="wonderful") as others:  # which is this machine, but not by its usual name
        assert status_for(others, "gadjax.example", Authorization="Bearer wonderful") == 200
        assert status_for(others, "gadjax.example") == 401


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
        ({**GOOD, "stream": "perhaps"}, 400, "stream"),
        ({**GOOD, "top_p": 0}, 400, "top_p"),
        ({**GOOD, "stop": [""]}, 400, "stop string is empty"),
        ({**GOOD, "stop": ["a"] * 5}, 400, "stop"),
        ({**GOOD, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({**GOOD, "presence_penalty": 0.5}, 400, "presence_penalty: is not supported"),
        ({**GOOD, "tools": [{"type": "function"}]}, 400, "tools: is not supported"),
        ({**GOOD, "top_k": 5}, 400, "top_k: is not supported"),
        ({**GOOD, "stream": True, "messages": [{"role": "user", "content": "mine"}]}, 400, "not understood"),
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

    def slow(ask: Ask) -> Generator[Piece, None, None]:
        entered.set()
        go.wait(10)
        yield Piece(text="late", finish="stop", prompt_tokens=1, completion_tokens=1)

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
