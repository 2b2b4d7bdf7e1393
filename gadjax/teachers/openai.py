"""The teacher behind an OpenAI-compatible endpoint.

The client library is used for the protocol only: it retries nothing, follows no redirect and validates no reply. Here a
reply is capped; teachers/replies.py checks and sorts it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Self, cast
from urllib.parse import urlsplit

import httpx2
from openai import APIConnectionError, APIStatusError, AsyncOpenAI

from gadjax.errors import UserError
from gadjax.foreign import is_this_machine
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.config import PRICES, Price, TeacherConfig
from gadjax.teachers.dispatch import Dispatcher, OnProgress, run_to_its_end
from gadjax.teachers.replies import Replies, Retry
from gadjax.teachers.requests import Outcome, Request

MAX_REPLY = 8 * 2**20  # bytes
NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


def collect_from_endpoint(
    requests: Sequence[Request], config: TeacherConfig, cache: TeacherCache, on_progress: OnProgress, key: str | None = None
) -> None:
    """Asks for every request that has no answer or refusal yet.

    Args:
        requests: what is wanted.
        config: the endpoint, and how to ask it.
        cache: where the outcomes go.
        on_progress: called with the number of answers that are there and of those that are wanted.
        key: the API key; else that of the environment variable `config.api_key_env`.

    Raises:
        UserError: the key, the model's price or the endpoint is missing or wrong, or `teacher.max_cost` is reached.
    """
    answered = cache.answered(request.key for request in requests)
    missing = [request for request in requests if request.key not in answered]
    on_progress(len(answered), len(requests))
    if missing:
        endpoint = Endpoint(config, price_of(config), key or api_key(config))
        cache.add(missing)
        run_to_its_end(_ask_all(endpoint, missing, config, cache, on_progress, done=len(answered)))


async def _ask_all(
    endpoint: "Endpoint", missing: Sequence[Request], config: TeacherConfig, cache: TeacherCache, on_progress: OnProgress, done: int
) -> None:
    async with endpoint:
        await Dispatcher(endpoint.ask, endpoint.worst_cost, config, cache, on_progress).run(missing, done)


def has_key(config: TeacherConfig) -> bool:
    """Whether the environment holds the key, if the teacher asks for one."""
    return config.backend != "openai" or bool(os.environ.get(config.api_key_env, "").strip())


def api_key(config: TeacherConfig) -> str:
    """The key that the environment holds."""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError("teacher.api_key_env", f"the environment variable {config.api_key_env} is not set", "export it with the API key")
    if not (key.isascii() and key.isprintable()):
        raise UserError("teacher.api_key_env", f"{config.api_key_env} holds characters that no key has", "set it to the key alone")
    return key


def price_of(config: TeacherConfig) -> Price:
    """The model's price."""
    price = config.price or PRICES.get(config.model)
    if price is None:
        what = f"the price of {config.model} is not known, so max_cost could not be kept"
        raise UserError("teacher.price", what, "write {input: ..., output: ...} in dollars per million tokens (0.0 where it is free)")
    return price


def limit_name(address: str) -> str:
    """What the endpoint calls the longest answer. OpenAI's newer models refuse the older name, other servers ignore the newer one."""
    return "max_completion_tokens" if "openai" in (urlsplit(address).hostname or "") else "max_tokens"


def body_of(request: Request, address: str) -> dict[str, object]:
    """The body of a chat completion request."""
    names = {"max_tokens": limit_name(address)}
    parameters = {names.get(name, name): value for name, value in request.parameters.items()}
    return {"model": request.model, "messages": request.messages, **parameters}


class Endpoint:
    """A client of the endpoint, to be used within `async with`."""

    def __init__(self, config: TeacherConfig, price: Price, key: str):
        self._config, self._key = config, key
        self._replies = Replies(config, price, key)
        self.worst_cost = self._replies.worst_cost
        self._replied = False

    async def __aenter__(self) -> Self:
        config = self._config
        http_client = httpx2.AsyncClient(
            timeout=config.timeout,
            limits=httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
            follow_redirects=False,  # it would send the prompt to another host
            trust_env=not is_this_machine(config.address),  # no proxy lies between a machine and itself
            headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [self._guard]},
        )
        self._client = AsyncOpenAI(api_key=self._key, base_url=config.address, max_retries=0, http_client=http_client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, request: Request) -> Outcome:
        """Sends a request once. Raises Retry where another try may help, UserError where no request can succeed."""
        try:
            async with asyncio.timeout(self._config.timeout):  # the client's own timeout is for each read
                content = await self._post(request)
        except APIStatusError as error:
            return self._replies.sort(error.status_code, error.body, error.response.headers)
        except (APIConnectionError, TimeoutError) as error:
            raise self._sorted_connection(error) from error
        return self._replies.outcome(content, request)

    async def _post(self, request: Request) -> bytes:
        headers = {"Idempotency-Key": request.key}
        body = body_of(request, self._config.address)
        # The raw reply: the library's typed method validates nothing, and takes as long again.
        reply = await self._client.post("/chat/completions", cast_to=httpx2.Response, body=body, options={"headers": headers})
        return reply.content

    async def _guard(self, response: httpx2.Response) -> None:
        """Looks at a reply before its body is read."""
        self._replied = True
        if response.headers.get("Content-Encoding", "identity") != "identity":  # a small reply may unpack to a huge one
            raise Retry("the endpoint replied in an encoding that it was not asked for", billed=response.is_success)
        response.stream = _Capped(cast(httpx2.AsyncByteStream, response.stream), billed=response.is_success)

    def _sorted_connection(self, error: Exception) -> Exception:
        """Another try; or a fault, where no request has ever met the endpoint."""
        reason = self._replies.plain(str(error.__cause__ or error) or "no reply in time")
        if not self._replied and isinstance(error.__cause__, (httpx2.ConnectError, httpx2.ConnectTimeout)):
            return UserError("teacher.base_url", f"{self._config.address} is not reached ({reason})", "check the address and the network")
        return Retry(reason, billed=not isinstance(error.__cause__, NEVER_SENT))


class _Capped(httpx2.AsyncByteStream):
    """A reply's bytes, as long as they are not too many."""

    def __init__(self, stream: httpx2.AsyncByteStream, billed: bool):
        self._stream, self._billed = stream, billed

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_REPLY:
                raise Retry(f"the reply has more than {MAX_REPLY} bytes", billed=self._billed)
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
