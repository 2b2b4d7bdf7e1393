"""A server that misbehaves in every way that we could think of: an endpoint for collecting trials. It counts what it answered.

    python -m tests.hostile PORT_FILE SHARE SEED        serves until its standard input ends, then prints its counts as JSON

A fault is chosen by lot for each call; a prompt that met enough of them is answered, so that a trial ends with all answers.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

MOST_FAULTS = 3  # of one prompt
SLOW = 5.0  # seconds; longer than the collectors' timeout
Writer = asyncio.StreamWriter
Fault = Callable[[Writer, str], Awaitable[None]]


def completion(text: str, **others: Any) -> bytes:
    """A good reply, or one that `others` spoil."""
    choice = {"index": 0, "message": {"role": "assistant", "content": f"answer to {text}"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
    body = {"id": "1", "object": "chat.completion", "model": "m", "choices": [choice | others.pop("choice", {})], "usage": usage}
    return json.dumps(body | others).encode()


def problem(message: str, code: object = None) -> bytes:
    return json.dumps({"error": {"message": message, "type": "some_error", "param": None, "code": code}}).encode()


def http(content: bytes, status: str = "200 OK", length: int | None = None, **headers: str) -> bytes:
    named = {"Content-Type": "application/json", "Content-Length": str(len(content) if length is None else length)}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in named.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode() + content


def sends(make: Callable[[str], bytes]) -> Fault:
    async def fault(writer: Writer, text: str) -> None:
        writer.write(make(text))
        await writer.drain()

    return fault


def then_closes(make: Callable[[str], bytes]) -> Fault:
    async def fault(writer: Writer, text: str) -> None:
        writer.write(make(text))
        await writer.drain()
        writer.close()

    return fault


async def hangs(writer: Writer, text: str) -> None:
    await asyncio.sleep(SLOW)


async def trickles(writer: Writer, text: str) -> None:
    for byte in http(completion(text)):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(SLOW / 50)


async def hangs_half_way(writer: Writer, text: str) -> None:
    content = http(completion(text))
    writer.write(content[: len(content) // 2])
    await writer.drain()
    await asyncio.sleep(SLOW)


async def resets(writer: Writer, text: str) -> None:
    writer.transport.abort()


def limited(**headers: str) -> Fault:
    return sends(lambda text: http(problem("slow down", "rate_limit_exceeded"), "429 Too Many Requests", None, **headers))


def chunked(text: str) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nno length\r\n"


def bad_message(**fields: Any) -> Fault:
    return sends(lambda text: http(completion(text, choice={"message": {"role": "assistant", "content": text} | fields})))


FAULTS: dict[str, Fault] = {
    "status 408": sends(lambda text: http(problem("slow"), "408 Request Timeout")),
    "status 409": sends(lambda text: http(problem("conflict"), "409 Conflict")),
    "status 500": sends(lambda text: http(problem("oops"), "500 Internal Server Error")),
    "status 500 in HTML": sends(lambda text: http(b"<html>oops</html>", "500 Internal Server Error", Content_Type="text/html")),
    "status 502": sends(lambda text: http(b"", "502 Bad Gateway")),
    "status 503 with nonsense": sends(lambda text: http(b"{", "503 Service Unavailable", Retry_After="soon")),
    "status 529": sends(lambda text: http(problem("overloaded"), "529 Overloaded")),
    "429": limited(),
    "429 for a moment": limited(Retry_After="0.02"),
    "429 in milliseconds": limited(retry_after_ms="20"),
    "429 with a duration": limited(x_ratelimit_reset_requests="20ms", x_ratelimit_remaining_requests="0"),
    "429 with a date": limited(Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "429 with nonsense": limited(Retry_After="-inf"),
    "truncated JSON": sends(lambda text: http(completion(text)[:-9])),
    "HTML": sends(lambda text: http(b"<html>busy</html>", Content_Type="text/html")),
    "nothing": sends(lambda text: http(b"")),
    "null": sends(lambda text: http(b"null")),
    "deep JSON": sends(lambda text: http(b"[" * 100_000)),
    "an error on 200": sends(lambda text: http(problem("overloaded"))),
    "an error of a status on 200": sends(lambda text: http(problem("later", 503))),
    "choices null": sends(lambda text: http(completion(text, choices=None))),
    "no choices": sends(lambda text: http(completion(text, choices=[]))),
    "two choices": sends(lambda text: http(completion(text, choices=json.loads(completion(text))["choices"] * 2))),
    "a list for content": bad_message(content=["x"]),
    "a number for content": bad_message(content=1),
    "a user for a role": bad_message(role="user"),
    "a lone surrogate": sends(lambda text: http(completion(text).replace(b"answer", b"\\ud800"))),
    "no UTF-8": sends(lambda text: http(completion(text).replace(b"answer", b"\xff\xfe"))),
    "an unknown ending": sends(lambda text: http(completion(text, choice={"finish_reason": "tool_calls"}))),
    "no ending": sends(lambda text: http(completion(text, choice={"finish_reason": None}))),
    "negative usage": sends(lambda text: http(completion(text, usage={"prompt_tokens": -1, "completion_tokens": 1}))),
    "usage that is not a number": sends(lambda text: http(completion(text, usage={"prompt_tokens": "1", "completion_tokens": 1}))),
    "infinite usage": sends(lambda text: http(completion(text).replace(b'"prompt_tokens": 10', b'"prompt_tokens": 1e999'))),
    "a packed reply": sends(lambda text: http(completion(text), Content_Encoding="gzip")),
    "a huge reply": sends(lambda text: http(completion("x" * 9_000_000))),
    "a reply that breaks off": then_closes(lambda text: http(completion(text), length=99_999)),
    "no length and broken off": then_closes(lambda text: http(completion(text)[:40], Content_Length="")),
    "a chunk without a length": then_closes(chunked),
    "no HTTP": then_closes(lambda text: b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a header without an end": then_closes(lambda text: b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000),
    "closed without a reply": then_closes(lambda text: b""),
    "a reset": resets,
    "silence": hangs,
    "a trickle": trickles,
    "silence half way": hangs_half_way,
}
SLOW_ONES = {"silence", "a trickle", "silence half way"}


class Hostile:
    """The endpoint.

    Args:
        share: of the calls that meet a fault.
        seed: of the lots.
        latency: seconds that an answer takes.
    """

    def __init__(self, share: float, seed: int, latency: float = 0.02):
        self.share, self.latency, self._rng = share, latency, random.Random(seed)
        self.good, self.met, self.kinds = Counter[str](), Counter[str](), Counter[str]()
        # Slow faults hold a worker until its timeout: they are rarer, so that a trial ends.
        self._names, self._weights = list(FAULTS), [0.1 if name in SLOW_ONES else 1.0 for name in FAULTS]

    async def serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        try:
            while not writer.is_closing() and (head := await reader.readuntil(b"\r\n\r\n")):
                (length,) = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
                body = json.loads(await reader.readexactly(length))
                await self._answer(writer, body["messages"][-1]["content"])
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, TimeoutError):
            pass  # collectors hang up, and are killed
        finally:
            writer.close()

    async def _answer(self, writer: Writer, text: str) -> None:
        if self._rng.random() < self.share and self.met[text] < MOST_FAULTS:
            (name,) = self._rng.choices(self._names, self._weights)
            self.met[text] += 1
            self.kinds[name] += 1
            await FAULTS[name](writer, text)
            return
        await asyncio.sleep(self.latency * self._rng.uniform(0.5, 1.5))
        self.good[text] += 1
        writer.write(http(completion(text)))
        await writer.drain()

    def counts(self) -> dict[str, Any]:
        return {
            "answered": len(self.good),
            "paid twice": self.good.total() - len(self.good),
            "faults": self.kinds.total(),
            "kinds": len(self.kinds),
        }


async def _main(port_file: Path, share: float, seed: int) -> None:
    hostile = Hostile(share, seed)
    server = await asyncio.start_server(hostile.serve, "127.0.0.1", 0, limit=2**20, backlog=512)
    port_file.write_text(str(server.sockets[0].getsockname()[1]))
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(hostile.counts()), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
