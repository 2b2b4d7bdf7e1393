"""The teacher behind an OpenAI-compatible endpoint.

The client library is used for the protocol only: it retries nothing, follows no redirect and validates no reply. Here a
reply is capped, checked against a strict schema and sorted: an outcome to keep, a reason to try again (Retry), or a fault
that would meet every request (UserError).
"""

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Self, cast
from urllib.parse import urlsplit

import httpx2
from openai import APIConnectionError, APIStatusError, AsyncOpenAI
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gadjax.errors import UserError
from gadjax.teachers.cache import Outcome, Request, TeacherCache
from gadjax.teachers.config import PRICES, Price, TeacherConfig
from gadjax.teachers.dispatch import Dispatcher, OnProgress, Retry

MAX_REPLY = 8 * 2**20  # bytes
LONGEST_RETRY_AFTER = 300.0  # seconds
FILTERED = ("content_filter", "content_policy_violation")  # codes of a request that the endpoint refuses for its content
TRANSIENT = (408, 409, 425, 429)


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    model_config = ConfigDict(strict=True)
    finish_reason: str
    message: _Message


class _Usage(BaseModel):
    model_config = ConfigDict(strict=True)
    prompt_tokens: int = Field(ge=0, lt=2**31)
    completion_tokens: int = Field(ge=0, lt=2**31)


class _Reply(BaseModel):
    """What is used of a chat completion. (pydantic's JSON parser refuses lone surrogates.)"""

    model_config = ConfigDict(strict=True)
    model: str
    choices: list[_Choice] = Field(min_length=1, max_length=1)
    usage: _Usage | None = None


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
        asyncio.run(_ask_all(endpoint, missing, config, cache, on_progress, done=len(answered)))


async def _ask_all(
    endpoint: "Endpoint", missing: Sequence[Request], config: TeacherConfig, cache: TeacherCache, on_progress: OnProgress, done: int
) -> None:
    async with endpoint:
        await Dispatcher(endpoint.ask, endpoint.worst_cost, config, cache, on_progress).run(missing, done)


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


