"""Moderation: an endpoint that says of texts whether they are not to be used: of the data, and of what a student says.

with Moderator(config, folder / "moderation.sqlite") as moderator:
    flagged = moderator.flagged(["a text", "another"])        # [False, False]
    complete = moderated(speaker.complete, moderator.flagged)  # says nothing that was not judged before
"""

import hashlib
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Self, cast

import httpx2
from openai import APIError, OpenAI
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from gadjax.completions import Ask, Complete, Piece, Unavailable
from gadjax.errors import UserError
from gadjax.foreign import check_address, check_variable, is_this_machine
from gadjax.section import Section

AT_ONCE = 32  # texts a request
TRIES = 5
SECONDS = 60.0
OPENAI = "https://api.openai.com/v1"
MAX_REPLY = 2**20  # bytes
SENTENCE = re.compile(r"[.!?…]\s|[。！？\n]")  # its end
HELD = 400  # characters that are held back for the end of a sentence, at most
RUN = "run"  # in place of an address: as the run's config says
Flagged = Callable[[Sequence[str]], Sequence[bool]]  # which of the texts are not to be used
SCHEMA = "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, flagged INTEGER NOT NULL) STRICT"


class ModerationConfig(Section):
    """An endpoint with OpenAI's /moderations, whose own is free of charge.

    Attributes:
        model: the moderating model.
        base_url: the endpoint; null is OpenAI's.
        api_key_env: the environment variable that holds the key.
    """

    model: str = "omni-moderation-latest"
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"

    _may_be_sent_to = field_validator("base_url")(partial(check_address, "cleaning.moderation.base_url"))
    _is_no_key = field_validator("api_key_env")(partial(check_variable, "cleaning.moderation.api_key_env"))


class _Verdict(BaseModel):
    model_config = ConfigDict(strict=True)
    flagged: bool


class _Reply(BaseModel):
    model_config = ConfigDict(strict=True)
    results: list[_Verdict]


class Moderator:
    """Asks about every text once: verdicts are kept in a file. May be used by several threads, one after the other.

    Args:
        config: the endpoint.
        path: the file; None keeps them for this object only.

    Raises:
        UserError: there is no key.
    """

    def __init__(self, config: ModerationConfig, path: Path | None = None):
        key = os.environ.get(config.api_key_env, "").strip()
        if not key:
            where = "cleaning.moderation.api_key_env"
            raise UserError(where, f"the environment variable {config.api_key_env} is not set", "export it with the API key")
        self._config, address = config, config.base_url or OPENAI
        http_client = httpx2.Client(
            timeout=SECONDS,
            follow_redirects=False,  # it would send the texts to another host
            trust_env=not is_this_machine(address),
            headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [_guard]},
        )
        self._client = OpenAI(api_key=key, base_url=address, max_retries=TRIES, http_client=http_client)  # a text may be asked about twice
        self._db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
        self._db.execute(SCHEMA)
        self._alone = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._db.close()

    def flagged(self, texts: Sequence[str]) -> list[bool]:
        """Which of the texts are not to be used.

        Raises:
            Unavailable: the endpoint does not answer. What it answered before is kept.
        """
        with self._alone:
            return self._flagged(texts)

    def _flagged(self, texts: Sequence[str]) -> list[bool]:
        keys = {text: hashlib.sha256(f"{self._config.model}\0{text}".encode(errors="replace")).digest() for text in texts}
        unknown = [text for text, key in keys.items() if self._known(key) is None]
        for chunk in _chunks(unknown):
            verdicts = self._ask(chunk)
            rows = [(keys[text], verdict) for text, verdict in zip(chunk, verdicts, strict=True)]
            self._db.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", rows)
        return [bool(self._known(keys[text])) for text in texts]

    def _known(self, key: bytes) -> int | None:
        row = self._db.execute("SELECT flagged FROM verdicts WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def _ask(self, texts: Sequence[str]) -> list[bool]:
        try:
            body = {"model": self._config.model, "input": list(texts)}
            reply = self._client.post("/moderations", cast_to=httpx2.Response, body=body)
            results = _Reply.model_validate_json(reply.content).results
        except (APIError, ValidationError) as error:
            what = f"the endpoint does not answer ({type(error).__name__})"
            raise Unavailable("cleaning.moderation", what, "run the same command again, or leave it out") from error
        if len(results) != len(texts):
            what = f"the endpoint gave {len(results)} verdicts on {len(texts)} texts"
            raise Unavailable("cleaning.moderation", what, "name an endpoint that serves OpenAI's /moderations")
        return [result.flagged for result in results]


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE))


def _guard(response: httpx2.Response) -> None:
    """Looks at a reply before its body is read."""
    response.stream = _Capped(cast(httpx2.SyncByteStream, response.stream))


class _Capped(httpx2.SyncByteStream):
    """A reply's bytes, as long as they are not too many."""

    def __init__(self, stream: httpx2.SyncByteStream):
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self._stream:
            size += len(chunk)
            if size > MAX_REPLY:
                raise Unavailable("cleaning.moderation", f"the endpoint's reply has more than {MAX_REPLY} bytes", "name another one")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def moderation_of(own: ModerationConfig | None, address: str) -> ModerationConfig:
    """Whom to ask about what a student says.

    Args:
        own: the section `cleaning.moderation` of the run.
        address: `run` for that, or the address of another endpoint, which is asked with the rest of the section.

    Raises:
        UserError: the run has no such section, or the address is none to send texts to.
    """
    if address != RUN:
        return ModerationConfig(**(own or ModerationConfig()).model_dump() | {"base_url": address})
    if own is None:
        raise UserError("--moderation", "the run's config has no `cleaning.moderation`", "give the address of an endpoint")
    return own


def moderated(complete: Complete, flagged: Flagged) -> Complete:
    """`complete`, none of whose text is given before it was judged.

    An answer comes sentence by sentence, each when all of the answer up to its end has passed. One that is flagged ends there, with
    `content_filter`; what had passed before was given already. Where the endpoint does not answer, nothing is given.
    """

    def checked(ask: Ask) -> Generator[Piece, None, None]:
        held = dict[int, list[Piece]]()
        given, over = dict[int, str](), set[int]()
        with closing(complete(ask)) as pieces:
            for piece in pieces:
                choice = piece.choice
                if choice in over:
                    continue
                waiting = [*held.pop(choice, []), piece]
                text = "".join(each.text for each in waiting)
                if not (piece.finish or SENTENCE.search(text) or len(text) > HELD):
                    held[choice] = waiting
                    continue
                said = given.get(choice, "") + text
                if text.strip() and flagged([said])[0]:
                    cost = sum(each.completion_tokens for each in waiting)
                    yield Piece(choice=choice, text="", finish="content_filter", prompt_tokens=piece.prompt_tokens, completion_tokens=cost)
                else:
                    given[choice] = said
                    yield from waiting
                    if not piece.finish:
                        continue
                over.add(choice)
                if len(over) == ask.n:
                    return

    return checked
