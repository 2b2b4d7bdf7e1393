"""The teacher behind OpenAI's Batch API: the same requests, answered within a day, for half the price.

    begun in the cache --upload, create--> running --poll--> completed | expired | cancelled | failed --read--> forgotten

What is on its way is written down before it is sent: a batch carries a token, by which one whose creation was not seen to succeed
is found again. Its rows are leased to the token, so nothing asks for them elsewhere. Whatever a batch ends with, what it
finished is kept, and what it did not is asked for again.
"""

import fcntl
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
from openai import APIConnectionError, APIError, APIStatusError, OpenAI
from pydantic import BaseModel, ConfigDict, ValidationError

from gadjax.errors import UserError
from gadjax.foreign import is_this_machine
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.config import Price, TeacherConfig
from gadjax.teachers.dispatch import LONGEST_WAIT, OnProgress
from gadjax.teachers.openai import MAX_REPLY, api_key, body_of, price_of
from gadjax.teachers.replies import Replies, Retry
from gadjax.teachers.requests import Outcome, Request

ENDED = ("completed", "expired", "cancelled", "failed")
KEPT_SECONDS = 30 * 86400.0  # for which results can be fetched
MAX_FILE = 100 * 2**20  # bytes; OpenAI takes 200 MB
CHUNK = 1000  # outcomes a transaction
HALF = 0.5
Result = TypeVar("Result")


def collect_in_batches(
    requests: Sequence[Request], config: TeacherConfig, cache: TeacherCache, on_progress: OnProgress, key: str | None = None
) -> None:
    """Asks for every request that has no answer or refusal yet, in batches, and waits for them. Takes up batches that are under way.

    It may be interrupted at any point: batches go on, and the next call reads them.

    Args:
        requests: what is wanted.
        config: the endpoint, and how to ask it; `config.batch` is set.
        cache: where the outcomes go.
        on_progress: called with the number of answers that are there and of those that are wanted.
        key: the API key; else that of the environment variable `config.api_key_env`.

    Raises:
        UserError: the endpoint cannot be asked, refuses a batch, or `teacher.max_cost` is reached; or another process does the same.
    """
    if len(cache.answered(request.key for request in requests)) == len(requests) and not cache.open_batches(config.provider):
        on_progress(len(requests), len(requests))
        return
    with _alone(cache), _client(config, key := key or api_key(config)) as client:
        _Batches(client, config, cache, key, on_progress, requests).run()


def batch_price(price: Price) -> Price:
    """What a batch's tokens cost."""
    return Price(input=HALF * price.input, output=HALF * price.output)


@contextmanager
def _alone(cache: TeacherCache) -> Iterator[None]:
    """One process at a time submits and reads batches."""
    with cache.path.with_name(f".{cache.path.name}.batches").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(str(cache.path), "another process collects its batches", "wait until it has ended") from error
        yield


def _client(config: TeacherConfig, key: str) -> OpenAI:
    local = is_this_machine(config.address)
    http_client = httpx2.Client(timeout=config.timeout, follow_redirects=False, trust_env=not local)
    return OpenAI(api_key=key, base_url=config.address, max_retries=0, http_client=http_client)


class _Errors(BaseModel):
    model_config = ConfigDict(strict=True)
    data: list[dict[str, Any]] | None = None


class _Batch(BaseModel):
    """What is used of a batch."""

    model_config = ConfigDict(strict=True)
    id: str
    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    metadata: dict[str, str] | None = None
    errors: _Errors | None = None

    @classmethod
    def of(cls, reply: object) -> "_Batch":
        """The batch of a reply that the client library has not checked."""
        try:
            return cls.model_validate(reply.model_dump() if isinstance(reply, BaseModel) else reply)
        except ValidationError as error:
            raise Retry("the reply is no batch") from error