class Endpoint:
    """A client of the endpoint, to be used within `async with`."""

    def __init__(self, config: TeacherConfig, price: Price, key: str):
        self._config, self._price, self._key = config, price, key
        self._replied = False

    async def __aenter__(self) -> Self:
        config, host = self._config, urlsplit(self._config.address).hostname or ""
        http_client = httpx2.AsyncClient(
            timeout=config.timeout,
            limits=httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
            follow_redirects=False,  # it would send the prompt to another host
            trust_env=host not in ("127.0.0.1", "localhost", "::1"),  # no proxy lies between a machine and itself
            headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [self._guard]},
        )
        self._client = AsyncOpenAI(api_key=self._key, base_url=config.address, max_retries=0, http_client=http_client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    def worst_cost(self, request: Request) -> float:
        """US dollars that a request can cost at most: a token has a byte or more, and a message a few tokens more than its text."""
        prompt_tokens = 16 + sum(16 + len(message["content"].encode()) for message in request.messages)
        return self._price.cost(prompt_tokens, int(request.parameters["max_tokens"]))

    async def ask(self, request: Request) -> Outcome:
        """Sends a request once. Raises Retry where another try may help, UserError where no request can succeed."""
        try:
            async with asyncio.timeout(self._config.timeout):  # the client's own timeout is for each read
                content = await self._post(request)
        except APIStatusError as error:
            return self._sorted_status(error)
        except (APIConnectionError, TimeoutError) as error:
            raise self._sorted_connection(error) from error
        return self._checked(content, request)

    async def _post(self, request: Request) -> bytes:
        names = {"max_tokens": limit_name(self._config.address)}
        parameters = {names.get(name, name): value for name, value in request.parameters.items()}
        body = {"model": request.model, "messages": request.messages, **parameters}
        headers = {"Idempotency-Key": request.key}
        # The raw reply: the library's typed method validates nothing, and takes as long again.
        reply = await self._client.post("/chat/completions", cast_to=httpx2.Response, body=body, options={"headers": headers})
        return reply.content

    async def _guard(self, response: httpx2.Response) -> None:
        """Looks at a reply before its body is read."""
        self._replied = True
        if response.headers.get("Content-Encoding", "identity") != "identity":  # a small reply may unpack to a huge one
            raise Retry("the endpoint replied in an encoding that it was not asked for")
        response.stream = _Capped(cast(httpx2.AsyncByteStream, response.stream))

    def _checked(self, content: bytes, request: Request) -> Outcome:
        """The outcome that a reply of status 200 holds."""
        try:
            reply = _Reply.model_validate_json(content)
        except ValidationError as error:
            wrong = error.errors(include_input=False, include_url=False)[0]
            raise Retry(f"the reply is no chat completion: {'.'.join(map(str, wrong['loc']))} {wrong['msg']}") from error
        choice, usage = reply.choices[0], reply.usage
        refusal = choice.message.refusal or ("the content filter stopped it" if choice.finish_reason == "content_filter" else "")
        text = choice.message.content or ""
        if not refusal and choice.finish_reason not in ("stop", "length"):
            raise Retry(f"the reply ends with {self._plain(choice.finish_reason)}")
        refusal = refusal or ("" if text.strip() else "the answer is empty")
        return Outcome(
            state="refused" if refusal else "ok",
            text=text or choice.message.refusal or "",
            finish_reason=choice.finish_reason,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            cost=self._price.cost(usage.prompt_tokens, usage.completion_tokens) if usage else self.worst_cost(request),
            model=self._plain(reply.model),
            error=self._plain(refusal),
        )

    def _sorted_connection(self, error: Exception) -> Exception:
        """Another try; or a fault, where no request has ever met the endpoint."""
        reason = self._plain(str(error.__cause__ or error) or "no reply in time")
        if not self._replied and isinstance(error.__cause__, (httpx2.ConnectError, httpx2.ConnectTimeout)):
            return UserError("teacher.base_url", f"{self._config.address} is not reached ({reason})", "check the address and the network")
        return Retry(reason)

    def _sorted_status(self, error: APIStatusError) -> Outcome:
        """The outcome, Retry or fault that an error's status and code mean."""
        status, address = error.status_code, self._config.address
        code = next((name for name in (error.code, error.type) if isinstance(name, str)), "")
        reason = self._plain(f"status {status}: {error.message}")
        if status in (401, 403):
            what = f"{address} refuses the key in {self._config.api_key_env} ({reason})"
            raise UserError("teacher.api_key_env", what, "set it to a key that may use the model")
        if "insufficient_quota" in (error.code, error.type):
            raise UserError("teacher.api_key_env", f"the account of {self._config.api_key_env} has no quota left ({reason})", "add credit")
        if status < 400:
            target = self._plain(error.response.headers.get("Location", "elsewhere"))
            raise UserError("teacher.base_url", f"{address} redirects to {target}", "write the address that answers by itself")
        if status == 404:
            what = f"{address} does not know {self._config.model} ({reason})"
            raise UserError("teacher.model", what, "correct it, or teacher.base_url")
        if status in TRANSIENT or status >= 500:
            raise Retry(reason, retry_after(error.response.headers))
        return Outcome("refused" if code in FILTERED else "failed", error=reason)

    def _plain(self, text: str) -> str:
        """Foreign text for a message or a column: short, printable, without the key."""
        text = text.replace(self._key, "[key]").encode(errors="replace").decode()
        return " ".join(text.split())[:300]


class _Capped(httpx2.AsyncByteStream):
    """A reply's bytes, as long as they are not too many."""

    def __init__(self, stream: httpx2.AsyncByteStream):
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_REPLY:
                raise Retry(f"the reply has more than {MAX_REPLY} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds of a Retry-After header, which names seconds or a date; 0 where there is none that can be read."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if math.isfinite(seconds) else 0.0
