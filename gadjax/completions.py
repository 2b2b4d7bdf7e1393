"""OpenAI's chat completions as data: a request read and checked, an answer written whole or as a stream of pieces."""

import json
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gadjax.errors import UserError
from gadjax.prompts import checked_messages
from gadjax.records import Message

Finish = Literal["stop", "length", "content_filter"]


class Unavailable(UserError):
    """What an answer needs of others is not there at the moment; a client is told so by status 503."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a client wants.

    Attributes:
        messages: the conversation, which ends with the user's turn.
        temperature: 0 takes the likeliest token.
        top_p: the share of the mass that is drawn from.
        max_tokens: of an answer; None: as many as there is room for.
        seed: the same one gives the same answers; None: drawn.
        n: answers.
        stop: an answer ends before the first of these.
        top: how many of the likeliest tokens are told beside each; None: no log-probabilities are.
    """

    messages: tuple[Message, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    top: int | None = None


@dataclass(frozen=True)
class Token:
    """A token of an answer, its log-probability at temperature 1, and the likeliest ones in its place."""

    text: str
    log_prob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What comes next of one answer.

    Attributes:
        choice: which of the answers, from 0.
        text: what is added to it.
        tokens: those of which the text is, where they were asked for.
        finish: why the answer ends with this piece; None: it goes on.
        prompt_tokens: of the prompt.
        completion_tokens: how many more the answer has cost.
        score: with the last piece, the discriminator's of the answer, where it has one.
    """

    choice: int = 0
    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    prompt_tokens: int
    completion_tokens: int
    score: float | None = None


# Called from several threads at once; a UserError is told to the client as status 400. A client that has gone closes it.
Complete = Callable[[Ask], Generator[Piece, None, None]]


class ChatRequest(BaseModel):
    """The body of a request. What it names and nobody heeds is refused, so that no client believes in it."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Any]
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    n: int = Field(default=1, ge=1, le=128)
    stop: list[str] = Field(default=[], max_length=4)
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] = {}
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: list[str]) -> list[str]:
        if all(stop):
            return stop
        raise ValueError("a stop string is empty")

    def ask(self) -> Ask:
        """What is wanted. Raises UserError where the messages are no conversation."""
        return Ask(
            messages=tuple(checked_messages(self.messages, "messages")),
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            seed=self.seed,
            n=self.n,
            stop=tuple(self.stop),
            top=self.top_logprobs if self.logprobs else None,
        )


IGNORED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")  # they change no answer
NEUTRAL = {  # and these do not with these values
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "functions": [],
}


def read_request(body: bytes) -> ChatRequest:
    """A request from its body.

    Raises:
        UserError: it is not JSON, or asks for what is not offered; names the field.
    """
    try:
        values = json.loads(body)
        if isinstance(values, dict):  # null is OpenAI's word for a default
            values = {
                name: value
                for name, value in values.items()
                if value is not None and name not in IGNORED and not (name in NEUTRAL and value == NEUTRAL[name])
            }
        return ChatRequest.model_validate(values)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        name = ".".join(map(str, wrong["loc"])) or "body"
        said = "is not supported here" if wrong["type"] == "extra_forbidden" else wrong["msg"]
        raise UserError(name, said, "leave it out" if wrong["type"] == "extra_forbidden" else "correct it") from error
    except (ValueError, RecursionError) as error:
        raise UserError("body", f"is not JSON ({error})", "send JSON") from error


def whole(model: str, pieces: Iterable[Piece]) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.choice, []).append(piece)
    choices = []
    for index, parts in sorted(found.items()):
        message = {"role": "assistant", "content": "".join(part.text for part in parts), "refusal": None}
        tokens = [token for part in parts for token in part.tokens]
        choices.append(_choice(index, {"message": message}, tokens, parts[-1]))
    every = [part for parts in found.values() for part in parts]
    return _head(model, "chat.completion") | {"choices": choices, "usage": _usage(every)}


def stream(model: str, pieces: Iterable[Piece], include_usage: bool) -> Iterator[dict[str, Any]]:
    """The objects of a stream, one after the other."""
    head, begun, every = _head(model, "chat.completion.chunk"), set[int](), list[Piece]()
    for piece in pieces:
        delta = {"content": piece.text} if piece.choice in begun else {"role": "assistant", "content": piece.text}
        begun.add(piece.choice)
        every.append(piece)
        yield (
            head | {"choices": [_choice(piece.choice, {"delta": delta}, piece.tokens, piece)]} | ({"usage": None} if include_usage else {})
        )
    if include_usage:
        yield head | {"choices": [], "usage": _usage(every)}


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _choice(index: int, content: dict[str, Any], tokens: Sequence[Token], last: Piece) -> dict[str, Any]:
    told = {"content": [_token(token) for token in tokens], "refusal": None} if tokens else None
    score = {} if last.score is None else {"discriminator_score": last.score}
    return {"index": index, **content, "finish_reason": last.finish, "logprobs": told, **score}


def _token(token: Token) -> dict[str, Any]:
    likeliest = [_entry(text, log_prob) for text, log_prob in token.top]
    return _entry(token.text, token.log_prob) | {"top_logprobs": likeliest}


def _entry(text: str, log_prob: float) -> dict[str, Any]:
    """A token; the bytes of one that is a part of a character are not told."""
    return {"token": text, "logprob": log_prob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _usage(pieces: Sequence[Piece]) -> dict[str, int]:
    prompt = pieces[0].prompt_tokens if pieces else 0
    completion = sum(piece.completion_tokens for piece in pieces)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
