"""An OpenAI-compatible HTTP server, on this machine only, over a function that completes conversations.

POST /v1/chat/completions (not streaming) and GET /v1/models; every error has OpenAI's shape.
"""

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, Self

from pydantic import BaseModel, Field, ValidationError

from gadjax.errors import UserError
from gadjax.prompts import checked_messages
from gadjax.records import Message

HOST = "127.0.0.1"
MAX_BODY = 4 * 2**20  # bytes
IDLE_SECONDS = 60.0  # after which a connection that says nothing is closed
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """One response to a conversation.

    Attributes:
        text: what the assistant says.
        truncated: the length limit ended it.
        prompt_tokens, completion_tokens: their numbers of tokens.
    """

    text: str
    truncated: bool
    prompt_tokens: int
    completion_tokens: int


class Complete(Protocol):
    """Completes a conversation `n` times; called from several threads at once. A UserError is told to the client as status 400."""

    def __call__(
        self, messages: Sequence[Message], *, temperature: float, max_tokens: int | None, seed: int | None, n: int
    ) -> Sequence[Completion]: ...


class ChatRequest(BaseModel):
    """The body of a chat completion request, as far as it is understood here; the rest is ignored."""

    messages: list[Any]
    temperature: float = Field(default=1.0, ge=0, le=2)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False


class _Refusal(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class _Listener(ThreadingHTTPServer):
    """The threads of the connections, and the end of them all."""

    daemon_threads = False  # server_close waits for them
    request_queue_size = 256

    def __init__(self, port: int, model: str, complete: Complete, max_body: int):
        self.model, self.complete, self.max_body = model, complete, max_body
        self._connections: set[socket.socket] = set()
        super().__init__((HOST, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Ends the connections, so that no thread waits for another request."""
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RD)  # an answer that is under way is still sent
            except OSError:
                pass  # it is closed already

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection broke", exc_info=True)  # the client went away


class _Handler(BaseHTTPRequestHandler):
    server: _Listener  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave in one packet

    def do_GET(self) -> None:
        self._answer({"/v1/models": self._models})

    def do_POST(self) -> None:
        self._answer({"/v1/chat/completions": self._chat})

    def _answer(self, routes: dict[str, Callable[[], dict[str, Any]]]) -> None:
        try:
            route = routes.get(self.path.partition("?")[0])
            if route is None:
                raise _Refusal(HTTPStatus.NOT_FOUND, f"there is no {self.command} {self.path}")
            status, content = HTTPStatus.OK, route()
        except _Refusal as refusal:
            status, content = refusal.status, _error(refusal.status, str(refusal))
        except Exception:
            log.exception("a request failed")
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            content = _error(status, "the server failed; its log says why")
        self._send(status, content)

    def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.server.model, "object": "model", "created": 0, "owned_by": "gadjax"}]}

    def _chat(self) -> dict[str, Any]:
        request = self._request()
        try:
            completions = self.server.complete(
                checked_messages(request.messages, "messages"),
                temperature=request.temperature,
                max_tokens=request.max_completion_tokens or request.max_tokens,
                seed=request.seed,
                n=request.n,
            )
        except UserError as error:
            raise _Refusal(HTTPStatus.BAD_REQUEST, str(error)) from error
        return _reply(self.server.model, completions)

    def _request(self) -> ChatRequest:
        try:
            request = ChatRequest.model_validate(json.loads(self._body()))
        except ValidationError as error:
            wrong = error.errors()[0]
            raise _Refusal(HTTPStatus.BAD_REQUEST, f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error
        except (ValueError, RecursionError) as error:
            raise _Refusal(HTTPStatus.BAD_REQUEST, f"the body is not JSON ({error})") from error
        if request.stream:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "stream: streaming is not offered; leave it out")
        return request

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
        try:
            # Somewhat more than is accepted is read, so that the client comes to read the refusal.
            body = self.rfile.read(min(int(length), 4 * self.server.max_body))
        except TimeoutError as error:
            raise _Refusal(HTTPStatus.REQUEST_TIMEOUT, "the body does not arrive") from error
        if int(length) > self.server.max_body:
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {self.server.max_body} bytes")
        return body

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != HTTPStatus.OK:  # some of the request may be unread: another one cannot follow it
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Replaces the page of HTML that the base class writes."""
        self._send(code, _error(code, message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the base class from writing every request to the terminal."""
        log.debug(format, *args)


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _reply(model: str, completions: Sequence[Completion]) -> dict[str, Any]:
    prompt, completion = completions[0].prompt_tokens, sum(each.completion_tokens for each in completions)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": each.text, "refusal": None},
            "finish_reason": "length" if each.truncated else "stop",
            "logprobs": None,
        }
        for index, each in enumerate(completions)
    ]
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


class Server:
    """Serves `complete` under the name `model` from `start` to `stop`, or within a `with` block.

    Args:
        port: 0 takes a free one; `address` tells which.
        max_body: bytes; a longer request is refused.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, complete: Complete, model: str, port: int = 0, max_body: int = MAX_BODY):
        try:
            self._listener = _Listener(port, model, complete, max_body)
        except OSError as error:
            raise UserError("port", f"{port} cannot be listened at ({error.strerror})", "name another port") from error
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.05}, name="gadjax-server")

    @property
    def address(self) -> str:
        """The base URL for clients."""
        return f"http://{HOST}:{self._listener.server_port}/v1"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the connections and waits for the answers that are under way."""
        self._listener.shutdown()
        self._listener.hang_up()
        self._listener.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
