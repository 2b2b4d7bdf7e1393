"""An OpenAI-compatible HTTP server over a function that completes conversations.

POST /v1/chat/completions, streaming or not, and GET /v1/models; every error has OpenAI's shape. It listens on this machine only,
unless it is given a host and the token that clients must show; and there it answers to this machine's own names only, so that no site
whose name was made to lead here can have a browser talk to it.
"""

import hmac
import itertools
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from gadjax.completions import Complete, Piece, Unavailable, read_request, stream, whole
from gadjax.errors import UserError

HOST = "127.0.0.1"
LOOPBACK = (HOST, "localhost")
MAX_BODY = 4 * 2**20  # bytes
FAULT = "the server failed; its log says why"
IDLE_SECONDS = 60.0  # after which a connection that says nothing is closed
log = logging.getLogger(__name__)


class _Refusal(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class _Listener(ThreadingHTTPServer):
    """The threads of the connections, and the end of them all."""

    daemon_threads = False  # server_close waits for them
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], model: str, complete: Complete, max_body: int, token: str | None):
        self.model, self.complete, self.max_body, self.token = model, complete, max_body, token
        self.names = LOOPBACK if address[0] in LOOPBACK else None  # by which it may be asked, if not by any
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

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
        self._answer("/v1/models", self._models)

    def do_POST(self) -> None:
        self._answer("/v1/chat/completions", self._chat)

    def _answer(self, path: str, act: Callable[[], None]) -> None:
        try:
            self._check_name()
            if self.path.partition("?")[0] != path:
                raise _Refusal(HTTPStatus.NOT_FOUND, f"there is no {self.command} {self.path}")
            self._check_token()
            act()
        except _Refusal as refusal:
            self._send(refusal.status, _error(refusal.status, str(refusal)))
        except Unavailable as lack:
            log.error("%r", str(lack))
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, _error(HTTPStatus.SERVICE_UNAVAILABLE, FAULT))
        except UserError as mistake:
            self._send(HTTPStatus.BAD_REQUEST, _error(HTTPStatus.BAD_REQUEST, str(mistake), mistake.where))
        except (ConnectionError, TimeoutError):
            raise  # the client went away
        except Exception:
            log.exception("a request failed")
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, _error(HTTPStatus.INTERNAL_SERVER_ERROR, FAULT))

    def _check_name(self) -> None:
        """Whatever the port, for a tunnel has another one; a client that tells no name is no browser."""
        told = self.headers.get("Host")
        if told is None or self.server.names is None:
            return
        try:
            name = urlsplit(f"//{told}").hostname
        except ValueError:
            name = None
        if name not in self.server.names:
            raise _Refusal(HTTPStatus.MISDIRECTED_REQUEST, "this server has another name; ask it as localhost or 127.0.0.1")

    def _check_token(self) -> None:
        token, shown = self.server.token, self.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            raise _Refusal(HTTPStatus.UNAUTHORIZED, "the API key is not the token of this server")

    def _models(self) -> None:
        model = {"id": self.server.model, "object": "model", "created": 0, "owned_by": "gadjax"}
        self._send(HTTPStatus.OK, {"object": "list", "data": [model]})

    def _chat(self) -> None:
        request = read_request(self._body())
        with closing(self.server.complete(request.ask())) as pieces:
            if request.stream:
                first = next(pieces)  # before the headers: what is wrong with the request is told by its status
                self._send_stream(itertools.chain([first], pieces), request.stream_options.get("include_usage", False))
            else:
                self._send(HTTPStatus.OK, whole(self.server.model, pieces))

    def _send_stream(self, pieces: Iterable[Piece], include_usage: bool) -> None:
        """Server-sent events, each in a chunk of its own. An error on the way is the last event."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in stream(self.server.model, pieces, include_usage):
                self._send_chunk(f"data: {json.dumps(event)}\n\n".encode())
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            log.exception("a stream failed")
            self._send_chunk(f"data: {json.dumps(_error(HTTPStatus.INTERNAL_SERVER_ERROR, FAULT))}\n\n".encode())
        self._send_chunk(b"data: [DONE]\n\n")
        self._send_chunk(b"")

    def _send_chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

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


def _error(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}


class Server:
    """Serves `complete` under the name `model` from `start` to `stop`, or within a `with` block.

    Args:
        port: 0 takes a free one; `address` tells which.
        max_body: bytes; a longer request is refused.
        host: where to listen. Whoever can reach it is answered, so that another host than this machine needs a token.
        token: what clients must show as their API key; None asks for none.

    Raises:
        UserError: the address is taken, or open to others without a token.
    """

    def __init__(self, complete: Complete, model: str, port: int = 0, max_body: int = MAX_BODY, host: str = HOST, token: str | None = None):
        if host not in LOOPBACK and not token:
            raise UserError("host", f"{host} can be reached by others, and there is no token", "set one, or leave the host out")
        try:
            self._listener = _Listener((host, port), model, complete, max_body, token)
        except OSError as error:
            raise UserError("port", f"{host}:{port} cannot be listened at ({error.strerror})", "name another port") from error
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.05}, name="gadjax-server")
        self._host = host

    @property
    def address(self) -> str:
        """The base URL for clients."""
        return f"http://{self._host}:{self._listener.server_port}/v1"

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
