"""An OpenAI-compatible endpoint that replies what a test wants, over a real socket."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gadjax.records import Prompt
from gadjax.teachers.config import TeacherConfig

PROMPTS = [Prompt.of(f"question {number}") for number in range(40)]
KEY = "sk-secret-of-these-tests"
Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


class Desk(ThreadingHTTPServer):
    """An endpoint whose every reply is made by a function of the prompt's text and of how often it was asked before."""

    request_queue_size = 256  # a connection that finds no place is reset, and its request counts as lost

    def __init__(self, reply: Callable[[str, int], Reply]):
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
        text, desk = body["messages"][-1]["content"] if "messages" in body else "", self.server
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
def desk(reply: Callable[[str, int], Reply]) -> Iterator[tuple[Desk, TeacherConfig]]:
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


def ok(text: str) -> Reply:
    return 200, {}, good(f"answer to {text}")