class _Batches:
    """The work of one call of `collect_in_batches`."""

    def __init__(
        self, client: OpenAI, config: TeacherConfig, cache: TeacherCache, key: str, on_progress: OnProgress, requests: Sequence[Request]
    ):
        if config.batch is None:
            raise ValueError("the config asks for no batches")
        self._client, self._config, self._batch, self._cache, self._on_progress = client, config, config.batch, cache, on_progress
        self._replies = Replies(config, batch_price(price_of(config)), key)
        self._requests = {request.key: request for request in requests}
        self._tries = Counter[str]()
        self._fault: UserError | None = None

    def run(self) -> None:
        self._find_lost()
        self._advance()
        self._cache.add(self._open())
        while self._cache.open_batches(self._config.provider) or (self._open() and self._fault is None):
            if self._fault is None:
                self._submit()
            ended = [self._read(token, batch) for token, batch in self._cache.open_batches(self._config.provider)]
            self._advance()
            if ended and not any(ended):
                time.sleep(self._batch.poll_seconds)
        if self._fault:
            raise self._fault

    def _open(self) -> list[Request]:
        """What has no outcome and no more tries to lose."""
        answered = self._cache.answered(self._requests)
        return [each for key, each in self._requests.items() if key not in answered and self._tries[key] < self._config.tries]

    def _advance(self) -> None:
        self._on_progress(len(self._cache.answered(self._requests)), len(self._requests))

    # --- sending -----------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        """Everything that is open, in as many batches as it takes and the money allows."""
        for chunk in self._chunks(self._open()):
            token = uuid.uuid4().hex
            self._cache.begin_batch(token, self._config.provider)
            costs = {request.key: self._replies.worst_cost(request) for request in chunk}
            lease = self._cache.lease(costs, self._config.max_cost, owner=token, seconds=KEPT_SECONDS)
            if lease.taken:
                self._send(token, [request for request in chunk if request.key in lease.taken])
            else:
                self._cache.end_batch(token)
            if lease.dear and not lease.reserved:
                spent = f"{self._cache.cost():.2f} of {self._config.max_cost:.2f} dollars are spent and the next answer might exceed them"
                mend = "raise it and run the same command again: what is collected is kept"
                self._fault = self._fault or UserError("teacher.max_cost", spent, mend)

    def _chunks(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        chunk, size = list[Request](), 0
        for request in requests:
            length = len(self._line(request))
            if chunk and (len(chunk) == self._batch.requests or size + length > MAX_FILE):
                yield chunk
                chunk, size = [], 0
            chunk.append(request)
            size += length
        if chunk:
            yield chunk

    def _line(self, request: Request) -> bytes:
        body = body_of(request, self._config.address)
        return json.dumps({"custom_id": request.key, "method": "POST", "url": "/v1/chat/completions", "body": body}).encode() + b"\n"

    def _send(self, token: str, requests: Sequence[Request]) -> None:
        content = b"".join(map(self._line, requests))
        try:
            file = self._call(lambda: self._client.files.create(file=(f"{token}.jsonl", content), purpose="batch"))
            self._cache.name_batch(token, self._call(lambda: self._found(token) or self._created(token, str(file.id))).id)
        except UserError:
            if not self._call(lambda: [self._found(token)])[0]:
                self._cache.end_batch(token)
            raise

    def _created(self, token: str, file: str) -> _Batch:
        made = self._client.batches.create(
            input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h", metadata={"gadjax": token}
        )
        return _Batch.of(made)

    def _found(self, token: str) -> _Batch | None:
        """The batch of a token, among those that the endpoint has."""
        made = (_Batch.of(each) for each in self._client.batches.list(limit=100))
        return next((batch for batch in made if (batch.metadata or {}).get("gadjax") == token), None)

    def _find_lost(self) -> None:
        """Batches whose creation was interrupted are named, or forgotten where they were not made."""
        for token, batch in self._cache.open_batches(self._config.provider):
            if not batch:
                found = self._call(lambda token=token: [self._found(token)])[0]
                if found:
                    self._cache.name_batch(token, found.id)
                else:
                    self._cache.end_batch(token)

    # --- reading -----------------------------------------------------------------------------------------------------

    def _read(self, token: str, name: str) -> bool:
        """Keeps what an ended batch has finished, and frees the rest. False: it goes on."""
        batch = self._call(lambda: _Batch.of(self._client.batches.retrieve(name)))
        if batch.status not in ENDED:
            return False
        wanted = self._cache.in_batch(token)
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            self._call(lambda file=file: self._keep(file, wanted))
        for key in wanted:  # what is left of them
            self._tries[key] += 1
        exhausted = [each for key, each in wanted.items() if self._tries[key] >= self._config.tries]
        self._cache.record((each, Outcome("failed", error=f"batch {batch.status} without it")) for each in exhausted)
        self._cache.end_batch(token)
        if batch.status == "failed":
            said = (batch.errors.data if batch.errors else None) or [{}]
            reason = self._replies.plain(str(said[0].get("message", "no reason given")))
            what = f"the endpoint refuses the batch ({reason})"
            self._fault = self._fault or UserError("teacher.batch", what, "mend it, or leave `batch` out")
        return True

    def _keep(self, file: str, wanted: dict[str, Request]) -> None:
        """Records a file's outcomes, and takes their requests out of `wanted`."""
        with self._client.files.with_streaming_response.content(file) as reply:
            kept = list[tuple[Request, Outcome]]()
            try:
                for line in _lines(reply.iter_bytes()):
                    name, outcome = self._outcome(line, wanted)
                    if outcome:
                        kept.append((wanted.pop(name), outcome))
                        self._tries[name] = self._config.tries  # whatever it is: in this call it is not asked again
                    if len(kept) == CHUNK:
                        self._cache.record(kept)
                        kept = []
            finally:  # also of a reply that breaks off
                self._cache.record(kept)

    def _outcome(self, line: bytes, wanted: dict[str, Request]) -> tuple[str, Outcome | None]:
        """The key and the outcome that a line tells; no outcome where it is to be asked again, or is none of ours."""
        try:
            row = json.loads(line)
            name, reply = row["custom_id"], row.get("response") or {}
            status, body = int(reply.get("status_code") or 0), reply.get("body")
            request = wanted[name]
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return "", None
        try:
            if status == 200:
                return name, self._replies.outcome(json.dumps(body), request)
            error = body.get("error", body) if isinstance(body, dict) else row.get("error")
            return name, self._replies.sort(status if status >= 400 else 503, error, {})
        except Retry:
            return name, None
        except UserError as fault:
            self._fault = self._fault or fault
            return name, None

    def _call(self, call: Callable[[], Result]) -> Result:
        """Calls the endpoint, several times where that may help."""
        reason = ""
        for attempt in range(self._config.tries):
            wait = 0.0
            try:
                return call()
            except APIStatusError as error:
                try:
                    reason = self._replies.sort(error.status_code, error.body, error.response.headers).error
                    raise UserError("teacher.batch", f"the endpoint refuses it ({reason})", "mend it, or leave `batch` out")
                except Retry as retry:
                    reason, wait = str(retry), retry.wait
            except (APIConnectionError, APIError, httpx2.HTTPError, Retry) as error:
                reason = self._replies.plain(str(error.__cause__ or error) or type(error).__name__)
            if attempt + 1 < self._config.tries:
                time.sleep(max(wait, min(self._config.retry_wait * 2**attempt, LONGEST_WAIT)))
        raise UserError("teacher.base_url", f"{self._config.address} does not serve batches ({reason})", "try again later: nothing is lost")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a reply; one that is longer than any answer may be is left out."""
    rest, skips = b"", False
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not skips and line.strip():
                yield line
            skips = False
        if len(rest) > MAX_REPLY:
            rest, skips = b"", True
    if rest.strip() and not skips:
        yield rest
