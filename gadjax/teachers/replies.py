"""What an endpoint replied, checked and sorted: an outcome to keep, a reason to try again (Retry), or a fault that would meet
every request (UserError). The client library validates nothing of it.
"""

import json
import math
import re
import time
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gadjax.errors import UserError
from gadjax.teachers.config import Price, TeacherConfig
from gadjax.teachers.requests import Outcome, Request

LONGEST_RETRY_AFTER = 300.0  # seconds
FILTERED = ("content_filter", "content_policy_violation", "invalid_prompt")  # codes of a request that is refused for its content
SHORTEST_KEY = 16  # characters
TRANSIENT = (408, 409, 425, 429)
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated", "insufficient_balance")
BAD_KEY = ("invalid_api_key", "invalid_authentication", "authentication_error", "permission_error")
BAD_SETTING = ("unsupported_parameter", "unsupported_value", "model_not_found")  # codes of what every request has alike
UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhd]))+")
AGAIN = re.compile(rf'(?:try again in |"retryDelay": ?")({DURATION.pattern})')


class Retry(Exception):
    """A request may succeed when it is sent again.

    Args:
        reason: why it did not.
        wait: seconds for which the endpoint wants no request, where it says so.
        limited: the endpoint has nothing against the request but that there are too many.
        billed: the endpoint may have answered, and count it.
    """

    def __init__(self, reason: str, wait: float = 0.0, *, limited: bool = False, billed: bool = False):
        super().__init__(reason)
        self.wait, self.limited, self.billed = wait, limited, billed


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["assistant"] = "assistant"
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


