"""A request to a teacher, with its name for all time, and what becomes of it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from gadjax.records import Message

VERSION = 1  # of the keys


@dataclass(frozen=True)
class Request:
    """One answer that is wanted of a teacher.

    Attributes:
        provider: who answers; never holds a key or a port.
        model: the model's name there.
        messages: the conversation.
        parameters: every sampling parameter (`temperature`, `max_tokens`, ...).
        sample: 0 for the first answer to the messages, 1 for the second, ...
    """

    provider: str
    model: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, float | int]
    sample: int = 0

    @cached_property
    def json(self) -> str:
        """The request as canonical JSON: equal requests have equal texts."""
        content = {**{field.name: getattr(self, field.name) for field in fields(self)}, "version": VERSION}
        return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)

    @classmethod
    def parse(cls, text: str) -> "Request":
        """The request of its canonical JSON."""
        content = json.loads(text)
        del content["version"]
        return cls(**content | {"messages": tuple(content["messages"])})

    @cached_property
    def key(self) -> str:
        """The SHA-256 of the canonical JSON: the row's primary key."""
        return hashlib.sha256(self.json.encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        state: `ok`, `refused` (the teacher would not answer, which is data too) or `failed` (there was no usable reply).
        text: the answer, or the words of the refusal.
        finish_reason: as replied; `length` marks an answer that the length limit cut off.
        prompt_tokens, completion_tokens: as replied.
        cost: US dollars; the most that it may be where the endpoint does not say.
        model: the model's name as replied.
        error: why it failed or was refused.
    """

    state: Literal["ok", "refused", "failed"]
    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    model: str = ""
    error: str = ""


COLUMNS = tuple(field.name for field in fields(Outcome))