class Replies:
    """Reads the replies of one endpoint.

    Args:
        config: the teacher.
        price: of its tokens.
        key: the API key, which is kept out of every message.
    """

    def __init__(self, config: TeacherConfig, price: Price, key: str):
        self._config, self._price, self._key = config, price, key

    def worst_cost(self, request: Request) -> float:
        """US dollars that a request can cost at most."""
        return self._price.cost(most_prompt_tokens(request), int(request.parameters["max_tokens"]))

    def outcome(self, content: bytes | str, request: Request) -> Outcome:
        """The outcome that a reply of status 200 holds.

        Raises:
            Retry: it is no chat completion, or one that did not end.
            UserError: it is an error that would meet every request.
        """
        try:
            reply = _Reply.model_validate_json(content)
        except ValidationError as error:
            self._check_error(content)
            wrong = error.errors(include_input=False, include_url=False)[0]
            reason = f"the reply is no chat completion: {'.'.join(map(str, wrong['loc']))} {wrong['msg']}"
            raise Retry(self.plain(reason), billed=True) from error
        choice, usage = reply.choices[0], reply.usage
        if choice.finish_reason not in ("stop", "length", "content_filter"):
            raise Retry(f"the reply ends with {self.plain(choice.finish_reason)}", billed=True)
        text = choice.message.content or ""
        filtered = "the content filter stopped it" if choice.finish_reason == "content_filter" else ""
        refusal = choice.message.refusal or filtered or ("" if text.strip() else "the answer is empty")
        # Some servers say `stop` of an answer that has all the tokens that it may have: it was cut, too.
        full = usage is not None and usage.completion_tokens >= request.parameters["max_tokens"]
        return Outcome(
            state="refused" if refusal else "ok",
            text=self._without_key(text or choice.message.refusal or ""),
            finish_reason="length" if full and choice.finish_reason == "stop" else choice.finish_reason,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            cost=self._price.cost(usage.prompt_tokens, usage.completion_tokens) if usage else self.worst_cost(request),
            model=self.plain(reply.model),
            error=self.plain(refusal),
        )

    def _check_error(self, content: bytes | str) -> None:
        """An error that comes with status 200 is sorted by the status that it names."""
        try:
            error = json.loads(content)["error"]
            status = int(error["code"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return
        if 400 <= status < 600:
            self.sort(status, error, {})

    def sort(self, status: int, error: object, headers: Mapping[str, str]) -> Outcome:
        """The outcome of an error's status and body.

        Raises:
            Retry: another try may help.
            UserError: no request can succeed.
        """
        fields: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
        codes = {value for name in ("code", "type") if isinstance(value := fields.get(name), str)}
        message = fields.get("message")
        reason = self.plain(f"status {status}: {message if isinstance(message, str) else error}")
        if codes.intersection(FILTERED):
            return Outcome("refused", error=reason)
        self._check_account(status, codes, reason)
        if status < 400:
            target = self.plain(headers.get("Location", "elsewhere"))
            raise UserError("teacher.base_url", f"{self._config.address} redirects to {target}", "write the address that answers by itself")
        if status == 404 or "model_not_found" in codes:
            what = f"{self._config.address} does not know {self._config.model} ({reason})"
            raise UserError("teacher.model", what, "correct it, or teacher.base_url")
        if status == 400 and codes.intersection(BAD_SETTING):
            field = fields.get("param") if fields.get("param") in ("temperature", "max_tokens") else "model"
            raise UserError(f"teacher.{field}", f"{self._config.model} does not take it ({reason})", "give it a value that the model takes")
        if status in TRANSIENT or status >= 500:
            raise Retry(reason, retry_after(headers, json.dumps(error)), limited=status == 429)
        return Outcome("failed", error=reason)

    def _check_account(self, status: int, codes: set[str], reason: str) -> None:
        """Raises where the key or its account is not good for any request."""
        variable = self._config.api_key_env
        if status == 402 or codes.intersection(NO_MONEY):
            raise UserError("teacher.api_key_env", f"the account of {variable} has no quota left ({reason})", "add credit")
        if status in (401, 403) or codes.intersection(BAD_KEY):
            what = f"{self._config.address} refuses the key in {variable} ({reason})"
            raise UserError("teacher.api_key_env", what, "set it to a key that may use the model")

    def _without_key(self, text: str) -> str:
        """An answer, of which a student may learn: an endpoint that writes the key into it gives it away. (Words are no keys.)"""
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_KEY else text

    def plain(self, text: str) -> str:
        """Foreign text for a message or a column: short, printable, without the key."""
        text = text.replace(self._key, "[key]").encode(errors="replace").decode()
        return " ".join("".join(each if each.isprintable() else " " for each in text[:1000]).split())[:300]


def most_prompt_tokens(request: Request) -> int:
    """More than a prompt has: a token has a byte or more, and a message a few tokens more than its text."""
    return 16 + sum(16 + len(message["content"].encode()) for message in request.messages)


def retry_after(headers: Mapping[str, str], body: str = "") -> float:
    """The seconds for which an endpoint wants no more requests; 0 where nothing that can be read says so.

    Read, the first that is there: `Retry-After-Ms`; `Retry-After` as seconds or a date; the `...ratelimit...reset...` headers, as
    durations (`6m0s`), seconds, Unix times or ISO dates, the latest of those whose limit is used up; the words of the error
    ("try again in 20s").
    """
    names = {name.lower(): value for name, value in headers.items()}
    told = _seconds(names.get("retry-after-ms", ""), 1e-3)
    if told is None:
        told = _seconds(names.get("retry-after", ""))
    if told is None:
        resets = [name for name in names if "ratelimit" in name and "reset" in name]
        used_up = [name for name in resets if names.get(name.replace("reset", "remaining"), "").strip() in ("0", "")]
        told = max((seconds for name in used_up or resets if (seconds := _seconds(names[name])) is not None), default=None)
    if told is None:
        said = AGAIN.search(body)
        told = _seconds(said[1]) if said else None
    return min(max(told or 0.0, 0.0), LONGEST_RETRY_AFTER)


def _seconds(value: str, unit: float = 1.0) -> float | None:
    """The seconds until what a header names: a number of units, a duration, a Unix time (in s or ms) or a date."""
    value = value.strip()
    try:
        number = float(value)
    except ValueError:
        return _until(value)
    if not math.isfinite(number):
        return None
    if number < 1e9:
        return number * unit
    return (number / 1e3 if number > 1e12 else number) - time.time()


def _until(value: str) -> float | None:
    if DURATION.fullmatch(value):
        return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd])", value))
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            return parse(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            continue
    return None
